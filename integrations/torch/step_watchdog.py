"""Notices optimizer steps without an observation within minutes, rather than at the end of a long epoch."""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

STEPS = 5
"""Steps of one optimizer without an observation until the watchdog looks for the reason. It looks again after 2, 4, 8, ...
times as many steps."""
LATER_STEPS = 8 * STEPS
"""Steps without an observation until they are reported, if there was an observation before."""


class Watched(Protocol):
    """The adapter, as the watchdog sees it."""

    passes: int
    """Number of backward passes observed so far."""

    @property
    def is_paused(self) -> bool:
        """Returns True inside `Monitor.paused`, where no observation is expected."""
        ...

    def check_head(self, steps: int = 0) -> bool:
        """Checks that the head is still at its path. Returns True if another one was found there and is now observed.

        Args:
            steps: optimizer steps of the model since the last observation.
        """
        ...

    def after_step(self) -> None:
        """Called after the first optimizer step since a backward pass was observed. Never raises."""
        ...

    def copies(self) -> list[nn.Module]:
        """Deep copies of the model that still exist."""
        ...

    def on_timeout(self, steps: int) -> None:
        """Called once: `steps` optimizer steps have trained the model, and none was observed."""
        ...

    def on_copy_trained(self, steps: int) -> None:
        """Called once: `steps` optimizer steps have trained a copy of the model while the model was not observed."""
        ...

    def on_error(self, error: Exception) -> None:
        """Called with an error, which must not be raised in the user's optimizer."""
        ...


class StepWatchdog:
    """Counts optimizer steps since the last observation.

    It is called after each step of every optimizer in the process, so it must be fast while the model is observed. Steps are
    counted per optimizer, since a model may have an optimizer per parameter.
    """

    def __init__(self, model: nn.Module, watched: Watched) -> None:
        """Watches until `cancel`. Holds only weak references to the model and the adapter."""
        self._model = weakref.ref(model)
        self._watched: Callable[[], Watched | None] = weakref.ref(watched)
        self._passes = 0
        self._steps = 0
        self._unobserved: dict[int, int] = {}  # optimizer steps since the last observation, by the optimizer's id
        self._reported: set[str] = set()
        _register_hook()
        _watchdogs.append(self)

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer."""
        watched = self._watched()
        if watched is None or watched.is_paused:
            return
        if watched.passes != self._passes:
            self._passes = watched.passes
            self._unobserved.clear()
            self._steps += 1
            watched.after_step()
            if self._steps % STEPS == 0:
                watched.check_head()
            return
        steps = self._unobserved.get(id(optimizer), 0) + 1
        self._unobserved[id(optimizer)] = steps
        doublings, rest = divmod(steps, STEPS)
        if rest == 0 and doublings & (doublings - 1) == 0:
            try:
                self._look_for_the_reason(watched, optimizer, steps)
            except Exception as error:  # noqa: BLE001 - nothing may reach the user's optimizer
                watched.on_error(error)

    def _look_for_the_reason(self, watched: Watched, optimizer: Optimizer, steps: int) -> None:
        trained = self._trained_by(optimizer, watched)
        if watched.check_head(steps if trained == "model" else 0) or trained in self._reported:
            return
        if trained == "copy":
            watched.on_copy_trained(steps)
        elif trained == "model" and steps >= (LATER_STEPS if self._passes else STEPS):
            watched.on_timeout(steps)
        else:
            return
        self._reported.add(trained)

    def _trained_by(self, optimizer: Optimizer, watched: Watched) -> str | None:
        """Returns what an optimizer trains: "model", "copy", or None for anything else."""
        model = self._model()
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if model is not None and not parameters.isdisjoint(map(id, model.parameters())):
            return "model"
        if any(not parameters.isdisjoint(map(id, copy.parameters())) for copy in watched.copies()):
            return "copy"
        return None

    def cancel(self) -> None:
        """Stops watching. May be called at any time, also twice."""
        if self in _watchdogs:
            _watchdogs.remove(self)


_watchdogs: list[StepWatchdog] = []


@cache
def _register_hook() -> None:
    """Registers the one hook of this process, which is never removed.

    A watchdog is cancelled when its model is garbage-collected, which may happen in the middle of an optimizer step. The step
    fails if a hook is removed while it iterates over the hooks.
    """
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watchdog in _watchdogs:
        watchdog.after_step(optimizer)
