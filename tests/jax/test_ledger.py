"""The per-sample ledger in JAX, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from tests.agreement import N as SAMPLES
from tests.agreement import by_loop, random_epochs

N = 11
SCORES = np.random.default_rng(0).uniform(-0.5, 0.5, 6).astype(np.float32)


def watched(**options) -> Monitor:
    return gwa_logging.watch(linen.Dense(3), num_samples=N, **options)


def by_id(monitor: Monitor) -> dict[int, tuple[float, float]]:
    return {s.id: (s.mean_score, s.times_seen) for s in monitor.suspects(N)}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8, np.uint64])
@pytest.mark.parametrize("on_device", [True, False])
def test_scores_add_up_by_id_for_every_integer_type_and_repeated_ids(dtype, on_device):
    ids = np.array([3, 0, 3, 10, 7, 3], dtype)
    with watched() as monitor:
        monitor.update(jnp.asarray(SCORES), jnp.asarray(ids) if on_device else ids)
        found = by_id(monitor)
    expected = {int(i): (pytest.approx(SCORES[ids == i].mean(), abs=1e-7), (ids == i).sum()) for i in ids}
    assert found == expected


@pytest.mark.parametrize("on_device", [True, False])
def test_ids_out_of_range_are_left_out_counted_and_reported(on_device, caplog):
    wide = [] if on_device else [2**32 + 5, 2**40]  # JAX would cut them off to 5 and 0
    ids = np.array([[1, -1, N, 2**31 - 1], [1, -1, N, 4]][bool(wide)] + (wide or [2, 4]))
    with watched() as monitor:
        monitor.update(jnp.asarray(SCORES), jnp.asarray(ids) if on_device else ids)
        assert by_id(monitor).keys() == ({1, 2, 4} if on_device else {1, 4})
        assert monitor.faults == {"sample ids": 3 if on_device else 4}
    assert "ids were not in [0, 11)" in caplog.text


@pytest.mark.parametrize("shape", ["one lambda", "a lambda for each", "an array"])
def test_the_score_of_a_mixed_input_is_divided_by_its_weights(shape):
    ids = np.random.default_rng(1).integers(0, N, (6, 2))
    shares = np.broadcast_to([0.75, 0.25], (6, 2)).astype(np.float32)
    weights = {"one lambda": (0.75, 0.25), "a lambda for each": jnp.asarray(shares), "an array": np.array([0.75, 0.25])}
    with watched() as monitor:
        monitor.update(jnp.asarray(SCORES), ids, weights=weights[shape])
        found = by_id(monitor)
    sums, seen = np.zeros(N), np.zeros(N)
    np.add.at(sums, ids, shares * SCORES[:, None])
    np.add.at(seen, ids, shares)
    assert found == {
        i: (pytest.approx(sums[i] / seen[i], abs=1e-6), pytest.approx(seen[i])) for i in np.flatnonzero(seen)
    }


def test_weights_that_are_negative_or_nan_are_left_out_and_counted():
    with watched() as monitor:
        weights = np.array([[1.5, -0.5], [np.nan, 1.0]])
        monitor.update(jnp.asarray(SCORES[:2]), np.array([[0, 1], [2, 3]]), weights=weights)
        assert {i: seen for i, (_, seen) in by_id(monitor).items()} == {0: 1.5, 3: 1.0}
        assert monitor.faults == {"sample ids": 2}


def test_a_suspect_has_the_last_prediction_and_the_given_label():
    with gwa_logging.watch(linen.Dense(3), labels=[i % 3 for i in range(N)]) as monitor:
        monitor.update(jnp.asarray(SCORES), np.arange(6))
        monitor.update(jnp.asarray(SCORES), np.arange(6), predicted=jnp.full(6, 2))
        monitor.update(jnp.asarray(SCORES[:2]), np.arange(2), predicted=np.array([1, 0]))
        found = {s.id: (s.label, s.predicted) for s in monitor.suspects(N)}
    assert found == {0: (0, 1), 1: (1, 0), 2: (2, 2), 3: (0, 2), 4: (1, 2), 5: (2, 2)}


def test_samples_without_a_score_are_not_seen():
    with watched() as monitor:
        monitor.update(jnp.array([0.1, jnp.nan, jnp.inf]), np.arange(3), predicted=np.arange(3))
        assert [(s.id, s.predicted) for s in monitor.suspects(N)] == [(0, 0)]


def test_batches_without_ids_are_counted_and_reported():
    with watched() as monitor:
        monitor.update(jnp.asarray(SCORES))
        monitor.update(jnp.asarray(SCORES), np.arange(6))
        assert len(monitor.suspects(N)) == 6
        assert monitor.faults == {"samples without ids": 6}


def test_a_step_with_new_numbers_of_the_same_shape_compiles_nothing():
    from gwa_logging.integrations.jax.ledger import add_steps_to_ledger

    with watched() as monitor:
        for i in range(3):
            lam = 0.1 * (i + 1)
            monitor.update(jnp.asarray(SCORES), np.full((6, 2), i), weights=(lam, 1 - lam))
            if i == 0:
                compiled = add_steps_to_ledger._cache_size()
        assert add_steps_to_ledger._cache_size() == compiled


def test_update_with_ids_does_not_block_on_the_scores():
    @jax.jit
    def late(x):
        def turn(_, matrix):
            return jnp.tanh(matrix @ matrix)

        return x + 0 * jax.lax.fori_loop(0, 300, turn, jnp.eye(600))[0, 0]

    late(jnp.zeros(6)).block_until_ready()
    with watched() as monitor:
        monitor.update(jnp.zeros(6), np.arange(6))  # compiles
        scores = late(jnp.asarray(SCORES))
        monitor.update(scores, np.arange(6))
        assert not scores.is_ready()
        assert {seen for _, seen in by_id(monitor).values()} == {2}


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (
            np.zeros((6, 2), np.int64),
            {},
            r"expected \[6\], one for each score.*found \[6, 2\]; if .* pass their weights",
        ),
        (np.arange(6), {"weights": (0.5, 0.5)}, r"\[batch, m\] with weights"),
        (np.zeros((6, 2), np.int64), {"weights": (1.0,)}, r"weights: expected \(2,\)"),
        (np.arange(6), {"predicted": np.zeros((6, 3))}, r"predicted: expected integers \(6,\)"),
        (None, {"weights": (0.5, 0.5)}, "by sample id"),
    ],
)
def test_ids_and_weights_of_other_shapes_are_refused(ids, options, said):
    with watched() as monitor:
        with pytest.raises(InvalidInputError, match=said):
            monitor.update(jnp.asarray(SCORES), ids, **options)
        assert monitor.suspects() == []


def test_update_inside_paused_counts_nothing():
    with watched() as monitor:
        with monitor.paused():
            monitor.update(jnp.asarray(SCORES), np.arange(6))
        monitor.update(jnp.asarray(SCORES[:4]), np.arange(4))
        assert monitor.end_epoch().count == 4
        assert by_id(monitor).keys() == set(range(4))


@pytest.mark.parametrize("rows", [0, 4])
def test_the_agreement_of_each_epoch_equals_a_loop_over_the_samples(rows):
    epochs = random_epochs(3, rows=rows)
    rule = EarlyStop(statistic="agreement")
    with gwa_logging.watch(linen.Dense(3), num_samples=SAMPLES, early_stop=rule) as monitor:
        for batches in epochs:
            for scores, ids in batches:
                monitor.update(jnp.asarray(scores), ids)
            monitor.end_epoch()
    expected = by_loop(epochs)
    assert [report.agreement for report in monitor.history] == expected
    assert len({*expected}) > 3
