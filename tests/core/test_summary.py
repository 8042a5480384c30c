"""AlignmentSummary: moments compared with SciPy, merging, the report and its notes."""

import math
from functools import reduce

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gwa_logging import STABLE_BETA, AlignmentSummary, gwa

EPOCHS = ("unimodal", "heavy", "bimodal60_40", "uniform", "tiny")


@st.composite
def spread_scores(draw):
    """Scores around a mean with a spread from 1e-6 to 1."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = 10 ** draw(st.floats(-6, 0))
    mean = draw(st.floats(-0.9, 0.9))
    kind = draw(st.sampled_from([rng.normal, rng.laplace, rng.uniform]))
    return np.clip(mean + spread * kind(size=draw(st.integers(20, 400))), -1, 1).astype(np.float32)


def split(scores, pieces, seed=0):
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(scores), pieces - 1))
    return [AlignmentSummary.from_scores(piece) for piece in np.split(scores, cuts)]


def assert_same(a: AlignmentSummary, b: AlignmentSummary):
    assert a.count == b.count
    assert a.excluded == b.excluded
    np.testing.assert_array_equal(a.bins, b.bins)
    assert (a.minimum, a.maximum) == (b.minimum, b.maximum)
    scale = b.std or 1e-9
    assert a.mean == pytest.approx(b.mean, abs=1e-9 * scale)
    assert a.std == pytest.approx(b.std, rel=1e-9, abs=1e-12)
    if not b.constant:
        assert a.skewness == pytest.approx(b.skewness, rel=1e-6, abs=1e-6)
        assert a.excess_kurtosis + 3 == pytest.approx(b.excess_kurtosis + 3, rel=1e-6)


def assert_equals_scipy(summary: AlignmentSummary, scores, rel=1e-6):
    x = np.asarray(scores, dtype=np.float64)
    if x.std() < 1e-7:
        return
    assert summary.count == x.size
    assert summary.mean == pytest.approx(x.mean(), abs=rel * x.std())
    assert summary.std == pytest.approx(x.std(), rel=rel)
    assert summary.skewness == pytest.approx(scipy.stats.skew(x), abs=rel * (1 + abs(scipy.stats.skew(x))))
    assert summary.excess_kurtosis + 3 == pytest.approx(scipy.stats.kurtosis(x) + 3, rel=rel)


@given(scores=spread_scores(), pieces=st.integers(1, 12))
def test_merged_pieces_equal_scipy_on_the_whole(scores, pieces):
    assert_equals_scipy(reduce(AlignmentSummary.merge, split(scores, pieces)), scores)


@given(scores=spread_scores(), seed=st.integers(0, 1000))
def test_merging_does_not_depend_on_the_order(scores, seed):
    parts = split(scores, 7, seed)
    shuffled = [parts[i] for i in np.random.default_rng(seed).permutation(len(parts))]
    assert_same(AlignmentSummary.merge_all(shuffled), AlignmentSummary.merge_all(parts))


@given(scores=spread_scores())
def test_merging_is_associative(scores):
    a, b, c = split(scores, 3)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(scores=spread_scores())
@settings(max_examples=20)
def test_the_empty_summary_is_neutral(scores):
    summary = AlignmentSummary.from_scores(scores)
    assert_same(summary.merge(AlignmentSummary()), summary)
    assert_same(AlignmentSummary().merge(summary), summary)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_merged_report_has_the_published_gwa(published, epoch):
    scores = published[f"epoch_{epoch}/scores"]
    report = AlignmentSummary.merge_all(split(scores, 9)).report()
    assert report.gwa == pytest.approx(float(published[f"epoch_{epoch}/gwa"]), rel=1e-9)
    assert report.stable_gwa == pytest.approx(gwa(scores, STABLE_BETA), rel=1e-9)


def test_gwa_is_defined_for_unimodal_and_not_for_bimodal_scores(published):
    def report(epoch):
        return AlignmentSummary.from_scores(published[f"epoch_{epoch}/scores"]).report()

    assert report("unimodal").gwa_defined
    assert not report("bimodal60_40").gwa_defined
    assert any("bimodal" in note for note in report("bimodal60_40").notes)
    assert not any("bimodal" in note for note in report("unimodal").notes)


def test_constant_scores_give_nan_with_a_note():
    report = AlignmentSummary.from_scores(np.full(500, 0.3)).report()
    assert math.isnan(report.gwa)
    assert math.isnan(report.stable_gwa)
    assert not report.gwa_defined
    assert any("all scores are equal" in note for note in report.notes)


def test_samples_without_a_score_are_excluded_and_counted_by_reason():
    summary = AlignmentSummary.from_scores([0.1, np.nan, np.nan, -np.inf, np.inf, 7.0, 0.2])
    assert (summary.count, summary.no_gradient, summary.dead, summary.not_finite) == (2, 2, 1, 2)
    notes = " ".join(summary.report().notes)
    assert "2 samples had no gradient" in notes
    assert "1 samples had a zero embedding" in notes
    assert "2 samples had NaN or infinite" in notes


def test_without_scores_the_report_is_nan_with_a_note():
    report = AlignmentSummary.from_scores([np.nan]).report()
    assert report.count == 0
    assert math.isnan(report.mean)
    assert any("no sample had a score" in note for note in report.notes)


def test_one_outlier_among_thousands_is_exact_and_noted():
    scores = np.concatenate([np.random.default_rng(0).normal(0, 1e-4, 8000), [0.9]])
    report = AlignmentSummary.from_scores(scores).report()
    assert report.excess_kurtosis == pytest.approx(scipy.stats.kurtosis(scores), rel=1e-6)
    assert any("outliers" in note for note in report.notes)


def test_quantiles_stay_between_the_smallest_and_the_largest_score():
    report = AlignmentSummary.from_scores([0.5, 0.5001, 0.5002]).report()
    assert all(0.5 <= q <= 0.5002 for q in report.quantiles.values())
