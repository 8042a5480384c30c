"""Notices training steps that pass while the probe sees nothing, in minutes rather than at the end of a long epoch."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

STEPS = 5
"""Optimizer steps without an observation until it is said."""


class Silence:
    """Counts the steps of the optimizers that train a model, until the first observation."""

    def __init__(self, model: nn.Module, said: Callable[[int], None]) -> None:
        """Calls `said(steps)` once if there are STEPS of them before `heard`."""
        self._model = weakref.ref(model)
        self._said = said
        self._steps = 0
        self._handle: Any = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model = self._model()
        if model is None or self._steps >= STEPS:
            return  # the hook stays until `heard`: PyTorch is going through its hooks, and none may leave meanwhile
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if trained.isdisjoint(map(id, model.parameters())):
            return
        self._steps += 1
        if self._steps == STEPS:
            self._said(self._steps)

    def heard(self) -> None:
        """Ends the count: something was observed, or nobody waits any more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
