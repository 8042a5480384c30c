"""A histogram of scores with fixed edges: to merge two histograms, add their counts.

The scores of a head with C classes have a size of about 1/sqrt(C - 1): 1 for two classes, 0.007 for 21,843. To resolve
both, the edges are symmetric-logarithmic: linear around zero, logarithmic outside. Zero is an edge, so the share of negative
scores is exact. For display, `Histogram.to_display` converts to at most 64 bins of equal width.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gwa_logging.errors import InvalidInputError

BINS_PER_SIDE = 256
BINS = 2 * BINS_PER_SIDE
LINEAR_WITHIN = 1e-3
"""Size of score below which all bins are about 3e-5 wide; above it each bin is 3 % wider than the one before."""

DISPLAY_BINS = 64
MAX_COUNT = 2**53
"""Upper bound of a count: larger integers are not exact in float64, and the sum of 512 such counts fits into int64."""

_DISPLAY_LIMITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def _edges() -> npt.NDArray[np.float32]:
    positions = np.linspace(-1.0, 1.0, BINS + 1) * np.arcsinh(1 / LINEAR_WITHIN)
    return np.asarray(LINEAR_WITHIN * np.sinh(positions), dtype=np.float32)


EDGES = _edges()
"""float32 [513], ascending from -1 to 1. Bin i counts EDGES[i] <= score < EDGES[i + 1]; the first and the last bin also
count scores beyond the edges. The edges are float32 in every framework, so that a float32 score falls into the same bin
everywhere."""
EDGES.flags.writeable = False


class Histogram(BaseModel):
    """Counts of scores per bin of `EDGES`. Empty bins at both ends are not stored.

    Attributes:
        first: index of the first bin in `counts`, from 0 to 511.
        counts: number of scores per bin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(default=0, ge=0, le=BINS)
    counts: tuple[int, ...] = Field(default=(), max_length=BINS)

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.first + len(self.counts) > BINS or min(self.counts, default=0) < 0:
            raise ValueError(
                f"counts: expected non-negative counts for {BINS} bins at most, found {len(self.counts)} from bin {self.first}"
            )
        if max(self.counts, default=0) >= MAX_COUNT:
            raise ValueError(f"counts: expected less than {MAX_COUNT} in each bin")
        return self

    @classmethod
    def from_dense(cls, dense: npt.NDArray[np.int64]) -> Self:
        """Creates a histogram from int64 [512], the count of every bin."""
        (occupied,) = dense.nonzero()
        if not occupied.size:
            return cls()
        first, last = int(occupied[0]), int(occupied[-1])
        counts = tuple(dense[first : last + 1].tolist())
        if not (len(dense) == BINS and min(counts) >= 0 and max(counts) < MAX_COUNT):
            return cls(first=first, counts=counts)  # which raises
        return cls.model_construct(first=first, counts=counts)  # a third of the time: it is in a training step

    def dense(self) -> npt.NDArray[np.int64]:
        """Returns int64 [512], the count of every bin."""
        out = np.zeros(BINS, dtype=np.int64)
        out[self.first : self.first + len(self.counts)] = self.counts
        return out

    @property
    def total(self) -> int:
        """Number of scores."""
        return sum(self.counts)

    @property
    def negative_fraction(self) -> float:
        """Share of scores below zero, in [0, 1]; NaN for an empty histogram."""
        total = self.total
        below = sum(self.counts[: max(0, BINS_PER_SIDE - self.first)])
        return below / total if total else float("nan")

    def merge(self, other: "Histogram") -> "Histogram":
        """Returns the histogram of both sets of scores together."""
        return Histogram.from_dense(np.minimum(self.dense() + other.dense(), MAX_COUNT - 1))

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """Returns the quantiles of the scores, accurate to the width of a bin.

        Args:
            at: probabilities in [0, 1].

        Returns:
            One score per probability, in [-1, 1], interpolated within its bin; NaN for an empty histogram.
        """
        total = self.total
        if not total:
            return [float("nan")] * len(at)
        edges = EDGES[self.first : self.first + len(self.counts) + 1].astype(np.float64)
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        return [float(q) for q in np.interp(np.asarray(at) * total, cumulative, edges)]

    def display_limit(self, at_least: float = _DISPLAY_LIMITS[0]) -> float:
        """Chooses the half-width of a display range for nearly all scores, from 0.001, 0.002, 0.005, 0.01, ... 1.

        Args:
            at_least: the limit used so far. The range of a run only grows, so that its histograms stay comparable.

        Returns:
            The smallest of these limits that leaves at most one score in a thousand outside.
        """
        last = self.first + len(self.counts)
        reaches = -float(EDGES[self.first]), float(EDGES[last])
        if at_least in _DISPLAY_LIMITS and max(reaches) <= at_least:
            return at_least  # all bins are inside
        low, high = self.quantiles([0.0005, 0.9995])
        reach = max(abs(low), abs(high)) if self.total else 0.0
        return next((limit for limit in _DISPLAY_LIMITS if limit >= max(reach, at_least)), 1.0)

    def to_display(
        self, bins: int = DISPLAY_BINS, limit: float | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Converts to bins of equal width over [-limit, limit], for display.

        Args:
            bins: number of bins, 1 to 512.
            limit: half-width of the range, dimensionless; None takes `display_limit()`.

        Returns:
            counts int64 [bins], edges float64 [bins + 1]. The counts add up to `total`: the first and the last bin also
            count the scores outside the range.
        """
        if not 1 <= bins <= BINS:
            raise InvalidInputError(f"bins: expected 1 to {BINS}, found {bins}")
        limit = self.display_limit() if limit is None else limit
        if not limit > 0:
            raise InvalidInputError(f"limit: expected a positive half-width such as 0.5, found {limit}")
        edges = np.linspace(-limit, limit, bins + 1)
        cumulative = np.concatenate([[0], np.cumsum(self.dense())])
        at_edges = np.rint(np.interp(edges, EDGES.astype(np.float64), cumulative)).astype(np.int64)
        at_edges[0], at_edges[-1] = 0, cumulative[-1]
        return np.diff(at_edges), edges
