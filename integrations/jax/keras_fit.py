"""Keras 3 on its JAX backend: `fit` with scores, for `gwa_logging.integrations.keras`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from gwa_logging.errors import InvalidInputError
from gwa_logging.monitor import Monitor

_SCORES = "gwa_logging scores"
"""The key of the scores in the logs of a train step."""


def watch_fit(model: Any, monitor: Monitor) -> Callable[[], None]:
    """Makes the train step of `fit` return the scores, and updates the monitor with them; returns a function that undoes it.

    Keras jits `model.train_step`. While that is traced, `jax.value_and_grad` is the monitor's, and the step returns the scores
    among its logs.

    Raises:
        InvalidInputError: one step runs several batches, of which Keras keeps only the last one's logs.
    """
    if model.steps_per_execution > 1:
        raise InvalidInputError(
            f"compile(steps_per_execution={model.steps_per_execution}): Keras keeps only what the last of these steps returns; "
            "use 1"
        )
    original = getattr(model.train_step, "original", model.train_step)  # it is watched already if the last fit failed

    def train_step(state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        with _gradients_watched(monitor) as scores:
            logs, state = original(state, data)
        if len(scores) != 1:
            raise InvalidInputError(
                f"{type(model).__name__}.train_step calls jax.value_and_grad {len(scores)} times; to be watched, it must "
                "call it once, by that name"
            )
        return {**logs, _SCORES: scores[0]}, state

    def train_function(state: Any, iterator: Any) -> tuple[dict[str, Any], Any]:
        logs, state = jitted_step(state, iterator)
        monitor.update(logs.pop(_SCORES))
        return logs, state

    def undo() -> None:
        del model.train_step
        model.train_function = None  # the next fit makes a new one

    train_step.original = original  # type: ignore[attr-defined]
    model.train_step = train_step
    model.make_train_function(force=True)
    jitted_step, model.train_function = model.train_function, train_function
    return undo


@contextmanager
def _gradients_watched(monitor: Monitor) -> Iterator[list[Any]]:
    """Replaces `jax.value_and_grad` by the monitor's while a train step is traced; yields the list of its scores."""
    original, scores = jax.value_and_grad, list[Any]()

    def value_and_grad(fun: Callable[..., Any], argnums: Any = 0, has_aux: bool = False, **options: Any) -> Any:
        def differentiated(*args: Any, **kwargs: Any) -> Any:
            jax.value_and_grad = original  # which the monitor calls
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
