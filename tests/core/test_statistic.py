"""The statistics of the stop rule, compared with NumPy; their standard errors, with the spread over fresh samples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwa_logging import AlignmentSummary, gwa
from gwa_logging.alignment import STABLE_BETA
from gwa_logging.histogram import Histogram
from gwa_logging.statistic import estimate


def histogram_of(scores):
    return AlignmentSummary.from_scores(scores).histogram


def best_split(scores):
    """The oracle: tries every threshold between two sorted scores."""
    s = np.sort(np.asarray(scores, dtype=np.float64))
    best = 0.0
    for cut in range(1, len(s)):
        low, high = s[:cut], s[cut:]
        between = cut * (low.mean() - s.mean()) ** 2 + (len(s) - cut) * (high.mean() - s.mean()) ** 2
        best = max(best, between / ((s - s.mean()) ** 2).sum())
    return best


def two_groups(n, share=0.7, distance=4.0, seed=0, scale=0.05):
    rng = np.random.default_rng(seed)
    return scale * (rng.standard_normal(n) + distance * (rng.random(n) < share))


STATISTICS = {
    "separation": best_split,
    "mean": np.mean,
    "stable": lambda s: gwa(s, STABLE_BETA),
    "gwa": gwa,
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("distance", [0.0, 1.5, 4.0])
def test_the_value_equals_that_of_the_scores_to_within_a_bin(statistic, distance):
    scores = two_groups(1000, distance=distance)
    assert estimate(statistic, histogram_of(scores)).value == pytest.approx(STATISTICS[statistic](scores), rel=0.02)


@pytest.mark.parametrize(
    ("statistic", "share", "distance"),
    [
        *[
            (name, *shape)
            for name in ("separation", "mean", "stable")
            for shape in [(0.6, 2.0), (0.9, 5.0), (0.7, 3.0)]
        ],
        ("gwa", 0.9, 5.0),  # away from its pole, near which its spread over samples is unbounded
        ("gwa", 1.0, 5.0),
    ],
)
def test_the_standard_error_is_the_spread_over_fresh_samples(statistic, share, distance):
    values = [
        estimate(statistic, histogram_of(two_groups(2000, share, distance, seed=seed))).value for seed in range(400)
    ]
    error = estimate(statistic, histogram_of(two_groups(2000, share, distance, seed=1000))).standard_error
    assert error == pytest.approx(np.std(values), rel=0.25)  # a spread over 400 has an error of 4 %


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param(np.random.default_rng(0).normal(0.1, 0.03, 200_000), 2 / math.pi, id="normal"),
        pytest.param(np.linspace(-0.4, 0.4, 100_001), 3 / 4, id="uniform"),
        pytest.param([-0.5] * 30 + [0.5] * 70, 1.0, id="two points"),
    ],
)
def test_separation_of_known_shapes(scores, expected):
    assert AlignmentSummary.from_scores(scores).report().separation == pytest.approx(expected, abs=0.005)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_separation_depends_on_neither_scale_nor_sign(largest, share, seed):
    scores = two_groups(500, share, 3.0, seed)
    scores *= largest / np.abs(scores).max()  # outside [-1, 1] there are no scores
    value = estimate("separation", histogram_of(scores)).value
    assert value == pytest.approx(best_split(scores), rel=0.01)
    assert estimate("separation", histogram_of(-scores)).value == pytest.approx(value, rel=1e-6)


def test_separation_falls_when_two_groups_merge():
    values = [AlignmentSummary.from_scores(two_groups(5000, distance=d)).report().separation for d in (6, 4, 2, 1)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("scores", [[], [0.2], [0.2] * 50], ids=["none", "one", "all equal"])
def test_without_a_spread_every_statistic_is_undefined(scores):
    for statistic in STATISTICS:
        assert all(math.isnan(number) for number in estimate(statistic, histogram_of(scores)))
    assert math.isnan(AlignmentSummary.from_scores(scores).report().separation)


def test_small_scores_of_a_head_with_many_classes_are_resolved():
    scores = two_groups(5000, scale=1e-4)
    assert estimate("separation", histogram_of(scores)).value == pytest.approx(best_split(scores), rel=0.02)


def test_an_empty_histogram_has_no_estimate():
    assert math.isnan(estimate("separation", Histogram()).value)
