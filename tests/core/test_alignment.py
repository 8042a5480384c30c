"""The NumPy reference, compared with the numbers of the published code and with the definitions."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gwa_logging
from gwa_logging import InvalidInputError, alignment_scores, gwa
from gwa_logging.alignment import DEAD, NOT_FINITE, is_constant

CASES = ("hard10", "smooth10", "mixup100", "hard1000", "confident")
EPOCHS = ("unimodal", "heavy", "bimodal60_40", "uniform", "tiny")
some_scores = arrays(np.float64, st.integers(3, 60), elements=st.floats(-1, 1, width=32))


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_those_of_the_published_code(published, case):
    scores = alignment_scores(published.logit_grads(case), published[f"{case}/embeddings"], published[f"{case}/weight"])
    np.testing.assert_allclose(scores, published[f"{case}/scores"], atol=1e-6)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_gwa_equals_that_of_the_published_code(published, epoch):
    assert gwa(published[f"epoch_{epoch}/scores"]) == pytest.approx(float(published[f"epoch_{epoch}/gwa"]), rel=1e-9)


def test_a_score_is_the_cosine_between_the_negative_head_gradient_and_the_weight():
    rng = np.random.default_rng(0)
    delta, h, w = rng.normal(size=(7, 4)), rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    gradients = delta[:, :, None] * h[:, None, :]
    cosines = [-(g * w).sum() / np.linalg.norm(g) / np.linalg.norm(w) for g in gradients]
    np.testing.assert_allclose(alignment_scores(delta, h, w), cosines, atol=1e-12)


def test_scores_keep_the_leading_dimensions():
    rng = np.random.default_rng(0)
    delta, h, w = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 3)), rng.normal(size=(4, 3))
    scores = alignment_scores(delta, h, w)
    assert scores.shape == (2, 5)
    np.testing.assert_allclose(scores[1, 3], alignment_scores(delta[1, 3], h[1, 3], w))


@given(factor=st.floats(1e-3, 1e3))
def test_a_positive_factor_on_delta_h_or_w_changes_nothing(factor):
    rng = np.random.default_rng(1)
    delta, h, w = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    want = alignment_scores(delta, h, w)
    for scaled in ((factor * delta, h, w), (delta, factor * h, w), (delta, h, factor * w)):
        np.testing.assert_allclose(alignment_scores(*scaled), want, atol=1e-12)


def test_a_sample_without_a_score_has_the_reason_as_its_value():
    delta = np.array([[0.0, 0.0], [1.0, -1.0], [np.nan, 0.0], [np.inf, 0.0], [1.0, -1.0]])
    h = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    scores = alignment_scores(delta, h, np.eye(2))
    assert math.isnan(scores[0])
    assert list(scores[1:4]) == [DEAD, NOT_FINITE, NOT_FINITE]
    assert math.isfinite(scores[4])


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((4, 3), (4, 5), (3, 6)), "embeddings: expected (4, 6)"),
        (((4, 2), (4, 5), (3, 5)), "logit_grads: expected [..., 3]"),
        (((4, 3), (5, 5), (3, 5)), "embeddings: expected (4, 5)"),
        (((4, 3), (4, 5), (3,)), "weight: expected 2 dimensions"),
    ],
)
def test_shapes_that_do_not_match_are_named(shapes, named):
    with pytest.raises(InvalidInputError, match="expected") as error:
        alignment_scores(*(np.ones(shape) for shape in shapes))
    assert named in str(error.value)


@given(scores=some_scores, beta=st.sampled_from([1.2, 2.5, 3.0]))
def test_gwa_is_the_mean_over_scipys_excess_kurtosis_plus_beta(scores, beta):
    if scores.std() < 1e-6:
        return
    want = scores.mean() / (scipy.stats.kurtosis(scores) + beta)
    assert gwa(scores, beta) == pytest.approx(want, rel=1e-6, abs=1e-12)


@given(scores=some_scores)
def test_the_stable_statistic_is_never_larger_than_the_mean(scores):
    value = gwa(scores, gwa_logging.STABLE_BETA)
    assert math.isnan(value) or abs(value) <= abs(scores.mean()) * (1 + 1e-9)


def test_gwa_ignores_values_that_are_not_finite():
    assert gwa([0.1, 0.3, 0.7, np.nan, np.inf, -np.inf]) == gwa([0.1, 0.3, 0.7])


@pytest.mark.parametrize("scores", [[], [0.3], [0.1] * 50, [np.nan]])
def test_gwa_of_scores_without_spread_is_nan(scores):
    assert math.isnan(gwa(scores))


def test_constant_means_a_spread_within_rounding():
    assert is_constant(float(np.var(np.full(1000, 0.1))), 0.1)
    assert not is_constant(1e-20, 0.1)


def test_gwa_at_its_pole_is_infinite_and_does_not_raise():
    assert gwa_logging.alignment.gwa_from_moments(0.3, -1.2, 1.2) == math.inf
    assert gwa_logging.alignment.gwa_from_moments(-0.3, -1.2, 1.2) == -math.inf
