"""What each tracker costs the training thread: the time to record an interval and pass it on.

    python -m benchmarks.flush [--intervals 300] [--json FILE]

Trains a small MLP with 20 steps per interval and one real tracker at a time: healthy, then killed, stopped or taken away. Times
the step in which a summary has arrived on the host: it builds the record, and queues it for the thread that writes the journal
and notifies the backend. For Trackio, and for W&B in a user's run, the notification is the write itself.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import gwa_logging
from benchmarks.trackers import (
    MLFLOW_SERVER,
    MLFLOW_SQLITE,
    TENSORBOARD,
    TRACKIO,
    WANDB,
    Tracker,
    signal_servers,
    start_wandb_run,
)
from gwa_logging.interval_recorder import IntervalRecorder
from gwa_logging.monitor import Monitor
from gwa_logging.summary import AlignmentSummary

STEPS = 20
"""Steps per interval."""

Break = Callable[[Path], None]


def _signal_wandb_core(number: int) -> Break:
    def send(_: Path) -> None:
        listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            if "wandb-core" in line and f"--pid {os.getpid()}" in line:
                os.kill(int(line.split()[0]), number)

    return send


def _signal_server(number: int) -> Break:
    return lambda _: signal_servers(number)


def _replace_folder_by_file(folder: Path) -> None:
    shutil.rmtree(folder / "events")
    (folder / "events").touch()


class Row(NamedTuple):
    """A tracker, whether the run is the user's, and what breaks the tracker."""

    tracker: Tracker | None
    is_guest: bool = False
    breaks: Break | None = None


ROWS = {
    "local": Row(None),
    "MLflow, sqlite": Row(MLFLOW_SQLITE),
    "MLflow, server": Row(MLFLOW_SERVER),
    "MLflow, server killed": Row(MLFLOW_SERVER, breaks=_signal_server(signal.SIGKILL)),
    "MLflow, server stopped": Row(MLFLOW_SERVER, breaks=_signal_server(signal.SIGSTOP)),
    "W&B, our run": Row(WANDB),
    "W&B, our run, core killed": Row(WANDB, breaks=_signal_wandb_core(signal.SIGKILL)),
    "W&B, our run, core stopped": Row(WANDB, breaks=_signal_wandb_core(signal.SIGSTOP)),
    "W&B, user's run": Row(WANDB, True),
    "W&B, user's, core killed": Row(WANDB, True, _signal_wandb_core(signal.SIGKILL)),
    "W&B, user's, core stopped": Row(WANDB, True, _signal_wandb_core(signal.SIGSTOP)),
    "TensorBoard": Row(TENSORBOARD),
    "TensorBoard, folder gone": Row(TENSORBOARD, breaks=_replace_folder_by_file),
    "Trackio": Row(TRACKIO),
}


def measure(row: Row, intervals: int, folder: Path) -> np.ndarray:
    """Seconds on the training thread per interval, float [intervals], in the step that records it.

    Its scores are folded in other steps, which no tracker changes.
    """
    times: list[float] = []
    on_step, record = Monitor._on_step, IntervalRecorder._record
    has_recorded = False

    def noted_record(self: IntervalRecorder, step: int, steps: int, summary: AlignmentSummary) -> None:
        nonlocal has_recorded
        has_recorded = True
        record(self, step, steps, summary)

    def timed_step(monitor: Monitor) -> None:
        nonlocal has_recorded
        has_recorded, begin = False, time.perf_counter()
        on_step(monitor)
        if has_recorded:
            times.append(time.perf_counter() - begin)

    # This process measures one row and ends, so nothing is restored.
    Monitor._on_step = timed_step  # type: ignore[method-assign]
    IntervalRecorder._record = noted_record  # type: ignore[method-assign]
    tracker = row.tracker
    if tracker is not None:
        tracker.set_up(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.randn(128, 64), torch.randint(0, 10, (128,))
    run = str(folder / "events") if tracker is TENSORBOARD else start_wandb_run(folder) if row.is_guest else None
    monitor = gwa_logging.watch(
        model,
        backend="local" if tracker is None else tracker.backend,
        run=run,
        directory=folder / "gwa",
        log_every_n_steps=STEPS,
        early_stop=None,
    )

    def train(n: int) -> None:
        for _ in range(n * STEPS):
            nn.functional.cross_entropy(model(x), y).backward()

    train(20)
    monitor.flush()
    if row.breaks is not None:
        row.breaks(folder)
    times.clear()
    train(intervals)
    return np.array(times)


def _measure_one(name: str, intervals: int) -> None:
    """Measures one row in this process, which a killed tracker may break, and ends it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        times = measure(ROWS[name], intervals, Path(folder))
        sys.stdout.write("RESULT " + json.dumps(times.tolist()) + "\n")
        sys.stdout.flush()
        signal_servers(signal.SIGKILL)
        _signal_wandb_core(signal.SIGKILL)(Path())
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=300)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        _measure_one(args.one, args.intervals)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {args.intervals} intervals of {STEPS} steps\n")
    print(f"{'on the training thread':26}{'p50':>9}{'p99':>9}{'max':>9}   ms per interval")
    results = {}
    for name in ROWS:
        command = [sys.executable, "-m", "benchmarks.flush", "--intervals", str(args.intervals), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        times = 1e3 * np.array(json.loads(lines[0].removeprefix("RESULT ")))
        p50, p99 = np.percentile(times, [50, 99])
        results[name] = {"p50_ms": p50, "p99_ms": p99, "max_ms": times.max(), "intervals": len(times)}
        print(f"{name:26}{p50:9.2f}{p99:9.2f}{times.max():9.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
