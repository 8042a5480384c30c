"""A training that tests kill and resume. It uses no framework, so that a process starts within a tenth of a second.

The scores of a step depend only on its number. So a run that was killed and resumed any number of times must leave the same
records as an uninterrupted one.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from gwa_logging import EarlyStop, Monitor, registry
from gwa_logging._watch import _open
from gwa_logging.protocols import Backend, RunContext
from gwa_logging.records import AnyRecord
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary

STEPS = 21
"""Steps in an epoch; each is an interval."""

CHECKPOINT_EVERY = 5
STEP_TAKES = 0.002  # seconds; otherwise the training would end before any tracker has accepted a record


class Arrived(NamedTuple):
    """A snapshot that is already on the host."""

    summary: AlignmentSummary

    def ready(self) -> bool:
        return True

    def result(self) -> AlignmentSummary:
        return self.summary


class HostAdapter:
    """An adapter for scores that are NumPy arrays."""

    head, path, shape = "scores by step", "", (2, 2)
    writes, processes = True, 1
    is_detached, is_language_model, notes = False, False, ()

    def __init__(self) -> None:
        self._summary = AlignmentSummary()
        self._on_step: Callable[[], None]

    def start(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def observe(self, scores: Any, samples: Any) -> None:
        self._summary = self._summary.merge(AlignmentSummary.from_scores(scores))
        self._on_step()

    def snapshot(self) -> Arrived:
        arrived, self._summary = Arrived(self._summary), AlignmentSummary()
        return arrived

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        return summary

    def to_checkpoint_array(self, array: Any) -> Any:
        return array

    def no_observation_hint(self) -> str:
        return "call update"

    def close(self) -> None:
        """Nothing to remove."""


class Model:
    """An object to watch."""


def watch(model: Model, directory: Path, backend: str, run: str | None = None) -> Monitor:
    """Like `gwa_logging.watch`. The alert fires in the fourth epoch."""
    settings = WatchSettings(
        backend=backend,
        run=run,
        log_every_n_steps=1,
        early_stop=EarlyStop(patience=3, warmup=0, min_delta=1e9, drop=0),
    )
    framework: Any = SimpleNamespace(attach=lambda *_: HostAdapter(), subject=lambda model: model)
    return _open(framework, model, settings, directory / f"{time.time_ns()}")


def step(monitor: Monitor, number: int) -> None:
    """Trains a step, and closes the epoch after its last one."""
    monitor.update(np.random.default_rng(number).normal(0.2, 0.3, size=16).clip(-1, 1))
    if number % STEPS == STEPS - 1:
        monitor.end_epoch()


def train(
    folder: str, backend: str, run: str | None, environment: dict[str, str], steps: int, ticks: Connection
) -> None:
    """Trains from the last checkpoint up to `steps`.

    After each step it sends the number of steps done, and continues once it receives an answer.
    """
    os.environ.pop("WANDB_SERVICE", None)  # the wandb-core of the test's own process
    os.environ.update(environment)
    model, checkpoint = Model(), Path(folder) / "checkpoint.json"
    monitor = watch(model, Path(folder) / "runs", backend, run)
    first = 0
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        monitor.load_state_dict(saved)
        first = saved["step"]
    for number in range(first, steps):
        step(monitor, number)
        time.sleep(STEP_TAKES)
        if number % CHECKPOINT_EVERY == 0:
            written = checkpoint.with_suffix(".new")
            written.write_text(json.dumps(monitor.state_dict()))
            written.replace(checkpoint)
        ticks.send(number + 1)
        ticks.recv()
    monitor.close()


def die_after_sending(kind: str, *arguments: Any) -> None:
    """Trains until the tracker has accepted a record of this kind, and dies before anything else can happen."""
    open_backend = registry.open_backend

    def open_and_wrap(wanted: Any, context: RunContext) -> Backend | None:
        backend = open_backend(wanted, context)
        if backend is not None:
            write_many = backend.write_many

            def write_and_die(records: Sequence[AnyRecord]) -> None:
                write_many(records)
                if any(record.kind == kind for record in records):
                    os.kill(os.getpid(), signal.SIGKILL)

            backend.write_many = write_and_die
        return backend

    registry.open_backend = open_and_wrap
    train(*arguments)


def uninterrupted(folder: Path, steps: int) -> Path:
    """The journal of the same training, never killed."""
    model = Model()
    monitor = watch(model, folder, "local")
    for number in range(steps):
        step(monitor, number)
    monitor.close()
    assert monitor.journal is not None
    return monitor.journal
