"""What the journal holds and the backends receive.

The records are frozen pydantic models, one JSON line each. Numbers that JSON cannot hold (NaN, infinities) are written
as null and read back as NaN; wherever one can occur, the record's notes or flags say why.

Everything read from JSON is checked, because a journal may come from somebody else: numbers are within bounds in which no
arithmetic overflows, names are those that `watch(name=)` accepts, and a picture is a small PNG.
"""

import math
import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

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
from gwa_logging.redact import redact_urls
from gwa_logging.report.notebook import report_html
from gwa_logging.settings import NAME_LENGTH, NAME_PATTERN
from gwa_logging.thumbnail import is_thumbnail

JOURNAL_VERSION = 1

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}

STEP_KEYS = {"step_mean": "mean", "negative_fraction": "negative_fraction"}
EPOCH_KEYS = {"gwa": "gwa", "stable": "stable_gwa"} | {
    k: k for k in ("separation", "mean", "std", "excess_kurtosis", "excluded", "count")
}
"""What trackers receive of an IntervalRecord, besides its quantiles, and of an EpochReport: metric key to attribute."""

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


class TrackerRunRef(Record):
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
    places: dict[str, TrackerRunRef] = Field(default_factory=dict)

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
            `gwa_logging.statistic`. NaN if there is no spread.
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
