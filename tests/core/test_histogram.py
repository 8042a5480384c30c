"""The histogram: resolution for few and for many classes, merging, quantiles, display."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gwa_logging import AlignmentSummary, InvalidInputError
from gwa_logging.histogram import BINS, EDGES, Histogram

any_scores = arrays(np.float32, st.integers(1, 80), elements=st.floats(-1, 1, width=32))


def histogram_of(scores) -> Histogram:
    return AlignmentSummary.from_scores(scores).histogram


def test_edges_are_symmetric_and_include_zero():
    assert EDGES.dtype == np.float32
    assert EDGES[BINS // 2] == 0
    assert EDGES[0] == -1
    assert EDGES[-1] == 1
    np.testing.assert_array_equal(EDGES, -EDGES[::-1])
    assert (np.diff(EDGES) > 0).all()


@pytest.mark.parametrize("classes", [2, 10, 1000, 21_843])
def test_scores_of_few_or_many_classes_fill_at_least_30_bins(classes):
    size = 1 / math.sqrt(classes - 1)  # of a score at neural collapse
    scores = np.random.default_rng(0).normal(0.6 * size, 0.25 * size, 5000).clip(-size, size)
    assert np.count_nonzero(histogram_of(scores).dense()) >= 30


@given(scores=any_scores)
def test_counts_equal_numpys_histogram(scores):
    want, _ = np.histogram(scores, bins=EDGES)
    np.testing.assert_array_equal(histogram_of(scores).dense(), want)


@given(scores=any_scores, bins=st.integers(1, 512), limit=st.floats(1e-4, 1))
def test_display_keeps_the_total_for_every_range(scores, bins, limit):
    histogram = histogram_of(scores)
    counts, edges = histogram.to_display(bins, limit)
    assert counts.sum() == histogram.total == len(scores)
    assert (counts >= 0).all()
    assert len(edges) == bins + 1
    assert edges[0] == -limit


def test_display_looks_like_the_distribution():
    scores = np.random.default_rng(0).normal(0.1, 0.05, 200_000)
    counts, edges = histogram_of(scores).to_display(64, 0.5)
    want, _ = np.histogram(scores, bins=edges)
    assert np.abs(counts - want).max() < 0.03 * want.max()


@given(a=any_scores, b=any_scores)
def test_merging_is_adding(a, b):
    merged = histogram_of(a).merge(histogram_of(b))
    np.testing.assert_array_equal(merged.dense(), histogram_of(np.concatenate([a, b])).dense())


@given(scores=any_scores)
def test_the_share_of_negative_scores_is_exact(scores):
    assert histogram_of(scores).negative_fraction == np.mean(scores < 0)


def test_quantiles_are_accurate_to_a_bin():
    scores = np.random.default_rng(0).normal(0.02, 0.1, 10_000).clip(-1, 1)
    at = [0.05, 0.25, 0.5, 0.75, 0.95]
    for have, want in zip(histogram_of(scores).quantiles(at), np.quantile(scores, at), strict=True):
        assert abs(have - want) <= 0.03 * abs(want) + 4e-5


def test_quantiles_skip_empty_bins():
    low, high = histogram_of([-0.5] * 10 + [0.5] * 10).quantiles([0.25, 0.75])
    assert low == pytest.approx(-0.5, rel=0.03)
    assert high == pytest.approx(0.5, rel=0.03)


def test_the_display_range_only_grows():
    small, large = histogram_of([0.004] * 10), histogram_of([0.3] * 10)
    assert small.display_limit() == 0.005
    assert large.display_limit(0.005) == 0.5
    assert small.display_limit(0.5) == 0.5


def test_an_empty_histogram_has_no_quantiles():
    assert math.isnan(Histogram().quantiles([0.5])[0])
    assert Histogram().to_display(8, 1.0)[0].sum() == 0


@pytest.mark.parametrize(("arguments", "named"), [((0, 1.0), "bins"), ((513, 1.0), "bins"), ((64, 0.0), "limit")])
def test_impossible_display_arguments_are_named(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        histogram_of([0.1]).to_display(*arguments)


@given(scores=any_scores, size=st.floats(1e-4, 1), at_least=st.sampled_from((0.001, 0.01, 0.3, 0.5, 1.0)))
def test_the_display_limit_follows_from_the_quantiles(scores, size, at_least):
    histogram = histogram_of(scores * np.float32(size))
    low, high = histogram.quantiles([0.0005, 0.9995])
    reach = max(abs(low), abs(high), at_least)
    limits = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert histogram.display_limit(at_least) == min(limit for limit in limits if limit >= reach)


def test_an_empty_histogram_keeps_the_display_limit():
    assert Histogram().display_limit(0.2) == 0.2


@pytest.mark.parametrize("dense", [np.full(BINS, -1), np.full(BINS, 2**53), np.ones(BINS + 1, int)])
def test_counts_that_a_histogram_cannot_have_are_refused(dense):
    with pytest.raises(ValueError, match="counts"):
        Histogram.from_dense(dense)
