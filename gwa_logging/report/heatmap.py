"""The distribution of scores over time, for pictures: bounded in size, however long the run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.histogram import BINS, DISPLAY_BINS, EDGES
from gwa_logging.records import IntervalRecord

_EDGES = EDGES.astype(np.float64)


class Heatmap(NamedTuple):
    """The numbers that a heatmap of scores shows.

    Attributes:
        steps: int64 [columns + 1]; column i covers the steps steps[i] to steps[i + 1] - 1.
        edges: float64 [bins + 1], of the scores.
        shares: float64 [bins, columns]; the share of a column's samples in each bin. Each column with scores sums to 1.
        medians: float64 [columns]; NaN where a column has no scores.
    """

    steps: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    medians: npt.NDArray[np.float64]


class Timeline:
    """Collects intervals in order. Once there are more than `columns`, each pair of neighbours is merged into one."""

    def __init__(self, columns: int = 400) -> None:
        self._columns = columns
        self._intervals: list[IntervalRecord] = []
        self._merged = 1  # intervals merged into each entry, except the last
        self._merged_in_last = 0  # intervals merged into the last entry

    def __len__(self) -> int:
        return len(self._intervals)

    def copy(self) -> "Timeline":
        """Returns a timeline with the same intervals, to which nothing is added when this one grows."""
        other = Timeline(self._columns)
        other._intervals = self._intervals.copy()  # the intervals themselves never change
        other._merged, other._merged_in_last = self._merged, self._merged_in_last
        return other

    def add(self, interval: IntervalRecord) -> None:
        """Adds the next interval."""
        if self._intervals and self._merged_in_last < self._merged:
            self._intervals[-1] = self._intervals[-1].merge(interval)
            self._merged_in_last += 1
            return
        self._intervals.append(interval)
        self._merged_in_last = 1
        if len(self._intervals) > self._columns:
            self._halve()

    def _halve(self) -> None:
        pairs = [self._intervals[i : i + 2] for i in range(0, len(self._intervals), 2)]
        if len(pairs[-1]) == 2:
            self._merged_in_last += self._merged
        self._intervals = [pair[0] if len(pair) == 1 else pair[0].merge(pair[1]) for pair in pairs]
        self._merged *= 2

    def __iter__(self) -> Iterator[IntervalRecord]:
        """Yields the intervals of the columns."""
        return iter(self._intervals)

    def heatmap(self, bins: int = DISPLAY_BINS, until: int | None = None) -> Heatmap:
        """Returns the heatmap of the intervals up to the step `until`, over the range in which the run's histograms are shown.

        A column that contains this step is left out unless it ends there. The range is that of all intervals.
        """
        limit = max((r.display_limit for r in self._intervals), default=1.0)
        shown = [r for r in self._intervals if until is None or r.step <= until]
        edges = np.linspace(-limit, limit, bins + 1)
        dense = np.array([r.histogram.dense() for r in shown], dtype=np.int64).reshape(-1, BINS)
        cumulative = np.pad(np.cumsum(dense, axis=1), ((0, 0), (1, 0)))
        totals = cumulative[:, -1:]
        # Computes what `Histogram.to_display` and `IntervalRecord.quantiles` do for all columns at once, because worker threads
        # call this during training.
        counts = np.diff(np.rint(_counts_below(cumulative, edges[1:-1])), axis=1, prepend=0, append=totals)
        first = [r.step - r.steps + 1 for r in shown[:1]]
        return Heatmap(
            steps=np.array([*first, *(r.step + 1 for r in shown)], dtype=np.int64),
            edges=edges,
            shares=(counts / np.maximum(totals, 1)).T,
            medians=_medians(shown, cumulative),
        )


def _medians(intervals: Sequence[IntervalRecord], cumulative: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    half = cumulative[:, -1] / 2
    # Index of the first edge with more than half of the samples below it.
    above = np.minimum((cumulative <= half[:, None]).sum(axis=1), BINS)
    rows = np.arange(len(cumulative))
    low, high = cumulative[rows, above - 1], cumulative[rows, above]
    within = (half - low) / np.maximum(high - low, 1)
    medians = _EDGES[above - 1] + within * (_EDGES[above] - _EDGES[above - 1])
    extremes = np.array([(r.minimum, r.maximum) for r in intervals], dtype=np.float64).reshape(-1, 2)
    return np.where(half > 0, np.clip(medians, extremes[:, 0], extremes[:, 1]), np.nan)


def _counts_below(cumulative: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the interpolated number of samples below each score, float64 [columns, scores]."""
    right = np.clip(np.searchsorted(_EDGES, scores, side="right"), 1, BINS)
    share = (scores - _EDGES[right - 1]) / (_EDGES[right] - _EDGES[right - 1])
    return cumulative[:, right - 1].astype(np.float64) + share * (cumulative[:, right] - cumulative[:, right - 1])
