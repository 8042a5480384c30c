"""Keras 3 on its JAX backend: intercepts the linear layers of the watched model, as `nnx` does.

The loss runs `model.stateless_call`; a layer's activation is applied after the probe.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import jax
import keras
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.contractions import Layer, einsum, pointwise
from gwa_logging.integrations.jax.model_library import Library
from gwa_logging.integrations.jax.probe import Session, current, entered
from gwa_logging.monitor import Monitor

_KINDS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


@cache
def _heard_kind(kind: Any) -> type:
    """A subclass of a linear layer that tells of its calls."""

    def call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Any:
        session = current()
        activation = self.activation
        if session is None:
            return kind.call(self, inputs, *args, **kwargs)

        def layer(inputs: Array) -> Array:
            object.__setattr__(self, "activation", None)
            try:
                return kind.call(self, inputs, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                object.__setattr__(self, "activation", activation)

        logits = _run(session, self, layer, inputs)
        return logits if activation is None else activation(logits)

    call.__signature__ = signature(kind.call)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"call": call})


def _run(session: Session, layer: Any, call: Layer, inputs: Array) -> Array:
    """Runs a layer, without its activation, by way of a session."""
    if layer.quantization_mode is not None:
        return session.unfit(layer.path, call(inputs), "its weight is packed or quantised, which is not read")
    weight, bias = (None if v is None else keras.ops.convert_to_tensor(v) for v in (layer.kernel, layer.bias))
    assert weight is not None
    if isinstance(layer, keras.layers.EinsumDense):
        return einsum(session, layer.path, call, inputs, weight, bias, layer.equation)
    if isinstance(layer, keras.layers.Dense):
        return session.linear(layer.path, call, inputs, weight, bias)
    if weight.size != math.prod(weight.shape[-2:]):
        return call(inputs)
    first = 1 if layer.data_format == "channels_last" else 2
    return pointwise(session, layer.path, call, inputs, weight, bias, range(first, first + weight.ndim - 2))


class Keras(Library):
    """A `keras.Model`, run by the loss through its stateless calls."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.name = model.name
        if keras.backend.backend() != "jax":
            raise InvalidInputError(
                f"model: a Keras model on the {keras.backend.backend()!r} backend, of which GWA is not taken; set "
                "KERAS_BACKEND=jax or KERAS_BACKEND=torch before keras is imported"
            )

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        variables = {v.path: v.shape for v in self.model.trainable_variables}
        with entered(session), _heard(self.model):
            for value in args:  # as stateless_call takes them
                if isinstance(value, list) and [getattr(v, "shape", None) for v in value] == list(variables.values()):
                    session.parameters(dict(zip(variables, value, strict=True)))
            return fun(*args, **kwargs)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return self.model, inputs


@contextmanager
def _heard(model: keras.Model) -> Iterator[None]:
    layers: list[tuple[Any, Any]] = [
        (layer, type(layer)) for layer in model._flatten_layers() if isinstance(layer, _KINDS)
    ]
    for layer, kind in layers:
        object.__setattr__(layer, "__class__", _heard_kind(kind))
    try:
        yield
    finally:
        for layer, kind in layers:
            object.__setattr__(layer, "__class__", kind)


# --- fit ----------------------------------------------------------------------------------------------------------------

_SCORES = "gwa_logging scores"


def scored_fit(model: Any, monitor: Monitor) -> Callable[[], None]:
    """Has the train step of `fit` bring out the scores; returns how to undo that.

    Keras jits `model.train_step`: while that is traced, `jax.value_and_grad` is the monitor's, and the scores leave it among
    its logs.

    Raises:
        InvalidInputError: the step runs several batches, of which Keras keeps the logs of the last.
    """
    if model.steps_per_execution > 1:
        raise InvalidInputError(
            f"compile(steps_per_execution={model.steps_per_execution}): Keras keeps what the last of these steps returns; use 1"
        )
    bare = getattr(model.train_step, "bare", model.train_step)  # ours, if the last fit was not ended but broke off

    def train_step(state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        with _differentiated_by(monitor) as scores:
            logs, state = bare(state, data)
        if len(scores) != 1:
            raise InvalidInputError(
                f"{type(model).__name__}.train_step calls jax.value_and_grad {len(scores)} times; to be watched, it must "
                "call it once, by that name"
            )
        return {**logs, _SCORES: scores[0]}, state

    def train_function(state: Any, iterator: Any) -> tuple[dict[str, Any], Any]:
        logs, state = stepping(state, iterator)
        monitor.update(logs.pop(_SCORES))
        return logs, state

    def undo() -> None:
        del model.train_step
        model.train_function = None  # the next fit builds it anew

    train_step.bare = bare  # type: ignore[attr-defined]
    model.train_step = train_step
    model.make_train_function(force=True)
    stepping, model.train_function = model.train_function, train_function
    return undo


@contextmanager
def _differentiated_by(monitor: Monitor) -> Iterator[list[Any]]:
    """While a train step is traced: `jax.value_and_grad` is the monitor's, and its scores are in the list."""
    original, scores = jax.value_and_grad, list[Any]()

    def value_and_grad(fun: Callable[..., Any], argnums: Any = 0, has_aux: bool = False, **options: Any) -> Any:
        def differentiated(*args: Any, **kwargs: Any) -> Any:
            jax.value_and_grad = original  # the monitor takes it itself
            with_scores = monitor.value_and_grad(lambda *a: fun(*a, **kwargs), argnums, has_aux, **options)
            (value, found), grads = with_scores(*args)
            scores.append(found)
            return value, grads

        return differentiated

    jax.value_and_grad = value_and_grad  # type: ignore[assignment]
    try:
        yield scores
    finally:
        jax.value_and_grad = original
