"""Records (what the journal holds and the backends receive) and protocols (what an adapter and a backend must do).

The records are frozen pydantic models, one JSON line each. Numbers that JSON cannot hold (NaN, infinities) are written
as null and read back as NaN; wherever one can occur, the record's notes or flags say why.
"""

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter

from gwa_logging.histogram import Histogram
from gwa_logging.notebook import report_html

JOURNAL_VERSION = 1

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}

STEP_KEYS = {"step_mean": "mean", "negative_fraction": "negative_fraction"}
EPOCH_KEYS = {"gwa": "gwa", "stable": "stable_gwa"} | {
    k: k for k in ("separation", "mean", "std", "excess_kurtosis", "excluded", "count")
}
"""What trackers receive of an IntervalRecord, besides its quantiles, and of an EpochReport: metric key to attribute."""

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
"""A float that may be undefined: null in JSON, NaN in Python."""


class Record(BaseModel):
    """Base of everything in the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunPlace(Record):
    """Where a tracker's run is.

    Attributes:
        run: what `watch(run=)` and `gwa-logging replay --run` take to find it again; None if it cannot be found again.
        url: where to look at it, or None.
    """

    run: str | None = None
    url: str | None = None


class RunRecord(Record):
    """The first line of a journal: what is being watched, and how.

    Attributes:
        version: of the journal's form.
        name: prefix of every metric key.
        head: which head was chosen, and why.
        created: ISO 8601, UTC.
        settings: arguments of `watch`.
        places: the trackers' runs, by backend.
    """

    kind: Literal["run"] = "run"
    version: int = JOURNAL_VERSION
    name: str
    head: str
    created: str
    settings: dict[str, Any]
    places: dict[str, RunPlace] = Field(default_factory=dict)


class TimedRecord(Record):
    """Something that happened at a time.

    Attributes:
        time: when it was written into the journal, in seconds since 1970 (UTC); 0 in what was not read from a journal.
    """

    time: float = 0.0


class IntervalRecord(TimedRecord):
    """The scores of the training steps since the last interval.

    Attributes:
        step: index of the last step of the interval, from 0 over the whole run.
        epoch: the epoch it belongs to, from 0.
        steps: how many steps it spans.
        count, excluded: samples with a score, and without.
        mean: mean score, dimensionless, in [-1, 1].
        minimum, maximum: smallest and largest score.
        histogram: distribution of the scores.
        display_limit: half-width of the range to show; grows only, through a run.
    """

    kind: Literal["interval"] = "interval"
    step: int
    epoch: int
    steps: int
    count: int
    excluded: int
    mean: Number
    minimum: Number
    maximum: Number
    histogram: Histogram
    display_limit: float = Field(gt=0)

    @property
    def negative_fraction(self) -> float:
        """Share of scores below zero: samples whose gradient asks the head to shrink, in [0, 1]."""
        return self.histogram.negative_fraction

    @property
    def quantiles(self) -> dict[str, float]:
        """Scores at 5, 25, 50, 75 and 95 %, right to within a bin of the histogram."""
        return score_quantiles(self.histogram, self.minimum, self.maximum)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a tracker, by metric key without the prefix."""
        return {key: getattr(self, name) for key, name in STEP_KEYS.items()} | self.quantiles

    def merge(self, later: "IntervalRecord") -> "IntervalRecord":
        """This interval and a later one as one."""
        count = self.count + later.count
        parts = [r for r in (self, later) if r.count]
        return later.model_copy(
            update={
                "steps": self.steps + later.steps,
                "count": count,
                "excluded": self.excluded + later.excluded,
                "mean": sum(r.mean * r.count for r in parts) / count if count else math.nan,
                "minimum": min((r.minimum for r in parts), default=math.nan),
                "maximum": max((r.maximum for r in parts), default=math.nan),
                "histogram": self.histogram.merge(later.histogram),
                "display_limit": max(self.display_limit, later.display_limit),
            }
        )


