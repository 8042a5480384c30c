"""Haiku: hears of the Linear modules that run inside of a transformed function."""

from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
from jax import Array

from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, entered


class Haiku(Library):
    """What `hk.transform` returns. Haiku names modules by itself, such as `mlp/~/linear_1`; that name is the path."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if not (isinstance(module, hk.Linear) and context.method_name == "__call__"):
                return next_fun(*args, **kwargs)
            inputs, *rest = args or (kwargs.pop("inputs"),)
            parameters = {name.rpartition("/")[2]: value for name, value in module.params_dict().items()}

            def layer(inputs: Array) -> Array:
                return next_fun(inputs, *rest, **kwargs)  # type: ignore[no-any-return]

            return session.linear(module.module_name, layer, inputs, parameters["w"], parameters.get("b"))

        with entered(session), hk.intercept_methods(intercept):
            return fun(*args, **kwargs)
