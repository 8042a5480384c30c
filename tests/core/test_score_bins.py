"""The table of bins against a search over all edges: equal for every float32."""

import warnings

import numpy as np
import pytest

from gwa_logging import AlignmentSummary
from gwa_logging.alignment import DEAD, NO_GRADIENT, NOT_FINITE, SCORE_TOLERANCE
from gwa_logging.histogram import BINS, EDGES
from gwa_logging.score_bins import (
    DEAD_OUTCOME,
    NO_GRADIENT_OUTCOME,
    NOT_FINITE_OUTCOME,
    OUTCOMES,
    PADDING,
    PADDING_OUTCOME,
    outcomes_of,
)
from gwa_logging.summary import summary_vector
from tests.core.test_summary import assert_equals_scipy


def searched(values):
    """The outcomes by the definition, with NumPy's search in float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = values.astype(np.float64)
    conditions = [np.isnan(x), x == DEAD, x == PADDING, ~(np.abs(x) <= 1 + SCORE_TOLERANCE)]
    reasons = [NO_GRADIENT_OUTCOME, DEAD_OUTCOME, PADDING_OUTCOME, NOT_FINITE_OUTCOME]
    bins = np.clip(np.searchsorted(EDGES.astype(np.float64), x, side="right") - 1, 0, BINS - 1)
    return np.select(conditions, reasons, bins)


def neighbours(values):
    """The values and the float32 before and after each."""
    values = np.asarray(values, np.float32)
    return np.concatenate([values, *(np.nextafter(values, np.float32(to)) for to in (-np.inf, np.inf))])


def test_every_edge_and_its_neighbours_are_in_the_bins_that_a_search_finds():
    values = neighbours(EDGES)
    np.testing.assert_array_equal(outcomes_of(values), searched(values))


def test_the_ends_of_all_cells_of_the_table_are_in_the_bins_that_a_search_finds():
    """Within a cell the outcome changes once at most, so equal ends and equal edges mean that all values are equal."""
    firsts = np.arange(1 << 15, dtype=np.uint32) << 17
    values = np.concatenate([firsts, firsts | 1, firsts | ((1 << 17) - 1), firsts | ((1 << 17) - 2)]).view(np.float32)
    np.testing.assert_array_equal(outcomes_of(values), searched(values))


def test_markers_and_their_neighbours_are_what_they_mean():
    limits = np.float32(
        [1, -1, 1 + SCORE_TOLERANCE, -1 - SCORE_TOLERANCE, PADDING, -PADDING, 64, -128, 128, 0, -0.0, 1e-45]
    )
    values = np.concatenate([neighbours(limits), np.float32([np.inf, -np.inf, np.nan, -np.nan, 3e38, -3e38])])
    np.testing.assert_array_equal(outcomes_of(values), searched(values))
    markers = np.float32([NO_GRADIENT, DEAD, NOT_FINITE, PADDING])
    reasons = [NO_GRADIENT_OUTCOME, DEAD_OUTCOME, NOT_FINITE_OUTCOME, PADDING_OUTCOME]
    np.testing.assert_array_equal(outcomes_of(markers), reasons)


@pytest.mark.parametrize("seed", range(4))
def test_millions_of_random_float32_are_in_the_bins_that_a_search_finds(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, 500_000, dtype=np.uint32).view(np.float32)
    logarithmic = (rng.choice([-1, 1], 250_000) * 10 ** rng.uniform(-9, 0.01, 250_000)).astype(np.float32)
    values = np.concatenate([bits, logarithmic, rng.uniform(-1.01, 1.01, 250_000).astype(np.float32)])
    np.testing.assert_array_equal(outcomes_of(values), searched(values))


@pytest.mark.slow
def test_every_float32_is_in_the_bin_that_a_search_finds():
    """All 2**32 of them except the NaNs' payloads; half a minute."""
    step = 1 << 22
    for begin in range(0, 1 << 32, step):
        values = np.arange(begin, begin + step, dtype=np.uint64).astype(np.uint32).view(np.float32)
        if not np.isnan(values).all():
            # float32 is exact in float64, so searching in float32 is the same search
            bins = np.clip(np.searchsorted(EDGES, values, side="right") - 1, 0, BINS - 1)
            found = outcomes_of(values)
            is_score = np.abs(values) <= np.float64(1 + SCORE_TOLERANCE)
            assert (found[is_score] == bins[is_score]).all()
            assert (found[~is_score] >= BINS).all()


@pytest.mark.parametrize("size", [0, 1, 2, 1_000_000])
def test_the_summary_of_any_number_of_rows_equals_float64(size):
    scores = np.random.default_rng(0).normal(0.01, 0.3, size).clip(-1, 1).astype(np.float32)
    vector = summary_vector(scores)
    np.testing.assert_allclose(vector, AlignmentSummary.from_scores(scores).to_vector(), rtol=1e-12, atol=1e-12)
    assert vector.shape == (10 + BINS,)
    if size > 2:
        assert_equals_scipy(AlignmentSummary.from_vector(vector), scores)


def test_a_summary_of_markers_alone_has_no_score_and_warns_of_nothing():
    scores = np.float32([np.nan, -np.inf, np.inf, PADDING, 3.0, -3.0, -np.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = AlignmentSummary.from_vector(summary_vector(scores))
    assert (summary.count, summary.no_gradient, summary.dead, summary.not_finite) == (0, 2, 1, 3)
    assert (summary.minimum, summary.maximum) == (np.inf, -np.inf)
    assert OUTCOMES == BINS + 4


def test_scores_that_are_not_contiguous_are_read_in_their_order():
    scores = np.random.default_rng(0).uniform(-1, 1, (100, 3)).astype(np.float32)
    np.testing.assert_array_equal(outcomes_of(scores[:, 1]), searched(scores[:, 1]))
