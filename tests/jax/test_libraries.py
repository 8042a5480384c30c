"""NNX, Equinox and Haiku: scores against each sample's own gradient, and nothing else changed."""

import copy

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError
from gwa_logging.cli import main
from gwa_logging.integrations.jax import describe, tap

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def data(n: int = 24) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(1), (n, 8)), jax.random.randint(jax.random.key(2), (n,), 0, 5)


def scores_of(gradients: jax.Array, weight: jax.Array) -> np.ndarray:
    """The oracle: from each sample's own gradient of the head's weight."""
    dots = -(gradients * weight).reshape(len(gradients), -1).sum(-1)
    return np.asarray(dots / jnp.linalg.norm(gradients.reshape(len(gradients), -1), axis=-1) / jnp.linalg.norm(weight))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body, self.norm = nnx.Linear(8, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(jnp.tanh(self.norm(self.body(x)))))


def nnx_loss(model: Nnx, x: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(model(x), y).mean()


def nnx_oracle(model: Nnx, x: jax.Array, y: jax.Array) -> np.ndarray:
    model = copy.deepcopy(model)
    h = model.drop(jnp.tanh(model.norm(model.body(x))))
    kernel, bias = model.head.kernel[...], model.head.bias[...]
    gradients = jax.jit(jax.vmap(lambda h, y: jax.grad(lambda k: cross_entropy(h @ k + bias, y))(kernel)))(h, y)
    return scores_of(gradients, kernel)


@pytest.mark.parametrize(
    "jitted", [pytest.param(False, id="eager", marks=pytest.mark.slow), pytest.param(True, id="nnx.jit")]
)
def test_nnx_scores_equal_each_samples_own_gradient_and_the_rest_is_bit_identical(jitted):
    x, y = data()
    model, plain = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    want = nnx_oracle(model, x, y)
    with gwa_logging.watch(model) as monitor:
        watched, bare = monitor.value_and_grad(nnx_loss), nnx.value_and_grad(nnx_loss)
        if jitted:
            watched, bare = nnx.jit(watched), nnx.jit(bare)
        (value, scores), grads = watched(model, x, y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
        assert "'head'" in repr(monitor)
    plain_value, plain_grads = bare(plain, x, y)
    np.testing.assert_allclose(scores, want, atol=1e-6)
    assert value == plain_value
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    for a, b in (
        (grads, plain_grads),
        (nnx.state(model), nnx.state(plain)),
    ):  # batch statistics and random keys as well
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert all(
            jnp.array_equal(
                jax.random.key_data(p) if jnp.issubdtype(p.dtype, jax.dtypes.prng_key) else p,
                jax.random.key_data(q) if jnp.issubdtype(q.dtype, jax.dtypes.prng_key) else q,
            )
            for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    assert type(model.head) is nnx.Linear


def test_nnx_trains_with_an_optimizer_and_aux():
    x, y = data()
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def loss(model, x, y):
        z = model(x)
        return cross_entropy(z, y).mean(), z

    with gwa_logging.watch(model) as monitor:
        value_and_grad = monitor.value_and_grad(loss, has_aux=True)

        @nnx.jit
        def step(model, optimizer, x, y):
            ((value, z), scores), grads = value_and_grad(model, x, y)
            optimizer.update(model, grads)
            return value, z, scores

        losses = []
        for _ in range(20):
            value, z, scores = step(model, optimizer, x, y)
            monitor.update(scores)
            losses.append(float(value))
        assert z.shape == (24, 5)
        assert losses[-1] < losses[0]
        assert monitor.end_epoch().count == 20 * 24


class Eqx(eqx.Module):
    layers: list

    def __init__(self, key: jax.Array) -> None:
        a, b = jax.random.split(key)
        self.layers = [eqx.nn.Linear(8, 12, key=a), jnp.tanh, eqx.nn.Linear(12, 5, key=b)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def eqx_loss(model: Eqx, x: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(jax.vmap(model)(x), y).mean()


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "filter_jit"])
def test_equinox_under_vmap_scores_equal_each_samples_own_gradient(jitted):
    model, (x, y) = Eqx(jax.random.key(0)), data()
    with gwa_logging.watch(model) as monitor:
        step = monitor.value_and_grad(eqx_loss)
        (value, scores), grads = (eqx.filter_jit(step) if jitted else step)(model, x, y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
        assert "'layers.2'" in repr(monitor)
    gradient = eqx.filter_grad(lambda model, x, y: cross_entropy(model(x), y))
    each = jax.jit(jax.vmap(lambda x, y: gradient(model, x, y).layers[2].weight))(x, y)
    np.testing.assert_allclose(scores, scores_of(each, model.layers[2].weight), atol=1e-6)
    bare = eqx.filter_value_and_grad(eqx_loss)
    plain_value, plain_grads = (eqx.filter_jit(bare) if jitted else bare)(model, x, y)
    assert value == plain_value
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))


def test_equinox_is_scored_if_the_user_batches_by_hand():
    model, (x, y) = Eqx(jax.random.key(0)), data()

    def loss(model, x, y):
        h = jnp.tanh(x @ model.layers[0].weight.T + model.layers[0].bias)
        return cross_entropy(jax.vmap(model.layers[2])(h), y).mean()

    with gwa_logging.watch(model, head="layers.2") as monitor:
        (_, scores), _ = eqx.filter_jit(monitor.value_and_grad(loss))(model, x, y)
        (_, want), _ = eqx.filter_jit(monitor.value_and_grad(eqx_loss))(model, x, y)
    np.testing.assert_allclose(scores, want, atol=1e-6)


def test_equinox_differentiates_by_the_first_argument_only():
    model, (x, y) = Eqx(jax.random.key(0)), data()
    with gwa_logging.watch(model) as monitor, pytest.raises(InvalidInputError, match="first argument only"):
        monitor.value_and_grad(eqx_loss, argnums=1)(model, x, y)


def test_haiku_scores_equal_each_samples_own_gradient():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 5], activation=jnp.tanh)(x)))
    x, y = data()
    params = net.init(jax.random.key(0), x)

    def loss(params, x, y):
        return cross_entropy(net.apply(params, x), y).mean()

    with gwa_logging.watch(net) as monitor:
        (value, scores), grads = jax.jit(monitor.value_and_grad(loss))(params, x, y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
        assert "'mlp/~/linear_1'" in repr(monitor)
    head = "mlp/~/linear_1"
    each = jax.jit(jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None])[head]["w"]))(x, y)
    np.testing.assert_allclose(scores, scores_of(each, params[head]["w"]), atol=1e-6)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, x, y)
    assert value == plain_value
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))


