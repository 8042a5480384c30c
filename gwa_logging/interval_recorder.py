"""Turns training steps into interval records, without blocking the training thread on the device.

At the end of an interval the recorder starts copying the device's summary to the host. A later step, or `flush`,
picks the copy up and writes the record.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gwa_logging.faults import Faults
from gwa_logging.protocols import Adapter, Snapshot
from gwa_logging.records import IntervalRecord
from gwa_logging.summary import AlignmentSummary

STEADY = 10_000
"""Number of intervals before they begin to grow."""


def interval_at(step: int, every: int) -> int:
    """Number of steps in the interval at `step`: `every`, doubled each time the run has become twice as long.

    The first 10,000 intervals have `every` steps. After that, each doubling of the run's length adds 5,000 intervals, so
    their number stays bounded: a run of 1e9 steps with `every` = 50 writes 65,000 intervals, 65 MB. The length depends on the
    step alone, so a resumed run has the same intervals as an uninterrupted one.
    """
    return every << (step // (every * STEADY)).bit_length()


class _PendingInterval(NamedTuple):
    last_step: int
    steps: int
    snapshot: Snapshot


class IntervalRecorder:
    """Counts steps, takes a snapshot at the first step and then every n-th, and writes each as an interval record.

    n grows in very long runs; see `interval_at`.

    Attributes:
        steps: training steps so far.
        epoch: the current epoch, from 0.
        summary: scores of the current epoch that have arrived on the host.
        display_limit: half-width of the range in which histograms are shown; it only grows.
    """

    def __init__(
        self,
        adapter: Adapter,
        every: int,
        write: Callable[[IntervalRecord], None],
        faults: Faults,
        *,
        grow: bool = True,
    ) -> None:
        self.steps = 0
        self.epoch = 0
        self.summary = AlignmentSummary()
        self.display_limit = 0.001
        self._adapter = adapter
        self._every = every
        self._grow = grow
        self._write = write
        self._faults = faults
        self._pending: deque[_PendingInterval] = deque()
        self._first_step = 0  # of the current epoch
        self._recorded_steps = 0  # steps in written or pending intervals
        self._partial = AlignmentSummary()  # the part of the current interval that `peek` has already read

    def step(self) -> bool:
        """Counts a training step. Does not wait for the device. Returns True if a record was written."""
        due = self.steps % self._every == 0
        if due and self._grow:
            due = self.steps % interval_at(self.steps, self._every) == 0
        self.steps += 1
        if due:
            self._snapshot()
        return self._write_arrived(wait=False) if self._pending else False

    def flush(self) -> bool:
        """Writes records for all steps so far. Waits for the device. Returns True if a record was written."""
        if self.steps > self._recorded_steps:
            self._snapshot()
        return self._write_arrived(wait=True)

    def begin_epoch(self, epoch: int) -> None:
        """Assigns the following steps to another epoch."""
        self.epoch = epoch
        self.summary = AlignmentSummary()
        self._first_step = self.steps

    @property
    def in_epoch(self) -> bool:
        """Returns True if the current epoch has had a step. Ranks that share a head agree on this, unlike on `summary.seen`."""
        return self.steps > self._first_step

    def peek(self) -> tuple[int, AlignmentSummary]:
        """Reads the interval in progress without ending it. Waits for the device.

        Returns:
            The number of steps in finished intervals, and the summary of the steps since then.
        """
        self._write_arrived(wait=True)
        if self.steps > self._recorded_steps:
            summary = self._adapter.snapshot().result()
            self._add(summary)
            self._partial = self._partial.merge(summary)
        return self._recorded_steps, self._partial

    def restore(
        self,
        *,
        steps: int,
        epoch: int,
        summary: AlignmentSummary,
        display_limit: float,
        recorded_steps: int,
        partial: AlignmentSummary,
        in_epoch: bool,
    ) -> None:
        """Continues an earlier run; `recorded_steps` and `partial` are what `peek` returned."""
        self._first_step = steps - in_epoch
        self.steps, self.epoch, self.summary, self.display_limit = steps, epoch, summary, display_limit
        self._recorded_steps, self._partial = recorded_steps, partial

    def _snapshot(self) -> None:
        """Ends the interval: starts copying its summary to the host."""
        steps = self.steps - self._recorded_steps
        self._pending.append(_PendingInterval(self.steps - 1, steps, self._adapter.snapshot()))
        self._recorded_steps = self.steps

    def _write_arrived(self, *, wait: bool) -> bool:
        """Writes the pending intervals that have arrived, or all of them. Returns True if there was one."""
        written = False
        while self._pending and (wait or self._pending[0].snapshot.ready()):
            pending = self._pending.popleft()
            self._record(pending.last_step, pending.steps, pending.snapshot.result())
            written = True
        return written

    def _add(self, summary: AlignmentSummary) -> None:
        self.summary = self.summary.merge(summary)
        if summary.not_finite:
            self._faults.record(
                "samples that are not finite",
                f"{summary.not_finite} samples had NaN or infinite logits, gradients or scores and were left out",
                summary.not_finite,
            )

    def _record(self, step: int, steps: int, summary: AlignmentSummary) -> None:
        self._add(summary)
        summary, self._partial = self._partial.merge(summary), AlignmentSummary()
        histogram = summary.histogram
        if summary.count:
            self.display_limit = histogram.display_limit(self.display_limit)
        self._write(
            IntervalRecord(
                step=step,
                epoch=self.epoch,
                steps=steps,
                count=summary.count,
                excluded=summary.excluded,
                mean=summary.mean if summary.count else math.nan,
                minimum=summary.minimum if summary.count else math.nan,
                maximum=summary.maximum if summary.count else math.nan,
                histogram=histogram,
                display_limit=self.display_limit,
            )
        )
