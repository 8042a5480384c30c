"""Haiku: intercepts the linear modules that run inside a transformed function."""

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import haiku as hk
import jax
from jax import Array

from gwa_logging.integrations.jax.contractions import pointwise
from gwa_logging.integrations.jax.model_library import Library, named, zeros
from gwa_logging.integrations.jax.probe import Session, entered


class Haiku(Library):
    """What `hk.transform` returns. Haiku names modules by itself, such as `mlp/~/linear_1`; that name is the path."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        is_known = False

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal is_known
            if not is_known:
                is_known = True
                session.parameters(named(hk.get_params()))
            module = context.module
            if context.method_name != "__call__" or not isinstance(module, hk.Linear | hk.ConvND):
                return next_fun(*args, **kwargs)
            inputs, *rest = args or (kwargs.pop("inputs"),)
            parameters = {name.rpartition("/")[2]: value for name, value in module.params_dict().items()}
            weight, bias = parameters["w"], parameters.get("b")

            def layer(inputs: Array) -> Array:
                return next_fun(inputs, *rest, **kwargs)  # type: ignore[no-any-return]

            if isinstance(module, hk.Linear):
                return session.linear(module.module_name, layer, inputs, weight, bias)
            if weight.size != math.prod(weight.shape[-2:]):
                return layer(inputs)
            first = -weight.ndim + (1 if module.channel_index == -1 else 2)
            spatial = range(first, first + weight.ndim - 2)
            return pointwise(session, module.module_name, layer, inputs, weight, bias, spatial)

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
