"""Steps that are added up many at once, against sums in float64 over the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import gwa_logging
from gwa_logging import AlignmentSummary, InvalidInputError
from gwa_logging.integrations.jax.accumulate import AlignmentState, update_state, update_state_with_steps
from gwa_logging.integrations.jax.ledger import add_steps_to_ledger
from gwa_logging.integrations.jax.pending_steps import MOST_SCORES, MOST_STEPS, PendingSteps, Step
from tests.core.test_summary import assert_equals_scipy

N = 30
MARKERS = [np.nan, np.inf, -np.inf, 64.0, -128.0, 128.0]


def random_steps(number: int, shape: tuple[int, ...] = (8,), seed: int = 0) -> list[np.ndarray]:
    """Scores of some steps, float32, of which a few are markers."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.1, 0.2, (number, *shape)).clip(-1, 1).astype(np.float32)
    return list(np.where(rng.random(scores.shape) < 0.1, rng.choice(MARKERS, scores.shape), scores).astype(np.float32))


def watched(**options) -> gwa_logging.Monitor:
    return gwa_logging.watch(linen.Dense(3), **options)


@pytest.mark.parametrize("every", [1, 7, 50])
def test_the_report_equals_that_of_all_scores_for_any_number_of_steps_and_any_shapes(every):
    rows = [8] * 20 + [5] + [8] * 3 + [5] * 2 + [8] * 11
    steps = [random_steps(1, (size,), seed)[0] for seed, size in enumerate(rows)]
    with watched(log_every_n_steps=every) as monitor:
        for step in steps:
            monitor.update(jnp.asarray(step))
        report = monitor.end_epoch()
        assert monitor.faults.keys() <= {"samples that are not finite"}
    scores = np.concatenate(steps)
    expected = AlignmentSummary.from_scores(scores)
    valid = scores[np.abs(scores) <= 1].astype(np.float64)
    assert (
        (report.count, report.excluded) == (len(valid), len(scores) - len(valid)) == (expected.count, expected.excluded)
    )
    assert report.mean == pytest.approx(valid.mean(), rel=1e-6)
    assert report.std == pytest.approx(valid.std(), rel=1e-6)
    np.testing.assert_array_equal(report.histogram.dense(), expected.histogram.dense())


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("mean", [0.0, 0.9])
def test_thousands_of_scores_at_once_have_a_relative_error_below_a_millionth(mean, spread):
    rng = np.random.default_rng(0)
    scores = np.clip(mean + spread * rng.laplace(size=(4 * MOST_STEPS, 2048)), -1, 1).astype(np.float32)
    state = AlignmentState.empty()
    for first in range(0, len(scores), MOST_STEPS):
        steps = [jnp.asarray(step) for step in scores[first : first + MOST_STEPS]]
        state = update_state_with_steps(state, steps, np.int32(MOST_STEPS))
    assert_equals_scipy(state.summary(), scores.ravel(), rel=1e-6)


def test_epochs_of_different_lengths_compile_one_program():
    shape = (13,)  # of this test alone
    before = update_state_with_steps._cache_size(), update_state._cache_size()
    with watched() as monitor:
        for length in (1, 2, 15, 40, 101):
            for step in random_steps(length, shape):
                monitor.update(jnp.asarray(step))
            assert monitor.end_epoch().step >= length - 1
    assert (update_state_with_steps._cache_size(), update_state._cache_size()) == (before[0] + 1, before[1])


@pytest.mark.parametrize("on_device", [True, False])
def test_the_ledger_equals_a_loop_over_the_steps_and_keeps_the_last_prediction(on_device):
    rng = np.random.default_rng(1)
    place = jnp.asarray if on_device else np.asarray
    steps, sums, seen, last = random_steps(41), np.zeros(N), np.zeros(N), {}
    with watched(num_samples=N) as monitor:
        for scores in steps:
            ids = rng.permutation(N)[: len(scores)].astype(np.int32)  # the samples of one step are distinct
            predicted = rng.integers(0, 3, len(ids)).astype(np.int32)
            monitor.update(jnp.asarray(scores), place(ids), predicted=place(predicted))
            for score, sample, guess in zip(scores, ids, predicted, strict=True):
                if abs(score) <= 1:
                    sums[sample], seen[sample], last[sample] = sums[sample] + score, seen[sample] + 1, guess
        found = {s.id: (s.mean_score, s.times_seen, s.predicted) for s in monitor.suspects(N)}
    assert found == {i: (pytest.approx(sums[i] / seen[i], abs=1e-6), seen[i], guess) for i, guess in last.items()}


def test_documents_in_several_steps_count_once_per_step():
    ids, scores = np.array([[3, 3, 4]]), np.array([[0.5, 0.1, -0.2]], np.float32)
    with watched(num_samples=N) as monitor:
        for _ in range(20):
            monitor.update(jnp.asarray(scores), jnp.asarray(ids))
        found = {s.id: (s.mean_score, s.times_seen) for s in monitor.suspects(N)}
    assert found == {3: (pytest.approx(0.3, abs=1e-6), 20), 4: (pytest.approx(-0.2, abs=1e-6), 20)}


