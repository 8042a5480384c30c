"""What the journal holds and the backends receive.

Each record is a frozen pydantic model and one line of JSON. Numbers that JSON cannot represent (NaN, infinities) are written
as null and read back as NaN; the record's notes or flags explain every such number.

Everything read from JSON is validated, because a journal may come from an untrusted source: numbers are within bounds in
which no arithmetic overflows, names are those that `watch(name=)` accepts, and a picture is a small PNG.
"""

import math
import re
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

from gwa_logging._record_base import Count, Number, Record
from gwa_logging._record_base import TimedRecord as TimedRecord
from gwa_logging._suspects_record import Suspect as Suspect
from gwa_logging._suspects_record import SuspectsRecord as SuspectsRecord
from gwa_logging.histogram import MAX_COUNT, Histogram
from gwa_logging.redact import redact_urls
from gwa_logging.report.notebook import report_html
from gwa_logging.settings import NAME_LENGTH, NAME_PATTERN

JOURNAL_VERSION = 1

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}

STEP_KEYS = {"negative_fraction": "negative_fraction", "steps/mean": "mean"}
QUANTILE_KEYS = {f"steps/{name}": name for name in QUANTILES}
EPOCH_KEYS = {"gwa": "gwa", "separation": "separation", "stable": "stable_gwa", "stop": "stop"} | {
    f"stats/{name}": name for name in ("mean", "std", "excess_kurtosis", "excluded", "count")
}
OPTIONAL_KEYS = {"consensus": "consensus", "agreement": "agreement"}
"""The metrics of an IntervalRecord, its quantiles, the metrics of an EpochReport, and those that only some epochs have: key to
attribute.

Trackers sort keys by name, in a section for each folder: the most important keys have no folder, so they come first.
"""

Address = Annotated[str, AfterValidator(redact_urls)]
"""A text that may be a URL. Credentials in it are masked."""


class TrackerRunRef(Record):
    """Identifies a tracker's run, as text.

    Attributes:
        run: the value for `watch(run=)` and `gwa-logging replay --run`; None if the run cannot be opened again.
        url: the page or folder that shows the run, or None.
    """

    run: Address | None = None
    url: Address | None = None


class RunRecord(Record):
    """The first line of a journal: what is watched, and with which settings.

    Attributes:
        version: version of the journal's format.
        name: prefix of every metric key.
        head: which head was chosen, and why.
        created: date and time in ISO 8601, UTC.
        settings: the arguments of `watch`.
        places: the trackers' runs, by the name of the backend.
        classes: number of classes of the head; None if it is not known yet, as in JAX.
    """

    kind: Literal["run"] = "run"
    version: int = JOURNAL_VERSION
    name: str
    head: str
    created: str
    settings: dict[str, object]
    places: dict[str, TrackerRunRef] = Field(default_factory=dict)
    classes: int | None = None

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        """Accepts a name that `watch(name=)` accepts; for a further head, followed by a slash and the head's path."""
        name, _, path = value.partition("/")
        fits = re.fullmatch(NAME_PATTERN, name) and len(name) <= NAME_LENGTH and re.fullmatch(r"[\w.-]{0,1000}", path)
        if not fits or path in (".", ".."):
            raise ValueError("expected a name as watch(name=) takes it")
        return value


