"""JAX: value_and_grad with scores, against per-sample gradients, the published numbers, and plain jax.value_and_grad."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError, NoObservationsError
from gwa_logging.integrations.jax import tap
from tests.jax.tiers import tiered

CASES = ("hard10", "smooth10", "mixup100", "hard1000", "confident")


class MLP(nn.Module):
    classes: int = 5
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(12)(x))
        return nn.Dense(self.classes, use_bias=self.bias, name="head")(x)


class WithSetup(nn.Module):
    def setup(self) -> None:
        self.body, self.classifier, self.unused = nn.Dense(12), nn.Dense(5), nn.Dense(5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.log_softmax(self.classifier(nn.tanh(self.body(x))) / 2)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.tanh(nn.Dense(12, name="body")(x))
        return (nn.Dense(5, name="a")(h) + nn.Dense(5, name="b")(h)) / 2


LOSSES = {
    "cross-entropy": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y),
    "label smoothing": lambda z, y: optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, 5), 0.1)),
    "soft labels": lambda z, y: optax.softmax_cross_entropy(z, jax.nn.one_hot(y, 5) * 0.7 + 0.06),
    "class weights": lambda z, y: (
        optax.softmax_cross_entropy_with_integer_labels(z, y) * jnp.array([0.2, 1.0, 3.0, 0.5, 2.0])[y]
    ),
    "BCE with logits": lambda z, y: optax.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 5)).sum(-1),
}


def data(n: int = 24) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(1), (n, 8)), jax.random.randint(jax.random.key(2), (n,), 0, 5)


def one_at_a_time(loss_of_one, params: Any, x, y, *path: str) -> np.ndarray:
    """The oracle: each sample's own gradient of the head's kernel, by jax.grad."""
    kernel = params["params"]
    for part in path:
        kernel = kernel[part]

    def score(xi, yi):
        gradient = jax.grad(loss_of_one)(params, xi[None], yi[None])["params"]
        for part in path:
            gradient = gradient[part]
        return -jnp.sum(gradient * kernel) / jnp.linalg.norm(gradient) / jnp.linalg.norm(kernel)

    return np.asarray(jax.jit(jax.vmap(score))(x, y))


# test_ways.py has further losses under jit in the fast tier.
@tiered("loss, jitted", product(LOSSES, (False, True)), fast=product(["cross-entropy"], (False, True)))
def test_scores_equal_each_samples_own_gradient(loss, jitted):
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES[loss](model.apply(p, x), y).mean()

    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(loss_fn)
        (_, scores), _ = (jax.jit(step) if jitted else step)(params, x, y)
    np.testing.assert_allclose(scores, one_at_a_time(loss_fn, params, x, y, "head", "kernel"), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_those_of_the_published_code(published, case):
    w, b, h, y = (jnp.asarray(published[f"{case}/{k}"]) for k in ("weight", "bias", "embeddings", "labels"))
    model = nn.Dense(w.shape[0])
    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(lambda p: optax.softmax_cross_entropy(model.apply(p, h), y).sum())
        (_, scores), _ = jax.jit(step)({"params": {"kernel": w.T, "bias": b}})
        monitor.update(scores)
        report = monitor.end_epoch()
    assert report.count == len(h)
    np.testing.assert_allclose(scores, published[f"{case}/scores"], atol=1e-6)


@tiered(
    "argnums, has_aux", product([0, (0,), (0, 1), -3], (False, True)), fast=[(0, False), ((0, 1), False), (-3, True)]
)
def test_value_and_gradients_are_bit_identical_to_those_of_jax(argnums, has_aux):
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        z = model.apply(p, x)
        loss = LOSSES["cross-entropy"](z, y).mean()
        return (loss, z) if has_aux else loss

    arguments = (params, x, y)
    want = jax.jit(jax.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux))(*arguments)
    with gwa_logging.watch(model) as monitor:
        (value, _), grads = jax.jit(monitor.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux))(*arguments)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(want), strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize("has_aux", [False, True])
def test_grad_is_value_and_grad_without_the_value(has_aux):
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        z = model.apply(p, x)
        loss = LOSSES["cross-entropy"](z, y).mean()
        return (loss, {"logits": z}) if has_aux else loss

    with gwa_logging.watch(model) as monitor:
        (value, scores), grads = jax.jit(monitor.value_and_grad(loss_fn, has_aux=has_aux))(params, x, y)
        result = jax.jit(monitor.grad(loss_fn, has_aux=has_aux))(params, x, y)
    want = (grads, (value[1], scores)) if has_aux else (grads, scores)
    assert jax.tree.structure(result) == jax.tree.structure(want)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True))


def test_a_negative_argnum_counts_from_the_end():
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)
    with gwa_logging.watch(model) as monitor:
        _, grads = monitor.value_and_grad(
            lambda x, y, p: LOSSES["cross-entropy"](model.apply(p, x), y).mean(), argnums=-1
        )(x, y, params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_the_step_has_no_callback_and_is_compiled_once():
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)
    with gwa_logging.watch(model) as monitor:
        step = jax.jit(monitor.value_and_grad(lambda p, x, y: LOSSES["cross-entropy"](model.apply(p, x), y).mean()))
        for _ in range(3):
            (_, scores), _ = step(params, x, y)
            monitor.update(scores)
        assert "callback" not in str(step.trace(params, x, y).jaxpr)
        assert step._cache_size() == 1


def test_the_head_is_found_by_dataflow_through_what_follows_it():
    model, (x, y) = WithSetup(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        penalty = 1e-3 * sum(jnp.sum(q**2) for q in jax.tree.leaves(p))
        return -jnp.take_along_axis(model.apply(p, x), y[:, None], 1).mean() + penalty

    def without_penalty(p, x, y):
        return -jnp.take_along_axis(model.apply(p, x), y[:, None], 1).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = jax.jit(monitor.value_and_grad(loss_fn))(params, x, y)
        assert "'classifier'" in repr(monitor)
    np.testing.assert_allclose(scores, one_at_a_time(without_penalty, params, x, y, "classifier", "kernel"), atol=1e-6)


@pytest.mark.slow  # test_ways.py has both in the fast tier, with another width
@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["checkpoint", "inner jit"])
def test_a_head_inside_an_inner_transformation_is_found(wrap):
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](wrap(model.apply)(p, x), y).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = jax.jit(monitor.value_and_grad(loss_fn))(params, x, y)
    np.testing.assert_allclose(scores, one_at_a_time(loss_fn, params, x, y, "head", "kernel"), atol=1e-6)


def test_a_loss_that_is_jitted_itself_needs_no_jit_around_the_step_and_is_traced_once():
    model, (x, y) = MLP(), data()
    params, traced = model.init(jax.random.key(0), x), []

    @jax.jit
    def loss_fn(p, x, y):
        traced.append(None)
        return LOSSES["cross-entropy"](model.apply(p, x), y).mean()

    want = jax.value_and_grad(loss_fn)(params, x, y)
    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(loss_fn)
        (value, scores), grads = step(params, x, y)
        times = len(traced)
        for _ in range(3):
            assert jnp.array_equal(step(params, x, y)[0][1], scores)
    assert len(traced) == times
    np.testing.assert_allclose(scores, one_at_a_time(loss_fn, params, x, y, "head", "kernel"), atol=1e-6)
    for a, b in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_inner_jit_in_a_step_that_is_not_jitted_is_refused_because_it_would_be_compiled_at_every_step():
    model, (x, y) = MLP(), data()
    params, apply = model.init(jax.random.key(0), x), jax.jit(model.apply)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](apply(p, x), y).mean() + 0.0

    with gwa_logging.watch(model) as monitor, pytest.raises(InvalidInputError, match=r"Jit the whole step: jax\.jit"):
        monitor.value_and_grad(loss_fn)(params, x, y)


def test_a_teacher_of_another_class_is_not_confused_with_the_watched_model():
    model, teacher, (x, y) = MLP(), WithSetup(), data()
    params, taught = model.init(jax.random.key(0), x), teacher.init(jax.random.key(1), x)

    def loss_fn(p, x, y):
        return (
            LOSSES["cross-entropy"](model.apply(p, x), y).mean() + (model.apply(p, x) * teacher.apply(taught, x)).mean()
        )

    def once(p, x, y):
        z = model.apply(p, x)
        return LOSSES["cross-entropy"](z, y).mean() - (z * jax.nn.softmax(teacher.apply(taught, x))).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = jax.jit(monitor.value_and_grad(once))(params, x, y)
        np.testing.assert_allclose(scores, one_at_a_time(once, params, x, y, "head", "kernel"), atol=1e-6)
        with pytest.raises(HeadNotFoundError, match="'head' runs 2 times"):
            monitor.value_and_grad(loss_fn)(params, x, y)


def test_scan_over_micro_batches_works():
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](model.apply(p, x), y).mean()

    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(loss_fn)

        @jax.jit
        def accumulated(params, x, y):
            def micro(total, batch):
                (_, scores), grads = step(params, *batch)
                return jax.tree.map(jnp.add, total, grads), scores

            return jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, params), (x.reshape(4, 6, 8), y.reshape(4, 6)))

        _, scores = accumulated(params, x, y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
    np.testing.assert_allclose(scores.ravel(), one_at_a_time(loss_fn, params, x, y, "head", "kernel"), atol=1e-6)


def hand_written(params, x):
    h = jnp.tanh(x @ params["w1"])
    return tap(h @ params["w2"] + params["b2"], h, params["w2"], params["b2"])


def hand_params():
    a, b, c = jax.random.split(jax.random.key(0), 3)
    return {"w1": jax.random.normal(a, (8, 12)), "w2": jax.random.normal(b, (12, 5)), "b2": jax.random.normal(c, (5,))}


def test_a_hand_written_net_marks_its_head_with_tap():
    params, (x, y) = hand_params(), data()

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](hand_written(p, x), y).mean()

    with gwa_logging.watch(hand_written) as monitor:
        (value, scores), grads = jax.jit(monitor.value_and_grad(loss_fn))(params, x, y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
    want = one_at_a_time(lambda p, x, y: loss_fn(p["params"], x, y), {"params": params}, x, y, "w2")
    np.testing.assert_allclose(scores, want, atol=1e-6)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss_fn))(params, x, y)
    assert value == plain_value
    assert all(jnp.array_equal(grads[k], plain_grads[k]) for k in params)


def test_tap_with_the_users_own_probe_gives_the_scores_in_plain_jax_grad():
    params, (x, y) = hand_params(), data()

    def loss_fn(p, probe):
        h = jnp.tanh(x @ p["w1"])
        z = tap(h @ p["w2"] + p["b2"], h, p["w2"], p["b2"], probe)
        return LOSSES["cross-entropy"](z, y).mean()

    scores = jax.grad(loss_fn, argnums=1)(params, jnp.zeros(len(x)))
    want = one_at_a_time(
        lambda p, x, y: LOSSES["cross-entropy"](hand_written(p["params"], x), y).mean(), {"params": params}, x, y, "w2"
    )
    np.testing.assert_allclose(scores, want, atol=1e-6)


def test_tap_outside_a_watched_loss_does_nothing():
    params, (x, _) = hand_params(), data()
    h = jnp.tanh(x @ params["w1"])
    assert jnp.array_equal(hand_written(params, x), h @ params["w2"] + params["b2"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": jnp.ones((3, 5))}, r"weight: expected \(12, 5\) or the transpose"),
        ({"embeddings": jnp.ones((7, 12))}, r"embeddings: expected \(4,\)"),
        ({"bias": jnp.ones(4)}, r"bias: expected \(5,\)"),
        ({"probe": jnp.ones(3)}, r"probe: expected \(4,\)"),
    ],
)
def test_tap_names_shapes_that_do_not_match(change, said):
    arguments = {
        "logits": jnp.ones((4, 5)),
        "embeddings": jnp.ones((4, 12)),
        "weight": jnp.ones((12, 5)),
        "bias": jnp.ones(5),
        "probe": jnp.ones(4),
    }
    with pytest.raises(InvalidInputError, match=said):
        tap(**{**arguments, **change})


def test_a_head_without_a_bias_is_scored():
    model, (x, y) = MLP(bias=False), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](model.apply(p, x), y).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = monitor.value_and_grad(loss_fn)(params, x, y)
    np.testing.assert_allclose(scores, one_at_a_time(loss_fn, params, x, y, "head", "kernel"), atol=1e-6)


def test_bfloat16_is_scored_in_float32():
    x, y = data(64)
    model = nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(5, dtype=jnp.bfloat16)])
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](model.apply(p, x).astype(jnp.float32), y).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = jax.jit(monitor.value_and_grad(loss_fn))(params, x, y)
    assert scores.dtype == jnp.float32
    want = one_at_a_time(loss_fn, params, x, y, "layers_2", "kernel")
    np.testing.assert_allclose(scores, want, atol=2e-2)


def test_two_heads_are_refused_unless_one_is_named():
    model, (x, y) = TwoHeads(), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(p, x, y):
        return LOSSES["cross-entropy"](model.apply(p, x), y).mean()

    with gwa_logging.watch(model) as monitor, pytest.raises(HeadNotFoundError, match="'a', 'b'") as error:
        monitor.value_and_grad(loss_fn)(params, x, y)
    assert "'a': 12 -> 5" in error.value.candidates
    with gwa_logging.watch(model, head="b") as monitor:
        (_, scores), _ = monitor.value_and_grad(loss_fn)(params, x, y)
    np.testing.assert_allclose(scores, one_at_a_time(loss_fn, params, x, y, "b", "kernel"), atol=1e-6)


def test_an_unknown_head_is_named_with_the_candidates():
    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)
    with (
        gwa_logging.watch(model, head="nope") as monitor,
        pytest.raises(HeadNotFoundError, match=r"head='nope'.*with this path"),
    ):
        monitor.value_and_grad(lambda p: LOSSES["cross-entropy"](model.apply(p, x), y).mean())(params)


def test_a_loss_that_does_not_run_the_model_is_refused():
    model, other, (x, y) = MLP(), MLP(classes=7), data()
    params = other.init(jax.random.key(0), x)
    with (
        gwa_logging.watch(model) as monitor,
        pytest.raises(HeadNotFoundError, match="does not run a linear layer of MLP"),
    ):
        monitor.value_and_grad(lambda p: LOSSES["cross-entropy"](other.apply(p, x), y).mean())(params)


def test_a_head_must_be_named_by_a_path():
    with pytest.raises(InvalidInputError, match="expected a dotted path"):
        gwa_logging.watch(MLP(), head=nn.Dense(5))


def test_an_epoch_without_value_and_grad_ends_with_an_error_that_names_it():
    with (
        gwa_logging.watch(MLP()) as monitor,
        pytest.raises(NoObservationsError, match=r"monitor\.value_and_grad\(loss_fn\)"),
    ):
        monitor.end_epoch()


def test_a_tracer_is_refused_by_update():
    with gwa_logging.watch(MLP()) as monitor, pytest.raises(InvalidInputError, match="call update outside"):
        jax.jit(lambda s: monitor.update(s))(jnp.zeros(3))


@pytest.mark.parametrize(
    ("scores", "said"),
    [(jnp.zeros(3, jnp.int32), "int32"), (jnp.float32(0.1), r"shape \(\)"), ([0.1], "list"), ("no", "str")],
)
def test_scores_of_a_wrong_type_shape_or_dtype_are_refused(scores, said):
    with gwa_logging.watch(MLP()) as monitor, pytest.raises(InvalidInputError, match=f"scores: expected.*{said}"):
        monitor.update(scores)


def test_nan_scores_are_excluded_counted_and_training_continues(caplog):
    with gwa_logging.watch(MLP()) as monitor:
        for _ in range(2):
            monitor.update(jnp.array([0.1, jnp.inf, 0.2]))
            monitor.flush()
        report = monitor.end_epoch()
    assert (report.count, report.excluded) == (4, 2)
    assert sum("not finite" in message for message in caplog.messages) == 1


def test_tag_is_refused_in_jax():
    with gwa_logging.watch(MLP(), num_samples=3) as monitor, pytest.raises(InvalidInputError, match="update"):
        monitor.tag(jnp.arange(3))


def test_the_ledger_adds_up_by_id():
    with gwa_logging.watch(MLP(), num_samples=4) as monitor:
        monitor.update(jnp.array([0.1, 0.2, 0.3, jnp.nan]), jnp.array([2, 0, 2, 1]))
        monitor.update(jnp.array([0.5]), np.array([9]))
        found = monitor.suspects(4)
        assert [(s.id, s.times_seen) for s in found] == [(0, 1), (2, 2)]
        assert monitor.faults == {"sample ids": 1}


def test_pytorch_and_jax_agree_on_the_same_weights_and_batch():
    import torch
    import torch.nn.functional as F

    model, (x, y) = MLP(), data()
    params = model.init(jax.random.key(0), x)
    twin = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5))
    with torch.no_grad():
        for layer, name in ((twin[0], "Dense_0"), (twin[2], "head")):
            layer.weight.copy_(torch.from_numpy(np.array(params["params"][name]["kernel"].T)))
            layer.bias.copy_(torch.from_numpy(np.array(params["params"][name]["bias"])))
    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = monitor.value_and_grad(lambda p: LOSSES["cross-entropy"](model.apply(p, x), y).mean())(params)
        monitor.update(scores)
        ours = monitor.end_epoch()
    with gwa_logging.watch(twin) as monitor:
        F.cross_entropy(twin(torch.from_numpy(np.array(x))), torch.from_numpy(np.array(y)).long()).backward()
        theirs = monitor.end_epoch()
    for name in ("mean", "std", "gwa", "stable_gwa"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-6)
