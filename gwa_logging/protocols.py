"""The interfaces between the core and the integrations: what an adapter and a backend must provide.

An `AdapterModule` is a package such as `gwa_logging.integrations.torch`; its `attach` returns an `Adapter`, which gives the
monitor its `Snapshot`s. A backend's module has `open_backend`, which returns a `Backend` or any other `BackendWriter`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gwa_logging.best_weights import ModelWeights
from gwa_logging.faults import Faults
from gwa_logging.ledger import LedgerPart, TaggedBatch
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


class Evaluated(NamedTuple):
    """What an adapter returns of a look.

    Attributes:
        logits: float32 [inputs, classes], on the host.
        ids: int64 [inputs], the sample ids of inputs that the adapter has chosen itself; None if unknown.
    """

    logits: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64] | None = None


class Snapshot(Protocol):
    """A summary that is being copied from the device to the host."""

    def ready(self) -> bool:
        """Returns True if `result` would return without blocking on the device.

        The monitor calls it once per training step until then, so it may do a part of the work on the host each time.
        """
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
        """Number of processes in the run."""
        ...

    @property
    def is_detached(self) -> bool:
        """Returns True if the model was deleted and nothing more can be observed. Always False if users pass the scores."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the last `reduce` for the epoch's report, such as processes whose samples do not count."""
        ...

    def start(self, on_step: Callable[[], None]) -> None:
        """Starts observing; calls `on_step` after each training step that the probe saw."""
        ...

    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
        """Adds the scores of one step, float [...] on the device, from the user's own training loop."""
        ...

    def tag(self, samples: TaggedBatch) -> None:
        """Sets which samples the next forward pass processes."""
        ...

    def pause(self, paused: bool) -> None:
        """Stops counting training passes, or resumes."""
        ...

    @property
    def is_language_model(self) -> bool:
        """Returns True if the head is known to predict tokens."""
        ...

    def snapshot(self) -> Snapshot:
        """Returns what has accumulated on the device since the last snapshot, and starts an empty summary."""
        ...

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """Merges the summaries of all processes; the result is the same on each. Every process must call this."""
        ...

    def ledger(self) -> LedgerPart:
        """The part of the ledger of all processes that this one keeps, on the host. Every process must call this."""
        ...

    def own_samples(self, num_samples: int) -> range:
        """The ids of the samples that this process keeps of a ledger; all of them if each process keeps the whole ledger."""
        ...

    def gather(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `LedgerPart.gather`."""
        ...

    def load_ledger(self, part: LedgerPart) -> None:
        """Restores what `ledger` returned, so that the ledger of all processes is unchanged."""
        ...

    def evaluate(self, inputs: Any) -> Evaluated | None:
        """The model's logits for the inputs of `watch(look=)`.

        In evaluation mode, without gradients; neither the model nor the streams of random numbers change. If `weights` keeps
        the average of the weights, the average is evaluated. In a distributed run every process must call this; all get the
        logits of the first one, or None if it failed in another process.

        Raises:
            InvalidInputError: the model's output has no logits.
            Exception: any that the model raises.
        """
        ...

    def weights(self, *, averaged: bool) -> ModelWeights:
        """What copies the model's weights, or with `averaged` their running average. Called at most once, before `start`.

        Raises:
            InvalidInputError: those of this model cannot be kept, or not be averaged.
        """
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
        """Returns the head finder's view of a model as plain text. Without a head, the last line starts with "no head:"."""
        ...


class RunContext(NamedTuple):
    """What `open_backend` receives.

    Attributes:
        name: prefix of every metric key.
        run: what the user passed as `watch(run=)`: a run of the tracker or its id. None means the active one.
        directory: the run's own folder, which contains the journal.
        is_restart: True if `run` is a run that this library started in an earlier process: `close` ends it.
    """

    name: str
    run: object
    directory: Path
    is_restart: bool = False


class TrackerContents(NamedTuple):
    """Which of this library's records a tracker's run contains, as read back from the tracker.

    A tracker can lack records in the middle, for example if it was down, or if the process was killed and the resumed run
    sent later ones. So each field answers for single records. Any container that supports `in` will do; for a tracker that
    only knows its last step, use a range such as `range(last_step + 1)`.

    Attributes:
        intervals: steps of the intervals (`IntervalRecord.step`).
        epochs: number of samples that each epoch's report covers, with and without a score; see `samples_by_epoch`.
        alerts: epochs of the stop alerts.
        suspects: steps of the lists of suspects.
        closes: numbers of epochs (`CloseRecord.epochs`) of the close records.
    """

    intervals: Container[int] = frozenset()
    epochs: Mapping[int, float] = MappingProxyType({})
    alerts: Container[int] = frozenset()
    suspects: Container[int] = frozenset()
    closes: Container[int] = frozenset()

    def has(self, record: AnyRecord) -> bool:
        """Returns True if the run has this record, or another one about the same interval, epoch, alert or list.

        A report that covers fewer samples does not count: its run was closed in the middle of the epoch, so `record` is more
        complete. The answer for a RunRecord is always False; writing it again changes nothing.
        """
        if isinstance(record, IntervalRecord):
            return record.step in self.intervals
        if isinstance(record, EpochReport):
            seen = record.count + record.excluded
            return self.epochs.get(record.epoch, -1.0) >= seen * (1 - 1e-6)  # some trackers store float32
        if isinstance(record, StopAlert):
            return record.epoch in self.alerts
        if isinstance(record, SuspectsRecord):
            return record.step in self.suspects
        return isinstance(record, CloseRecord) and record.epochs in self.closes


def samples_by_epoch(reports: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Computes `TrackerContents.epochs` from all reports in a tracker.

    Args:
        reports: pairs of epoch and number of samples, in any order. An epoch may have several reports.

    Returns:
        The largest number of samples of each epoch.
    """
    samples: dict[int, float] = {}
    for epoch, count in reports:
        samples[epoch] = max(count, samples.get(epoch, -1.0))
    return samples


class BackendWriter(Protocol):
    """The required part of a backend: `watch(backend=)` accepts any object with these two methods."""

    def write(self, record: AnyRecord) -> None:
        """Writes one record. If it raises, the record counts as not written, and is written again later."""
        ...

    def close(self) -> None:
        """Called once, after the last record. Ends the tracker's run if the backend started it."""
        ...


class Backend(ABC):
    """Writes records to a tracker.

    `write` and `close` are required. All other members are optional and have defaults: subclasses inherit them, and
    `backend_defaults.with_defaults` adds them to any other object.

    A module or entry point named by `watch(backend=)` has a function `open_backend(context: RunContext)`, which returns an
    object with `write` and `close`, and raises BackendError if the tracker cannot be used. The module may also have a
    function `locate(context: RunContext) -> TrackerRunRef`: the run that `open_backend` would use, found without opening
    it; empty if `open_backend` would start a new one.

    Attributes:
        name: what faults and warnings call the backend. By default the name of its class.
        run: the tracker's run, in a form that `open_backend` accepts as `RunContext.run`. Several heads share it.
        run_ref: the same run as text, for the journal.
        threaded: if True, a thread of the delivery calls `write`, which may block for as long as it needs. If False, the
            training thread waits meanwhile (at most a few milliseconds), for trackers that go wrong if users log at the same
            time; then `write` should take about a millisecond.
        records_per_call: how many records `write_many` accepts in one call.
        is_notifier: True for what only sends alerts to people: it has no run, and nothing can be replayed to it.
        owns_run: True if this library started the run. If a state of another run is loaded, that run takes its place.
        is_in_folder: True if the run is stored in the run's own folder (`RunContext.directory`), next to the journal.
    """

    name: str = ""
    run: object = None
    run_ref: TrackerRunRef = TrackerRunRef()
    threaded: bool = True
    records_per_call: int = 1
    is_notifier: bool = False
    owns_run: bool = False
    is_in_folder: bool = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.name or cls.__name__

    @abstractmethod
    def write(self, record: AnyRecord) -> None:
        """See `BackendWriter.write`."""

    @abstractmethod
    def close(self) -> None:
        """See `BackendWriter.close`."""

    def write_many(self, records: Sequence[AnyRecord]) -> None:
        """Writes several records, in order. If it raises, all of them are written again later.

        Override it, and `records_per_call`, if the tracker takes many records in one request and drops those that it already
        has.
        """
        for record in records:
            self.write(record)

    def contents(self) -> TrackerContents:
        """Reads back which records the run contains. `gwa-logging replay` and a resumed run send only the others."""
        return TrackerContents()

    def discard(self) -> None:
        """Called instead of `close` if another run takes the place of this empty one; removes it if it was started here."""
        self.close()

    def move_to(self, directory: Path) -> None:  # noqa: B027 - optional
        """Called if the journal is continued in another folder; `close` may upload the files there."""

    def refusal(self) -> str | None:
        """Returns why the tracker has stopped accepting records for good, or None.

        Called every 10 seconds from a thread, and at the end.
        """
        return None


class BackendModule(Protocol):
    """The module or entry point that `watch(backend=)` names.

    It may also have `locate(context: RunContext) -> TrackerRunRef`; see `Backend`.
    """

    def open_backend(self, context: RunContext) -> BackendWriter:
        """Opens the tracker.

        Raises:
            BackendError: it cannot be used.
        """
        ...
