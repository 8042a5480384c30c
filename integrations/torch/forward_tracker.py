"""Tracks where a forward pass of the watched model begins and ends, however often it calls the head.

This answers two questions: how many rows the head sees for how many inputs, and which calls of the head belong to the same
batch. The first counted eager pass answers both. Its hooks are removed afterwards, unless the pass has called the head several
times, since they would be noticeable in a step of a millisecond. A compiled model keeps them: there they cost nothing, and
removing them would compile it again.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.module_patch import ModulePatch, is_tracing, unchecked
from gwa_logging.integrations.torch.tags import Tags
from gwa_logging.integrations.torch.units import note_rows


class ForwardTracker:
    """Hooks on the watched model, removed as soon as they are no longer needed.

    Attributes:
        is_open: False once the hooks are removed.
    """

    def __init__(
        self, model: nn.Module, tags: Tags, faults: Faults, *, keeps_samples: bool, notes_rows: bool = True
    ) -> None:
        """Notes it if there are more rows than inputs, unless `notes_rows` is False."""
        self.is_open = True
        self._notes_rows = notes_rows
        self._tags = tags
        self._faults = faults
        self._keeps_samples = keeps_samples
        self._is_compiled = False
        self._is_known = False  # the number of rows per input
        self._sizes: tuple[int, ...] = ()
        self._rows = 0
        self._calls = 0
        self._is_grouped = False
        self._patch = weakref.ref(
            ModulePatch(model, before=self._before_forward, after=self._after_forward, scripted=self.close)
        )

    def head_called(self, rows: int, *, is_grouped: bool = False) -> None:
        """Counts a call of the head in an eager training pass, and its rows.

        Args:
            rows: number of rows.
            is_grouped: True if an input's rows may be one sample, see `units`.
        """
        self._rows += rows
        self._calls += 1
        self._is_grouped = is_grouped

    def inputs_of(self, rows: int) -> int:
        """The number of inputs of the running pass, if the same number of rows may belong to each of them; else 0."""
        inputs = self._sizes[0] if self._sizes and not self._calls else 0
        return inputs if inputs and rows % inputs == 0 and rows not in self._sizes else 0

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if not is_exporting():
                unchecked(self._before_compiled_forward)
            return
        if _is_partial(model):
            return
        self._sizes = () if self._is_known and not self._is_grouped else batch_sizes(args, kwargs)
        self._rows = self._calls = 0
        self._tags.begin_forward()

    def _before_compiled_forward(self) -> None:
        self._is_compiled = True
        if self._keeps_samples:
            self._tags.begin_forward()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            if self._keeps_samples and not is_exporting():
                unchecked(self._tags.end_forward)
            return
        if _is_partial(model):
            return
        self._tags.end_forward()
        if not self._calls:
            return
        if self._calls > 1:
            self._is_grouped = False  # only the rows of one call can be grouped
        has_more_rows = self._sizes and self._rows > self._sizes[0] and self._rows not in self._sizes
        if has_more_rows and self._notes_rows and not self._is_grouped:
            note_rows(self._faults, self._rows, self._sizes[0])
        self._is_known = True
        if not (self._is_compiled or self._is_grouped or (self._calls > 1 and self._keeps_samples)):
            self.close()

    def close(self) -> None:
        """Removes the hooks."""
        patch = self._patch()
        if patch is not None:
            patch.remove()
        self.is_open = False


def _is_partial(model: nn.Module) -> bool:
    """Returns True if this is not a pass of a whole batch: a replica of DataParallel, or torch.jit.trace."""
    return "_is_replica" in model.__dict__ or is_tracing()


def is_exporting() -> bool:
    """Returns True while torch.export traces. Up to 2.11 `torch.compiler.is_exporting()` is always True in compiled code."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def batch_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The number of inputs that a model is called with; empty if unknown.

    It is the first dimension of the first tensor. Sequences may have the time first, so for them the second dimension is
    returned as well. A list of tensors is ambiguous: it may hold several inputs, or several parts of each.
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
