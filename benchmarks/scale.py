"""Bytes and time per epoch at scale: a cost model, checked against runs of 1, 2 and 4 processes over gloo.

    python -m benchmarks.scale [--steps 2000] [--json FILE]

Each process trains a small watched MLP with a ledger; at the end of the epoch the ranks' summaries are gathered and merged. The
time that one rank needs to merge 1,024 summaries is measured in one process, because merging needs no network.
"""

import argparse
import json
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing, nn

import gwa_logging
from gwa_logging.interval_recorder import STEADY, interval_at
from gwa_logging.ranks import Identity
from gwa_logging.summary import AlignmentSummary

SUMMARY_BYTES = AlignmentSummary().to_vector().nbytes
SENT_BYTES = SUMMARY_BYTES + Identity().to_vector().nbytes  # a rank's summary and the identity of its head
EVERY = 50
LEDGER_SAMPLES = 10_000
"""Size of the ledger in the measured runs."""


def intervals(steps: int, every: int = EVERY) -> int:
    """Number of intervals that a run of this many steps writes, computed from the rule for their length."""
    count, step = 0, 0
    while step < steps:
        length = interval_at(step, every)
        # The step up to which intervals keep this length.
        until = every * STEADY if length == every else every * STEADY * (length // every)
        count += -(-(min(steps, until) - step) // length)
        step = until
    return count


def predicted(world: int, samples: int, batch: int, epochs: int, line: float, ledger: int) -> dict[str, float]:
    """The cost model: steps, bytes and intervals.

    Args:
        world: number of ranks.
        samples: in an epoch, all ranks together.
        batch: samples per step on one rank.
        epochs: number of epochs.
        line: bytes of an interval in the journal.
        ledger: number of samples in the ledger.
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


def train_epoch(steps: int) -> dict[str, Any]:
    """Trains one epoch on this rank. Returns the bytes that it wrote, sent and received, and the time of `end_epoch`."""
    torch.manual_seed(distributed.get_rank())
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    monitor = gwa_logging.watch(model, directory=Path("runs"), num_samples=LEDGER_SAMPLES, log_every_n_steps=EVERY)
    sent: list[int] = []
    received: list[int] = []
    gather = distributed.all_gather

    def recording_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        received.append(sum(each.nbytes for each in tensors))
        return gather(tensors, tensor, *args, **kwargs)

    distributed.all_gather = recording_gather
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
    for _ in range(20):  # epochs of one step each
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


def run_rank(rank: int, world: int, steps: int, folder: Path) -> None:
    """Joins the world, trains an epoch and writes the result to `folder`; the entry point of one process."""
    torch.set_num_threads(1)
    os.chdir(folder)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    found = train_epoch(steps)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def run_world(world: int, steps: int) -> list[dict[str, Any]]:
    """The results of all ranks of a world, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (world, steps, Path(folder)), nprocs=world)
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def merge_milliseconds(world: int) -> float:
    """Milliseconds that one rank needs to merge the summaries of `world` ranks."""
    scores = np.random.default_rng(0).normal(0.1, 0.05, (world, 256)).astype(np.float32)
    data = [AlignmentSummary.from_scores(row).to_vector() for row in scores]
    begin = time.perf_counter()
    AlignmentSummary.merge_all(AlignmentSummary.from_vector(each) for each in data)
    return 1e3 * (time.perf_counter() - begin)


def measure(steps: int, worlds: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Measured points beside the model's, and the model at 1,024 ranks and 1e9 samples."""
    points = []
    line = 1000.0
    for world in worlds:
        found = run_world(world, steps)
        assert all(each["intervals"] == 0 for each in found[1:]), "only rank 0 writes"
        if world == worlds[0]:
            line = found[0]["journal_bytes"] / found[0]["intervals"]
        modelled = predicted(world, steps * 64 * world, 64, 1, line, LEDGER_SAMPLES)
        points.append({"ranks": world, "measured": found[0], "model": modelled})
    large = predicted(1024, 10**9, 256, 1, line, 10**9)
    long = predicted(1024, 10**9, 256, 1000, line, 10**9)
    return {
        "line_bytes": line,
        "points": points,
        "merging_ms": {str(world): merge_milliseconds(world) for world in (1, 4, 64, 1024)},
        "large": large,
        "long": long,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    text = json.dumps(measure(args.steps), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
