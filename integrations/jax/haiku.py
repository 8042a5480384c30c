"""Haiku: intercepts the linear modules that run inside a transformed function."""

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import haiku as hk
import jax
from jax import Array

from gwa_logging.integrations.jax.contractions import run_pointwise_convolution
from gwa_logging.integrations.jax.model_library import ModelLibrary, named_arrays, zeros_of
from gwa_logging.integrations.jax.sessions import Session, session_entered


class Haiku(ModelLibrary):
    """What `hk.transform` returns. The path of a module is its name in Haiku, such as `mlp/~/linear_1`."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        has_parameters = False

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal has_parameters
            if not has_parameters:
                has_parameters = True
                session.parameters(named_arrays(hk.get_params()))
            module = context.module
            if context.method_name != "__call__" or not isinstance(module, hk.Linear | hk.ConvND):
                return next_fun(*args, **kwargs)
            inputs, *rest = args or (kwargs.pop("inputs"),)
            parameters = {name.rpartition("/")[2]: value for name, value in module.params_dict().items()}
            weight, bias = parameters["w"], parameters.get("b")

            def layer(inputs: Array) -> Array:
                return next_fun(inputs, *rest, **kwargs)  # type: ignore[no-any-return]

            if isinstance(module, hk.Linear):
                return session.run_linear(module.module_name, layer, inputs, weight, bias)
            if weight.size != math.prod(weight.shape[-2:]):
                return layer(inputs)
            first = -weight.ndim + (1 if module.channel_index == -1 else 2)
            spatial = range(first, first + weight.ndim - 2)
            return run_pointwise_convolution(session, module.module_name, layer, inputs, weight, bias, spatial)

        with session_entered(session), hk.intercept_methods(intercept):
            return fun(*args, **kwargs)

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        net, key = self.model, jax.random.key(0)
        shapes = jax.eval_shape(net.init, key, *inputs)
        keys = [key] if "rng" in signature(net.apply).parameters else []  # none after hk.without_apply_rng

        def run(*inputs: Any) -> Any:
            if isinstance(net, hk.TransformedWithState):
                return net.apply(*zeros_of(shapes), *keys, *inputs)[0]
            return net.apply(zeros_of(shapes), *keys, *inputs)

        return run, inputs
