"""How records become rows of a W&B run, and how this library adds to the rows of a run that the user started.

W&B only appends rows: once the run's step has moved on, it drops a row that the user logs with an earlier `step=`. So in
the user's run, `UserRunWriter` adds its values to the open row with `commit=False`, and the user's next `log` commits them.
Within one row the last value of a key wins. Two rules prevent any loss:

- Intervals that fall into the same row are merged, and the sum is logged again: histograms can be added.
- If several epochs fall into the same row, the first is logged, and the others wait for later rows, one for each row.

If the user never logs, nothing would be visible before the end. So as long as the run contains no values of the user, the
report of epoch k is logged to row k, as if the user had logged it with `step=epoch`. This commits the row before, and a user
who starts to log with `step=epoch` later loses nothing. W&B's summary shows whether the user logs: it has every key of the
committed rows. It does not show the user's first row while that row is open, so this library may commit it.

Records can arrive late and in any order. They are appended like any other, since the axis of a row, `gwa/step` or
`gwa/epoch`, is a metric, which may be lower than in the row before. A row of merged intervals lists the steps that it covers
as `gwa/covers`, so that `contents` can tell which intervals the run contains.

The training thread waits while this library looks at the run's step and logs, but only for a limited time. If W&B takes
longer, the user may log in between. So every row names the step that it was made for: W&B drops it, with a warning, if the
user has moved past that step, and it is made again for the open row.
"""

from collections import deque
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import wandb

from gwa_logging.errors import BackendError
from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.records import EPOCH_KEYS, OPTIONAL_KEYS, QUANTILE_KEYS, STEP_KEYS, EpochReport, IntervalRecord

HISTOGRAM_SUBKEYS = ("", "._type", ".bins", ".values")
"""W&B stores a histogram under these keys, and looks up the axis of each of them."""

PICTURE_SUBKEYS = ("", "._type", ".format", ".height", ".path", ".sha256", ".size", ".width")
"""The same for a picture."""

BEST_IS_LARGEST = ("separation", "stable", "consensus", "agreement")
"""Metric keys of which W&B's summary keeps the largest value besides the last one."""

IDENTIFYING = ("step", "epoch", "count")
"""Metric keys that together identify the records in a row."""

ATTEMPTS = 20
"""To add a row while the user logs at the same time. Each takes about a millisecond."""


def define_metrics(run: wandb.Run, prefix: str) -> None:
    """Sets the x axis of every key by its exact name: a pattern such as "gwa/*" competes with the user's patterns at random."""
    axes = {
        "step": (*(f"scores{subkey}" for subkey in HISTOGRAM_SUBKEYS), *STEP_KEYS, *QUANTILE_KEYS, "covers"),
        "epoch": (*EPOCH_KEYS, *OPTIONAL_KEYS),
    }
    for axis, keys in axes.items():
        run.define_metric(f"{prefix}/{axis}", hidden=True)
        for key in keys:
            summary = "max,last" if key in BEST_IS_LARGEST else None
            run.define_metric(f"{prefix}/{key}", step_metric=f"{prefix}/{axis}", summary=summary)
    for subkey in PICTURE_SUBKEYS:  # W&B's sliders of pictures show its own steps
        run.define_metric(f"{prefix}/picture{subkey}", step_metric="_step")


def row_of(prefix: str, record: IntervalRecord | EpochReport) -> dict[str, Any]:
    """Returns the values of a record as W&B stores them, with the axis among them."""
    if isinstance(record, EpochReport):
        values: dict[str, Any] = {"epoch": record.epoch, **record.metrics}
    else:
        histogram = record.histogram.to_display(DISPLAY_BINS, record.display_limit)
        values = {"step": record.step, "scores": wandb.Histogram(np_histogram=histogram), **record.metrics}
    return {f"{prefix}/{key}": value for key, value in values.items()}


class RunWriters:
    """The backends that write to the same run: one for each head, each in its own thread.

    Attributes:
        lock: a backend holds it while it looks at the run's step and logs.
        prefixes: prefixes of their keys.
        folders: the folders of their journals and reports, by prefix.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.prefixes: set[str] = set()
        self.folders: dict[str, Path] = {}

    def wrote(self, key: str) -> bool:
        """Returns True if one of these backends, or W&B itself, wrote this key of the run's summary."""
        return key.startswith(("_", *(f"{prefix}/" for prefix in self.prefixes)))


