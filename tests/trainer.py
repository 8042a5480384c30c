"""A training process that test_outages.py controls line by line.

Each line on stdin is a command with its arguments in JSON, each line on stdout an answer. So the test decides what happens
between two training steps, and no sleeps are needed.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gwa_logging import _all_heads
from gwa_logging.recording import Recording
from tests.trackers import BATCHES, Training

STEPS = BATCHES * 5


class Trainer:
    """Trains, and records how long each step was blocked while gwa_logging notified its backends."""

    def __init__(self, directory: str, backend: str, run: str | None) -> None:
        self.training = Training()
        begin = time.monotonic()
        self.monitor = self.training.watch(Path(directory), backend=backend, run=run, log_every_n_steps=1)
        self.watch_took = time.monotonic() - begin
        self.waits: list[float] = []
        notify = _all_heads.notify

        def timed_notify(recordings: Sequence[Recording]) -> None:
            begin = time.perf_counter()
            notify(recordings)
            self.waits.append(time.perf_counter() - begin)

        _all_heads.notify = timed_notify

    def start(self) -> dict[str, Any]:
        return {"journal": str(self.monitor.journal), "took": self.watch_took}

    def steps(self, n: int) -> dict[str, Any]:
        for index in range(n):
            self.training.step(index)
        return {"faults": self.monitor.faults}

    def step_and_die(self) -> dict[str, Any]:
        self.steps(1)
        self.monitor.flush(0.0)  # writes the journal, and does not wait for the tracker
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def epoch(self) -> dict[str, Any]:
        self.steps(STEPS)
        self.monitor.end_epoch()
        return {"faults": self.monitor.faults}

    def flush(self, timeout: float) -> dict[str, Any]:
        return {"done": self.monitor.flush(timeout)}

    def limit_files(self, more: int | None) -> dict[str, Any]:
        """Limits the size of files to the journal's size plus `more` bytes, like a quota; None removes the limit."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        assert self.monitor.journal is not None
        soft = hard if more is None else self.monitor.journal.stat().st_size + more
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return {}

    def close(self) -> dict[str, Any]:
        begin = time.monotonic()
        self.monitor.close()
        return {"took": time.monotonic() - begin, "faults": self.monitor.faults, "waits": sorted(self.waits)}


def main() -> None:
    trainer = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            if command == "start":
                trainer = Trainer(*arguments)
                arguments = []
            answer = getattr(trainer, command)(*arguments)
        except Exception as error:  # noqa: BLE001 - reported to the test
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
