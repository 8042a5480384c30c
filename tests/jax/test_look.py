"""Looks in JAX: logits that users pass before the end of an epoch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError
from tests.core.test_consensus import expected, expected_from_votes

CLASSES = 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8)).astype(np.float32), RNG.integers(0, CLASSES, 64)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(16)(x)))


def start(directory: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The monitor, the parameters, and a step that updates the monitor."""
    model = Net()
    monitor = gwa_logging.watch(model, directory=directory, **options)

    def loss(params: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, X), Y).mean()

    value_and_grad = monitor.value_and_grad(loss)

    @jax.jit
    def step(params: Any) -> Any:
        (_, scores), grads = value_and_grad(params)
        return jax.tree.map(lambda p, g: p - 2.0 * g, params, grads), scores

    def train(params: Any) -> Any:
        for _ in range(3):
            params, scores = step(params)
            monitor.update(scores)
        return params

    return monitor, model.init(jax.random.key(0), X), train


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_passed_before_the_end_of_an_epoch_give_its_consensus(dtype, tmp_path):
    monitor, params, train = start(tmp_path)
    looks = []
    with monitor:
        for _ in range(6):
            params = train(params)
            logits = Net().apply(params, X[:40]).astype(dtype)
            monitor.look(logits)
            looks.append(dict(enumerate(np.asarray(logits).astype(np.float64).tolist())))
            want = expected(looks)
            assert monitor.end_epoch().consensus == (None if want is None else pytest.approx(want, abs=1e-12))
    assert monitor.faults == {}
    assert monitor.history[-1].metrics["consensus"] == monitor.history[-1].consensus


def test_predictions_passed_with_ids_vote_for_the_consensus(tmp_path):
    monitor, params, _ = start(tmp_path, num_samples=64)
    looked_at, votes = np.arange(0, 64, 2), []
    rng = np.random.default_rng(1)
    with monitor:
        for _ in range(6):
            ids = rng.permutation(64)
            predicted = rng.integers(0, CLASSES, 64)
            monitor.update(jnp.asarray(rng.normal(size=64), jnp.float32) / 9, ids, predicted=predicted)
            votes.append({i: c for i, c in zip(ids.tolist(), predicted.tolist(), strict=True) if i % 2 == 0})
            logits = np.asarray(Net().apply(params, X[looked_at]))
            monitor.look(logits, looked_at)
            looked = dict(zip(looked_at.tolist(), logits.argmax(1).tolist(), strict=True))
            assert monitor.end_epoch().consensus == pytest.approx(expected_from_votes(votes, looked), abs=1e-12)
    assert monitor.faults == {}


def test_a_state_goes_on_with_the_same_consensus(tmp_path):
    monitor, params, train = start(tmp_path)
    other = start(tmp_path)[0]
    for epoch in range(6):
        params = train(params)
        monitor.look(Net().apply(params, X[:40]))
        if epoch == 3:
            state = monitor.state_dict()
        report = monitor.end_epoch()
    monitor.close()
    assert isinstance(state["look"]["shares"], np.ndarray)
    other.load_state_dict(state)
    assert other._recording.look.consensus.looks == 3
    assert report.consensus is not None


def test_tracers_are_refused(tmp_path):
    monitor = start(tmp_path)[0]
    with (
        monitor,
        pytest.raises(InvalidInputError, match=r"logits: .* cannot be copied to the host: call it outside jit"),
    ):
        jax.jit(lambda z: monitor.look(z))(X)


def test_a_look_argument_is_refused(tmp_path):
    with pytest.raises(
        InvalidInputError, match=r"look: in JAX .* call monitor.look\(logits\) before monitor.end_epoch"
    ):
        start(tmp_path, look=X)


def test_an_epoch_without_the_look_that_the_rule_needs_is_a_fault_and_no_reason_to_stop(tmp_path, caplog):
    monitor, params, train = start(tmp_path, early_stop=EarlyStop(statistic="consensus", warmup=0, patience=2))
    with monitor:
        for _ in range(4):
            params = train(params)
            monitor.end_epoch()
    assert monitor.faults == {"look": 4}
    assert "call monitor.look(logits) before monitor.end_epoch()" in caplog.text
    assert monitor.alert is None
