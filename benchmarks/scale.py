"""Bytes and time per epoch at scale: a cost model, checked against runs of up to 256 processes over gloo.

    python -m benchmarks.scale [--steps 1000] [--ranks 1 2 4 64 256] [--losing 16] [--json FILE]

Each process trains a small watched MLP with a ledger, with a different number of steps; at the end of the epoch the ranks'
summaries are gathered and merged, and each rank sends the others the scores of the samples that they keep. The time that one
rank needs to merge 1,024 summaries, and its part of 1e9 samples, is measured in one process, because that needs no network.
"""

import argparse
import json
import os
import pickle
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

import gwa_logging
from gwa_logging.integrations.torch.ledger_entries import Entries
from gwa_logging.interval_recorder import STEADY, interval_at
from gwa_logging.ranks import Identity
from gwa_logging.summary import AlignmentSummary

SUMMARY_BYTES = AlignmentSummary().to_vector().nbytes
IDENTITY_BYTES = Identity().to_vector().nbytes
SENT_BYTES = SUMMARY_BYTES + IDENTITY_BYTES
"""Of a rank without a ledger, at the end of an epoch: its summary and the identity of its head."""

EVERY = 50
BATCH = 64
LEDGER_SAMPLES = 10_000
"""Size of the ledger in the measured runs."""

ENTRY_BYTES = 16
"""Of an entry for another rank: id, sum, times seen, prediction."""

COUNTS = 7
"""Numbers that go with the entries: the invalid ids, the samples without an id, and which of the five columns there are."""


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


