"""The device's summary in float32 against SciPy, and that update does not wait."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwa_logging import AlignmentSummary
from gwa_logging.integrations.jax.accumulate import AlignmentState, update
from tests.heart.test_summary import assert_equals_scipy, spread_scores


def summary_of(pieces) -> AlignmentSummary:
    state = AlignmentState.empty()
    for piece in pieces:
        state = update(state, jnp.asarray(piece))
    return state.summary()


@given(scores=spread_scores(), size=st.sampled_from([16, 128]))
@settings(max_examples=20)
def test_scores_fed_in_float32_give_scipys_moments(scores, size):
    pieces = np.split(scores, range(size, len(scores), size))
    summary = summary_of(pieces)
    assert_equals_scipy(summary, scores, rel=2e-6)
    np.testing.assert_array_equal(summary.bins, AlignmentSummary.from_scores(scores).bins)


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.9])
def test_an_interval_of_fifty_batches_is_right_to_a_millionth(mean, spread):
    scores = np.clip(mean + spread * np.random.default_rng(0).laplace(size=(50, 512)), -1, 1).astype(np.float32)
    assert_equals_scipy(summary_of(scores), scores.ravel(), rel=1e-6)


def test_every_kind_of_missing_score_is_counted_as_what_it_is():
    summary = summary_of([np.array([0.1, np.nan, -np.inf, np.inf, 3.0, 0.2], np.float32)])
    assert (summary.count, summary.no_gradient, summary.dead, summary.not_finite) == (2, 1, 1, 2)
    assert (summary.minimum, summary.maximum) == pytest.approx((0.1, 0.2))


def test_a_batch_without_a_score_changes_no_moment():
    summary = summary_of([[0.1, 0.3], [np.nan, np.nan], [0.2, 0.6]])
    assert_equals_scipy(summary, np.array([0.1, 0.3, 0.2, 0.6], np.float32))
    assert summary.no_gradient == 2


def test_the_empty_state_is_the_empty_summary():
    summary = AlignmentState.empty().summary()
    assert summary.seen == 0
    assert summary.bins.sum() == 0
