"""Notices training steps that pass while the probe sees nothing, in minutes rather than at the end of a long epoch."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

STEPS = 5
"""Steps of one optimizer without an observation until the watchdog looks for the reason; then it looks after 2, 4, 8, ...
times as many."""
LATER_STEPS = 8 * STEPS
"""Steps without an observation until it is reported, if there was one before."""


class Watched(Protocol):
    """The adapter, as the watchdog sees it."""

    passes: int
    """Number of backward passes observed so far."""

    @property
    def is_paused(self) -> bool:
        """Returns True inside `Monitor.paused`, where nothing is to be observed."""
        ...

    def check_head(self, steps: int = 0) -> bool:
        """Checks that the head is still at its path. Returns True if another one was found there and is observed now.

        Args:
            steps: optimizer steps of the model since the last observation.
        """
        ...

    def copies(self) -> list[nn.Module]:
        """Deep copies of the model that still exist."""
        ...

    def silent(self, steps: int) -> None:
        """Called once: `steps` optimizer steps have trained the model, and none was observed."""
        ...

    def copy_trained(self, steps: int) -> None:
        """Called once: `steps` optimizer steps have trained a copy of the model while the model was not observed."""
        ...

    def fault(self, error: Exception) -> None:
        """Called with an error that must not reach the user's optimizer."""
        ...


class StepWatchdog:
    """Counts optimizer steps since the last observation.

    It is called after each step of every optimizer in the process, so while the model is observed it must cost next to
    nothing. Steps are counted for each optimizer by itself: a model may have one for each parameter.
    """

    def __init__(self, model: nn.Module, watched: Watched) -> None:
        """Watches until `close`; keeps neither the model nor the adapter alive."""
        self._model = weakref.ref(model)
        self._watched: Callable[[], Watched | None] = weakref.ref(watched)
        self._passes = 0
        self._steps = 0
        self._unobserved: dict[int, int] = {}  # optimizer steps since the last observation, by the optimizer's id
        self._reported: set[str] = set()
        self._handle: Any = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        watched = self._watched()
        if watched is None or watched.is_paused:
            return  # the hook stays until `close`: PyTorch is going through its hooks, and none may leave meanwhile
        if watched.passes != self._passes:
            self._passes = watched.passes
            self._unobserved.clear()
            self._steps += 1
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
                watched.fault(error)

    def _look_for_the_reason(self, watched: Watched, optimizer: Optimizer, steps: int) -> None:
        trained = self._trained_by(optimizer, watched)
        if watched.check_head(steps if trained == "model" else 0) or trained in self._reported:
            return
        if trained == "copy":
            watched.copy_trained(steps)
        elif trained == "model" and steps >= (LATER_STEPS if self._passes else STEPS):
            watched.silent(steps)
        else:
            return
        self._reported.add(trained)

    def _trained_by(self, optimizer: Optimizer, watched: Watched) -> str | None:
        """What an optimizer trains: "model", "copy", or None for anything else."""
        model = self._model()
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if model is not None and not parameters.isdisjoint(map(id, model.parameters())):
            return "model"
        if any(not parameters.isdisjoint(map(id, copy.parameters())) for copy in watched.copies()):
            return "copy"
        return None

    def close(self) -> None:
        """Takes the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
