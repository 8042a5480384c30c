"""The longest training steps, watched against bare.

    python -m benchmarks.longest_step [--steps 10000] [--trackers] [--json FILE]

Copies of one MLP take turns in blocks of 200 steps, in a different order each round, so that other load on the machine affects
all alike. Two of the copies are bare: what they differ by is noise. Both watched copies write a journal. With `--trackers`
each row is a run of its own process with MLflow instead, whose worker threads hold the interpreter lock (to draw a picture or
encode a request) and so delay the training step that runs at the same time.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gwa_logging
from benchmarks.measuring import Step
from benchmarks.torch_steps import mlp
from benchmarks.trackers import MLFLOW_SERVER, MLFLOW_SQLITE, Tracker, signal_servers

BLOCK = 200
"""Steps in a turn. The first 10 of a turn are not counted: their caches are those that another copy has left."""
UNCOUNTED = 10
PERCENTILES = (50, 99, 99.9)

TRACKERS: dict[str, Tracker | None] = {
    "journal": None,
    "MLflow, sqlite": MLFLOW_SQLITE,
    "MLflow, server": MLFLOW_SERVER,
}
WARM_UP, EPOCH, INTERVAL = 50, 500, 20  # steps, with trackers


def _training(watch: Callable[[nn.Module], gwa_logging.Monitor] | None) -> tuple[Step, gwa_logging.Monitor | None]:
    """A training step of the benchmark's MLP, and its monitor if it is watched."""
    torch.manual_seed(0)
    work = mlp()
    model, x, y = work.model, work.x, work.y
    monitor = watch(model) if watch else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, monitor


def measure(steps: int, folder: Path) -> dict[str, np.ndarray]:
    """Milliseconds of each step, float [steps], by name of the row."""

    def every(n: int) -> tuple[Step, gwa_logging.Monitor | None]:
        return _training(
            lambda model: gwa_logging.watch(
                model, directory=folder, log_every_n_steps=n, early_stop=None, name=f"gwa{n}"
            )
        )

    rows = {"bare": _training(None), "bare again": _training(None), "every 50": every(50), "every step": every(1)}
    taken: dict[str, list[float]] = {name: [] for name in rows}
    rng = np.random.default_rng(0)
    while len(taken["bare"]) < steps:
        for name in rng.permutation(list(rows)):
            step = rows[name][0]
            for i in range(UNCOUNTED + BLOCK):
                begin = time.perf_counter()
                step()
                if i >= UNCOUNTED:
                    taken[name].append(1e3 * (time.perf_counter() - begin))
    for _, monitor in rows.values():
        if monitor is not None:
            monitor.close()
            assert not monitor.faults, monitor.faults
    return {name: np.array(column[:steps]) for name, column in taken.items()}


def measure_tracker(tracker: Tracker | None, steps: int, folder: Path) -> np.ndarray:
    """Milliseconds of each step of a run with a tracker, float [steps]."""
    if tracker is not None:
        tracker.set_up(folder)
    backend = tracker.backend if tracker else "local"
    step, monitor = _training(
        lambda model: gwa_logging.watch(
            model, backend=backend, directory=folder / "gwa", log_every_n_steps=INTERVAL, early_stop=None
        )
    )
    assert monitor is not None
    for _ in range(WARM_UP):
        step()
    monitor.flush()
    times = np.zeros(steps)
    for i in range(steps):
        begin = time.perf_counter()
        step()
        times[i] = 1e3 * (time.perf_counter() - begin)
        if i % EPOCH == EPOCH - 1:
            monitor.end_epoch()
    monitor.close()
    return times


def summarise(times: np.ndarray) -> dict[str, float]:
    """Percentiles and the longest step, in ms."""
    found = {f"p{p:g}_ms": float(np.percentile(times, p)) for p in PERCENTILES}
    return found | {"max_ms": float(times.max()), "steps": len(times)}


def _one(name: str, steps: int) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            times = measure_tracker(TRACKERS[name], steps, Path(folder))
            sys.stdout.write("RESULT " + json.dumps(times.tolist()) + "\n")
    finally:
        signal_servers(signal.SIGTERM)


def _in_own_process(name: str, steps: int) -> np.ndarray:
    command = [sys.executable, "-m", "benchmarks.longest_step", "--steps", str(steps), "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return np.array(json.loads(lines[0].removeprefix("RESULT ")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--trackers", action="store_true", help="measure runs with MLflow instead")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        return _one(args.one, args.steps)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {args.steps} steps of each row, in ms\n")
    if args.trackers:
        rows = {name: _in_own_process(name, args.steps) for name in TRACKERS}
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args.steps, Path(folder))
    print(f"{'':18}" + "".join(f"{f'p{p:g}':>9}" for p in PERCENTILES) + f"{'longest':>9}")
    results = {name: summarise(times) for name, times in rows.items()}
    for name, found in results.items():
        print(f"{name:18}" + "".join(f"{found[f'p{p:g}_ms']:9.2f}" for p in PERCENTILES) + f"{found['max_ms']:9.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
