"""The model's own forward: where one pass of the model begins and ends, however often it calls the head.

It is needed for two questions only: how many rows the head sees for how many inputs, and which calls of the head belong to the
same batch. The first counted eager forward answers both, and unless it has called the head several times, the hooks go
again: in a step of a millisecond they would be noticed. A compiled model keeps them, since there they cost nothing, and
taking them off would compile it again.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.module_patch import ModulePatch, is_tracing, unchecked
from gwa_logging.integrations.torch.tags import Tags


class Forwards:
    """Hooks on the watched model itself, until they are no longer needed."""

    def __init__(self, model: nn.Module, tags: Tags, faults: Faults, *, keeps_samples: bool) -> None:
        self.is_open = True
        self._tags = tags
        self._faults = faults
        self._keeps_samples = keeps_samples
        self._is_compiled = False
        self._is_known = False  # how many rows there are for an input
        self._sizes: tuple[int, ...] = ()
        self._rows = 0
        self._calls = 0
        self._attachment = weakref.ref(ModulePatch(model, before=self._begins, after=self._ends, scripted=self.close))

    def head_called(self, rows: int) -> None:
        """Adds a call of the head in an eager training pass, with its number of rows."""
        self._rows += rows
        self._calls += 1

    def _begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if not is_exporting():
                unchecked(self._begins_compiled)
            return
        if _is_partial(model):
            return
        self._sizes = () if self._is_known else batch_sizes(args, kwargs)
        self._rows = self._calls = 0
        self._tags.begin_forward()

    def _begins_compiled(self) -> None:
        self._is_compiled = True
        if self._keeps_samples:
            self._tags.begin_forward()

    def _ends(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            if self._keeps_samples and not is_exporting():
                unchecked(self._tags.end_forward)
            return
        if _is_partial(model):
            return
        self._tags.end_forward()
        if not self._calls:
            return
        if self._sizes and self._rows > self._sizes[0] and self._rows not in self._sizes:
            self._faults.note(
                f"the head saw {self._rows} rows in one pass of {self._sizes[0]} inputs. Each row with a gradient (a token, a "
                "view, a clip) counts as a sample"
            )
        self._is_known = True
        if not self._is_compiled and not (self._calls > 1 and self._keeps_samples):
            self.close()

    def close(self) -> None:
        """Takes the hooks off."""
        attachment = self._attachment()
        if attachment is not None:
            attachment.remove()
        self.is_open = False


def _is_partial(model: nn.Module) -> bool:
    """Whether this is no pass of a whole batch: DataParallel's replicas run at once, and torch.jit.trace trains nothing."""
    return "_is_replica" in model.__dict__ or is_tracing()


def is_exporting() -> bool:
    """Whether torch.export is tracing. Up to 2.11 the compiler answers `torch.compiler.is_exporting()` with True always."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def batch_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """How many inputs a model is called with; empty if that cannot be known.

    It is the first dimension of the first tensor. Sequences may also have the time first: then the second one is given too.
    A list of tensors is no batch that could be counted: it may be several inputs, or several parts of each.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Mapping):
            value = next((each for each in value.values() if isinstance(each, Tensor)), None)
        if isinstance(value, Tensor) and value.ndim and not value.is_nested:
            is_sequence = value.ndim > 2 or (value.ndim == 2 and not value.is_floating_point())
            return tuple(value.shape[:2]) if is_sequence and value.shape[0] > 1 else (value.shape[0],)
        if not isinstance(value, str | int | float | None):
            break
    return ()
