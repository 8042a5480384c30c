"""AlignmentSummary: mergeable statistics of a set of scores, 4 KB in size.

It stores centred moments and no power sums, which suffer from cancellation: with a mean of 0.5 and a standard deviation of
0.005, power sums in float32 turn a kurtosis of 2.6 into -119. Merging is associative and commutative up to float64 rounding,
so summaries of steps, devices, processes and resumed runs can be merged in any order.

Source of the merge: P. Pebay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
statistical moments", Sandia report SAND2008-6212, 2008.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gwa_logging.alignment import (
    DEAD,
    GWA_BETA,
    GWA_MIN_DENOMINATOR,
    NOT_FINITE,
    STABLE_BETA,
    FloatArray,
    as_scores,
    gwa_from_moments,
    is_constant,
)
from gwa_logging.histogram import BINS, EDGES, Histogram
from gwa_logging.records import EpochReport, score_quantiles
from gwa_logging.score_bins import OUTCOMES, PADDING_OUTCOME, outcomes_of
from gwa_logging.statistic import estimate

FEW_SAMPLES = 200
"""Number of samples below which the standard error of a normal sample's kurtosis, sqrt(24 / n), exceeds 1/3."""

SUMMARY_NUMBERS = ("count", "mean", "m2", "m3", "m4", "minimum", "maximum", "no_gradient", "dead", "not_finite")
"""The order of the numbers in the vector of a summary. The adapters accumulate scores on the device in the same order."""


@dataclass(frozen=True, slots=True)
class AlignmentSummary:
    """Mergeable statistics of scores.

    Attributes:
        count: number of samples with a score.
        mean: mean score.
        m2, m3, m4: sums of the second, third and fourth powers of (score - mean).
        minimum, maximum: smallest and largest score; inf and -inf if count is 0.
        bins: int64 [512], counts over `gwa_logging.histogram.EDGES`.
        no_gradient, dead, not_finite: numbers of samples without a score, by reason (see `gwa_logging.alignment`).
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    no_gradient: int = 0
    dead: int = 0
    not_finite: int = 0

    @classmethod
    def from_scores(cls, scores: npt.ArrayLike) -> Self:
        """Summarises scores, float of any shape. Values that are not scores are counted by reason."""
        values = as_scores(scores)
        s = values[np.isfinite(values)]
        excluded = cls(
            no_gradient=int(np.isnan(values).sum()),
            dead=int((values == DEAD).sum()),
            not_finite=int((values == NOT_FINITE).sum()),
        )
        if not s.size:
            return excluded
        mean = float(s.mean())
        c = s - mean
        mean += float(c.mean())  # corrects rounding of about 1e-16, which matters if the spread is as small
        return replace(
            excluded,
            count=s.size,
            mean=mean,
            m2=float(np.sum(c**2)),
            m3=float(np.sum(c**3)),
            m4=float(np.sum(c**4)),
            minimum=float(s.min()),
            maximum=float(s.max()),
            bins=bin_counts(s),
        )

    @classmethod
    def merge_all(cls, summaries: Iterable["AlignmentSummary"]) -> "AlignmentSummary":
        """Returns the summary of all scores together."""
        total: AlignmentSummary = cls()
        for summary in summaries:
            total = total.merge(summary)
        return total

    def to_vector(self) -> FloatArray:
        """Encodes the summary for other processes and checkpoints.

        Returns:
            float64 [522]: the ten numbers in the order of `SUMMARY_NUMBERS`, then the bins.
        """
        return np.concatenate([[float(getattr(self, name)) for name in SUMMARY_NUMBERS], self.bins])

    @classmethod
    def from_vector(cls, vector: FloatArray) -> Self:
        """Decodes the result of `to_vector`. Counts up to 2**53 are exact."""
        numbers: dict[str, Any] = dict(zip(SUMMARY_NUMBERS, vector[:-BINS].tolist(), strict=True))
        numbers |= {name: int(numbers[name]) for name in ("count", "no_gradient", "dead", "not_finite")}
        return cls(**numbers, bins=vector[-BINS:].astype(np.int64))

    def merge(self, other: "AlignmentSummary") -> "AlignmentSummary":
        """Returns the summary of both sets of scores together."""
        if not self.seen:
            return other
        if not other.seen:
            return self
        a, b, n = self.count, other.count, self.count + other.count
        moments = {"mean": self.mean, "m2": self.m2, "m3": self.m3, "m4": self.m4}
        if b:
            share_a, share_b = a / n, b / n
            d = other.mean - self.mean
            cross = d * share_a * share_b  # d * a * b / n**2, without an overflow of a * b
            moments = {
                "mean": self.mean * share_a + other.mean * share_b,
                "m2": self.m2 + other.m2 + d * cross * n,
                "m3": self.m3
                + other.m3
                + d * d * cross * n * (share_a - share_b)
                + 3 * d * (share_a * other.m2 - share_b * self.m2),
                "m4": self.m4
                + other.m4
                + d**3 * cross * n * (share_a**2 - share_a * share_b + share_b**2)
                + 6 * d * d * (share_a**2 * other.m2 + share_b**2 * self.m2)
                + 4 * d * (share_a * other.m3 - share_b * self.m3),
            }
        return AlignmentSummary(
            count=n,
            **moments,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            bins=self.bins + other.bins,
            no_gradient=self.no_gradient + other.no_gradient,
            dead=self.dead + other.dead,
            not_finite=self.not_finite + other.not_finite,
        )

    @property
    def excluded(self) -> int:
        """Number of samples without a score."""
        return self.no_gradient + self.dead + self.not_finite

    @property
    def seen(self) -> int:
        """Number of all samples, with and without a score."""
        return self.count + self.excluded

    @property
    def std(self) -> float:
        """Population standard deviation of the scores; NaN if there are none."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    @property
    def constant(self) -> bool:
        """True if the scores have no spread, so that skewness and kurtosis are undefined."""
        largest = max(abs(self.minimum), abs(self.maximum))
        return not self.count or is_constant(self.m2 / self.count, largest)

    @property
    def skewness(self) -> float:
        """Biased skewness; NaN if undefined."""
        return math.nan if self.constant else self.m3 / self.count / self.std**3

    @property
    def excess_kurtosis(self) -> float:
        """Biased excess (Fisher) kurtosis, at least -2; NaN if undefined."""
        return math.nan if self.constant else self.m4 / self.count / self.std**4 - 3.0

    @property
    def histogram(self) -> Histogram:
        """The distribution of the scores."""
        return Histogram.from_dense(self.bins)

    def report(self, epoch: int = 0, step: int = -1) -> EpochReport:
        """Computes all statistics, with notes on what is unusual. `epoch` and `step` are copied into the report."""
        kurtosis, histogram = self.excess_kurtosis, self.histogram
        defined = math.isfinite(kurtosis) and kurtosis + GWA_BETA > GWA_MIN_DENOMINATOR
        return EpochReport(
            epoch=epoch,
            step=step,
            count=self.count,
            excluded=self.excluded,
            mean=self.mean if self.count else math.nan,
            std=self.std,
            skewness=self.skewness,
            excess_kurtosis=kurtosis,
            gwa=gwa_from_moments(self.mean, kurtosis, GWA_BETA),
            stable_gwa=gwa_from_moments(self.mean, kurtosis, STABLE_BETA),
            separation=math.nan if self.constant else estimate("separation", histogram).value,
            negative_fraction=histogram.negative_fraction,
            quantiles=score_quantiles(histogram, self.minimum, self.maximum),
            histogram=histogram,
            gwa_defined=defined,
            notes=tuple(self._notes(defined)),
        )

    def _notes(self, defined: bool) -> Iterable[str]:
        """Yields remarks for the user."""
        if self.no_gradient:
            yield f"{self.no_gradient} samples had no gradient at the head (padded, ignored or saturated)"
        if self.dead:
            yield f"{self.dead} samples had a zero embedding (dead features) or a zero weight at the head"
        if self.not_finite:
            yield f"{self.not_finite} samples had NaN or infinite logits, gradients or scores"
        if not self.count:
            yield "no sample had a score: every statistic is undefined"
        elif self.constant:
            yield "all scores are equal: kurtosis and GWA are undefined"
        elif not defined:
            yield (
                f"bimodal scores (excess kurtosis {self.excess_kurtosis:.3g}): the published GWA is at or beyond its pole and "
                "has no meaning; look at the separation and at stable GWA"
            )
        if 0 < self.count < FEW_SAMPLES:
            yield f"only {self.count} samples: kurtosis and GWA are inaccurate"
        if not self.constant and self.excess_kurtosis > 100:
            yield f"excess kurtosis {self.excess_kurtosis:.0f}: a few outliers dominate GWA"


