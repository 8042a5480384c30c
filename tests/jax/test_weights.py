"""keep_best in JAX: the parameters that the user passes, and their running average, against copies and a loop in float64."""

import gc
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError

EVERY = EarlyStop(warmup=0, statistic="mean")


class MLP(linen.Module):
    dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(12, param_dtype=self.dtype)(x))
        return linen.Dense(5, name="head", param_dtype=self.dtype)(x)


def batch(seed: int):
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (12, 8)), jax.random.randint(y, (12,), 0, 5)


class Loop:
    """A training loop whose jitted step donates the parameters."""

    def __init__(self, keep_best: Any, dtype: Any = jnp.float32, early_stop: EarlyStop = EVERY) -> None:
        model = MLP(dtype)
        self.params = model.init(jax.random.key(0), batch(0)[0])
        self.monitor = gwa_logging.watch(model, keep_best=keep_best, early_stop=early_stop)
        value_and_grad = self.monitor.value_and_grad(
            lambda params, x, y: optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()
        )

        def step(params, x, y):
            (_, scores), grads = value_and_grad(params, x, y)
            return jax.tree.map(lambda p, g: (p - 0.1 * g).astype(p.dtype), params, grads), scores

        self.step = jax.jit(step, donate_argnums=0)

    def steps(self, epoch: int, n: int):
        for number in range(n):
            self.params, scores = self.step(self.params, *batch(100 * epoch + number))
            yield scores


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda array: np.array(array), tree)


def assert_trees_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("at", ["update", "end_epoch"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_parameters_are_those_of_the_best_epoch(dtype, at):
    loop, kept = Loop(True, dtype, EarlyStop(warmup=0)), {}
    for epoch in range(6):
        for scores in loop.steps(epoch, 3):
            loop.monitor.update(scores, params=loop.params if at == "update" else None)
        loop.monitor.end_epoch(params=loop.params if at == "end_epoch" else None)
        kept[epoch] = on_host(loop.params)
    loop.monitor.close()
    best = [report.epoch for report in loop.monitor.history if report.is_best][-1]
    assert best < 5, "the last epoch must not be the best for this test to tell them apart"
    assert_trees_equal(loop.monitor.best_weights(), kept[best])
    assert [path.name for path in loop.monitor.journal.parent.glob("best*")] == [f"best_weights_epoch_{best}.npz"]
    assert not loop.monitor.faults


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_the_average_equals_a_loop_in_float64(dtype, tolerance):
    loop = Loop("averaged", dtype)
    average, last, kept = None, 0, {}
    for epoch, n in enumerate((4, 3, 5, 5)):
        for number, scores in enumerate(loop.steps(epoch, n), start=1):
            loop.monitor.update(scores, params=loop.params)
            now = jax.tree.map(lambda array: np.array(array, np.float64), loop.params)
            share = 1 / (last or number)
            average = now if average is None else jax.tree.map(lambda a, p, s=share: a + s * (p - a), average, now)
        last = n
        loop.monitor.end_epoch()
        kept[epoch] = average
    best = [report.epoch for report in loop.monitor.history if report.is_best][-1]
    found = loop.monitor.best_weights()
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float64), b, tolerance, tolerance), found, kept[best]
    )
    assert not loop.monitor.faults
    loop.monitor.close()


def watched(keep_best: Any) -> gwa_logging.Monitor:
    return gwa_logging.watch(MLP(), keep_best=keep_best, early_stop=EarlyStop(warmup=0))


def keep(monitor: gwa_logging.Monitor, params: Any) -> Any:
    monitor.update(jnp.array([0.5, -0.25, 0.125]))
    monitor.end_epoch(params=params)
    assert not monitor.faults
    return monitor.best_weights()


def test_other_pytrees_keep_their_structure_and_what_is_no_array():
    net = equinox.nn.MLP(8, 5, 12, 1, key=jax.random.key(0))
    with watched(True) as monitor:
        found = keep(monitor, net)
    assert found.activation is net.activation
    assert np.array_equal(found.layers[0].weight, net.layers[0].weight)
    state = nnx.state(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), nnx.Param)
    with watched(True) as monitor:
        assert_trees_equal(keep(monitor, state), state)
    with watched(True) as monitor:
        assert_trees_equal(
            keep(monitor, [np.arange(3), {"file": np.ones(2, np.float16)}]),
            [np.arange(3), {"file": np.ones(2, np.float16)}],
        )


def test_sharded_parameters_are_averaged_where_they_are_and_gathered():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    n = 4 * len(jax.devices())
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    arrays = [jax.device_put(jnp.arange(n, dtype=jnp.float32) + step, sharding) for step in range(3)]
    with watched("averaged") as monitor:
        for array in arrays:
            monitor.update(jnp.array([0.5, -0.25]), params={"w": array})
        assert monitor._recording.best_weights._weights._average[0].sharding.is_equivalent_to(sharding, 1)
        monitor.end_epoch()
        assert np.array_equal(monitor.best_weights()["w"], np.arange(n) + 1)


