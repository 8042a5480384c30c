"""A very long run: size of the journal, memory of the trainer as it grows, and what a replay of it takes.

    python -m benchmarks.long_run [--intervals 100000]

Every training step of a small MLP is an interval. Then everything is replayed to TensorBoard and to MLflow on sqlite.
Sending to MLflow holds no records: with 10,000 intervals memory grew by 80 MB in the first 2,000, then not at all, and by 30 MB
at the close, which makes the report.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging.replay import replay
from tests.trackers import OnMlflow, OnTensorBoard


def _resident() -> float:
    """Memory of this process now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(128, 16), torch.randint(0, 10, (128,))
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        folder = Path(directory)
        # A window, which never closes here, keeps the intervals from growing.
        monitor = gwa_logging.watch(
            model, directory=folder, log_every_n_steps=1, early_stop=None, samples_per_epoch=10**15
        )
        assert monitor.journal is not None
        for done in range(1, args.intervals + 1):
            nn.functional.cross_entropy(model(x), y).backward()
            if done % (args.intervals // 10) == 0:
                size = monitor.journal.stat().st_size / 1e6
                print(f"{done:>8,} intervals: {_resident():6.0f} MB resident, journal {size:6.1f} MB", flush=True)
        monitor.close()
        for tracker, run in ((OnTensorBoard(), str(folder / "events")), (OnMlflow(), "new")):
            tracker.set_up(folder, patch)
            before, begin = _resident(), time.monotonic()
            sent = replay(monitor.journal, tracker.backend, run).sent
            took, grown = time.monotonic() - begin, _resident() - before
            print(f"replay to {tracker.backend}: {sent:,} records in {took:.0f} s, {grown:+.0f} MB", flush=True)
            begin = time.monotonic()
            again = None if run == "new" else replay(monitor.journal, tracker.backend, run).sent
            if again is not None:
                print(f"  again: {again} records in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
