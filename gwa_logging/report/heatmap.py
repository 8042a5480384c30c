"""The distribution of scores over time, for pictures: bounded, however long the run."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.histogram import BINS, DISPLAY_BINS, EDGES
from gwa_logging.records import IntervalRecord

_EDGES = EDGES.astype(np.float64)


class Heatmap(NamedTuple):
    """A picture's numbers.

    Attributes:
        steps: int64 [columns + 1]; column i covers the steps steps[i] to steps[i + 1] - 1.
        edges: float64 [bins + 1], of the scores.
        shares: float64 [bins, columns]; the share of a column's samples in each bin, so that columns add up to 1.
        medians: float64 [columns]; NaN where a column has no scores.
    """

    steps: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    medians: npt.NDArray[np.float64]


class Timeline:
    """Takes in intervals; whenever there are more than `columns`, neighbours are merged, two into one."""

    def __init__(self, columns: int = 400) -> None:
        self._most = columns
        self._intervals: list[IntervalRecord] = []
        self._merged = 1  # original intervals per entry; the last entry may hold fewer
        self._in_last = 0

    def __len__(self) -> int:
        return len(self._intervals)

    def add(self, interval: IntervalRecord) -> None:
        """Takes in the next interval."""
        if self._intervals and self._in_last < self._merged:
            self._intervals[-1] = self._intervals[-1].merge(interval)
            self._in_last += 1
            return
        self._intervals.append(interval)
        self._in_last = 1
        if len(self._intervals) > self._most:
            pairs = [self._intervals[i : i + 2] for i in range(0, len(self._intervals), 2)]
            self._in_last = self._in_last if len(pairs[-1]) == 1 else self._merged + self._in_last
            self._intervals = [pair[0] if len(pair) == 1 else pair[0].merge(pair[1]) for pair in pairs]
            self._merged *= 2

    def heatmap(self, bins: int = DISPLAY_BINS) -> Heatmap:
        """The picture so far, over the range that the run's histograms are shown in."""
        limit = max((r.display_limit for r in self._intervals), default=1.0)
        edges = np.linspace(-limit, limit, bins + 1)
        dense = np.array([r.histogram.dense() for r in self._intervals], dtype=np.int64).reshape(-1, BINS)
        cumulative = np.pad(np.cumsum(dense, axis=1), ((0, 0), (1, 0)))
        totals = cumulative[:, -1:]
        # As `Histogram.to_display` and `IntervalRecord.quantiles` do it, for all columns at once: worker threads draw this
        # while somebody trains.
        counts = np.diff(np.rint(_interpolated(cumulative, edges)), axis=1, prepend=0, append=totals)
        first = [r.step - r.steps + 1 for r in self._intervals[:1]]
        return Heatmap(
            steps=np.array([*first, *(r.step + 1 for r in self._intervals)], dtype=np.int64),
            edges=edges,
            shares=(counts / np.maximum(totals, 1)).T,
            medians=self._medians(cumulative),
        )

    def _medians(self, cumulative: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        half = cumulative[:, -1] / 2
        above = np.minimum(
            (cumulative <= half[:, None]).sum(axis=1), BINS
        )  # the first edge with more than half below it
        rows = np.arange(len(cumulative))
        low, high = cumulative[rows, above - 1], cumulative[rows, above]
        within = (half - low) / np.maximum(high - low, 1)
        medians = _EDGES[above - 1] + within * (_EDGES[above] - _EDGES[above - 1])
        extremes = np.array([(r.minimum, r.maximum) for r in self._intervals], dtype=np.float64).reshape(-1, 2)
        return np.where(half > 0, np.clip(medians, extremes[:, 0], extremes[:, 1]), np.nan)


def _interpolated(cumulative: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How many samples lie below the inner ones of `edges`, float64 [columns, edges - 2]."""
    inner = edges[1:-1]
    right = np.clip(np.searchsorted(_EDGES, inner, side="right"), 1, BINS)
    share = (inner - _EDGES[right - 1]) / (_EDGES[right] - _EDGES[right - 1])
    return cumulative[:, right - 1].astype(np.float64) + share * (cumulative[:, right] - cumulative[:, right - 1])
