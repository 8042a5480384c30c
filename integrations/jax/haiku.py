"""Haiku: hears of the Linear modules that run inside of a transformed function."""

from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk

from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, entered


class Haiku(Library):
    """What `hk.transform` returns. Haiku names modules by itself, such as `mlp/~/linear_1`; that name is the path."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            output = next_fun(*args, **kwargs)
            module = context.module
            if not (isinstance(module, hk.Linear) and context.method_name == "__call__"):
                return output
            parameters = {name.rpartition("/")[2]: value for name, value in module.params_dict().items()}
            embeddings = args[0] if args else kwargs["inputs"]
            return session.linear(module.module_name, output, embeddings, parameters["w"], parameters.get("b"))

        with entered(session), hk.intercept_methods(intercept):
            return fun(*args, **kwargs)