def bin_counts(scores: FloatArray) -> npt.NDArray[np.int64]:
    """Returns int64 [512], the number of finite scores in each bin of `gwa_logging.histogram.EDGES`."""
    index = np.searchsorted(EDGES, scores, side="right") - 1
    return np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS).astype(np.int64)


def summary_vector(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Summarises scores in float64.

    Args:
        scores: float32 [rows], with markers.

    Returns:
        float64 [522], in the order of `AlignmentSummary.to_vector`.
    """
    outcomes = outcomes_of(scores)
    counts = np.bincount(outcomes, minlength=OUTCOMES)
    bins, (no_gradient, dead, not_finite, _) = counts[:BINS], counts[BINS:].tolist()
    count = scores.size - no_gradient - dead - not_finite - int(counts[PADDING_OUTCOME])
    mean = m2 = m3 = m4 = 0.0
    minimum, maximum = np.inf, -np.inf
    if count:
        if count < scores.size:
            scores = scores[outcomes < BINS]
        # The ufuncs and not the methods, which call further Python code.
        minimum, maximum = float(np.minimum.reduce(scores)), float(np.maximum.reduce(scores))
        x = scores.astype(np.float64)
        mean = float(np.add.reduce(x)) / count
        x -= mean
        correction = float(np.add.reduce(x)) / count  # of rounding, which matters if the spread is as small
        x -= correction
        mean += correction
        square = x * x
        m2, m3, m4 = (float(a.dot(b)) for a, b in ((x, x), (square, x), (square, square)))
    numbers = (count, mean, m2, m3, m4, minimum, maximum, no_gradient, dead, not_finite)
    return np.concatenate([numbers, bins])
