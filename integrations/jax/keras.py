"""Keras 3 on its JAX backend: hears of the Dense layers of the watched model, as NNX's are heard.

The loss runs `model.stateless_call`; a layer's activation is applied after the probe.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, current, entered


class _Heard(keras.layers.Dense):  # type: ignore[misc]  # keras comes without types
    """A Dense layer that tells of its calls."""

    def call(self, inputs: Array, training: bool | None = None) -> Any:
        def layer(inputs: Array) -> Any:
            products = keras.ops.matmul(inputs, self.kernel)
            return products if self.bias is None else keras.ops.add(products, self.bias)

        session = current()
        if session is None:
            return super().call(inputs, training=training)
        parameters = (keras.ops.convert_to_tensor(v) for v in (self.kernel, self.bias) if v is not None)
        logits = session.linear(self.path, layer, inputs, next(parameters), next(parameters, None))
        return logits if self.activation is None else self.activation(logits)


class Keras(Library):
    """A `keras.Model`, run by the loss through its stateless calls."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.name = model.name
        if keras.backend.backend() != "jax":
            raise InvalidInputError(
                f"model: a Keras model on the {keras.backend.backend()!r} backend, of which GWA is not taken; set "
                "KERAS_BACKEND=jax before keras is imported"
            )

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with entered(session), _heard(self.model):
            return fun(*args, **kwargs)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return self.model, inputs


@contextmanager
def _heard(model: keras.Model) -> Iterator[None]:
    layers = [layer for layer in model._flatten_layers() if type(layer) is keras.layers.Dense]
    for layer in layers:
        object.__setattr__(layer, "__class__", _Heard)
    try:
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "__class__", keras.layers.Dense)
