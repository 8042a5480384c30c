"""Haiku: hears of the Linear modules that run inside of a transformed function."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import haiku as hk
import jax
from jax import Array

from gwa_logging.integrations.jax.library import Library, zeros
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

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        net, key = self.model, jax.random.key(0)
        shapes = jax.eval_shape(net.init, key, *inputs)
        keys = [key] if "rng" in signature(net.apply).parameters else []  # none after hk.without_apply_rng

        def run(*inputs: Any) -> Any:
            if isinstance(net, hk.TransformedWithState):
                return net.apply(*zeros(shapes), *keys, *inputs)[0]
            return net.apply(zeros(shapes), *keys, *inputs)

        return run, inputs