writers_of: WeakKeyDictionary[wandb.Run, RunWriters] = WeakKeyDictionary()


class UserRunWriter:
    """Adds records to the rows of a run that the user started. Its state changes only after W&B has accepted a row."""

    def __init__(self, run: wandb.Run, prefix: str, writers: RunWriters) -> None:
        self.run = run
        self._prefix = prefix
        self._writers = writers
        self._step: int | None = None  # of the row that contains the next three; None if no row does
        self._interval: IntervalRecord | None = None
        self._covers: tuple[tuple[int, int], ...] = ()  # the steps of `_interval`, as ranges
        self._has_epoch = False
        self._waiting: deque[EpochReport] = deque()

    def log(self, record: IntervalRecord | EpochReport) -> None:
        """Adds a record to the open row. An epoch's report opens a new row if the user does not log.

        Raises:
            BackendError: the user's log calls moved the run's step in every attempt.
        """
        for _ in range(ATTEMPTS):
            if self._try_to_log(record):
                return
        raise BackendError(f"the W&B run's step moved during each of {ATTEMPTS} attempts to add a row to it")

    def _try_to_log(self, record: IntervalRecord | EpochReport) -> bool:
        step = self._open_row()
        if isinstance(record, EpochReport) and step < record.epoch and not self._user_logs(step):
            step = record.epoch
        same_row = step == self._step
        interval, covers = (self._interval, self._covers) if same_row else (None, ())
        has_epoch = same_row and self._has_epoch
        waiting = deque(self._waiting)
        row: dict[str, Any] = {}
        if isinstance(record, EpochReport):
            waiting.append(record)
        else:
            interval = record if interval is None else interval.merge(record)
            covers = extend_ranges(covers, record)
            row |= row_of(self._prefix, interval)
            if interval is not record:
                row[f"{self._prefix}/covers"] = covers
        if waiting and not has_epoch:
            row |= row_of(self._prefix, waiting.popleft())
            has_epoch = True
        if row:
            if not self._add(row, step):
                return False
            self._step, self._interval, self._covers, self._has_epoch = step, interval, covers, has_epoch
        self._waiting = waiting
        return True

    def drain(self) -> None:
        """Logs the epochs that still wait, one in each row.

        The last row stays open: the user's next log, or `run.finish`, commits it.
        So the run's step moves only if epochs had to wait, which means that the user logged less than once per epoch.
        """
        while self._waiting:
            step = self._open_row()
            if step == self._step and self._has_epoch:
                self.run.log({}, commit=True)
                self._step = None
            elif self._add(row_of(self._prefix, self._waiting[0]), step):
                self._waiting.popleft()
                self._step, self._has_epoch = step, True

    def _add(self, row: dict[str, Any], step: int) -> bool:
        """Adds values to the row with this step, which becomes the open one. Returns False if W&B has moved past it.

        With `step=`, W&B drops values for an earlier step, rather than add them to a row that the user has opened meanwhile.
        If the step has moved when this returns from W&B, either order is possible; the summary, which has the values of the
        committed rows, decides.
        """
        self.run.log(row, step=step, commit=False)
        if self._open_row() <= step:
            return True
        summary = self.run.summary
        keys = [key for key in row if key.rpartition("/")[2] in IDENTIFYING]
        return all(summary.get(key) == row[key] for key in keys)  # type: ignore[no-untyped-call]

    def _open_row(self) -> int:
        """The step of the open row. In a resumed run, `run.step` is 0 before the first `log`."""
        return max(self.run.step, self.run.starting_step)

    def _user_logs(self, step: int) -> bool:
        keys = list(self.run.summary.keys())  # type: ignore[no-untyped-call]
        unanswered = step > 0 and not keys  # W&B returns an empty summary if it has no answer
        return unanswered or not all(self._writers.wrote(key) for key in keys)


def extend_ranges(ranges: tuple[tuple[int, int], ...], record: IntervalRecord) -> tuple[tuple[int, int], ...]:
    """Adds the steps of an interval to ranges of steps. An interval that follows the last range extends it."""
    first = record.step - record.steps + 1
    if ranges and ranges[-1][1] + 1 == first:
        first = ranges[-1][0]
        ranges = ranges[:-1]
    return (*ranges, (first, record.step))
