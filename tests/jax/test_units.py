"""Several rows of the head for one input, with unit="sample"."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gwa_logging

B, T = 6, 4


class Tokens(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(nn.tanh(nn.Dense(8)(x)))


POOLS = {"mean": lambda z: z.mean(-2), "max": lambda z: z.max(-2), "views in two axes": lambda z: z.mean(-2)}


FAST = {("mean", "whole batch", 5), ("max", "vmap", 9), ("views in two axes", "whole batch", 9)}
WAYS = product(POOLS, ("whole batch", "vmap"), (5, 9))  # fewer and more classes than features


@pytest.mark.parametrize(
    ("pool", "batching", "classes"),
    [pytest.param(*way, marks=() if way in FAST else pytest.mark.slow) for way in WAYS],
)
def test_a_sample_is_an_input_whose_rows_add_up(pool, batching, classes):
    model = Tokens(classes)
    shape = (B, 2, 2, 8) if pool == "views in two axes" else (B, T, 8)
    x, y = jax.random.normal(jax.random.key(1), shape), jax.random.randint(jax.random.key(2), (B,), 0, classes)
    params = model.init(jax.random.key(0), x)

    def one_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        z = model.apply(params, x)
        pooled = POOLS[pool](z.reshape(-1, classes))
        return optax.softmax_cross_entropy_with_integer_labels(pooled, y)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        if batching == "vmap":
            return jax.vmap(one_loss, (None, 0, 0))(params, x, y).mean()
        z = model.apply(params, x).reshape(B, T, classes)
        return optax.softmax_cross_entropy_with_integer_labels(POOLS[pool](z), y).mean()

    weight = params["params"]["head"]["kernel"]
    want, gradient_of = [], jax.jit(jax.grad(one_loss))
    for i in range(B):
        gradient = gradient_of(params, x[i], y[i])["params"]["head"]["kernel"]
        want.append(-jnp.vdot(gradient, weight) / jnp.linalg.norm(gradient) / jnp.linalg.norm(weight))
    with gwa_logging.watch(model, unit="sample", num_samples=B) as monitor:
        step = jax.jit(monitor.value_and_grad(loss))
        (value, scores), grads = step(params, x, y)
        assert scores.shape == (B,)
        monitor.update(scores, np.arange(B))
        report, found = monitor.end_epoch(), monitor.suspects()
        assert monitor.faults == {}
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(params, x, y)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, expected)
    assert report.count == B
    assert {s.id: s.mean_score for s in found} == pytest.approx(dict(enumerate(map(float, want))), abs=1e-6)


def test_one_row_for_each_input_is_scored_as_always():
    model = Tokens(5)
    x, y = jax.random.normal(jax.random.key(1), (B, 8)), jnp.zeros(B, jnp.int32)
    params = model.init(jax.random.key(0), x)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    scores = []
    for unit in ("sample", "position", None):
        with gwa_logging.watch(model, unit=unit) as monitor:
            scores.append(jax.jit(monitor.value_and_grad(loss))(params, x, y)[0][1])
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])
