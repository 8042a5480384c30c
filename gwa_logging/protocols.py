"""The interfaces between the core and the integrations: what an adapter and a backend must provide.

An `AdapterModule` is a package such as `gwa_logging.integrations.torch`; its `attach` returns an `Adapter`, which gives the
monitor its `Snapshot`s. A backend's module has `open_backend`, which returns a `Backend`.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from gwa_logging.faults import Faults
from gwa_logging.ledger import Ledger, TaggedBatch
from gwa_logging.records import (
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    StopAlert,
    SuspectsRecord,
    TrackerRunRef,
)
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary


class Snapshot(Protocol):
    """A summary that is being copied from the device to the host."""

    def ready(self) -> bool:
        """Returns True if `result` would return without blocking on the device."""
        ...

    def result(self) -> AlignmentSummary:
        """The summary. Blocks until the device has finished."""
        ...


class Adapter(Protocol):
    """What a framework provides for the monitor: one instance watches one head of one model."""

    @property
    def head(self) -> str:
        """One line: which head was chosen, and why."""
        ...

    @property
    def path(self) -> str:
        """The head's dotted path; empty if the head is the model itself, or is not known yet."""
        ...

    @property
    def shape(self) -> tuple[int, int] | None:
        """Number of features and of classes of the head; None until they are known."""
        ...

    @property
    def writes(self) -> bool:
        """Returns True if this process writes the journal and the trackers. In a distributed run one process does."""
        ...

    @property
    def processes(self) -> int:
        """How many processes train together."""
        ...

    @property
    def is_detached(self) -> bool:
        """Returns True if the model no longer exists, so that nothing more can be observed."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the last `reduce` for the epoch's report, such as processes whose samples do not count."""
        ...

    def start(self, on_step: Callable[[], None]) -> None:
        """Starts observing; calls `on_step` after each training step that the probe saw."""
        ...

    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
        """Takes the scores of one step, float [...] on the device, from the user's own training loop."""
        ...

    def tag(self, samples: TaggedBatch) -> None:
        """Sets which samples the next forward pass is about."""
        ...

    def pause(self, paused: bool) -> None:
        """Stops counting training passes, or resumes."""
        ...

    def snapshot(self) -> Snapshot:
        """Returns what has accumulated on the device since the last snapshot, and starts an empty summary."""
        ...

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary over all processes, the same on each. Every process must call it."""
        ...

    def ledger(self) -> Ledger:
        """The ledger over all processes, on the host, the same on each. Every process must call it."""
        ...

    def load_ledger(self, ledger: Ledger) -> None:
        """Restores what `ledger` returned, so that the sum over processes is what it was."""
        ...

    def to_checkpoint_array(self, array: npt.NDArray[Any]) -> Any:
        """Converts a NumPy array to the form that the framework's own checkpoints accept."""
        ...

    def no_observation_hint(self) -> str:
        """What to check when no step has passed the probe."""
        ...

    def close(self) -> None:
        """Removes the probe from the model."""
        ...


class AdapterModule(Protocol):
    """The package of one framework, such as `gwa_logging.integrations.torch`."""

    SEVERAL_HEADS: bool
    """True if `watch(head=)` accepts a list."""

    def subject(self, model: Any) -> Any:
        """The object that identifies what is watched: the model without its wrappers. It can be referenced weakly."""
        ...

    def attach(self, model: Any, settings: WatchSettings, faults: Faults) -> Adapter:
        """Puts a probe at the model's head. Nothing is observed until `Adapter.start`.

        Raises:
            HeadNotFoundError: no head was found, or several modules could be it.
            InvalidInputError: the settings do not fit the model or the number of processes.
        """
        ...

    def describe(self, model: Any, wanted: Any = None, inputs: Sequence[Any] = ()) -> str:
        """What the head finder sees in a model, as plain text: for `gwa-logging heads`."""
        ...


class RunContext(NamedTuple):
    """What a backend is told when it is opened.

    Attributes:
        name: prefix of every metric key.
        run: the user's run, or None for the active one.
        directory: the run's own folder, with the journal in it.
    """

    name: str
    run: Any
    directory: Path


class TrackerContents(NamedTuple):
    """What a tracker's run holds already, as it is read back from the tracker.

    A tracker can lack records in the middle: it was down, the process was killed, and the resumed run sent later ones. So
    each field answers for single records. Any container with `in` will do; a tracker that knows only its last step
    gives ranges, such as `range(last_step + 1)`.

    Attributes:
        intervals: steps of the intervals (`IntervalRecord.step`).
        epochs: by epoch, how many samples its report is about, with and without a score; see `samples_by_epoch`.
        alerts: epochs of the stop alerts.
        suspects: steps of the lists of suspects.
        closes: numbers of epochs (`CloseRecord.epochs`) of the ends that it has been sent.
    """

    intervals: Container[int] = frozenset()
    epochs: Mapping[int, float] = MappingProxyType({})
    alerts: Container[int] = frozenset()
    suspects: Container[int] = frozenset()
    closes: Container[int] = frozenset()

    def has(self, record: AnyRecord) -> bool:
        """Returns True if the run has this record, or another one about the same interval, epoch, alert or list.

        A report of fewer samples does not count: that run was closed in the middle of the epoch, and the record knows more.
        A RunRecord is never held: it says the same every time.
        """
        if isinstance(record, IntervalRecord):
            return record.step in self.intervals
        if isinstance(record, EpochReport):
            seen = record.count + record.excluded
            return self.epochs.get(record.epoch, -1.0) >= seen * (1 - 1e-6)  # some trackers keep float32
        if isinstance(record, StopAlert):
            return record.epoch in self.alerts
        if isinstance(record, SuspectsRecord):
            return record.step in self.suspects
        return isinstance(record, CloseRecord) and record.epochs in self.closes


def samples_by_epoch(reports: Iterable[tuple[int, float]]) -> dict[int, float]:
    """`TrackerContents.epochs` from all reports in a tracker, in any order: pairs of epoch and number of samples."""
    found: dict[int, float] = {}
    for epoch, samples in reports:
        found[epoch] = max(samples, found.get(epoch, -1.0))
    return found


class Backend(Protocol):
    """What a tracker does: it writes records, nothing else.

    A module or entry point named by `backend=` has a function `open_backend(context: RunContext) -> Backend`, which
    raises BackendError where the tracker cannot be used. It may also have `locate(context) -> TrackerRunRef`: the place of the
    run that `open_backend` would take, without opening it, and empty if it would start one.
    """

    name: str
    run: Any
    """The tracker's run, in a form that its `open_backend` takes as the user's."""

    run_ref: TrackerRunRef
    """The same as text, for the journal."""

    threaded: bool
    """True: written whenever there is news. False: only while the training thread waits for it, a few milliseconds at most,
    because something would go wrong if the user wrote at the same time; so `write` should take about a millisecond."""

    def contents(self) -> TrackerContents:
        """What the run holds of this library's records: `gwa-logging replay` and a resumed run send the rest."""
        ...

    def write(self, record: AnyRecord) -> None:
        """Writes one record. Raising means that it was not written: it is counted, kept in the journal, tried again.

        A backend may also have `write_many(records)`, of the same meaning for a list, if its tracker takes many at once and
        drops what it has already: then it catches up so.
        """
        ...

    def close(self) -> None:
        """Finishes the run if the backend started it. Called once, after the last record."""
        ...
