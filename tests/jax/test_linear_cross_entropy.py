"""`linear_cross_entropy` of JAX, against one token at a time in float64 and against the cross-entropy of all logits."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError, alignment_scores
from gwa_logging.integrations.jax import linear_cross_entropy

D, V = 12, 40


def inputs(rows: tuple[int, ...] = (23,), features: int = D, classes: int = V, dtype: Any = jnp.float32) -> Any:
    """Hidden states, a weight, a bias and labels, of which about every fourth is ignored."""
    rng = np.random.default_rng(0)
    target = np.where(rng.random(rows) < 0.25, -100, rng.integers(0, classes, rows))
    arrays = rng.normal(size=(*rows, features)), rng.normal(size=(features, classes)) / 2, rng.normal(size=classes)
    return *(jnp.asarray(array, dtype) for array in arrays), jnp.asarray(target)


class Expected:
    """Losses, gradients by hidden, weight and bias, and scores, one token at a time in float64.

    The gradients are those of the sum of the losses times `factors`.
    """

    def __init__(self, hidden, weight, bias, target, smoothing=0.0, factors=1.0) -> None:
        hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
        rows, classes = target.shape, weight.shape[1]
        bias = np.zeros(classes) if bias is None else np.asarray(bias, np.float64)
        self.losses = np.zeros(rows)
        self.by_hidden, self.by_weight, self.by_bias = np.zeros(hidden.shape), np.zeros(weight.shape), np.zeros(classes)
        self.scores = np.full(rows, np.nan)
        factors = np.broadcast_to(factors, rows)
        for at in np.ndindex(rows):
            if target[at] == -100:
                continue
            logits = hidden[at] @ weight + bias
            wanted = np.full(classes, smoothing / classes)
            wanted[target[at]] += 1 - smoothing
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            delta = np.exp(log_p) - wanted
            self.losses[at] = -(wanted * log_p).sum()
            self.by_hidden[at] = factors[at] * (weight @ delta)
            self.by_weight += factors[at] * np.outer(hidden[at], delta)
            self.by_bias += factors[at] * delta
            if factors[at]:
                self.scores[at] = alignment_scores(factors[at] * delta[None], hidden[at][None], weight.T)[0]

    @property
    def gradients(self):
        return self.by_hidden, self.by_weight, self.by_bias


def assert_close(found, wanted, atol=1e-6):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=atol, rtol=1e-6)


def assert_matches(arrays, smoothing=0.0, reduction="mean", chunk=None, jit=jax.jit):
    """Loss, gradients and scores against the oracle, with a probe of the test's own."""
    hidden, weight, bias, target = arrays
    share = np.full(target.shape, 1 / max((target >= 0).sum(), 1))
    factors = {
        "mean": share,
        "sum": np.ones(target.shape),
        "none": np.linspace(-1, 2, target.size).reshape(target.shape),
    }
    wanted = Expected(*arrays, smoothing, factors[reduction])

    def loss(hidden, weight, bias, probe):
        options: Any = {"label_smoothing": smoothing, "reduction": reduction, "chunk": chunk, "probe": probe}
        losses = linear_cross_entropy(hidden, weight, target, bias, **options)
        return jnp.sum(losses * factors["none"].astype(np.float32)) if reduction == "none" else losses

    probe = jnp.zeros(target.shape, jnp.float32)
    value, (*grads, scores) = jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(hidden, weight, bias, probe)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, (wanted.losses * factors[reduction]).sum(), rtol=2e-6, atol=1e-5)
    gradients = wanted.gradients[: 3 if bias is not None else 2]
    assert_close(grads[: len(gradients)], gradients, atol=1e-6 * max(1, *(abs(g).max(initial=0) for g in gradients)))
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "smoothing", "rows", "chunk"),
    [("mean", 0.0, (23,), 5), ("none", 0.1, (3, 7), 6), pytest.param("sum", 0.1, (23,), None, marks=pytest.mark.slow)],
)
def test_loss_gradients_and_scores_equal_those_of_one_token_at_a_time(reduction, smoothing, rows, chunk):
    assert_matches(inputs(rows), smoothing, reduction, chunk)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_chunk_smoothing_and_set_of_ignored_rows_is_exact(data):
    rows = tuple(data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3), label="rows"))
    hidden, weight, bias, target = inputs(rows, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    target = jnp.where(data.draw(st.booleans(), label="all ignored"), -100, target)
    bias = data.draw(st.sampled_from([bias, None]))
    smoothing, chunk = data.draw(st.sampled_from([0.0, 0.1, 1.0])), data.draw(st.sampled_from([None, 1, 2, 3, 7]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    assert_matches((hidden, weight, bias, target), smoothing, reduction, chunk, jit=lambda f: f)


class Lm(linen.Module):
    """A language model whose head is only a kernel: its loss computes the product."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = linen.Dense(D)(jnp.tanh(linen.Embed(V, 8)(tokens)))
        return jnp.tanh(h), self.param("kernel", linen.initializers.lecun_normal(), (D, V))


TOKENS = jax.random.randint(jax.random.key(1), (4, 10), 0, V)
NEXT = jnp.roll(TOKENS, -1, axis=1).at[:, -1].set(-100)


def test_a_watched_loss_gives_the_scores_of_its_trained_tokens_and_unchanged_gradients():
    model = Lm()
    params = model.init(jax.random.key(0), TOKENS)

    def loss(params, tokens, target):
        return linear_cross_entropy(*model.apply(params, tokens), target, chunk=8)

    with gwa_logging.watch(model, num_samples=4) as monitor:
        (value, scores), grads = jax.jit(monitor.value_and_grad(loss))(params, TOKENS, NEXT)
        monitor.update(scores)
        report = monitor.end_epoch()
    assert (report.count, report.excluded) == (36, 4)
    assert monitor.journal.exists()
    hidden, weight = model.apply(params, TOKENS)
    wanted = Expected(hidden, weight, None, np.asarray(NEXT))
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, TOKENS, NEXT)
    assert value == plain_value
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))


ARRAYS = inputs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": ARRAYS[1].T}, r"weight: expected \[12, classes\] .* found \(40, 12\); pass weight\.T"),
        ({"weight": ARRAYS[1][:5]}, r"weight: expected \[12, classes\] .* found \(5, 40\)$"),
        ({"weight": jnp.ones((D, V), jnp.int8)}, r"weight: expected a floating-point array, found int8"),
        ({"target": ARRAYS[3][:3]}, r"target: expected shape \(23,\) .* found \(3,\)"),
        ({"target": jnp.ones((23, V))}, r"target: expected class indices as integers, found float32 .*\.tap"),
        ({"bias": jnp.ones(D)}, r"bias: expected shape \(40,\) .* found \(12,\)"),
        ({"probe": jnp.zeros(3)}, r"probe: expected shape \(23,\) .* found \(3,\)"),
        ({"hidden": jnp.ones(())}, r"hidden: expected an array \[\.\.\., D\]"),
        ({"weight": {"kernel": ARRAYS[1]}}, r"weight: expected an array, found dict"),
        ({"ignore_index": 0.5}, r"ignore_index: expected an int, found 0\.5"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], found 1\.5"),
        ({"reduction": "avg"}, r"reduction: expected 'mean', 'sum' or 'none', found 'avg'"),
        ({"chunk": 0}, r"chunk: expected a number of rows of at least 1, or None, found 0"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found(change, message):
    arguments = dict(zip(("hidden", "weight", "bias", "target"), ARRAYS, strict=True)) | change
    with pytest.raises(InvalidInputError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.bfloat16, 3e-3), (jnp.float16, 4e-4)], ids=["bfloat16", "float16"])
def test_in_16_bits_scores_are_those_of_the_rounded_arrays_and_survive_a_huge_loss_scale(dtype, atol, reduction):
    hidden, weight, bias, target = inputs((64,), 32, 300, dtype)
    scale = jnp.float32(2**24)

    def loss(hidden, weight, bias, probe):
        losses = linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, probe=probe, chunk=16)
        return losses.mean() * scale

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    by_hidden, by_weight, by_bias, scores = gradient(hidden, weight, bias, jnp.zeros(64))
    assert (by_hidden.dtype, by_weight.dtype, by_bias.dtype, scores.dtype) == (dtype, dtype, dtype, jnp.float32)
    wanted = Expected(hidden, weight, bias, np.asarray(target))
    np.testing.assert_allclose(scores, wanted.scores, atol=atol)
    if dtype == jnp.bfloat16:
        share = float(scale) / (64 if reduction == "none" else (np.asarray(target) >= 0).sum())
        np.testing.assert_allclose(
            np.asarray(by_weight, np.float32) / share, wanted.by_weight, atol=0.02 * abs(wanted.by_weight).max()
        )


@pytest.mark.slow
def test_operands_in_float64_are_computed_in_float64():
    with jax.enable_x64(True):
        hidden, weight, bias, target = inputs(dtype=jnp.float64)
        loss = partial(linear_cross_entropy, target=target, reduction="sum", chunk=4)
        value, grads = jax.value_and_grad(lambda h, w, b: loss(h, w, bias=b), argnums=(0, 1, 2))(hidden, weight, bias)
        wanted = Expected(hidden, weight, bias, np.asarray(target))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted.losses.sum(), rtol=1e-14)
        for found, expected in zip(grads, wanted.gradients, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.slow
def test_a_row_that_is_predicted_with_confidence_keeps_its_gradient_and_score():
    hidden, weight, bias, target = inputs((6,))
    target = jnp.abs(target) % V
    confident = bias.at[target[0]].add(30.0)  # 1 - p is 1e-12, far below the rounding of p
    wanted = Expected(hidden[:1], weight, confident, np.asarray(target[:1]))
    gradient = jax.grad(lambda h, w, p: linear_cross_entropy(h, w, target[:1], confident, probe=p), argnums=(0, 2))
    by_hidden, scores = gradient(hidden[:1], weight, jnp.zeros(1))
    np.testing.assert_allclose(by_hidden, wanted.by_hidden, rtol=1e-4)
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)


@pytest.mark.slow
def test_only_the_sign_of_a_rows_factor_reaches_its_score():
    hidden, weight, bias, target = inputs((6,))
    factors = jnp.array([1.0, 1e30, -1e-30, 0.0, jnp.nan, jnp.inf])
    target = jnp.abs(target) % V

    def scores_with(factors):
        def loss(probe):
            return jnp.sum(linear_cross_entropy(hidden, weight, target, bias, reduction="none", probe=probe) * factors)

        return np.asarray(jax.grad(loss)(jnp.zeros(6)))

    plain, scores = scores_with(jnp.ones(6)), scores_with(factors)
    np.testing.assert_array_equal(
        scores, [plain[0], plain[1], -plain[2], np.nan, np.inf, np.inf]
    )  # markers of scores.py


@pytest.mark.slow
def test_bad_rows_are_visible_and_ignored_ones_are_harmless():
    hidden, weight, bias, target = inputs((8,))
    target = jnp.arange(8)
    losses = partial(linear_cross_entropy, reduction="none")
    for wrong in (V, -1):
        found = losses(hidden, weight, target.at[2].set(wrong), bias)
        assert jnp.array_equal(jnp.isnan(found), jnp.arange(8) == 2)
    ignored = target.at[2].set(-100)
    gradient = jax.value_and_grad(partial(linear_cross_entropy, target=ignored), argnums=(0, 1))
    clean = gradient(hidden, weight)
    dirty = gradient(hidden.at[2].set(jnp.nan), weight)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True))
    masked = bias.at[30:].set(-jnp.inf)  # classes that only fill the vocabulary up
    value, grads = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(hidden, weight, target, masked)
    fewer, fewer_grads = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(
        hidden, weight[:, :30], target, bias[:30]
    )
    np.testing.assert_allclose(value, fewer, rtol=1e-6)
    np.testing.assert_allclose(grads[0], fewer_grads[0], atol=1e-6)
    assert not grads[1][:, 30:].any()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_a_trained_row_has_loss_zero_and_no_gradient(reduction):
    hidden, weight, bias, _ = inputs((6,))
    for rows in (0, 6):
        arrays = hidden[:rows], weight, bias
        loss = partial(linear_cross_entropy, target=jnp.full(rows, -100, jnp.int32), reduction=reduction)
        value, grads = jax.value_and_grad(lambda h, w, b, loss=loss: loss(h, w, bias=b).sum(), argnums=(0, 1, 2))(
            *arrays
        )
        assert value == 0
        assert not any(g.any() for g in grads)


@pytest.mark.slow
def test_second_derivatives_equal_those_of_all_logits():
    hidden, weight, bias, target = inputs((5,))
    tangent = jax.random.normal(jax.random.key(3), weight.shape)

    def full(weight):
        log_p = jax.nn.log_softmax(hidden @ weight + bias)
        losses = -jnp.take_along_axis(log_p, jnp.abs(target)[:, None] % V, axis=1)[:, 0]
        return jnp.sum(jnp.where(target >= 0, losses, 0)) / jnp.sum(target >= 0)

    def fused(weight, reduction):
        losses = linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, chunk=2)
        return losses if reduction == "mean" else jnp.sum(losses) / jnp.sum(target >= 0)

    wanted = jax.grad(lambda w: jnp.vdot(jax.grad(full)(w), tangent))(weight)
    for reduction in ("mean", "none"):
        gradient = jax.grad(partial(fused, reduction=reduction))
        np.testing.assert_allclose(jax.grad(lambda w, g=gradient: jnp.vdot(g(w), tangent))(weight), wanted, atol=1e-6)
        np.testing.assert_allclose(jax.jvp(gradient, (weight,), (tangent,))[1], wanted, atol=1e-6)


def lm_arrays():
    """The inputs of three sequences: hidden states [3, 7, D] and labels [3, 7]."""
    return inputs((3, 7))


def scores_of(loss, *args, jit=jax.jit, **options):
    with gwa_logging.watch(loss) as monitor:
        (_, scores), grads = jit(monitor.value_and_grad(loss, **options))(*args)
    return scores, grads


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sequences_mapped_inside_the_loss_have_their_own_scores(reduction):
    hidden, weight, bias, target = lm_arrays()

    def one(hidden, weight, bias):
        def of_sequence(h, y):
            return linear_cross_entropy(h, weight, y, bias, reduction=reduction, chunk=4).sum()

        return jax.vmap(of_sequence)(hidden, target).mean()

    counted = (np.asarray(target) >= 0).sum(axis=1, keepdims=True)
    factors = np.broadcast_to(1 / 3 / (counted if reduction == "mean" else 1), target.shape)
    wanted = Expected(hidden, weight, bias, np.asarray(target), factors=factors)
    scores, grads = scores_of(one, hidden, weight, bias, argnums=(0, 1, 2))
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)
    assert_close(grads, wanted.gradients)


@pytest.mark.slow
def test_an_ensemble_mapped_inside_the_loss_has_the_scores_of_each_member():
    hidden, weight, bias, target = lm_arrays()
    weights = jnp.stack([weight, -weight, weight[::-1]])

    def loss(weights):
        return jax.vmap(lambda w: jax.vmap(lambda h, y: linear_cross_entropy(h, w, y, bias))(hidden, target))(
            weights
        ).sum()

    scores, _ = scores_of(loss, weights)
    for found, each in zip(scores, weights, strict=True):
        np.testing.assert_allclose(found, Expected(hidden, each, bias, np.asarray(target)).scores, atol=1e-6)


@pytest.mark.slow
def test_several_targets_of_one_hidden_state_have_their_own_scores():
    hidden, weight, bias, target = inputs()
    targets = jnp.stack([target, jnp.where(target < 0, target, (target + 1) % V)])

    def loss(weight):
        return jax.vmap(lambda y: linear_cross_entropy(hidden, weight, y, bias))(targets).sum()

    scores, _ = scores_of(loss, weight)
    for found, each in zip(scores, targets, strict=True):
        np.testing.assert_allclose(found, Expected(hidden, weight, bias, np.asarray(each)).scores, atol=1e-6)


@pytest.mark.slow
def test_per_sample_gradients_without_a_watch():
    hidden, weight, bias, target = lm_arrays()
    gradient = jax.vmap(jax.grad(linear_cross_entropy, argnums=1), (0, None, 0, None))(hidden, weight, target, bias)
    for found, h, y in zip(gradient, hidden, np.asarray(target), strict=True):
        np.testing.assert_allclose(found, Expected(h, weight, bias, y).by_weight / (y >= 0).sum(), atol=1e-6)


@pytest.mark.slow
def test_remat_and_accumulation_in_a_scan_change_nothing():
    hidden, weight, bias, target = lm_arrays()
    wanted = Expected(hidden, weight, bias, np.asarray(target))

    def loss(weight, hidden, target):
        return jax.checkpoint(partial(linear_cross_entropy, bias=bias, reduction="sum", chunk=3))(
            jnp.tanh(jnp.arctanh(hidden / 9)) * 9, weight, target
        )

    with gwa_logging.watch(loss) as monitor:
        value_and_grad = monitor.value_and_grad(loss)

        @jax.jit
        def accumulated(weight):
            def add(total, part):
                (_, scores), grads = value_and_grad(weight, *part)
                return total + grads, scores

            return jax.lax.scan(add, jnp.zeros_like(weight), (hidden, target))

        grads, scores = accumulated(weight)
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)
    np.testing.assert_allclose(grads, wanted.by_weight, atol=2e-6)


@pytest.mark.slow
def test_a_step_that_is_not_jitted_compiles_once(caplog):
    hidden, weight, bias, target = lm_arrays()

    def loss(weight):
        return linear_cross_entropy(hidden, weight, target, bias, chunk=6)

    with gwa_logging.watch(loss) as monitor:
        step = monitor.value_and_grad(loss)
        (_, first), _ = step(weight)
        with jax.log_compiles(), caplog.at_level("DEBUG"):
            (_, second), _ = step(weight)
            assert "ompil" not in caplog.text
            jax.jit(lambda x: x + 41)(1)  # the log would show it
            assert "ompil" in caplog.text
    assert jnp.array_equal(first, second, equal_nan=True)


@pytest.mark.slow
def test_a_head_that_runs_twice_or_in_a_loop_inside_the_loss_is_refused():
    hidden, weight, bias, target = lm_arrays()

    def twice(weight):
        return linear_cross_entropy(hidden, weight, target) + linear_cross_entropy(hidden, weight, target, bias)

    def looped(weight):
        return jax.lax.map(lambda part: linear_cross_entropy(part[0], weight, part[1]), (hidden, target)).sum()

    with pytest.raises(
        HeadNotFoundError, match=r"'linear_cross_entropy' runs 2 times in the loss; a head must run once"
    ):
        scores_of(twice, weight)
    with pytest.raises(HeadNotFoundError, match=r"'linear_cross_entropy' runs in a loop"):
        scores_of(looped, weight)


def test_inputs_cannot_be_scored_where_the_loss_is_that_of_each_row():
    hidden, weight, _, target = lm_arrays()

    def loss(weight):
        return linear_cross_entropy(hidden, weight, target)

    with (
        gwa_logging.watch(loss, unit="sample") as monitor,
        pytest.raises(InvalidInputError, match="unit='sample': linear_cross_entropy has a loss for each row"),
    ):
        monitor.value_and_grad(loss)(weight)


@pytest.mark.slow
def test_beside_another_head_it_is_chosen_by_name():
    hidden, weight, bias, target = lm_arrays()
    model = linen.Dense(5)
    params = model.init(jax.random.key(0), hidden)

    def loss(params, weight):
        other = jax.nn.log_softmax(model.apply(params, hidden))[..., 0].mean()
        return linear_cross_entropy(hidden, weight, target, bias) + other

    with gwa_logging.watch(model) as monitor, pytest.raises(HeadNotFoundError, match="several linear layers"):
        jax.jit(monitor.value_and_grad(loss, argnums=(0, 1)))(params, weight)
    with gwa_logging.watch(model, head="linear_cross_entropy") as monitor:
        (_, scores), _ = jax.jit(monitor.value_and_grad(loss, argnums=(0, 1)))(params, weight)
        np.testing.assert_allclose(scores, Expected(hidden, weight, bias, np.asarray(target)).scores, atol=1e-6)


class NnxLm(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.head = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)


class EqxLm(eqx.Module):
    embed: eqx.nn.Embedding
    head: eqx.nn.Linear


def nnx_lm() -> tuple[Any, Any, Any, Any, Any]:
    model = NnxLm()
    # the kernel as a Variable, the bias as its array
    return model, model, lambda m: (m.embed(TOKENS), m.head.kernel, m.head.bias[...]), nnx.jit, nnx.value_and_grad


def equinox_lm() -> tuple[Any, Any, Any, Any, Any]:
    a, b = jax.random.split(jax.random.key(0))
    model = EqxLm(eqx.nn.Embedding(V, D, key=a), eqx.nn.Linear(D, V, key=b))

    def parts(m):
        return jax.vmap(jax.vmap(m.embed))(TOKENS), m.head.weight.T, m.head.bias

    return model, model, parts, eqx.filter_jit, eqx.filter_value_and_grad


def haiku_lm() -> tuple[Any, Any, Any, Any, Any]:
    def forward():
        bias = hk.get_parameter("b", (V,), init=jnp.ones)
        return hk.Embed(V, D)(TOKENS), hk.get_parameter("w", (D, V), init=hk.initializers.RandomNormal()), bias

    model = hk.without_apply_rng(hk.transform(forward))
    return model, model.init(jax.random.key(0)), model.apply, jax.jit, jax.value_and_grad


@pytest.mark.slow
@pytest.mark.parametrize("library", [nnx_lm, equinox_lm, haiku_lm], ids=["NNX", "Equinox", "Haiku"])
def test_every_model_library_gives_the_scores(library):
    model, params, parts, jit, value_and_grad = library()

    def loss(params):
        hidden, weight, bias = parts(params)
        return linear_cross_entropy(hidden, weight, NEXT, bias, chunk=16)

    with gwa_logging.watch(model) as monitor:
        (value, scores), grads = jit(monitor.value_and_grad(loss))(params)
    np.testing.assert_allclose(scores, Expected(*parts(params), np.asarray(NEXT)).scores, atol=1e-6)
    plain_value, plain_grads = jit(value_and_grad(loss))(params)
    assert value == plain_value
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))


@pytest.mark.slow
def test_nan_debugging_is_not_stopped_by_ignored_rows():
    hidden, weight, bias, target = inputs()

    def loss(weight):
        return linear_cross_entropy(hidden, weight, target, bias, chunk=5)

    with jax.debug_nans(True), jax.debug_infs(True):
        scores, _ = scores_of(loss, weight)
    assert jnp.array_equal(scores == 64, target == -100)


@pytest.mark.slow
@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_step_with_128k_classes_needs_a_fraction_of_the_memory_and_its_watch_nothing(reduction):
    rows, features, classes = 4096, 256, 131_072
    shapes = (rows, features), (features, classes)
    arrays = *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def full(hidden, weight, target):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ weight), target[:, None], axis=1).mean()

    def fused(hidden, weight, target):
        return linear_cross_entropy(hidden, weight, target, reduction=reduction).mean()

    def peak(value_and_grad):
        return jax.jit(value_and_grad).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    bare = peak(jax.value_and_grad(fused, argnums=(0, 1)))
    with gwa_logging.watch(fused) as monitor:
        watched = peak(monitor.value_and_grad(fused, argnums=(0, 1)))
    assert bare < peak(jax.value_and_grad(full, argnums=(0, 1))) / 4
    assert bare < rows * classes * 4  # there are never all logits, not even once
    assert watched < 1.01 * bare


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_fused.py")],
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
        cwd=tmp_path_factory.mktemp("sharded"),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("step", ["loss", "loss_by_row"])
def test_loss_gradients_and_scores_of_sharded_arrays_equal_those_of_one_device(sharded, step):
    one = sharded[f"one device, {step}"]
    ways = [name for name in sharded if name.endswith(f", {step}")]
    assert len(ways) == 11
    for name in ways:
        found = sharded[name]
        assert found["count"] == one["count"] == 40, name
        assert name.startswith("one device") or found["spec"][0] == "d", name
        for numbers, wanted in zip(found["numbers"], one["numbers"], strict=True):
            np.testing.assert_allclose(numbers, wanted, atol=2e-6, err_msg=name)
