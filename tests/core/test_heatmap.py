"""The timeline of a heatmap: its size is bounded, and it contains every sample."""

import numpy as np
import pytest

from gwa_logging.report.heatmap import Timeline
from tests.records import interval_record


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 1001])
def test_the_number_of_columns_is_bounded_and_every_sample_is_included(n):
    timeline = Timeline(columns=8)
    for step in range(n):
        timeline.add(interval_record(step))
    heatmap = timeline.heatmap()
    columns = heatmap.shares.shape[1]
    assert columns <= 8
    assert columns > min(n, 8) / 2 - 1
    assert (heatmap.steps[0], heatmap.steps[-1]) == (0, n)
    assert (np.diff(heatmap.steps) > 0).all()
    np.testing.assert_allclose(heatmap.shares.sum(axis=0), 1)
    assert sum(r.count for r in timeline._intervals) == 3 * n
    widths = np.diff(heatmap.steps)[:-1]
    assert len(set(widths)) <= 1  # all columns but the last span the same number of intervals


def test_the_median_equals_that_of_the_scores():
    timeline = Timeline()
    timeline.add(interval_record(0, (0.1, 0.2, 0.3)))
    assert timeline.heatmap().medians[0] == pytest.approx(0.2, rel=0.05)


def test_an_empty_timeline_has_an_empty_heatmap():
    assert Timeline().heatmap().shares.shape == (64, 0)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_a_copy_does_not_change_when_the_original_grows(n):
    timeline = Timeline(columns=8)
    for step in range(n):
        timeline.add(interval_record(step))
    copy, before = timeline.copy(), timeline.heatmap()
    for step in range(n, 3 * n):
        timeline.add(interval_record(step))
    for expected, found in zip(before, copy.heatmap(), strict=True):
        np.testing.assert_array_equal(found, expected)
    for step in range(n, 3 * n):
        copy.add(interval_record(step))
    for expected, found in zip(timeline.heatmap(), copy.heatmap(), strict=True):
        np.testing.assert_array_equal(found, expected)