def test_a_transfer_guard_does_not_matter():
    array = jnp.ones(3)
    scores = jnp.array([0.5, -0.25])
    with watched("averaged") as monitor, jax.transfer_guard("disallow"):
        for _ in range(3):
            monitor.update(scores, params={"w": array})
        monitor.end_epoch()
        assert not monitor.faults
        assert np.array_equal(monitor.best_weights()["w"], [1, 1, 1])


def test_an_epoch_without_parameters_is_counted_and_training_continues(caplog):
    for keep_best, remedy in ((True, "end_epoch(params=params)"), ("averaged", "update(scores, params=params)")):
        caplog.clear()
        with watched(keep_best) as monitor:
            monitor.update(jnp.array([0.5, -0.25]))
            monitor.end_epoch()
            assert monitor.faults == {"best weights": 1}
            assert remedy in caplog.text
            with pytest.raises(
                InvalidInputError, match=r"none could be kept \('best weights' is among monitor\.faults\)"
            ):
                monitor.best_weights()


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("keep_best", "params", "message"),
    [
        (True, {"a": 1.0}, "expected a pytree of arrays, found no array in it"),
        (True, {"a": [deleted()]}, r"params\['a'\]\[0\]: found a deleted array, which a jitted step has donated"),
        (True, {"key": jax.random.key(0)}, r"params\['key'\]: found a random key"),
        ("averaged", {"a": np.ones(2)}, r"pass them after each step: update\(scores, params=params\)"),
        (False, {"a": np.ones(2)}, r"the weights are not kept; use watch\(model, keep_best=True\)"),
    ],
)
def test_parameters_that_cannot_be_kept_are_refused_before_the_epoch_ends(keep_best, params, message):
    with watched(keep_best) as monitor:
        monitor.update(jnp.array([0.5, -0.25]))
        with pytest.raises(InvalidInputError, match=message):
            monitor.end_epoch(params=params)
        assert monitor.history == []


def test_parameters_that_cannot_be_averaged_are_refused():
    scores = jnp.array([0.5, -0.25])
    with (
        watched(False) as monitor,
        pytest.raises(InvalidInputError, match=r"update\(params=\): the weights are not kept"),
    ):
        monitor.update(scores, params={"w": jnp.ones(2)})
    with watched("averaged") as monitor:
        monitor.update(scores, params={"w": jnp.ones(2)})
        with pytest.raises(InvalidInputError, match="their number or shapes differ"):
            monitor.update(scores, params={"w": jnp.ones(3)})

        @jax.jit
        def step(w):
            monitor.update(scores, params={"w": w})
            return w

        with pytest.raises(InvalidInputError, match=r"params\['w'\]: found a tracer"):
            step(jnp.ones(2))


def test_models_without_parameters_cannot_be_restored():
    with watched(True) as monitor:
        keep(monitor, {"w": jnp.ones(2)})
        with pytest.raises(
            InvalidInputError, match=r"does not contain its parameters; use params = monitor.best_weights\(\)"
        ):
            monitor.restore_best()


def test_a_resumed_run_reads_the_file_once_it_knows_the_structure():
    with watched(True) as monitor:
        expected = keep(monitor, {"w": jnp.ones(2)})
        state = monitor.state_dict()
    del monitor
    gc.collect()
    with watched(True) as resumed:
        resumed.load_state_dict(state)
        with pytest.raises(InvalidInputError, match="their structure is unknown until"):
            resumed.best_weights()
        resumed.update(jnp.array([0.01, 0.01]))
        resumed.end_epoch(params={"w": jnp.zeros(2)})
        assert not resumed.history[-1].is_best
        assert_trees_equal(resumed.best_weights(), expected)


@pytest.mark.parametrize("keep_best", [True, "averaged"])
def test_parameters_of_an_earlier_epoch_do_not_stand_for_a_later_one(keep_best):
    with watched(keep_best) as monitor:
        monitor.update(jnp.array([0.01, 0.01]), params={"w": jnp.ones(2)})
        monitor.end_epoch()
        monitor.update(jnp.array([0.5, -0.25, 0.125]))
        monitor.end_epoch()
        assert [report.is_best for report in monitor.history] == [False, True]
        assert monitor.faults == {"best weights": 1}
        assert monitor._recording.best_weights.last_file() is None


def test_windows_keep_the_parameters_of_their_last_step():
    with gwa_logging.watch(
        MLP(), keep_best=True, early_stop=EVERY, samples_per_epoch=4, log_every_n_steps=1
    ) as monitor:
        for step in range(4):
            monitor.update(jnp.array([0.1, 0.2]), params={"w": jnp.full(2, step)})
        assert len(monitor.history) == 2
        best = [report.epoch for report in monitor.history if report.is_best][-1]
        assert monitor.best_weights()["w"][0] == 2 * best + 1


def test_an_average_recovers_after_a_divergence():
    with watched("averaged") as monitor:
        for value in (1.0, np.nan, 3.0, 5.0):
            monitor.update(jnp.array([0.5, -0.25]), params={"w": jnp.array([value, 1.0])})
        monitor.end_epoch()
        assert monitor.best_weights()["w"].tolist() == [3.5, 1.0]  # 3, and a quarter of the way to 5
