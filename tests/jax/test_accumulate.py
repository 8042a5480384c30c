"""The device's summary in float32 against SciPy, and that update does not wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st

import gwa_logging
from gwa_logging import AlignmentSummary, InvalidInputError
from gwa_logging.integrations.jax.accumulate import AlignmentState, update_state
from tests.core.test_summary import assert_equals_scipy, spread_scores


def summary_of(pieces) -> AlignmentSummary:
    state = AlignmentState.empty()
    for piece in pieces:
        state = update_state(state, jnp.asarray(piece))
    return state.summary()


@given(scores=spread_scores(), size=st.sampled_from([16, 128]))
@settings(max_examples=20)
def test_moments_of_float32_scores_equal_those_of_scipy(scores, size):
    padding = np.full(-len(scores) % size, 9.0, np.float32)  # one shape, so one compilation
    summary = summary_of(np.concatenate([scores, padding]).reshape(-1, size))
    assert_equals_scipy(summary, scores, rel=2e-6)
    np.testing.assert_array_equal(summary.bins, AlignmentSummary.from_scores(scores).bins)


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.9])
def test_the_summary_of_fifty_batches_has_a_relative_error_below_a_millionth(mean, spread):
    scores = np.clip(mean + spread * np.random.default_rng(0).laplace(size=(50, 512)), -1, 1).astype(np.float32)
    assert_equals_scipy(summary_of(scores), scores.ravel(), rel=1e-6)


def test_each_reason_for_a_missing_score_is_counted_separately():
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


@given(scores=spread_scores(), cut=st.integers(0, 20))
@settings(max_examples=30)
def test_moments_of_merged_states_equal_those_of_scipy(scores, cut):
    padded = [np.full(400, 9.0, np.float32), np.full(400, 9.0, np.float32)]  # one shape, so one compilation
    padded[0][:cut], padded[1][: len(scores) - cut] = scores[:cut], scores[cut:]
    a, b = (update_state(AlignmentState.empty(), jnp.asarray(part)) for part in padded)
    for merged in (a.merge(b), b.merge(a)):
        assert_equals_scipy(merged.summary(), scores, rel=2e-6)


def test_reduce_merges_the_members_of_an_axis():
    scores = np.random.default_rng(0).normal(0.1, 0.05, (6, 40)).astype(np.float32)
    reduced = jax.vmap(lambda s: AlignmentState.empty().update(s).reduce("seeds"), axis_name="seeds")
    states = jax.jit(reduced)(jnp.asarray(scores))
    for member in (0, 5):
        one = jax.tree.map(lambda leaf, member=member: leaf[member], states)
        assert_equals_scipy(one.summary(), scores.ravel())


def test_update_accepts_a_state_from_a_scan_over_steps():
    scores = np.random.default_rng(0).normal(0.1, 0.05, (30, 40)).astype(np.float32)

    @jax.jit
    def epoch(scores):
        return jax.lax.scan(lambda state, s: (state.update(s), None), AlignmentState.empty(), scores)[0]

    with gwa_logging.watch(linen.Dense(5)) as monitor:
        monitor.update(epoch(jnp.asarray(scores)))
        monitor.update(epoch(jnp.asarray(scores)))
        report = monitor.end_epoch()
        with pytest.raises(InvalidInputError, match="call update outside"):
            jax.jit(lambda s: monitor.update(AlignmentState.empty().update(s)))(jnp.zeros(3))
    assert report.count == 2400
    assert report.std == pytest.approx(scores.astype(np.float64).std(), rel=1e-5)
