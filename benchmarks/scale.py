"""What a run costs at scale: a model of bytes and time per epoch, checked against runs of 1, 2 and 4 processes over gloo.

    python -m benchmarks.scale [--steps 2000] [--json FILE]

Each process trains a small watched MLP, with a ledger; at the end of its epoch the ranks' summaries are gathered and merged.
What one rank's merging of 1,024 summaries takes is measured in one process, since merging needs no network.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

import gwa_logging
from gwa_logging.interval_recorder import STEADY, interval_at
from gwa_logging.ranks import Identity
from gwa_logging.summary import AlignmentSummary
from tests.torch import ranks

SUMMARY_BYTES = AlignmentSummary().to_vector().nbytes
SENT_BYTES = SUMMARY_BYTES + Identity().to_vector().nbytes  # a rank's summary, and what tells which head it is of
EVERY = 50
SAMPLES = 10_000
"""Of the ledger, in the measured runs."""


def intervals(steps: int, every: int = EVERY) -> int:
    """How many intervals a run of so many steps writes: by its rule, without the steps."""
    count, step = 0, 0
    while step < steps:
        length = interval_at(step, every)
        # As far as intervals stay so long.
        until = every * STEADY if length == every else every * STEADY * (length // every)
        count += -(-(min(steps, until) - step) // length)
        step = until
    return count


def predicted(world: int, samples: int, batch: int, epochs: int, line: float, ledger: int) -> dict[str, float]:
    """The model.

    Args:
        world: ranks.
        samples: of an epoch, all ranks together.
        batch: of one rank.
        line: bytes of an interval in the journal.
        ledger: its samples.
    """
    steps = samples // (batch * world)
    lines = intervals(steps * epochs) + epochs  # the rest of each epoch is written at its end
    return {
        "steps": steps,
        "to_host_bytes": SUMMARY_BYTES * lines / epochs,  # of each rank, per epoch
        "sent_bytes": SENT_BYTES * (world > 1),
        "received_bytes": SENT_BYTES * world * (world > 1),
        "ledger_bytes": 12.0 * ledger,
        "intervals_per_epoch": lines / epochs,
        "journal_bytes_per_epoch": line * lines / epochs,
        "journal_bytes": line * lines,
    }


def epoch_of_steps(steps: int) -> dict[str, Any]:
    """Trains one epoch on this rank; what it wrote, sent and waited for."""
    torch.manual_seed(distributed.get_rank())
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    monitor = gwa_logging.watch(model, directory=Path("runs"), num_samples=SAMPLES, log_every_n_steps=EVERY)
    sent: list[int] = []
    received: list[int] = []
    gather = distributed.all_gather

    def noted(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        received.append(sum(each.nbytes for each in tensors))
        return gather(tensors, tensor, *args, **kwargs)

    distributed.all_gather = noted
    ids = torch.arange(64)
    for _ in range(steps):
        monitor.tag(ids)
        nn.functional.cross_entropy(model(x), y).backward()
    monitor.flush()
    lines = monitor.journal.read_bytes().splitlines() if monitor.journal else []
    distributed.barrier()
    times = []
    begin = time.perf_counter()
    monitor.end_epoch()
    times.append(time.perf_counter() - begin)
    for _ in range(20):  # further ones, of one step each
        nn.functional.cross_entropy(model(x), y).backward()
        distributed.barrier()
        begin = time.perf_counter()
        monitor.end_epoch()
        times.append(time.perf_counter() - begin)
    distributed.all_gather = gather
    ledger = monitor._adapter._accumulator.ledger()
    found = {
        "end_epoch_ms": 1e3 * float(np.median(times)),
        "sent_bytes": sent[0] if sent else 0,
        "received_bytes": received[0] if received else 0,
        "ledger_bytes": float(ledger.sums.nbytes + ledger.seen.nbytes + ledger.predicted.nbytes),
        "intervals": sum(b'"interval"' in line for line in lines),
        "journal_bytes": sum(len(line) + 1 for line in lines if b'"interval"' in line),
    }
    monitor.close()
    return found


SCENARIOS = {"epoch": partial(epoch_of_steps, int(os.environ.get("GWA_BENCH_STEPS", "1000")))}


def merging(world: int) -> float:
    """Milliseconds that one rank needs to merge so many summaries."""
    scores = np.random.default_rng(0).normal(0.1, 0.05, (world, 256)).astype(np.float32)
    data = [AlignmentSummary.from_scores(row).to_vector() for row in scores]
    begin = time.perf_counter()
    AlignmentSummary.merge_all(AlignmentSummary.from_vector(each) for each in data)
    return 1e3 * (time.perf_counter() - begin)


def measure(steps: int, worlds: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Measured points beside what the model says, and the model at 1,024 ranks and 1e9 samples."""
    os.environ["GWA_BENCH_STEPS"] = str(steps)
    points = []
    line = 1000.0
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            found = ranks.run("benchmarks.scale", "SCENARIOS", world, Path(folder))["epoch"]
        assert all(each["intervals"] == 0 for each in found[1:]), "only rank 0 writes"
        if world == worlds[0]:
            line = found[0]["journal_bytes"] / found[0]["intervals"]
        says = predicted(world, steps * 64 * world, 64, 1, line, SAMPLES)
        points.append({"ranks": world, "measured": found[0], "model": says})
    large = predicted(1024, 10**9, 256, 1, line, 10**9)
    long = predicted(1024, 10**9, 256, 1000, line, 10**9)
    return {
        "line_bytes": line,
        "points": points,
        "merging_ms": {str(world): merging(world) for world in (1, 4, 64, 1024)},
        "large": large,
        "long": long,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    text = json.dumps(measure(args.steps), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
