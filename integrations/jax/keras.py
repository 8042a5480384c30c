"""Keras 3 on its JAX backend: hears of the Dense layers of the watched model, as NNX's are heard.

The loss runs `model.stateless_call`; a layer's activation is applied after the probe.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import keras
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, current, entered
from gwa_logging.monitor import Monitor


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
                "KERAS_BACKEND=jax or KERAS_BACKEND=torch before keras is imported"
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