def predicted(
    world: int, steps: int, epochs: int, line: float, ledger: int, scored: float, arriving: float
) -> dict[str, float]:
    """The cost model: bytes and intervals.

    Args:
        world: number of ranks.
        steps: of an epoch on rank 0.
        epochs: number of epochs.
        line: bytes of an interval in the journal.
        ledger: number of samples in the ledger.
        scored: different samples that a rank scores in an epoch.
        arriving: of the samples that a rank keeps, how many each rank scores in an epoch, added up over the ranks.
    """
    lines = intervals(steps * epochs) + epochs  # the rest of each epoch is written at its end
    vectors = SENT_BYTES + IDENTITY_BYTES + 8 * COUNTS
    return {
        "steps": steps,
        "to_host_bytes": SUMMARY_BYTES * lines / epochs,  # of each rank, per epoch
        "sent_bytes": (vectors + 8 * world + ENTRY_BYTES * scored) * (world > 1),
        "received_bytes": (vectors * world + 8 * world + ENTRY_BYTES * arriving) * (world > 1),
        "ledger_bytes": 12.0 * -(-ledger // world),
        "intervals_per_epoch": lines / epochs,
        "journal_bytes_per_epoch": line * lines / epochs,
        "journal_bytes": line * lines,
    }


class Traffic:
    """Counts the bytes that this rank sends and receives while it is entered."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self._originals = (distributed.all_gather, distributed.all_to_all_single)

    def __enter__(self) -> "Traffic":
        gather, exchange = self._originals

        def counting_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.nbytes
            self.received += sum(each.nbytes for each in tensors)
            return gather(tensors, tensor, *args, **kwargs)

        def counting_exchange(output: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += values.nbytes
            self.received += output.nbytes
            return exchange(output, values, *args, **kwargs)

        distributed.all_gather, distributed.all_to_all_single = counting_gather, counting_exchange
        return self

    def __exit__(self, *error: object) -> None:
        distributed.all_gather, distributed.all_to_all_single = self._originals


def train_epoch(steps: int, ends: int) -> dict[str, Any]:
    """Trains an epoch on this rank, and `ends` epochs of one step. Returns bytes, times and what the ledger holds."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(BATCH, 16), torch.randint(0, 10, (BATCH,))
    monitor = gwa_logging.watch(model, directory=Path("runs"), num_samples=LEDGER_SAMPLES, log_every_n_steps=EVERY)
    own_steps = steps + rank % 3
    drawn = torch.randint(0, LEDGER_SAMPLES, (own_steps, BATCH))
    for ids in drawn:
        monitor.tag(ids)
        nn.functional.cross_entropy(model(x), y).backward()
    monitor.flush()
    lines = monitor.journal.read_bytes().splitlines() if monitor.journal else []
    distributed.barrier()
    times = []
    begin = time.perf_counter()
    with Traffic() as traffic:
        report = monitor.end_epoch()
    times.append(time.perf_counter() - begin)
    ledger = monitor._adapter._accumulator.own_ledger()
    for _ in range(ends):
        monitor.tag(drawn[0])
        nn.functional.cross_entropy(model(x), y).backward()
        distributed.barrier()
        begin = time.perf_counter()
        monitor.end_epoch()
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    monitor.suspects(100)
    suspects = time.perf_counter() - begin
    first = monitor._adapter.own_samples(LEDGER_SAMPLES)
    found = {
        "end_epoch_ms": 1e3 * float(np.median(times)),
        "suspects_ms": 1e3 * suspects,
        "sent_bytes": traffic.sent,
        "received_bytes": traffic.received,
        "ledger_bytes": float(ledger.sums.nbytes + ledger.seen.nbytes + ledger.predicted.nbytes),
        "intervals": sum(b'"interval"' in line for line in lines),
        "journal_bytes": sum(len(line) + 1 for line in lines if b'"interval"' in line),
        "steps": own_steps,
        "samples": own_steps * BATCH,
        "counted": report.count,
        "scored": len(drawn.unique()),
        "in_ledger": float(ledger.seen.sum()),
        "drawn": torch.bincount(drawn.flatten(), minlength=LEDGER_SAMPLES).numpy(),
        "times_seen": ledger.seen,
        "first": first.start,
        "world": world,
    }
    monitor.close()
    return found


def lose_a_rank(steps: int) -> dict[str, Any]:
    """The last rank dies in the middle of an epoch. Returns how the others end it: the error and the time until it."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = nn.Linear(16, 10)
    monitor = gwa_logging.watch(model, directory=Path("runs"), num_samples=LEDGER_SAMPLES, log_every_n_steps=EVERY)
    for step in range(steps):
        monitor.tag(torch.arange(BATCH))
        nn.functional.cross_entropy(model(torch.randn(BATCH, 16)), torch.randint(0, 10, (BATCH,))).backward()
        if rank == world - 1 and step == steps // 2:
            os._exit(1)
    begin = time.perf_counter()
    try:
        monitor.end_epoch()
        error = ""
    except RuntimeError as raised:
        error = type(raised).__name__
    seconds = time.perf_counter() - begin
    monitor.close()
    lines = monitor.journal.read_bytes().splitlines() if monitor.journal else []
    return {"error": error, "seconds": seconds, "intervals": sum(b'"interval"' in line for line in lines)}


def run_rank(rank: int, world: int, task: str, arguments: tuple[int, ...], folder: Path) -> None:
    """Joins the world, runs a task and writes the result to `folder`; the entry point of one process."""
    torch.set_num_threads(1)
    os.chdir(folder)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    found = {"train": train_epoch, "lose": lose_a_rank}[task](*arguments)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    if task == "train":
        distributed.barrier()
        distributed.destroy_process_group()
    os._exit(0)  # without a dead rank, gloo cannot shut down


def run_world(world: int, task: str, *arguments: int) -> list[dict[str, Any] | None]:
    """The results of all ranks of a world, each in its own process; None of a rank that died.

    The processes are forked from one that has imported everything, so that 256 of them need 5 GB.
    """
    context: BaseContext = get_context("forkserver")
    context.set_forkserver_preload(["gwa_logging.integrations.torch.adapter"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=run_rank, args=(rank, world, task, arguments, folder)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        files = [folder / f"{rank}.pickle" for rank in range(world)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def check(found: list[dict[str, Any]]) -> None:
    """Checks that only rank 0 writes, and that every sample of every rank is counted once, by the rank that keeps it.

    Raises:
        RuntimeError: something is missing or counted twice.
    """
    samples = sum(each["samples"] for each in found)
    times_seen = np.concatenate([each["times_seen"] for each in found])
    drawn = np.sum([each["drawn"] for each in found], axis=0)
    if {each["counted"] for each in found} != {samples} or not np.array_equal(times_seen, drawn):
        raise RuntimeError(f"{len(found)} ranks: {samples} samples, counted {found[0]['counted']}")
    if any(each["intervals"] for each in found[1:]):
        raise RuntimeError("another rank than 0 has written intervals")


def arriving(found: list[dict[str, Any]], number: int) -> int:
    """How many entries reach a rank: of the samples that it keeps, how many each rank has scored."""
    first, size = found[number]["first"], len(found[number]["times_seen"])
    return sum(int(np.count_nonzero(each["drawn"][first : first + size])) for each in found)


def merge_milliseconds(world: int) -> float:
    """Milliseconds that one rank needs to merge the summaries of `world` ranks."""
    scores = np.random.default_rng(0).normal(0.1, 0.05, (world, 256)).astype(np.float32)
    data = [AlignmentSummary.from_scores(row).to_vector() for row in scores]
    begin = time.perf_counter()
    AlignmentSummary.merge_all(AlignmentSummary.from_vector(each) for each in data)
    return 1e3 * (time.perf_counter() - begin)


def compact_milliseconds(samples: int, num_samples: int) -> float:
    """Milliseconds that one rank needs to sort the scores of an epoch by sample, on the host."""
    ids = torch.randint(0, num_samples, (samples,), dtype=torch.int32)
    entries = Entries(ids, torch.rand(samples), torch.ones(samples, dtype=torch.bool), torch.zeros_like(ids))
    begin = time.perf_counter()
    entries.compact()
    return 1e3 * (time.perf_counter() - begin)


def measure(steps: int, worlds: tuple[int, ...] = (1, 2, 4, 64, 256), losing: int = 16) -> dict[str, Any]:
    """Measured points beside the model's, and the model at 1,024 ranks and 1e9 samples.

    Args:
        steps: in an epoch of a rank; fewer where there are many ranks, since they share the cores of this machine.
        worlds: numbers of ranks.
        losing: number of ranks of a world of which one dies; 0 leaves it out.
    """
    points = []
    line = 1000.0
    for world in worlds:
        own = max(10, steps * min(4, world) // world)
        found = [each for each in run_world(world, "train", own, 20 if world <= 4 else 1) if each is not None]
        check(found)
        if world == worlds[0]:
            line = found[0]["journal_bytes"] / found[0]["intervals"]
        modelled = predicted(world, found[0]["steps"], 1, line, LEDGER_SAMPLES, found[0]["scored"], arriving(found, 0))
        measured = {name: value for name, value in found[0].items() if not isinstance(value, np.ndarray)}
        points.append({"ranks": world, "measured": measured, "model": modelled})
    ranks, samples = 1024, 10**9
    each = samples // ranks
    large = predicted(ranks, each // 256, 1, line, samples, each, each)
    long = predicted(ranks, each // 256, 1000, line, samples, each, each)
    outcomes = run_world(losing, "lose", 2 * EVERY) if losing else []
    survivors = [found for found in outcomes if found is not None]
    return {
        "line_bytes": line,
        "summary_bytes": SENT_BYTES,
        "points": points,
        "merging_ms": {str(world): merge_milliseconds(world) for world in (1, 4, 64, 1024)},
        "compact_ms": compact_milliseconds(each, samples),
        "large": large,
        "long": long,
        "lost": {
            "ranks": losing,
            "errors": sorted({found["error"] for found in survivors}),
            "seconds": max((found["seconds"] for found in survivors), default=0.0),
            "intervals": max((found["intervals"] for found in survivors), default=0),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 64, 256])
    parser.add_argument("--losing", type=int, default=16, help="ranks of a world of which one dies; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    text = json.dumps(measure(args.steps, tuple(args.ranks), args.losing), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