@pytest.mark.parametrize("weights", ["tuple", "array", "device"])
def test_mixed_samples_keep_the_weights_of_their_step(weights):
    ids, sums, seen = np.array([[0, 1], [2, 3]]), np.zeros(4), np.zeros(4)
    buffer = np.zeros(2, np.float32)
    with watched(num_samples=N) as monitor:
        for i, scores in enumerate(np.random.default_rng(0).uniform(-0.5, 0.5, (19, 2)).astype(np.float32)):
            lam = np.float32(0.05 * i)
            buffer[:] = lam, 1 - lam  # the user's array, which the next step changes
            given = {"tuple": (float(lam), float(1 - lam)), "array": buffer, "device": jnp.array(buffer.copy())}[
                weights
            ]
            monitor.update(jnp.asarray(scores), ids, weights=given)
            np.add.at(sums, ids, np.array([lam, 1 - lam]) * scores[:, None])
            np.add.at(seen, ids, [lam, 1 - lam])
        found = {s.id: (s.mean_score, s.times_seen) for s in monitor.suspects(N)}
    assert found == {i: (pytest.approx(sums[i] / seen[i], abs=1e-6), pytest.approx(seen[i])) for i in range(4)}


def test_arrays_on_the_host_may_be_changed_after_update():
    scores, ids = np.full(4, 0.25, np.float32), np.arange(4)
    with watched(num_samples=N) as monitor:
        for _ in range(5):
            monitor.update(scores, ids)
        scores[:], ids[:] = 0.75, 9
        assert {(s.id, s.mean_score, s.times_seen) for s in monitor.suspects(N)} == {(i, 0.25, 5) for i in range(4)}
        assert monitor.end_epoch().mean == pytest.approx(0.25)


def test_steps_whose_scores_the_user_donates_are_a_fault_and_the_others_count(caplog):
    reuse = jax.jit(lambda scores: scores + 1, donate_argnums=0)
    with watched() as monitor:
        for i in range(60):
            scores = jnp.full(8, 0.5)
            monitor.update(scores)
            if i >= 5:
                reuse(scores)
        report = monitor.end_epoch()
        missing = monitor.faults["steps left out"]
    assert report.count == 8 * (60 - missing)
    assert 0 < missing <= MOST_STEPS  # after the first list each step is added at once
    assert "donated" in caplog.text


def test_an_error_while_steps_are_added_is_a_fault_and_training_continues(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    with watched() as monitor:
        monitor.update(jnp.full(8, 0.5))
        with monkeypatch.context() as patch:
            patch.setattr("gwa_logging.integrations.jax.adapter.update_state_with_steps", broken)
            for _ in range(20):
                monitor.update(jnp.full(8, 0.5))
            monitor.flush()
        monitor.update(jnp.full(8, 0.5))
        assert monitor.end_epoch().count == 16
        assert monitor.faults == {"steps left out": 20}


def test_a_tracer_among_the_ids_is_refused():
    with watched(num_samples=N) as monitor:
        with pytest.raises(InvalidInputError, match="sample_ids: found a tracer"):
            jax.jit(lambda ids: monitor.update(np.zeros(2, np.float32), ids))(jnp.arange(2))
        monitor.update(np.zeros(2, np.float32), np.arange(2))
        assert len(monitor.suspects(N)) == 2


@pytest.mark.parametrize("size", [1, 1000, MOST_SCORES // 4, 2 * MOST_SCORES])
@pytest.mark.parametrize("every", [1, 3, 16, 17, 50, 10**6])
def test_a_list_is_bounded_by_its_steps_and_its_scores(size, every):
    pending = PendingSteps(every)
    step = Step(jnp.zeros(size), None)
    while not (len(pending) and pending.is_full):
        pending.append(step)
    assert len(pending) <= min(every, MOST_STEPS)
    assert len(pending) * size <= max(MOST_SCORES, size)


def test_a_state_from_a_scan_and_single_steps_are_added_up_together():
    steps = random_steps(12)
    with watched() as monitor:
        for step in steps[:5]:
            monitor.update(jnp.asarray(step))
        monitor.update(update_state(AlignmentState.empty(), jnp.concatenate(steps[5:8])))
        for step in steps[8:]:
            monitor.update(jnp.asarray(step))
        report = monitor.end_epoch()
    expected = AlignmentSummary.from_scores(np.concatenate(steps))
    assert (report.count, report.excluded) == (expected.count, expected.excluded)
    assert report.mean == pytest.approx(expected.mean, rel=1e-6)


def test_a_restored_ledger_replaces_the_steps_that_came_before_it():
    with watched(num_samples=N) as monitor:
        monitor.update(jnp.full(2, 0.5), np.arange(2))
        state = monitor.state_dict()
    with watched(num_samples=N) as monitor:
        for _ in range(3):
            monitor.update(jnp.full(2, -0.5), np.arange(2))
        monitor.load_state_dict(state)
        monitor.update(jnp.full(2, 0.25), np.arange(2))
        assert {(s.id, s.mean_score, s.times_seen) for s in monitor.suspects(N)} == {(0, 0.375, 2), (1, 0.375, 2)}


def test_lists_of_any_length_use_one_program_of_the_ledger():
    before = add_steps_to_ledger._cache_size()
    with watched(num_samples=N) as monitor:
        for number in (1, 3, 16, 20):
            for step in random_steps(number, (11,)):
                monitor.update(jnp.asarray(step), np.arange(11))
            monitor.flush()
            assert monitor.suspects(N)
    assert add_steps_to_ledger._cache_size() == before + 1
