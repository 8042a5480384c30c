"""What the per-sample ledger costs: a training step, and, of ten million samples, memory and the end of an epoch.

    python -m benchmarks.ledger [--seconds 30] [--samples 10000000]

Steps: a model that is watched with a ledger, and two that are watched without one, take turns step by step, in one process; the
second one without against the first is the noise floor. Overheads are medians over pairs of neighbouring steps with the 95 %
interval of their bootstrap, in microseconds, and then in per cent of a step that is watched without a ledger. What the ledger
costs hardly depends on what else is in a step, so the small steps say it most exactly.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import gwa_logging
from benchmarks.step_overhead import Steps, cnn, jax_steps, measure, mlp, overhead, torch_steps

BATCH, BATCHES = 256, 50


def in_turn(make: Callable[[int | None], tuple[Steps, gwa_logging.Monitor]], samples: int) -> tuple[Steps, list[Any]]:
    """The watched step of three makes: without, with, and again without a ledger."""
    made = {name: make(size) for name, size in (("bare", None), ("ledger", samples), ("again", None))}
    return {name: steps["watched"] for name, (steps, _) in made.items()}, [monitor for _, monitor in made.values()]


def megabytes() -> float:
    """The most memory that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def epoch_of_torch(samples: int | None, directory: str) -> tuple[gwa_logging.Monitor, Callable[[], None]]:
    """A monitor, and a function that trains a small model for an epoch of 50 batches."""
    model = torch.nn.Linear(32, 10)
    monitor = gwa_logging.watch(model, directory=directory, num_samples=samples)

    def train() -> None:
        for _ in range(BATCHES):
            if samples:
                monitor.tag(torch.randint(0, samples, (BATCH,)))
            torch.nn.functional.cross_entropy(model(torch.randn(BATCH, 32)), torch.randint(0, 10, (BATCH,))).backward()

    return monitor, train


def epoch_of_jax(samples: int | None, directory: str) -> tuple[gwa_logging.Monitor, Callable[[], None]]:
    """The same in JAX; the scores are made up, the predictions too."""
    import jax.numpy as jnp
    from flax import linen

    monitor = gwa_logging.watch(linen.Dense(10), directory=directory, num_samples=samples)
    rng = np.random.default_rng(0)

    def train() -> None:
        for _ in range(BATCHES):
            scores = jnp.asarray(rng.uniform(-0.3, 0.3, BATCH).astype(np.float32))
            ids = rng.integers(0, samples, BATCH) if samples else None
            monitor.update(scores, ids, predicted=np.zeros(BATCH, np.int32) if samples else None)

    return monitor, train


def median_us(call: Callable[[], Any], times: int = 300) -> float:
    """Microseconds."""
    return float(1e6 * np.median([timed(call) for _ in range(times)]))


def own_operations(samples: int) -> None:
    """What the ledger adds to a step, each operation by itself and waited for: exact on a busy machine, too."""
    import jax
    import jax.numpy as jnp

    from gwa_logging.integrations.jax.accumulate import DeviceLedger, enter
    from gwa_logging.integrations.torch.accumulate import Accumulator
    from gwa_logging.samples import Samples

    accumulator, ids, scores = Accumulator(samples), torch.randint(0, samples, (BATCH,)), 0.3 * torch.rand(BATCH)
    batch = Samples(ids, None, torch.zeros(BATCH, dtype=torch.int64))
    for classes in (10, 100, 1000):
        logits = torch.randn(BATCH, classes)
        took = median_us(lambda logits=logits: logits.argmax(-1))  # type: ignore[misc]
        print(f"PyTorch, prediction of {BATCH} samples, {classes} classes: {took:.0f} us")
    print(f"PyTorch, entering them: {median_us(lambda: accumulator._enter(batch, scores)):.0f} us")

    ledger, device_scores = DeviceLedger.empty(samples), jnp.asarray(scores.numpy())
    device_batch = Samples(ids.numpy().astype(np.int32))

    def entered() -> None:
        nonlocal ledger
        ledger = jax.block_until_ready(enter(ledger, device_batch, device_scores))

    entered()
    print(f"JAX, entering them: {median_us(entered):.0f} us\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="per row of steps")
    parser.add_argument("--samples", type=int, default=10_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory, samples = tempfile.mkdtemp(), args.samples
    own_operations(samples)

    for name, epoch_of in (("PyTorch", epoch_of_torch), ("JAX", epoch_of_jax)):
        for size in (None, samples):
            monitor, train = epoch_of(size, directory)
            before = megabytes()
            train()
            monitor.end_epoch()  # compiles, and allocates the ledger
            ends = []
            for _ in range(5):
                train()
                ends.append(timed(monitor.end_epoch))
            print(f"{name}, {size or 'no'} samples: end_epoch() {1e3 * np.median(ends):.1f} ms", end="")
            if size:
                print(f", peak memory +{megabytes() - before:.0f} MB", end="")
                for call in (monitor.suspects, monitor.label_quality, monitor.state_dict):
                    print(f", {call.__name__}() {timed(call):.2f} s", end="")
                print(f", and the peak is then +{megabytes() - before:.0f} MB", end="")
            print(flush=True)
            monitor.close()

    shape = (64, 32, 32, 3)
    rows = {
        "PyTorch MLP": lambda size: torch_steps(mlp, False, directory, size),
        "PyTorch MLP, compiled": lambda size: torch_steps(mlp, True, directory, size),
        "JAX MLP": lambda size: jax_steps("mlp", (512, 16, 16, 2), 10, directory, size),
        "PyTorch CNN": lambda size: torch_steps(cnn, False, directory, size),
        "PyTorch CNN, compiled": lambda size: torch_steps(cnn, True, directory, size),
        "JAX CNN": lambda size: jax_steps("cnn", shape, 100, directory, size),
    }
    print(f"\n{'':24}{'no ledger':>10}  {'a ledger':>30}  {'no ledger, again':>30}")
    for name, make in rows.items():
        steps, monitors = in_turn(make, samples)
        times = measure(steps, args.seconds)
        for monitor in monitors:
            monitor.close()
        assert monitors[1].suspects(1), "the ledger is empty"
        cells = [overhead(times, other) for other in ("ledger", "again")]
        bare = float(np.median(times["bare"]))
        texts = []
        for cell in cells:
            middle, low, high = (1e4 * bare * cell[key] for key in ("median", "low", "high"))
            texts.append(f"{middle:+.0f} us [{low:+.0f}, {high:+.0f}] {cell['median']:+.2f} %".rjust(30))
        print(f"{name:24}{1e3 * bare:>7.2f} ms", *texts, sep="  ", flush=True)


if __name__ == "__main__":
    main()
