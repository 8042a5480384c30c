"""What `watch` costs a training step: bare and watched steps in turn, in one process.

    python benchmarks/step_overhead.py [--seconds 30] [--rows JAX] [--json FILE]

Copies of a model take turns step by step: bare, watched, and bare again. The second bare one against the first is
the noise floor of this machine. Everything is on in the watched one: scores at every step, a histogram every 50 steps,
the journal on disk. In JAX there is a fourth one, which does it as the paper's authors do: the model sows its embeddings, and
the scores come in closed form from logits, labels and the head's weight; they are only kept, without histograms or a journal.
Overheads are medians over pairs of neighbouring steps, with the 95 % interval of their bootstrap; the mean is given as well,
since the work at every 50th step does not show in a median.
"""

import argparse
import copy
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import gwa_logging

Step = Callable[[], None]
Steps = dict[str, Step]  # by name: "bare", "watched", "again" and, in JAX, "published"


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """About 1.5 ms a step on one core."""
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.randn(128, 128), torch.randint(0, 10, (128,))


def cnn() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """About 50 ms a step on one core."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 100))
    return model, torch.randn(64, 3, 32, 32), torch.randint(0, 100, (64,))


def torch_steps(
    make: Callable[[], Any], compiled: bool, directory: str, samples: int | None = None
) -> tuple[Steps, gwa_logging.Monitor]:
    """Training steps of three copies of a model, of which the second is watched; with a ledger of so many samples."""
    torch.manual_seed(0)
    model, x, y = make()
    models = {"bare": model, "watched": copy.deepcopy(model), "again": copy.deepcopy(model)}
    monitor = gwa_logging.watch(models["watched"], directory=directory, num_samples=samples)
    ids = torch.randint(0, samples or 1, (len(x),))

    def step_of(net: nn.Module) -> Step:
        run = torch.compile(net, fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        criterion = nn.CrossEntropyLoss()

        tagged = samples is not None and net is models["watched"]

        def step() -> None:
            if tagged:
                monitor.tag(ids)
            criterion(run(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: step_of(net) for name, net in models.items()}, monitor


def jax_body(kind: str) -> Any:
    """A function of images [B, H, W, C] that makes the embeddings; called inside of a compact Linen module."""
    import jax
    from flax import linen

    def mlp(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = linen.relu(linen.Dense(512)(x))
        return x

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

    return {"mlp": mlp, "cnn": cnn, "vit": vit}[kind]


def jax_steps(
    kind: str, shape: tuple[int, ...], classes: int, directory: str, samples: int | None = None
) -> tuple[Steps, gwa_logging.Monitor]:
    """Jitted, donated steps: bare, watched (with a ledger of so many samples), and the published way."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen

    class Net(linen.Module):
        sows: bool = False

        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            h = jax_body(kind)(x)
            if self.sows:
                self.sow("intermediates", "embeddings", h)
            return linen.Dense(classes, name="head")(h)

    model, sowing = Net(), Net(sows=True)
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.randint(jax.random.key(1), shape[:1], 0, classes)
    start = model.init(jax.random.key(2), x)
    monitor = gwa_logging.watch(model, directory=directory, num_samples=samples)
    ids = None if samples is None else np.random.default_rng(0).integers(0, samples, shape[0])
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
        "watched": step_of(watched, lambda scores: monitor.update(scores, ids)),
        "published": step_of(published, kept.append),
        "again": step_of(bare, lambda _: None),
    }
    return steps, monitor


def measure(steps: Steps, seconds: float) -> dict[str, np.ndarray]:
    """Seconds, float [rounds], of each step: in turn, in another order each time."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        for step in steps.values():
            step()
    rows: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rows) < 20:
        row = {}
        for name in rng.permutation(list(steps)):
            begin = time.perf_counter()
            steps[name]()
            row[name] = time.perf_counter() - begin
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in steps}


def overhead(times: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Per cent over the bare step: median of pairs with its interval, and of means."""
    bare = times["bare"] if name == "again" else (times["bare"] + times["again"]) / 2
    percent = 100 * (times[name] - bare) / np.median(bare)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(percent, len(percent))) for _ in range(500)]
    low, high = np.percentile(medians, [2.5, 97.5])
    # Without the moments when the machine was elsewhere.
    calm = np.logical_and.reduce([column < 3 * np.median(column) for column in times.values()])
    mean = 100 * (times[name][calm].mean() / bare[calm].mean() - 1)
    return {"median": float(np.median(percent)), "low": float(low), "high": float(high), "mean": float(mean)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="per row")
    parser.add_argument("--rows", default="", help="only the rows whose name holds this")
    parser.add_argument("--json", help="where to write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory = tempfile.mkdtemp()
    rows = {
        "PyTorch MLP": lambda: torch_steps(mlp, False, directory),
        "PyTorch CNN": lambda: torch_steps(cnn, False, directory),
        "PyTorch MLP, compiled": lambda: torch_steps(mlp, True, directory),
        "PyTorch CNN, compiled": lambda: torch_steps(cnn, True, directory),
        "JAX MLP": lambda: jax_steps("mlp", (512, 16, 16, 2), 10, directory),
        "JAX CNN": lambda: jax_steps("cnn", (64, 32, 32, 3), 100, directory),
        "JAX ViT": lambda: jax_steps("vit", (16, 32, 32, 3), 1000, directory),
    }
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, PyTorch {torch.__version__} with one thread\n")
    print(f"{'':24}{'bare step':>10}  {'watched':>28}  {'bare against bare':>28}  {'published scheme':>28}")
    results = {}
    for name, make in ((n, m) for n, m in rows.items() if args.rows in n):
        steps, monitor = make()
        times = measure(steps, args.seconds)
        monitor.close()
        assert monitor.history[0].count > 0, "the watched step was not seen"
        row = {other: overhead(times, other) for other in ("watched", "again", "published") if other in times}
        bare = float(1e3 * np.median(times["bare"]))
        results[name] = {"bare_ms": bare, **row}
        cells = [
            f"{o['median']:+.1f} % [{o['low']:+.1f}, {o['high']:+.1f}] {o['mean']:+.1f} %".rjust(28)
            for o in row.values()
        ]
        print(f"{name:24}{bare:>7.2f} ms", *cells, sep="  ", flush=True)
    print("\nmedian over pairs [95 % interval], then the mean")
    if args.json:
        with open(args.json, "w") as file:  # noqa: PTH123
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
