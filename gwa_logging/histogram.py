"""A histogram of scores whose edges never change, so that merging two is adding them.

Scores of a head with C classes are about 1/sqrt(C - 1) in size: 1 for two classes, 0.007 for 21,843. So the edges are
symmetric-logarithmic: linear around zero, logarithmic outside. Zero is an edge, hence the share of negative scores is
exact. People are shown at most 64 equal bins (`Histogram.to_display`).
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
"""Below this size of score the bins are about equally wide (3e-5); above it they widen by 3 % a bin."""

DISPLAY_BINS = 64
MOST = 2**53
"""Upper bound of a bin's count: larger numbers are not exact as floats, and 512 of these still fit into an int64."""

_LADDER = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def _edges() -> npt.NDArray[np.float32]:
    positions = np.linspace(-1.0, 1.0, BINS + 1) * np.arcsinh(1 / LINEAR_WITHIN)
    return np.asarray(LINEAR_WITHIN * np.sinh(positions), dtype=np.float32)


EDGES = _edges()
"""float32 [513], ascending from -1 to 1. Bin i holds EDGES[i] <= score < EDGES[i + 1]; the outermost two hold what is
beyond as well. They are float32 in every framework, so that the same float32 score falls into the same bin everywhere."""
EDGES.flags.writeable = False


class Histogram(BaseModel):
    """Counts over `EDGES`, without the empty bins at both ends.

    Attributes:
        first: index of the first bin in `counts`, from 0 to 511.
        counts: number of scores per bin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(default=0, ge=0, le=BINS)
    counts: tuple[int, ...] = Field(default=(), max_length=BINS)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.first + len(self.counts) > BINS or min(self.counts, default=0) < 0:
            raise ValueError(f"counts do not fit: first={self.first} and {len(self.counts)} counts, for {BINS} bins")
        if max(self.counts, default=0) >= MOST:
            raise ValueError(f"counts: expected less than {MOST} in each bin")
        return self

    @classmethod
    def from_dense(cls, dense: npt.NDArray[np.int64]) -> Self:
        """From one count for each of the 512 bins."""
        occupied = np.flatnonzero(dense)
        if not occupied.size:
            return cls()
        first, last = int(occupied[0]), int(occupied[-1])
        return cls(first=first, counts=tuple(dense[first : last + 1].tolist()))

    def dense(self) -> npt.NDArray[np.int64]:
        """int64 [512]: the count of every bin."""
        out = np.zeros(BINS, dtype=np.int64)
        out[self.first : self.first + len(self.counts)] = self.counts
        return out

    @property
    def total(self) -> int:
        """Number of scores."""
        return sum(self.counts)

    @property
    def negative_fraction(self) -> float:
        """Share of scores below zero, in [0, 1]; NaN if there are none."""
        total = self.total
        below = sum(self.counts[: max(0, BINS_PER_SIDE - self.first)])
        return below / total if total else float("nan")

    def merge(self, other: "Histogram") -> "Histogram":
        """The histogram of both sets of scores together."""
        return Histogram.from_dense(np.minimum(self.dense() + other.dense(), MOST - 1))

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """Scores below which the given shares lie, interpolated in the bin: right to within one bin's width.

        Args:
            at: shares in [0, 1].

        Returns:
            One score per share, in [-1, 1]; NaN if the histogram is empty.
        """
        total = self.total
        if not total:
            return [float("nan")] * len(at)
        edges = EDGES[self.first : self.first + len(self.counts) + 1].astype(np.float64)
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        return [float(q) for q in np.interp(np.asarray(at) * total, cumulative, edges)]

    def display_limit(self, at_least: float = _LADDER[0]) -> float:
        """Half-width of a display range, from the ladder 0.001, 0.002, 0.005, ... 1, that shows nearly all scores.

        Args:
            at_least: the limit shown so far. The range of a run only grows, so that its pictures stay comparable.

        Returns:
            The smallest rung that leaves at most one score in a thousand outside.
        """
        low, high = self.quantiles([0.0005, 0.9995])
        reach = max(abs(low), abs(high)) if self.total else 0.0
        return next((rung for rung in _LADDER if rung >= max(reach, at_least)), 1.0)

    def to_display(
        self, bins: int = DISPLAY_BINS, limit: float | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Equal bins for people, over [-limit, limit].

        Args:
            bins: number of bins, 1 to 512.
            limit: half-width of the range, dimensionless; None takes `display_limit()`.

        Returns:
            counts int64 [bins], edges float64 [bins + 1]. The counts add up to `total`: what lies outside the range
            is counted in the outermost bin of its side.
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
