"""Keras 3 on its JAX backend: intercepts the linear layers of the watched model, as `nnx` does.

The loss runs `model.stateless_call`; a layer's activation is applied after the probe.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import keras
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.contractions import run_einsum, run_pointwise_convolution
from gwa_logging.integrations.jax.model_library import ModelLibrary, substituted_classes
from gwa_logging.integrations.jax.sessions import Layer, Session, current_session, session_entered

_LINEAR = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


@cache
def _intercepted(kind: Any) -> type:
    """A subclass of a linear layer that calls the session."""

    def call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Any:
        session = current_session()
        activation = self.activation
        if session is None:
            return kind.call(self, inputs, *args, **kwargs)

        def layer(inputs: Array) -> Array:
            object.__setattr__(self, "activation", None)
            try:
                return kind.call(self, inputs, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                object.__setattr__(self, "activation", activation)

        logits = _run_layer(session, self, layer, inputs)
        return logits if activation is None else activation(logits)

    call.__signature__ = signature(kind.call)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"call": call})


def _run_layer(session: Session, layer: Any, call: Layer, inputs: Array) -> Array:
    """Runs a layer, without its activation, through a session."""
    if layer.quantization_mode is not None:
        return session.unsupported(layer.path, call(inputs), "its weight is packed or quantised, which is not read")
    weight, bias = (None if v is None else keras.ops.convert_to_tensor(v) for v in (layer.kernel, layer.bias))
    assert weight is not None
    if isinstance(layer, keras.layers.EinsumDense):
        return run_einsum(session, layer.path, call, inputs, weight, bias, layer.equation)
    if isinstance(layer, keras.layers.Dense):
        return session.run_linear(layer.path, call, inputs, weight, bias)
    if weight.size != math.prod(weight.shape[-2:]):
        return call(inputs)
    first = 1 if layer.data_format == "channels_last" else 2
    spatial = range(first, first + weight.ndim - 2)
    return run_pointwise_convolution(session, layer.path, call, inputs, weight, bias, spatial)


class Keras(ModelLibrary):
    """A `keras.Model`, run by the loss through its stateless calls."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.name = model.name
        if keras.backend.backend() != "jax":
            raise InvalidInputError(
                f"model: Keras runs on the {keras.backend.backend()!r} backend, which is not supported; set KERAS_BACKEND=jax "
                "or KERAS_BACKEND=torch before keras is imported"
            )

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        variables = {v.path: v.shape for v in self.model.trainable_variables}
        layers = [layer for layer in self.model._flatten_layers() if isinstance(layer, _LINEAR)]
        with session_entered(session), substituted_classes(layers, _intercepted):
            for value in args:  # as stateless_call takes them
                if isinstance(value, list) and [getattr(v, "shape", None) for v in value] == list(variables.values()):
                    session.parameters(dict(zip(variables, value, strict=True)))
            return fun(*args, **kwargs)

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return self.model, inputs
