"""The longest training steps with a healthy MLflow, compared with those of the journal alone.

    python -m benchmarks.longest_step [--steps 3000] [--repeats 3]

A worker thread that holds the interpreter lock (to draw a picture or encode a request) delays the training step that runs at
the same time. The rows are measured in turn, each in its own process, so that other load on the machine affects all alike.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gwa_logging
from benchmarks.trackers import MLFLOW_SERVER, MLFLOW_SQLITE, Tracker, signal_servers

ROWS: dict[str, Tracker | None] = {"journal": None, "MLflow, sqlite": MLFLOW_SQLITE, "MLflow, server": MLFLOW_SERVER}
WARM_UP, EPOCH, INTERVAL = 50, 500, 20  # steps


def measure(tracker: Tracker | None, steps: int, folder: Path) -> np.ndarray:
    """Milliseconds of each step, float [steps]."""
    if tracker is not None:
        tracker.set_up(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))
    monitor = gwa_logging.watch(
        model,
        backend=tracker.backend if tracker else "local",
        directory=folder / "gwa",
        log_every_n_steps=INTERVAL,
        early_stop=None,
    )

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

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


def _one(name: str, steps: int) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write("RESULT " + json.dumps(measure(ROWS[name], steps, Path(folder)).tolist()) + "\n")
    finally:
        signal_servers(signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        return _one(args.one, args.steps)
    print(f"{args.steps} steps\n{'':18}{'p50':>8}{'p99.9':>8}{'longest':>9}   ms; {'above 50 ms':>12}")
    for _ in range(args.repeats):
        for name in ROWS:
            command = [sys.executable, "-m", "benchmarks.longest_step", "--steps", str(args.steps), "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            times = np.array(json.loads(lines[0].removeprefix("RESULT ")))
            p50, p999 = np.percentile(times, [50, 99.9])
            print(f"{name:18}{p50:8.2f}{p999:8.2f}{times.max():9.2f}{(times > 50).sum():12d}", flush=True)
    return None


if __name__ == "__main__":
    main()
