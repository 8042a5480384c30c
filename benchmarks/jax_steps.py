"""The training steps of the benchmark in JAX: bare, watched, with a ledger, and with the published scheme."""

from collections.abc import Callable
from typing import Any

import numpy as np

import gwa_logging
from benchmarks.measuring import Group, Step

WORKS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "MLP": ("mlp", (512, 16, 16, 2), 10),
    "CNN": ("cnn", (64, 32, 32, 3), 100),
    "ViT": ("vit", (16, 32, 32, 3), 1000),
    "32k words": ("narrow", (64, 8, 8, 2), 32_000),
    "128k words": ("narrow", (32, 8, 8, 2), 128_000),
    "21,843 classes": ("narrow", (64, 8, 8, 2), 21_843),
}
"""Name of the body, shape of a batch, and number of classes."""


def body(kind: str) -> Any:
    """Returns a function from images [B, H, W, C] to embeddings [B, D], to be called inside a compact Linen module."""
    import jax
    from flax import linen

    def mlp(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = linen.relu(linen.Dense(512)(x))
        return x

    def narrow(x: jax.Array) -> jax.Array:
        return linen.relu(linen.Dense(128)(x.reshape(len(x), -1)))

    def cnn(x: jax.Array) -> jax.Array:
        for width in (32, 64, 64):
            x = linen.max_pool(linen.relu(linen.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return x.reshape(len(x), -1)

    def vit(x: jax.Array) -> jax.Array:
        x = linen.Conv(128, (4, 4), (4, 4))(x)
        x = x.reshape(len(x), -1, 128)
        x = x + linen.Embed(x.shape[1], 128)(np.arange(x.shape[1]))
        for _ in range(4):
            x = x + linen.MultiHeadDotProductAttention(4)(linen.LayerNorm()(x))
            x = x + linen.Dense(128)(linen.gelu(linen.Dense(512)(linen.LayerNorm()(x))))
        return linen.LayerNorm()(x).mean(1)

    return {"mlp": mlp, "narrow": narrow, "cnn": cnn, "vit": vit}[kind]


def group(kind: str, shape: tuple[int, ...], classes: int, directory: str) -> Group:
    """Jitted, donated steps."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen

    class Net(linen.Module):
        sows: bool = False

        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            h = body(kind)(x)
            if self.sows:
                self.sow("intermediates", "embeddings", h)
            return linen.Dense(classes, name="head")(h)

    model, sowing = Net(), Net(sows=True)
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.randint(jax.random.key(1), shape[:1], 0, classes)
    start = model.init(jax.random.key(2), x)
    monitor = gwa_logging.watch(model, directory=directory)
    ids, other = jnp.arange(shape[0]), Net()
    with_ledger = gwa_logging.watch(other, directory=directory, num_samples=1_000_000)
    kept: list[jax.Array] = []

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def loss_and_sown(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        z, sown = sowing.apply(params, x, mutable="intermediates")
        loss = optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        return loss, (z, sown["intermediates"]["embeddings"][0])

    def descended(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    def bare(params: Any) -> tuple[Any, jax.Array, None]:
        value, grads = jax.value_and_grad(loss)(params)
        return descended(params, grads), value, None

    def watched(params: Any) -> tuple[Any, jax.Array, jax.Array]:
        (value, scores), grads = monitor.value_and_grad(loss)(params)
        return descended(params, grads), value, scores

    def other_loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(other.apply(params, x), y).mean()

    def watched_with_ledger(params: Any) -> tuple[Any, jax.Array, jax.Array]:
        (value, scores), grads = with_ledger.value_and_grad(other_loss)(params)
        return descended(params, grads), value, scores

    def published(params: Any) -> tuple[Any, jax.Array, jax.Array]:
        (value, (z, h)), grads = jax.value_and_grad(loss_and_sown, has_aux=True)(params)
        kernel = params["params"]["head"]["kernel"]
        direction = jax.nn.one_hot(y, classes) - jax.nn.softmax(z)
        norms = [jnp.linalg.norm(direction, axis=1), jnp.linalg.norm(h, axis=1), jnp.linalg.norm(kernel)]
        scores = ((direction @ kernel.T) * h).sum(1) / (norms[0] * norms[1] * norms[2])
        return descended(params, grads), value, scores

    def step_of(run: Any, take: Callable[[Any], None]) -> Step:
        state, jitted = jax.tree.map(jnp.array, start), jax.jit(run, donate_argnums=0)

        def step() -> None:
            nonlocal state
            state, value, scores = jitted(state)
            take(scores)
            value.block_until_ready()

        return step

    steps = {
        "bare": step_of(bare, lambda _: None),
        "again": step_of(bare, lambda _: None),
        "watched": step_of(watched, monitor.update),
        "watched, ledger": step_of(watched_with_ledger, lambda scores: with_ledger.update(scores, ids)),
        "published form": step_of(published, kept.append),
    }

    def check() -> None:
        for each in (monitor, with_ledger):
            each.close()
            assert each.history, "a watched step was not seen"
            assert not each.faults, each.faults

    return Group(steps, check, {}, (shape[0], *start["params"]["head"]["kernel"].shape))


def groups(directory: str, names: list[str]) -> dict[str, Callable[[], Group]]:
    """Each model by name."""
    return {f"JAX {name}": (lambda name=name: group(*WORKS[name], directory)) for name in names}
