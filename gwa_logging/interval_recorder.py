"""From training steps to intervals: which summary is taken when, and how it comes to the journal without anybody waiting."""

import math
from collections import deque
from collections.abc import Callable

from gwa_logging.faults import Faults
from gwa_logging.protocols import Adapter, Snapshot
from gwa_logging.records import IntervalRecord
from gwa_logging.summary import AlignmentSummary

STEADY = 10_000
"""How many intervals a run writes before they begin to grow."""


def interval_at(step: int, every: int) -> int:
    """How many steps an interval has: `every`, and twice as many whenever the run has become twice as long.

    The first 10,000 intervals are of `every` steps; then each doubling of the run's length adds 5,000 more, so that a run of
    any length writes a bounded number of them: 1e9 steps with `every` = 50 are 65,000 intervals, 65 MB. It depends on the
    step alone, so a resumed run goes on as it would have.
    """
    return every << (step // (every * STEADY)).bit_length()


class IntervalRecorder:
    """Counts steps; has the device's summary taken at the first step and then at every n-th, and writes it down once it
    has come to the host. In a very long run n grows: see `interval_at`.

    Attributes:
        steps: training steps so far.
        epoch: the epoch that they belong to, from 0.
        summary: what has come of the present epoch.
        display_limit: half-width of the range that histograms are shown in; grows only.
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
        self._pending: deque[tuple[int, int, Snapshot]] = deque()
        self._first = 0  # step of the present epoch
        self._taken = 0  # steps that are in the journal or on their way there
        self._held = AlignmentSummary()  # of the interval in progress, what `hold` has brought to the host

    def step(self) -> bool:
        """Notes a training step; whether anything was written. Does not wait for the device."""
        due = self.steps % self._every == 0
        if due and self._grow:
            due = self.steps % interval_at(self.steps, self._every) == 0
        self.steps += 1
        if due:
            self._take()
        return self._collect(wait=False) if self._pending else False

    def gather(self) -> bool:
        """Has everything so far written, waiting for the device; whether anything was."""
        if self.steps > self._taken:
            self._take()
        return self._collect(wait=True)

    def begin_epoch(self, epoch: int) -> None:
        """What comes from now on belongs to another epoch."""
        self.epoch = epoch
        self.summary = AlignmentSummary()
        self._first = self.steps

    @property
    def in_epoch(self) -> bool:
        """Whether the present epoch has steps. On ranks that share a head this is the same, unlike `summary.seen`."""
        return self.steps > self._first

    def hold(self) -> tuple[int, AlignmentSummary]:
        """Has everything so far on the host, waiting for the device, without ending the interval.

        Returns:
            How many steps the journal has, and the summary of those after them.
        """
        self._collect(wait=True)
        if self.steps > self._taken:
            summary = self._adapter.snapshot().result()
            self._take_in(summary)
            self._held = self._held.merge(summary)
        return self._taken, self._held

    def go_on(
        self,
        steps: int,
        epoch: int,
        summary: AlignmentSummary,
        display_limit: float,
        taken: int,
        held: AlignmentSummary,
        in_epoch: bool = False,
    ) -> None:
        """Takes up where an earlier run stopped; `taken` and `held` are what `hold` gave."""
        self._first = steps - in_epoch
        self.steps, self.epoch, self.summary, self.display_limit = steps, epoch, summary, display_limit
        self._taken, self._held = taken, held

    def _take(self) -> None:
        """Starts moving to the host what the device has gathered."""
        self._pending.append((self.steps - 1, self.steps - self._taken, self._adapter.snapshot()))
        self._taken = self.steps

    def _collect(self, *, wait: bool) -> bool:
        written = False
        while self._pending and (wait or self._pending[0][2].ready()):
            step, steps, snapshot = self._pending.popleft()
            self._record(step, steps, snapshot.result())
            written = True
        return written

    def _take_in(self, summary: AlignmentSummary) -> None:
        self.summary = self.summary.merge(summary)
        if summary.not_finite:
            self._faults.record(
                "samples that are not finite",
                f"{summary.not_finite} samples had NaN or infinite logits, gradients or scores and were left out",
                summary.not_finite,
            )

    def _record(self, step: int, steps: int, summary: AlignmentSummary) -> None:
        self._take_in(summary)
        summary, self._held = self._held.merge(summary), AlignmentSummary()
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
