"""What `watch` costs a training step: bare and watched steps in turn, in one process.

    python benchmarks/step_overhead.py [--seconds 30] [--json FILE]

Three copies of a model take turns step by step: bare, watched, and bare again. The second bare one against the first is
the noise floor of this machine. Everything is on in the watched one: scores at every step, a histogram every 50 steps,
the journal on disk. Overheads are medians over pairs of neighbouring steps, with the middle half of the bootstrap medians;
the mean is given as well, since the work at every 50th step does not show in a median.
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


def torch_steps(make: Callable[[], Any], compiled: bool, directory: str) -> tuple[list[Step], gwa_logging.Monitor]:
    """Training steps of three copies of a model, of which the second is watched."""
    torch.manual_seed(0)
    model, x, y = make()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    monitor = gwa_logging.watch(models[1], directory=directory)

    def step_of(net: nn.Module) -> Step:
        run = torch.compile(net, fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        criterion = nn.CrossEntropyLoss()

        def step() -> None:
            criterion(run(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return [step_of(net) for net in models], monitor


def jax_steps(directory: str) -> tuple[list[Step], gwa_logging.Monitor]:
    """The same MLP in JAX, larger: jitted steps with and without the probe."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen

    model = linen.Sequential([linen.Dense(512), linen.relu, linen.Dense(512), linen.relu, linen.Dense(10)])
    x, y = jax.random.normal(jax.random.key(0), (512, 512)), jax.random.randint(jax.random.key(1), (512,), 0, 10)
    start = model.init(jax.random.key(2), x)
    monitor = gwa_logging.watch(model, directory=directory)

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def descended(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    @jax.jit
    def bare(params: Any) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        return descended(params, grads), value

    @jax.jit
    def watched(params: Any) -> tuple[Any, jax.Array, jax.Array]:
        (value, scores), grads = monitor.value_and_grad(loss)(params)
        return descended(params, grads), value, scores

    states = [jax.tree.map(jnp.array, start) for _ in range(3)]

    def bare_step(i: int) -> Step:
        def step() -> None:
            states[i], value = bare(states[i])
            value.block_until_ready()

        return step

    def watched_step() -> None:
        states[1], value, scores = watched(states[1])
        monitor.update(scores)
        value.block_until_ready()

    return [bare_step(0), watched_step, bare_step(2)], monitor


def measure(steps: list[Step], seconds: float) -> np.ndarray:
    """Seconds, float [rounds, 3]: the steps in turn, their order turned round every other time."""
    for _ in range(10):
        for step in steps:
            step()
    rows: list[list[float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rows) < 20:
        row = [0.0] * len(steps)
        for i in (0, 1, 2) if len(rows) % 2 else (2, 1, 0):
            begin = time.perf_counter()
            steps[i]()
            row[i] = time.perf_counter() - begin
        rows.append(row)
    return np.array(rows)


def overhead(times: np.ndarray, column: int) -> dict[str, float]:
    """Per cent over the bare step: median of pairs with its interval, and of means."""
    bare = times[:, 0] if column == 2 else (times[:, 0] + times[:, 2]) / 2
    percent = 100 * (times[:, column] - bare) / np.median(bare)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(percent, len(percent))) for _ in range(500)]
    low, high = np.percentile(medians, [2.5, 97.5])
    calm = times[
        (times < 3 * np.median(times, axis=0)).all(axis=1)
    ]  # without the moments when the machine was elsewhere
    mean = 100 * (calm[:, column].mean() / (calm[:, 0].mean() if column == 2 else calm[:, ::2].mean()) - 1)
    return {"median": float(np.median(percent)), "low": float(low), "high": float(high), "mean": float(mean)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="per row")
    parser.add_argument("--json", help="where to write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory = tempfile.mkdtemp()
    rows = {
        "PyTorch MLP": lambda: torch_steps(mlp, False, directory),
        "PyTorch CNN": lambda: torch_steps(cnn, False, directory),
        "PyTorch MLP, compiled": lambda: torch_steps(mlp, True, directory),
        "PyTorch CNN, compiled": lambda: torch_steps(cnn, True, directory),
        "JAX MLP, jitted": lambda: jax_steps(directory),
    }
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, PyTorch {torch.__version__} with one thread\n")
    print(f"{'':24}{'bare step':>10}  {'watched':>26}  {'same against same':>26}")
    results = {}
    for name, make in rows.items():
        steps, monitor = make()
        times = measure(steps, args.seconds)
        monitor.close()
        assert monitor.history[0].count > 0, "the watched step was not seen"
        row = {
            "bare_ms": float(1e3 * np.median(times[:, 0])),
            "watched": overhead(times, 1),
            "noise": overhead(times, 2),
        }
        results[name] = row
        cells = [
            f"{o['median']:+.1f} % [{o['low']:+.1f}, {o['high']:+.1f}] {o['mean']:+.1f} %"
            for o in (row["watched"], row["noise"])
        ]
        print(f"{name:24}{row['bare_ms']:>7.2f} ms  {cells[0]:>28}  {cells[1]:>28}", flush=True)
    print("\nmedian over pairs [95 % interval], then the mean")
    if args.json:
        with open(args.json, "w") as file:  # noqa: PTH123
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
