"""Records (what the journal holds and the backends receive) and protocols (what an adapter and a backend must do).

The records are frozen pydantic models, one JSON line each. Numbers that JSON cannot hold (NaN, infinities) are written
as null and read back as NaN; wherever one can occur, the record's notes or flags say why.

A journal may come from somebody else, so what is read from JSON is checked: numbers are within bounds in which no
arithmetic overflows, names are those that `watch(name=)` takes, and a picture is a small PNG.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gwa_logging.histogram import MOST, Histogram
from gwa_logging.notebook import report_html
from gwa_logging.redact import redact_urls
from gwa_logging.thumbnail import is_thumbnail

JOURNAL_VERSION = 1

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}

STEP_KEYS = {"step_mean": "mean", "negative_fraction": "negative_fraction"}
EPOCH_KEYS = {"gwa": "gwa", "stable": "stable_gwa"} | {
    k: k for k in ("separation", "mean", "std", "excess_kurtosis", "excluded", "count")
}
"""What trackers receive of an IntervalRecord, besides its quantiles, and of an EpochReport: metric key to attribute."""

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""What `watch(name=)` takes, with `NAME_LENGTH` characters at most. It becomes the name of folders."""

NAME_LENGTH = 64

_LARGEST = 1e30
"""Larger numbers in a journal are not ours: no statistic of scores comes near them."""


def _number(value: Any, info: ValidationInfo) -> Any:
    if value is None:
        return math.nan
    if info.mode == "json" and isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise ValueError(f"expected a number within +-{_LARGEST:g}")
    return value


Number = Annotated[
    float,
    BeforeValidator(_number),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
"""A float that may be undefined: null in JSON, NaN in Python."""


Count = Annotated[int, Field(ge=0, lt=MOST)]
"""Steps, epochs, samples."""

Index = Annotated[int, Field(gt=-MOST, lt=MOST)]
"""Samples' ids and classes, which may be negative where they are left out."""


class Record(BaseModel):
    """Base of everything in the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Address = Annotated[str, AfterValidator(redact_urls)]
"""A text that may be a URL; credentials in it are masked."""


class RunPlace(Record):
    """Where a tracker's run is.

    Attributes:
        run: what `watch(run=)` and `gwa-logging replay --run` take to find it again; None if it cannot be found again.
        url: where to look at it, or None.
    """

    run: Address | None = None
    url: Address | None = None


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

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        """A head beside the first one has the name of the run, a slash and its path, in which `watch` leaves no other."""
        name, _, path = value.partition("/")
        fits = re.fullmatch(NAME_PATTERN, name) and len(name) <= NAME_LENGTH and re.fullmatch(r"[\w.-]{0,1000}", path)
        if not fits or path in (".", ".."):
            raise ValueError("expected a name as watch(name=) takes it")
        return value


class TimedRecord(Record):
    """Something that happened at a time.

    Attributes:
        time: when it was written into the journal, in seconds since 1970 (UTC); 0 in what was not read from a journal.
    """

    time: float = Field(default=0.0, ge=0, lt=1e11)


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
    step: Count
    epoch: Count
    steps: Count
    count: Count
    excluded: Count
    mean: Number
    minimum: Number
    maximum: Number
    histogram: Histogram
    display_limit: float = Field(gt=0)

    @model_validator(mode="after")
    def _can_be_shown(self, info: ValidationInfo) -> Self:
        if info.mode == "json":
            if not 1e-6 <= self.display_limit <= 1:
                raise ValueError("display_limit: expected the half-width of a range of scores, at most 1")
            if bool(self.count) != any(self.histogram.counts):
                raise ValueError("count: expected as many scores as the histogram has")
        return self

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
    epoch: Count
    step: int = Field(ge=-1, lt=MOST)
    count: Count
    excluded: Count
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
    epoch: Count
    best_epoch: int = Field(ge=-1, lt=MOST)
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
    epochs: Count
    steps: Count
    best_epoch: Count | None
    best_value: Number
    faults: dict[str, Count]


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

    id: Index
    mean_score: Number
    times_seen: float = Field(ge=0, lt=MOST)
    label: Index | None = None
    predicted: Index | None = None
    thumbnail: str | None = None

    @field_validator("thumbnail")
    @classmethod
    def _is_a_picture(cls, value: str | None) -> str | None:
        if value is not None and not is_thumbnail(value):
            raise ValueError("expected a PNG of at most 64 x 64 pixels, in base64")
        return value


class SuspectsRecord(TimedRecord):
    """The samples that were most suspect at some moment of the run.

    Attributes:
        step: index of the last training step until then.
        epoch: the epoch in progress, or that has just been closed.
        samples: how many samples have been scored.
        suspects: the most suspect first.
    """

    kind: Literal["suspects"] = "suspects"
    step: int = Field(ge=-1, lt=MOST)
    epoch: Count
    samples: Count
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

    is_detached: bool
    """Whether the model no longer exists, so that nothing more can be observed."""

    notes: tuple[str, ...]
    """What the reports must say of the last `reduce`, such as processes whose samples do not count."""

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
    """`Held.epochs` from all reports that a tracker holds, in any order: pairs of the epoch and the number of samples."""
    found: dict[int, float] = {}
    for epoch, samples in reports:
        found[epoch] = max(samples, found.get(epoch, -1.0))
    return found


class Backend(Protocol):
    """What a tracker does: it writes records, nothing else.

    A module or entry point named by `backend=` has a function `open_backend(context: RunContext) -> Backend`, which
    raises BackendError where the tracker cannot be used. It may also have `locate(context) -> RunPlace`: the place of the
    run that `open_backend` would take, without opening it, and empty if it would start one.
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
