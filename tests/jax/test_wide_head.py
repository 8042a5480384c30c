"""A head with more classes than features: its scores come from the embeddings' gradient, and it costs no memory."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import gwa_logging

FEATURES, CLASSES, BATCH = 12, 40, 24

X = jax.random.normal(jax.random.key(1), (BATCH, 8))
Y = jax.random.randint(jax.random.key(2), (BATCH,), 0, CLASSES)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Linen(nn.Module):
    classes: int = CLASSES
    features: int = FEATURES
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(self.features, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(h)


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.body, self.head = nnx.Linear(8, FEATURES, rngs=rngs), nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.body(x)))


def linen() -> tuple[Any, Any, Any, Any]:
    model = Linen()
    return model, model.init(jax.random.key(0), X), model.apply, lambda g: g["params"]["head"]["kernel"]


def nnx_() -> tuple[Any, Any, Any, Any]:
    model = Nnx()
    return model, model, lambda m, x: m(x), lambda g: g["head"]["kernel"][...]


def equinox() -> tuple[Any, Any, Any, Any]:
    model = eqx.nn.MLP(8, CLASSES, FEATURES, 1, key=jax.random.key(0))
    return model, model, lambda m, x: jax.vmap(m)(x), lambda g: g.layers[-1].weight


def haiku() -> tuple[Any, Any, Any, Any]:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([FEATURES, CLASSES])(x)))
    return model, model.init(jax.random.key(0), X), model.apply, lambda g: g["mlp/~/linear_1"]["w"]


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(linen, id="Linen"),
        *(pytest.param(make, id=name, marks=pytest.mark.slow) for name, make in (("NNX", nnx_), ("Equinox", equinox))),
        pytest.param(haiku, id="Haiku"),
    ],
)
def test_scores_equal_each_samples_own_gradient_and_gradients_are_bit_identical(library):
    model, params, apply, head = library()

    def loss(params, x, y):
        return cross_entropy(apply(params, x), y).mean()

    transform = nnx.value_and_grad if library is nnx_ else eqx.filter_value_and_grad
    jit = nnx.jit if library is nnx_ else eqx.filter_jit
    with gwa_logging.watch(model) as monitor:
        (value, scores), grads = jit(monitor.value_and_grad(loss))(params, X, Y)
    plain_value, plain_grads = jit(transform(loss))(params, X, Y)
    assert value == plain_value
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))
    weight = head(nnx.state(params) if library is nnx_ else params)
    gradient = jit(lambda params, x, y: head(transform(loss)(params, x, y)[1]))
    each = [gradient(params, X[i : i + 1], Y[i : i + 1]) for i in range(BATCH)]
    want = [-(g * weight).sum() / jnp.linalg.norm(g) / jnp.linalg.norm(weight) for g in each]
    np.testing.assert_allclose(scores, want, atol=1e-6)


def test_each_reason_for_having_no_score_is_recognised():
    model = Linen(features=2)
    params = model.init(jax.random.key(0), X)
    x = X.at[0].set(0).at[1].set(jnp.nan)  # nothing in the embedding (no bias, ReLU), and not a number
    weights = jnp.ones(BATCH).at[2].set(0)  # no gradient
    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(lambda p: (cross_entropy(model.apply(p, x), Y) * weights).mean())
        (_, scores), _ = jax.jit(step)(params)
        monitor.update(scores)
        assert not any(jnp.isfinite(scores[:3]))
        assert monitor.end_epoch().excluded >= 3
    embeddings = nn.relu(x @ params["params"]["Dense_0"]["kernel"])
    assert jnp.array_equal(jnp.isfinite(scores), (embeddings.sum(-1) > 0) & (weights > 0))


@pytest.mark.parametrize(
    "features",
    [pytest.param(FEATURES, id="wide head"), pytest.param(CLASSES, id="narrow head", marks=pytest.mark.slow)],
)
def test_rows_and_seeds_mapped_inside_the_loss_have_their_own_scores(features):
    model = eqx.nn.MLP(8, CLASSES, features, 1, key=jax.random.key(0))
    seeds = eqx.filter_vmap(lambda key: eqx.nn.MLP(8, CLASSES, features, 1, key=key))(
        jax.random.split(jax.random.key(3), 3)
    )

    def both(seeds, x, y):
        z = eqx.filter_vmap(lambda m: jax.vmap(m)(x))(seeds)
        return jax.vmap(cross_entropy, (0, None))(z, y).mean(-1).sum()

    def one(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y).mean()

    with gwa_logging.watch(model) as monitor:
        (_, scores), _ = eqx.filter_jit(monitor.value_and_grad(both))(seeds, X, Y)
        step = eqx.filter_jit(monitor.value_and_grad(one))
        for k in range(3):
            member = jax.tree.map(lambda leaf, k=k: leaf[k] if eqx.is_array(leaf) else leaf, seeds)
            (_, want), _ = step(member, X, Y)
            np.testing.assert_allclose(scores[k], want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("fully_optimised")
def test_a_step_with_128k_classes_needs_no_more_memory(dtype):
    model = Linen(classes=131_072, features=64, dtype=dtype)
    x, y = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x, y):
        return cross_entropy(model.apply(params, x).astype(jnp.float32), y).mean()

    def step(value_and_grad):
        def run(params, x, y):
            value, grads = value_and_grad(params, x, y)
            return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        compiled = jax.jit(run, donate_argnums=0).lower(params, x, y).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    with gwa_logging.watch(model) as monitor:
        bare, watched = step(jax.value_and_grad(loss)), step(monitor.value_and_grad(loss))
    assert bare > 64 * 131_072 * 4  # that is, the logits are in it
    assert watched < 1.01 * bare
