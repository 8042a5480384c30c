"""A very long run: the size of its journal, the memory of the training process, and the time that a replay takes.

    python -m benchmarks.long_run [--intervals 100000]

Trains a small MLP with one interval per step, then replays the journal to TensorBoard and to MLflow on sqlite. Sending to
MLflow keeps no records: with 10,000 intervals memory grew by 80 MB in the first 2,000, then no more until the close, which
writes the report and took another 30 MB.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import gwa_logging
from benchmarks.trackers import MLFLOW_SQLITE, TENSORBOARD
from gwa_logging.replay import replay


def resident_megabytes() -> float:
    """Memory that this process uses now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(128, 16), torch.randint(0, 10, (128,))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        # In runs with windows the intervals do not grow longer; this window never closes.
        monitor = gwa_logging.watch(
            model, directory=folder, log_every_n_steps=1, early_stop=None, samples_per_epoch=10**15
        )
        assert monitor.journal is not None
        for done in range(1, args.intervals + 1):
            nn.functional.cross_entropy(model(x), y).backward()
            if done % (args.intervals // 10) == 0:
                size = monitor.journal.stat().st_size / 1e6
                print(
                    f"{done:>8,} intervals: {resident_megabytes():6.0f} MB resident, journal {size:6.1f} MB", flush=True
                )
        monitor.close()
        for tracker, run in ((TENSORBOARD, str(folder / "events")), (MLFLOW_SQLITE, "new")):
            tracker.set_up(folder)
            before, begin = resident_megabytes(), time.monotonic()
            sent = replay(monitor.journal, tracker.backend, run).sent
            took, grown = time.monotonic() - begin, resident_megabytes() - before
            print(f"replay to {tracker.backend}: {sent:,} records in {took:.0f} s, {grown:+.0f} MB", flush=True)
            if run != "new":
                begin = time.monotonic()
                again = replay(monitor.journal, tracker.backend, run).sent
                print(f"  again: {again} records in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