class IntervalRecord(TimedRecord):
    """The scores of the training steps since the last interval.

    Attributes:
        step: index of the interval's last step, counted from 0 over the whole run.
        epoch: the epoch that the interval belongs to, from 0.
        steps: number of steps in the interval.
        count, excluded: number of samples with and without a score.
        mean: mean score, dimensionless, in [-1, 1].
        minimum, maximum: smallest and largest score.
        histogram: distribution of the scores.
        display_limit: half-width of the score axis; never decreases during a run.
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
        """Share of scores below zero, in [0, 1]: samples whose gradient opposes the head's weights."""
        return self.histogram.negative_fraction

    @property
    def quantiles(self) -> dict[str, float]:
        """The 5, 25, 50, 75 and 95 % quantiles of the scores, accurate to one bin of the histogram."""
        return score_quantiles(self.histogram, self.minimum, self.maximum)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that trackers show, by metric key without the prefix."""
        quantiles = self.quantiles
        values = {key: getattr(self, name) for key, name in STEP_KEYS.items()}
        return values | {key: quantiles[name] for key, name in QUANTILE_KEYS.items()}

    def merge(self, later: "IntervalRecord") -> "IntervalRecord":
        """Returns the union of this interval and a later one."""
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
    """The statistics of the scores of one epoch.

    Attributes:
        epoch: index of the epoch, from 0.
        step: index of the epoch's last step, counted from 0 over the whole run; -1 in a report that belongs to no run.
        count: number of samples with a score.
        excluded: number of samples without a score: the gradient or the embedding is zero or not finite.
        mean, std: mean and population standard deviation (divided by count) of the scores, dimensionless.
        skewness, excess_kurtosis: biased estimates (SciPy's default); excess kurtosis is 0 for a normal distribution.
        gwa: mean / (excess kurtosis + 1.2), as published, even beyond its pole. NaN where the kurtosis is undefined.
        stable_gwa: mean / (excess kurtosis + 3), which has no pole.
        separation: how well the scores fall into two groups, in (0, 1); see `gwa_logging.statistic`. NaN if all are equal.
        negative_fraction: share of scores below zero, in [0, 1].
        quantiles: the quantiles q05, q25, q50, q75 and q95 of the scores, accurate to one bin of the histogram.
        histogram: distribution of the scores.
        gwa_defined: False where the denominator of `gwa` is not clearly positive; then `gwa` is meaningless.
        consensus: agreement of the checkpoint with the model's own early predictions for the inputs of the look, in [0, 1]; see
            `gwa_logging.consensus`. None without a look and if it failed, and in the first epoch unless sample ids name its
            inputs.
        agreement: share of the samples whose scores in this epoch have the sign of their earlier ones, in [0, 1]; see
            `gwa_logging.agreement`. None in the first epoch, and unless the stop alert watches it.
        is_best: True if this is the best epoch so far by the statistic that the stop alert watches.
        stop: True if a stop alert stands after this epoch: from the epoch in which it fires until one that withdraws it.
        notes: sentences about what is unusual in this epoch.
    """

    kind: Literal["epoch"] = "epoch"
    epoch: Count
    step: int = Field(ge=-1, lt=MAX_COUNT)
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
    consensus: Annotated[float, Field(ge=0, le=1)] | None = None
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    is_best: bool = False
    stop: bool = False
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that trackers show, by metric key without the prefix."""
        values = {key: getattr(self, name) for key, name in (EPOCH_KEYS | OPTIONAL_KEYS).items()}
        return {key: float(value) for key, value in values.items() if value is not None}

    def __str__(self) -> str:
        """The most important numbers in one line."""
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
    """The advice to stop training.

    Attributes:
        epoch: the epoch after which the alert fired, from 0.
        best_epoch: the epoch whose checkpoint to use; -1 if no epoch had a defined value.
        statistic: the watched statistic: "separation", "stable", "gwa", "mean", "consensus" or "agreement".
        value, best_value: the statistic at `epoch` and at `best_epoch`.
        reason: why the alert fired.
        message: the advice in one sentence.
        caveats: reasons to doubt the advice, without a full stop.
    """

    TITLE: ClassVar = "GWA: stop"
    kind: Literal["alert"] = "alert"
    epoch: Count
    best_epoch: int = Field(ge=-1, lt=MAX_COUNT)
    statistic: str
    value: Number
    best_value: Number
    reason: StopReason
    message: str
    caveats: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The message and the caveats as the trackers show them: Markdown that also reads well as plain text."""
        caveats = [f"- But: {caveat}." for caveat in self.caveats]
        return "\n".join([self.message, *([""] if caveats else []), *caveats])

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that trackers show, by metric key without the prefix."""
        return {"best_epoch": self.best_epoch, "best_value": self.best_value, "stop_epoch": self.epoch}


class AlertWithdrawal(TimedRecord):
    """A clearly better epoch has withdrawn the stop alert. Another alert may follow.

    Attributes:
        epoch: the better epoch.
        alert_epoch: `epoch` of the StopAlert that no longer stands.
        message: the news in one sentence.
    """

    TITLE: ClassVar = "GWA: alert withdrawn"
    kind: Literal["withdrawal"] = "withdrawal"
    epoch: Count
    alert_epoch: Count
    message: str


class CloseRecord(TimedRecord):
    """The last line of a journal whose monitor was closed: a summary of the run.

    Attributes:
        epochs, steps: number of epochs and of training steps.
        best_epoch, best_value: of the statistic that the stop alert watches; None and NaN if it was never defined.
        faults: number of faults, by kind.
    """

    kind: Literal["close"] = "close"
    epochs: Count
    steps: Count
    best_epoch: Count | None
    best_value: Number
    faults: dict[str, Count]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that trackers show, by metric key without the prefix; empty without a best epoch."""
        return {} if self.best_epoch is None else {"best_epoch": self.best_epoch, "best_value": self.best_value}


AnyRecord = RunRecord | IntervalRecord | EpochReport | StopAlert | AlertWithdrawal | SuspectsRecord | CloseRecord
RECORDS: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])
"""Reads any record from its JSON line."""


def score_quantiles(histogram: Histogram, minimum: float, maximum: float) -> dict[str, float]:
    """Returns the quantiles of `QUANTILES` from a histogram, clipped to the smallest and the largest score."""
    values = histogram.quantiles(list(QUANTILES.values()))
    return {name: float(np.clip(q, minimum, maximum)) for name, q in zip(QUANTILES, values, strict=True)}