class EpochReport(TimedRecord):
    """What the scores of one epoch say.

    Attributes:
        epoch: from 0.
        step: index of the epoch's last step, from 0 over the whole run; -1 in a report that belongs to no run.
        count: samples with a score.
        excluded: samples without one: no gradient (padded, ignored, saturated), nothing in the embedding, not finite.
        mean, std: of the scores, dimensionless; the spread is the population's (divided by count).
        skewness, excess_kurtosis: biased, as in SciPy's default; excess kurtosis is 0 for a normal distribution.
        gwa: mean / (excess kurtosis + 1.2), as published, even beyond its pole. NaN where the kurtosis is undefined.
        stable_gwa: mean / (excess kurtosis + 3), which has no pole.
        separation: how well the scores fall into two groups, in (0, 1), which is what the stop alert watches; see
            `gwa_logging.estimates`. NaN if there is no spread.
        negative_fraction: share of scores below zero, in [0, 1].
        quantiles: scores at q05, q25, q50, q75 and q95, right to within a bin of the histogram.
        histogram: distribution of the scores.
        gwa_defined: False where the denominator of `gwa` is not clearly positive; then `gwa` says nothing.
        is_best: whether this is the best epoch so far by the statistic that the stop alert watches.
        notes: sentences on what is unusual in this epoch.
    """

    kind: Literal["epoch"] = "epoch"
    epoch: int
    step: int
    count: int
    excluded: int
    mean: Number
    std: Number
    skewness: Number
    excess_kurtosis: Number
    gwa: Number
    stable_gwa: Number
    separation: Number = math.nan
    negative_fraction: Number
    quantiles: dict[str, Number]
    histogram: Histogram
    gwa_defined: bool
    is_best: bool = False
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a tracker, by metric key without the prefix."""
        return {key: getattr(self, name) for key, name in EPOCH_KEYS.items()}

    def __str__(self) -> str:
        """One readable line."""
        doubt = "" if self.gwa_defined else " (undefined)"
        return (
            f"epoch {self.epoch}: GWA {self.gwa:.4g}{doubt}, separation {self.separation:.4g}, mean {self.mean:.4g}, "
            f"{self.negative_fraction:.1%} negative, {self.count} samples{', best so far' if self.is_best else ''}"
        )

    def __repr__(self) -> str:
        return f"<EpochReport of {self}>"

    def _repr_html_(self) -> str:
        return report_html(self)


class StopReason(StrEnum):
    """Why a stop alert fired."""

    DECLINE = "decline"
    """The statistic has been clearly below its best (by the rule's `drop`) for `patience` epochs."""
    NO_IMPROVEMENT = "no improvement"
    """The statistic has not exceeded its best for `patience` epochs (a rule without `drop`)."""
    UNDEFINED = "undefined"
    """The statistic has been undefined for `patience` epochs: NaN losses, dead features, or scores that are all equal."""


class StopAlert(TimedRecord):
    """GWA says that training should stop.

    Attributes:
        epoch: when it fired, from 0.
        best_epoch: the epoch to go back to; -1 if there has been none.
        statistic: what was watched: "separation", "stable", "gwa" or "mean".
        value, best_value: of that statistic at `epoch` and at `best_epoch`.
        reason: why.
        message: the same in a sentence.
        caveats: what speaks against it.
    """

    kind: Literal["alert"] = "alert"
    epoch: int
    best_epoch: int
    statistic: str
    value: Number
    best_value: Number
    reason: StopReason
    message: str
    caveats: tuple[str, ...] = ()


class CloseRecord(TimedRecord):
    """The last line of a journal that was closed: how the run went.

    Attributes:
        best_epoch, best_value: by the statistic that the stop alert watches; None and NaN if there was none.
        faults: how often each kind of fault happened.
    """

    kind: Literal["close"] = "close"
    epochs: int
    steps: int
    best_epoch: int | None
    best_value: Number
    faults: dict[str, int]


class Suspect(Record):
    """A training sample that is probably mislabelled.

    Attributes:
        id: the sample's id.
        mean_score: its mean score over the run, dimensionless; the lower, the more suspect.
        times_seen: how often it was scored: a whole number, but for mixed samples (mixup), whose shares are added up.
        label: its class index, from `watch(labels=)`; None where unknown.
        predicted: the class that the head gave most to when the sample was last seen; None where unknown. Of several
            processes, the last time on the one of the highest rank that has seen it.
        thumbnail: a PNG in base64, at most 64 pixels wide and high; None if there is none.
    """

    id: int
    mean_score: float
    times_seen: float
    label: int | None = None
    predicted: int | None = None
    thumbnail: str | None = None


class SuspectsRecord(TimedRecord):
    """The samples that were most suspect at some moment of the run.

    Attributes:
        step: index of the last training step until then.
        epoch: the epoch in progress, or that has just been closed.
        samples: how many samples have been scored.
        suspects: the most suspect first.
    """

    kind: Literal["suspects"] = "suspects"
    step: int
    epoch: int
    samples: int
    suspects: tuple[Suspect, ...]

    COLUMNS: ClassVar = ("id", "mean_score", "times_seen", "label", "predicted")

    def rows(self) -> list[list[float | int | None]]:
        """The suspects' `COLUMNS`; whole numbers as int."""
        return [
            [s.id, s.mean_score, int(s.times_seen) if s.times_seen.is_integer() else s.times_seen, s.label, s.predicted]
            for s in self.suspects
        ]

    def csv(self) -> str:
        """The table as CSV, with a line of headings; unknown is empty."""
        lines = [",".join("" if value is None else str(value) for value in row) for row in self.rows()]
        return "\n".join([",".join(self.COLUMNS), *lines, ""])


AnyRecord = RunRecord | IntervalRecord | EpochReport | StopAlert | SuspectsRecord | CloseRecord
RECORDS: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])
"""Reads any record from its JSON line."""


