"""JAX's debugging and strictness options: a step that runs bare under them runs watched, with the same scores."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gwa_logging
from gwa_logging.integrations.jax import AlignmentState, tap

ROWS, CLASSES = 20, 5
_RANDOM = np.random.default_rng(0)
INPUTS = _RANDOM.normal(size=(ROWS, 8)).astype(np.float32)
LABELS = _RANDOM.integers(0, CLASSES, ROWS).astype(np.int32)
COUNTED = (np.arange(ROWS) % 5 != 0).astype(np.float32)  # the others are masked out of the loss

OPTIONS: dict[str, dict[str, Any]] = {
    "debug_nans": {"jax_debug_nans": True},
    "debug_infs": {"jax_debug_infs": True},
    "strict promotion": {"jax_numpy_dtype_promotion": "strict"},
    "rank promotion": {"jax_numpy_rank_promotion": "raise"},
    "x64": {"jax_enable_x64": True},
    "debug_nans without jit": {"jax_debug_nans": True, "jax_disable_jit": True},
    "leaks": {"jax_check_tracer_leaks": True},
    "transfer guard": {},
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES, name="head")(jnp.tanh(nn.Dense(12)(x)))


def _linen() -> tuple[Any, Any, Any]:
    model = Net()
    return model, model.init(jax.random.key(0), INPUTS), model.apply


def _hand_written() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "body": jax.random.normal(keys[0], (8, 12)) / 3,
        "head": jax.random.normal(keys[1], (12, CLASSES)) / 3,
        "bias": jnp.ones(CLASSES),
    }

    def model(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(jnp.matmul(x, params["body"]))
        logits = jnp.matmul(h, params["head"]) + jnp.expand_dims(params["bias"], 0)
        return tap(logits, h, params["head"], params["bias"])

    return model, params, model


MODELS = {"Linen": _linen, "tap": _hand_written}


@pytest.fixture
def configured() -> Iterator[Any]:
    before = {name: getattr(jax.config, name) for options in OPTIONS.values() for name in options}

    def configure(option: str) -> AbstractContextManager[Any]:
        for name, value in OPTIONS[option].items():
            jax.config.update(name, value)
        return jax.transfer_guard("disallow") if option == "transfer guard" else nullcontext()

    yield configure
    for name, value in before.items():
        jax.config.update(name, value)


def _run(model: Any, params: Any, logits: Any, guard: AbstractContextManager[Any], directory: Path) -> Any:
    """Three steps with a ledger, one of them through an AlignmentState that the caller still uses afterwards."""
    x, y, counted = jnp.asarray(INPUTS), jnp.asarray(LABELS), jnp.asarray(COUNTED)

    def loss(params: Any, x: jax.Array, y: jax.Array, counted: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy(logits(params, x), jax.nn.one_hot(y, CLASSES, dtype=jnp.float32))
        return (losses * counted).sum() / counted.sum()

    with gwa_logging.watch(model, num_samples=ROWS, log_every_n_steps=1, directory=directory) as monitor:
        step = jax.jit(monitor.value_and_grad(loss))
        bare = jax.jit(jax.value_and_grad(loss))
        state = AlignmentState.empty()
        with guard:
            value, _ = bare(params, x, y, counted)
            (watched, scores), _ = step(params, x, y, counted)
            monitor.update(scores, np.arange(ROWS), predicted=LABELS)
            monitor.update(scores, np.stack([np.arange(ROWS)] * 2, 1), weights=(0.25, 0.75))
            state = jax.jit(AlignmentState.update)(state, scores)
            monitor.update(state)
            monitor.update(scores)
        np.testing.assert_allclose(np.asarray(watched), np.asarray(value), rtol=1e-6)
        assert int(state.counts[0]) == COUNTED.sum()  # the caller's own arrays are still there
        report = monitor.end_epoch()
        suspects = monitor.suspects(ROWS)
        monitor.load_state_dict(monitor.state_dict())
        assert not monitor._faults.counts.keys() - {"samples without ids"}
    return report, [(suspect.id, round(suspect.mean_score, 5)) for suspect in suspects]


CASES = [(option, list(MODELS)[number % 2]) for number, option in enumerate(OPTIONS) if "without jit" not in option]
OTHER_CASES = [
    pytest.param(option, model, marks=pytest.mark.slow)
    for option in OPTIONS
    for model in MODELS
    if (option, model) not in CASES and ("without jit" not in option or model == "tap")  # without jit takes long
]


@pytest.mark.parametrize(("option", "model"), [*CASES, *OTHER_CASES])
def test_a_step_is_scored_under_each_option_of_jax(option: str, model: str, configured: Any, tmp_path: Path) -> None:
    parts = MODELS[model]()
    expected, expected_suspects = _run(*parts, nullcontext(), tmp_path)
    assert (expected.count, expected.excluded) == (4 * COUNTED.sum(), 4 * (ROWS - COUNTED.sum()))
    report, suspects = _run(*parts, configured(option), tmp_path)
    assert (report.count, report.excluded) == (expected.count, expected.excluded)
    assert report.mean == pytest.approx(expected.mean, abs=1e-6)
    assert report.gwa == pytest.approx(expected.gwa, rel=1e-3)
    assert suspects == expected_suspects


def test_update_does_not_change_a_state_that_it_is_given(tmp_path: Path) -> None:
    mine = AlignmentState.empty().update(jnp.array([0.1, 0.3]))
    with gwa_logging.watch(Net(), directory=tmp_path) as monitor:
        monitor.update(mine)
        monitor.update(jnp.array([0.2]))
        monitor.update(mine)
        assert monitor.end_epoch().count == 5
    assert mine.summary().count == 2


def test_orbax_saves_the_state_next_to_the_parameters_and_a_run_resumes_from_it(tmp_path: Path) -> None:
    from orbax import checkpoint

    with gwa_logging.watch(Net(), num_samples=10, directory=tmp_path) as first:
        first.update(jnp.array([0.1, 0.3]), np.arange(2))
        first.end_epoch()
        first.update(jnp.array([0.2]), np.arange(1))
        state = first.state_dict()
        with checkpoint.CheckpointManager(tmp_path / "checkpoints") as manager:
            arguments = {
                "params": checkpoint.args.StandardSave({"w": jnp.ones(3)}),
                "gwa": checkpoint.args.PyTreeSave(state),
            }
            manager.save(1, args=checkpoint.args.Composite(**arguments))
            manager.wait_until_finished()
            arguments = {"gwa": checkpoint.args.PyTreeRestore()}
            restored = manager.restore(1, args=checkpoint.args.Composite(**arguments))["gwa"]
        expected = first.end_epoch()
    with gwa_logging.watch(Net(), num_samples=10, directory=tmp_path) as second:
        second.load_state_dict(restored)
        assert second.end_epoch().model_dump_json(exclude={"time"}) == expected.model_dump_json(exclude={"time"})
        assert [(s.id, s.times_seen) for s in second.suspects(2)] == [(0, 2.0), (1, 1.0)]
