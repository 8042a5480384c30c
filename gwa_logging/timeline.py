"""The distribution of scores over time, for pictures: bounded, however long the run."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.types import IntervalRecord


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
        columns = [r.histogram.to_display(bins, limit) for r in self._intervals]
        counts = np.array([c for c, _ in columns], dtype=np.float64).reshape(len(columns), bins)
        first = [r.step - r.steps + 1 for r in self._intervals[:1]]
        return Heatmap(
            steps=np.array([*first, *(r.step + 1 for r in self._intervals)], dtype=np.int64),
            edges=np.linspace(-limit, limit, bins + 1),
            shares=(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).T,
            medians=np.array([r.quantiles["q50"] for r in self._intervals]),
        )