def score_quantiles(histogram: Histogram, minimum: float, maximum: float) -> dict[str, float]:
    """The quantiles of `QUANTILES` from a histogram, kept between the smallest and the largest score."""
    values = histogram.quantiles(list(QUANTILES.values()))
    return {name: float(np.clip(q, minimum, maximum)) for name, q in zip(QUANTILES, values, strict=True)}


class Snapshot(Protocol):
    """A summary on its way from the device."""

    def ready(self) -> bool:
        """Whether `result` would return without waiting for the device."""
        ...

    def result(self) -> Any:
        """The `AlignmentSummary`, waiting for it if need be."""
        ...


class Adapter(Protocol):
    """What a framework does for the monitor."""

    head: str
    """One line: which head was chosen, and why."""

    path: str
    """The head's dotted path; empty if it is the model itself, or not known yet."""

    writes: bool
    """Whether this process writes journal and trackers: of several processes, one does."""

    def reduce(self, summary: Any) -> Any:
        """The `AlignmentSummary` of all processes together, the same on each. Every process must call it."""
        ...

    processes: int
    """How many processes train together."""

    shape: tuple[int, int] | None
    """Features and classes of the head; None while it is not known."""

    def observe(self, scores: Any, samples: Any) -> None:
        """Takes the scores of one step, float [...] on the device, from the user's own loop, and the `Samples` or None."""
        ...

    def tag(self, samples: Any) -> None:
        """Notes which `Samples` the next forward pass is about."""
        ...

    def pause(self, paused: bool) -> None:
        """Counts no training pass from now on, or counts them again."""
        ...

    def start(self, on_step: Callable[[], None]) -> None:
        """Begins to observe; `on_step` is called after each training step that was seen."""
        ...

    def ledger(self) -> Any:
        """The `Ledger` of all processes together, the same on each, on the host. Every process must call it."""
        ...

    def load_ledger(self, ledger: Any) -> None:
        """Puts back what `ledger` gave, so that the sum over processes is what it was."""
        ...

    def portable(self, array: Any) -> Any:
        """A NumPy array in the form that the framework's own checkpoints take."""
        ...

    def snapshot(self) -> Snapshot:
        """Hands over what was accumulated on the device since the last snapshot, and starts anew."""
        ...

    def nothing_seen(self) -> str:
        """What to check when no step has passed the probe."""
        ...

    def close(self) -> None:
        """Takes the probe off the model."""
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


class Held(NamedTuple):
    """What a tracker's run holds already.

    Attributes:
        step: of the last interval, from 0; -1 if there is none.
        epoch: the last one with a report, from 0; -1 if there is none.
        alert: the epoch of the last stop alert; -1 if there is none.
        closed: whether it has what a CloseRecord says.
        suspects: the step of the last list of suspects; -1 if there is none.
    """

    step: int = -1
    epoch: int = -1
    alert: int = -1
    closed: bool = False
    suspects: int = -1

    def has(self, record: AnyRecord) -> bool:
        """Whether the run has this record. The first one of a journal says the same every time.

        An epoch counts if the last step of it has come as well: otherwise the run was closed in the middle of it, and holds
        what was known until then.
        """
        if isinstance(record, IntervalRecord):
            return record.step <= self.step
        if isinstance(record, EpochReport):
            return record.epoch < self.epoch or (record.epoch == self.epoch and record.step <= self.step)
        if isinstance(record, StopAlert):
            return record.epoch <= self.alert
        if isinstance(record, SuspectsRecord):
            return record.step <= self.suspects
        return isinstance(record, CloseRecord) and self.closed


class Backend(Protocol):
    """What a tracker does: it writes records, nothing else.

    A module or entry point named by `backend=` has a function `open_backend(context: RunContext) -> Backend`, which
    raises BackendError where the tracker cannot be used.
    """

    name: str
    run: Any
    """The tracker's run, in a form that its `open_backend` takes as the user's."""

    place: RunPlace
    """The same as text, for the journal."""

    threaded: bool
    """True: written whenever there is news. False: only while the training thread waits for it, a few milliseconds at most,
    because something would go wrong if the user wrote at the same time; so `write` should take about a millisecond."""

    def held(self) -> Held:
        """What the run has of ours already: `gwa-logging replay`, and a run that is resumed, send what comes after that."""
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