def test_watching_a_haiku_pair_again_replaces_the_first_watch():
    net = hk.transform(lambda x: hk.Linear(5)(x))
    first = gwa_logging.watch(net)
    second = gwa_logging.watch(net)
    with pytest.raises(InvalidInputError, match="closed"):
        first.end_epoch()
    second.close()


class TwoHeads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = nnx.Linear(8, 5, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.a(x) + self.b(x)


def test_two_heads_are_refused_unless_one_is_named():
    model, (x, y) = TwoHeads(nnx.Rngs(0)), data()
    with gwa_logging.watch(model) as monitor, pytest.raises(HeadNotFoundError, match="'a', 'b'"):
        monitor.value_and_grad(nnx_loss)(model, x, y)
    with gwa_logging.watch(model, head="b") as monitor:
        (_, scores), _ = monitor.value_and_grad(nnx_loss)(model, x, y)
    assert scores.shape == (24,)


def test_vmap_over_seeds_gives_the_scores_an_axis():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 5], activation=jnp.tanh)(x)))
    x, y = data()
    ensemble = jax.jit(jax.vmap(net.init, (0, None)))(jax.random.split(jax.random.key(0), 3), x)

    def loss(params, x, y):
        return cross_entropy(net.apply(params, x), y).mean()

    with gwa_logging.watch(net) as monitor:
        step = monitor.value_and_grad(loss)
        (_, scores), _ = jax.jit(jax.vmap(step, (0, None, None)))(ensemble, x, y)
        one = jax.tree.map(lambda p: p[1], ensemble)
        (_, want), _ = jax.jit(step)(one, x, y)
    assert scores.shape == (3, 24)
    np.testing.assert_allclose(scores[1], want, atol=1e-6)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dropout(0.1, deterministic=False)(linen.BatchNorm(use_running_average=False)(linen.Dense(12)(x)))
        return linen.Dense(5, name="out")(linen.relu(x))


def net(x: jax.Array) -> jax.Array:
    return hk.Linear(5)(hk.BatchNorm(True, True, 0.9)(hk.Linear(12)(x), is_training=True))


W = jnp.ones((8, 5))
MODELS = {
    "Linen": (Linen(), "out", 12),
    "NNX": (Nnx(nnx.Rngs(0)), "head", 12),
    "Haiku": (hk.transform(lambda x: hk.nets.MLP([12, 5])(x)), "mlp/~/linear_1", 12),
    "Haiku without a key": (
        hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 5])(x))),
        "mlp/~/linear_1",
        12,
    ),
    "Haiku with state": (hk.transform_with_state(net), "linear", 12),
    "hand-written": (lambda x: tap(x @ W, x, W), "tap", 8),
    "Equinox": (Eqx(jax.random.key(0)), "layers.2", 12),
}


@pytest.mark.parametrize("library", MODELS)
def test_heads_are_described_from_the_model_and_an_example_input(library):
    model, head, features = MODELS[library]
    x = jnp.zeros((8,) if library == "Equinox" else (4, 8))
    lines = describe(model, inputs=[x]).splitlines()
    assert lines[-1] == f"head {head!r}: {features} -> 5: the output comes from it"
    assert [line.split()[0] for line in lines if line.endswith("HEAD")] == [head]
    assert "does not run a linear layer with this path" in describe(model, "nope", [x])
    with pytest.raises(InvalidInputError, match="example input is needed"):
        describe(model)


def test_the_command_heads_takes_a_model_with_its_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jax_models.py").write_text(
        "import jax.numpy as jnp\nfrom flax import linen as nn\n\n\ndef make():\n    return nn.Dense(5), jnp.zeros((1, 8))\n"
    )
    assert main(["heads", "jax_models:make"]) == 0
    assert "8 -> 5" in capsys.readouterr().out
