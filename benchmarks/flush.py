"""What the trackers cost the training thread: each interval's way into the journal and to the backend.

    python -m benchmarks.flush [--intervals 300] [--json FILE]

A small MLP trains, 20 steps an interval, with one tracker at a time: healthy, then with the tracker dead or hanging. What is
timed is all that a step does once a summary has come to the host: the record, the journal's line, and the word to the backend,
which for W&B in a run of the user's and for Trackio is the write itself. Real trackers: MLflow on sqlite and on a server on
loopback, which is killed or stopped; offline W&B, whose core is killed or stopped; TensorBoard, whose folder is taken away;
Trackio.
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
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging.interval_recorder import IntervalRecorder
from gwa_logging.monitor import Monitor
from tests.trackers import OnMlflow, OnMlflowServer, OnTensorBoard, OnTrackio, OnWandb, Tracker

STEPS = 20
"""In an interval."""

Breaks = Callable[[Path], None]


def _core(signal_: int) -> Breaks:
    def breaks(_: Path) -> None:
        listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            if "wandb-core" in line and f"--pid {os.getpid()}" in line:
                os.kill(int(line.split()[0]), signal_)

    return breaks


def _server(signal_: int) -> Breaks:
    def breaks(_: Path) -> None:
        assert OnMlflowServer.server is not None
        OnMlflowServer.server.signal(signal_)

    return breaks


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder / "events")
    (folder / "events").touch()


class Row(NamedTuple):
    """A tracker, whether the run is the user's, and what happens to it."""

    tracker: type[Tracker] | None
    is_guest: bool = False
    breaks: Breaks | None = None


ROWS = {
    "local": Row(None),
    "MLflow, sqlite": Row(OnMlflow),
    "MLflow, server": Row(OnMlflowServer),
    "MLflow, server killed": Row(OnMlflowServer, breaks=_server(signal.SIGKILL)),
    "MLflow, server stopped": Row(OnMlflowServer, breaks=_server(signal.SIGSTOP)),
    "W&B, our run": Row(OnWandb),
    "W&B, our run, core killed": Row(OnWandb, breaks=_core(signal.SIGKILL)),
    "W&B, our run, core stopped": Row(OnWandb, breaks=_core(signal.SIGSTOP)),
    "W&B, user's run": Row(OnWandb, True),
    "W&B, user's, core killed": Row(OnWandb, True, _core(signal.SIGKILL)),
    "W&B, user's, core stopped": Row(OnWandb, True, _core(signal.SIGSTOP)),
    "TensorBoard": Row(OnTensorBoard),
    "TensorBoard, folder gone": Row(OnTensorBoard, breaks=_no_folder),
    "Trackio": Row(OnTrackio),
}


def measure(row: Row, intervals: int, folder: Path) -> np.ndarray:
    """Seconds on the training thread, float [intervals]; without the device's part, which is there without a tracker."""
    times: list[float] = []
    on_step, take = Monitor._on_step, IntervalRecorder._take
    device = 0.0

    def timed_take(self: IntervalRecorder) -> None:
        nonlocal device
        begin = time.perf_counter()
        take(self)
        device = time.perf_counter() - begin

    def timed(monitor: Monitor) -> None:
        nonlocal device
        device, begin = 0.0, time.perf_counter()
        on_step(monitor)
        if device:
            times.append(time.perf_counter() - begin - device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "_on_step", timed)
        patch.setattr(IntervalRecorder, "_take", timed_take)
        tracker = row.tracker and row.tracker()
        if tracker is not None:
            tracker.set_up(folder, patch)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        x, y = torch.randn(128, 64), torch.randint(0, 10, (128,))
        backend = "local" if tracker is None else tracker.backend
        run = str(folder / "events") if backend == "tensorboard" else None
        if tracker is not None and row.is_guest:
            run = tracker.start()
        monitor = gwa_logging.watch(
            model, backend=backend, run=run, directory=folder / "gwa", log_every_n_steps=STEPS, early_stop=None
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
        found = np.array(times)
        patch.setattr("gwa_logging._all_heads.CLOSE_WITHIN", 1.0)
        monitor.close()
    return found


def _one(name: str, intervals: int) -> None:
    """One row, in a process that a killed tracker may ruin."""
    with tempfile.TemporaryDirectory() as folder:
        times = measure(ROWS[name], intervals, Path(folder))
        sys.stdout.write("RESULT " + json.dumps(times.tolist()) + "\n")
        sys.stdout.flush()
        if OnMlflowServer.server is not None:
            OnMlflowServer.server.signal(signal.SIGKILL)
        _core(signal.SIGKILL)(Path())
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        _one(args.one, args.intervals)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {args.intervals} intervals of {STEPS} steps each\n")
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
