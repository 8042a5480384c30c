"""What the per-sample ledger costs: its operations in a step, and memory and time at the end of an epoch.

    python -m benchmarks.ledger [--samples 10000000]

`make bench` measures whole steps with a ledger.
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

BATCH, BATCHES, JAX_BATCHES = 256, 50, 13


def megabytes() -> float:
    """Peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def epoch_of_torch(
    samples: int | None, directory: str, **options: Any
) -> tuple[gwa_logging.Monitor, Callable[[], None]]:
    """A monitor, and a function that trains a small PyTorch model for an epoch of 50 batches."""
    model = torch.nn.Linear(32, 10)
    monitor = gwa_logging.watch(model, directory=directory, num_samples=samples, **options)

    def train() -> None:
        for _ in range(BATCHES):
            if samples:
                monitor.tag(torch.randint(0, samples, (BATCH,)))
            torch.nn.functional.cross_entropy(model(torch.randn(BATCH, 32)), torch.randint(0, 10, (BATCH,))).backward()

    return monitor, train


def epoch_of_jax(samples: int | None, directory: str) -> tuple[gwa_logging.Monitor, Callable[[], None]]:
    """A monitor of a JAX model, and a function that passes it random scores and predictions for an epoch of 50 batches."""
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
    """Median microseconds of a call."""
    return float(1e6 * np.median([timed(call) for _ in range(times)]))


def time_operations(samples: int) -> None:
    """Times each operation that the ledger adds to a step by itself, which is exact on a busy machine, too."""
    import jax
    import jax.numpy as jnp

    from gwa_logging.integrations.jax.ledger import DeviceLedger as JaxLedger
    from gwa_logging.integrations.jax.ledger import add_steps_to_ledger
    from gwa_logging.integrations.jax.pending_steps import side_by_side
    from gwa_logging.integrations.torch.head_layers import Linear
    from gwa_logging.integrations.torch.ledger import DeviceLedger, TaggedScores
    from gwa_logging.ledger import TaggedBatch

    scores = 0.3 * torch.rand(BATCH)
    for classes in (10, 100, 1000):
        layer, logits = Linear(torch.nn.Linear(8, classes), classes, 8), torch.randn(BATCH, classes)
        took = median_us(lambda layer=layer, logits=logits: layer.predicted(logits))  # type: ignore[misc]
        print(f"PyTorch, prediction of {BATCH} samples, {classes} classes: {took:.0f} us")
    ids, predicted = torch.randint(0, samples, (BATCH,)), torch.zeros(BATCH, dtype=torch.int64)
    ledger, batches = DeviceLedger(samples), [TaggedScores(TaggedBatch(ids, None, predicted), scores, None)] * BATCHES
    took = median_us(lambda: ledger.add(batches)) / BATCHES
    print(f"PyTorch, adding {BATCHES} batches at once: {took:.0f} us per batch")

    jax_ledger, jax_scores = JaxLedger.empty(samples), jnp.asarray(scores.numpy())
    jax_batches = [TaggedBatch(ids.numpy().astype(np.int32))] * JAX_BATCHES

    def add() -> None:
        nonlocal jax_ledger
        samples, steps = side_by_side(jax_batches), [jax_scores] * JAX_BATCHES
        jax_ledger = jax.block_until_ready(add_steps_to_ledger(jax_ledger, samples, steps, np.int32(JAX_BATCHES)))

    add()
    print(f"JAX, adding {JAX_BATCHES} batches at once: {median_us(add) / JAX_BATCHES:.0f} us per batch\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory, samples = tempfile.mkdtemp(), args.samples
    time_operations(samples)

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
    measure_agreement(samples, directory)


def measure_agreement(samples: int, directory: str) -> None:
    """Measures what the rule that compares each sample's scores with its earlier ones adds at the end of an epoch."""
    rule = gwa_logging.EarlyStop(statistic="agreement")
    monitor, train = epoch_of_torch(samples, directory, early_stop=rule)
    ends = []
    for _ in range(5):
        train()
        ends.append(timed(monitor.end_epoch))
    past = monitor._recording.agreement.past
    assert past is not None
    kept = (past.sums.nbytes + past.seen.nbytes) / samples
    print(
        f"PyTorch, statistic='agreement': end_epoch() {np.median(ends):.2f} s, {kept:.0f} bytes per sample on the host"
    )
    monitor.close()


if __name__ == "__main__":
    main()
