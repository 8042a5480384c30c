"""A run that is repeatedly killed and resumed, while its tracker fails at times: every record arrives once."""

import os
import random
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import wandb

from gwa_logging import AlignmentSummary
from gwa_logging.cli import main
from gwa_logging.integrations.wandb import WandbBackend
from gwa_logging.journal import read_journal
from gwa_logging.records import EPOCH_KEYS
from tests.resumed_trainer import STEPS, die_after_sending, train, uninterrupted
from tests.trackers import INTERVAL_KEYS, OnMlflow, OnTensorBoard, OnWandb, Tracker, numbers_in
from tests.wandb_server import OnWandbServer, WandbServer

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("GWA_TEST_KILLS", "4"))
"""`GWA_TEST_KILLS=20 pytest tests/test_kills.py` runs the long form."""

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.resumed_trainer", "gwa_logging.integrations.mlflow"])
ENVIRONMENT = ("MLFLOW_", "WANDB_", "TRACKIO_", "HF_HUB_OFFLINE")


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()


class Lives:
    """A training in a sequence of processes that log to the same run of a tracker."""

    def __init__(self, folder: Path, tracker: Tracker, run: str | None, steps: int) -> None:
        self.folder, self.tracker, self.run, self.steps = folder, tracker, run, steps
        self.linger = 0.0  # seconds that a process still trains before it is killed
        self.done = 0

    def live(self, until: Callable[[int], bool], target: Callable[..., None] = train, *first: Any) -> int | None:
        """Trains in a new process, which is killed as soon as `until` returns True for the number of steps.

        Returns:
            The exit code.
        """
        ticks, other = PROCESSES.Pipe()
        environment = {key: value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)}
        environment.pop("WANDB_SERVICE", None)  # of this process
        arguments = (*first, str(self.folder), self.tracker.backend, self.run, environment, self.steps, other)
        process = PROCESSES.Process(target=target, args=arguments)
        process.start()
        other.close()
        with ticks:
            while True:
                try:
                    self.done = ticks.recv()
                except (EOFError, ConnectionResetError):  # it has ended or died
                    break
                if until(self.done):
                    if self.linger:
                        ticks.send(None)
                        sleep(self.linger)
                    process.kill()
                    break
                ticks.send(None)
        process.join(60)
        return process.exitcode

    def finish(self) -> None:
        """Trains to the end in a last process."""
        assert self.live(lambda done: False) == 0

    def replay(self) -> None:
        """Replays the folder of runs."""
        assert main(["replay", str(self.folder / "runs"), "--backend", self.tracker.backend]) == 0

    def check(self) -> None:
        """Checks that the tracker contains exactly the records of the uninterrupted training, each once."""
        wanted = numbers_in(read_journal(uninterrupted(self.folder / "uninterrupted", self.steps))[0])
        assert self.run is not None
        found = numbers_of(self.tracker, self.run)
        for key in (*INTERVAL_KEYS, *EPOCH_KEYS):
            assert [step for step, _ in found[key]] == [step for step, _ in wanted[key]], key
            values = [value for _, value in wanted[key]]
            assert [value for _, value in found[key]] == pytest.approx(values, rel=1e-5, nan_ok=True), key


def numbers_of(tracker: Tracker, run: str) -> dict[str, list[tuple[int, float]]]:
    """All points of each metric, ordered by step, including duplicates of a step."""
    if isinstance(tracker, OnMlflow):
        keys = (*INTERVAL_KEYS, *EPOCH_KEYS)
        points = {key: tracker.client.get_metric_history(run, f"gwa/{key}") for key in keys}
        return {key: sorted((point.step, point.value) for point in found) for key, found in points.items()}
    return {key: sorted(found) for key, found in tracker.read_again(run).numbers.items()}


def start(tracker: Tracker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Starts a run. Returns the text that identifies it."""
    tracker.set_up(folder, monkeypatch)
    if tracker.backend == "tensorboard":
        return str(folder / "log directory")
    run = tracker.start()
    if isinstance(run, str):
        return run
    tracker.log(run, 0.5)
    tracker.end(run)
    return f"{run.project}/{run.name if tracker.backend == 'trackio' else run.id}"


class Failing:
    """Makes MLflow's database refuse metrics, or accept them again."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self.away = False

    def switch(self, *, away: bool) -> None:
        if away != self.away:
            names = ("step", "step_away") if away else ("step_away", "step")
            with closing(sqlite3.connect(self._database, timeout=60)) as connection, connection:
                connection.execute("ALTER TABLE metrics RENAME COLUMN {} TO {}".format(*names))
            self.away = away


@pytest.mark.parametrize("name", ["MLflow", "TensorBoard"])
def test_after_random_kills_and_outages_a_replay_completes_the_run_without_duplicates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = {"MLflow": OnMlflow, "TensorBoard": OnTensorBoard}[name]()
    chance = random.Random(7)
    lives = Lives(tmp_path, tracker, start(tracker, tmp_path, monkeypatch), 30 * KILLS // STEPS * STEPS)
    failing = Failing(tmp_path / "mlflow.db") if name == "MLflow" else None

    def moment(last: int) -> Callable[[int], bool]:
        def until(done: int) -> bool:
            if failing and chance.random() < 0.1:
                failing.switch(away=not failing.away)
            return done >= last

        return until

    for _ in range(KILLS):
        assert lives.live(moment(lives.done + chance.randint(1, 60))) in (-signal.SIGKILL, 0)
    if failing:
        failing.switch(away=False)
    lives.finish()
    lives.replay()
    lives.check()
    said = capsys.readouterr().out
    lives.replay()
    assert re.search(r": sent 0, ", capsys.readouterr().out), said
    lives.check()


@pytest.mark.parametrize(
    ("make", "kind"), [(OnMlflow, "alert"), (OnTensorBoard, "epoch"), (OnTensorBoard, "alert"), (OnWandb, "alert")]
)
def test_a_kill_right_after_the_tracker_received_a_report_causes_no_duplicate(
    make: type[Tracker], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only the tracker knows that it has the report. The resumed run creates the same report again."""
    tracker = make()
    lives = Lives(tmp_path, tracker, start(tracker, tmp_path, monkeypatch), 5 * STEPS)
    assert lives.live(lambda done: False, die_after_sending, kind) == -signal.SIGKILL
    lives.finish()
    lives.replay()
    lives.check()
    held = tracker.read_again(lives.run)
    assert len(held.alerts) == 1


@pytest.fixture
def wandb_server() -> Iterator[OnWandbServer]:
    with WandbServer() as server:
        yield OnWandbServer(server)
        wandb.teardown()


def test_after_a_kill_during_uploads_to_wandb_a_replay_completes_the_run_without_duplicates(
    wandb_server: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = Lives(tmp_path, wandb_server, start(wandb_server, tmp_path, monkeypatch), 5 * STEPS)
    stored = wandb_server.server.runs[lives.run.rpartition("/")[2]]

    def until(done: int) -> bool:
        if done == 2 * STEPS:
            assert wandb_server.server.wait(lambda: len(stored.history) > STEPS)
        wandb_server.server.taking = done < 2 * STEPS
        return done == 3 * STEPS + 3

    assert lives.live(until) == -signal.SIGKILL
    wandb_server.server.taking = True
    uploaded = len(stored.history)
    lives.finish()
    assert len(stored.history) > uploaded
    lives.replay()
    lives.check()
    assert [row["_step"] for row in stored.history] == list(range(len(stored.history)))
    assert len(stored.alerts) == 1


def test_in_a_resumed_run_without_user_rows_an_epoch_below_wandbs_step_is_not_dropped(
    wandb_server: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb_server.set_up(tmp_path, monkeypatch)
    report = AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report(epoch=0)
    with wandb.init() as run:
        for epoch in range(6):
            WandbBackend(run, "gwa", owned=True).write(report.model_copy(update={"epoch": epoch % 3}))
    with wandb.init(id=run.id, resume="must") as again:
        guest = WandbBackend(again, "gwa", owned=False)
        for epoch in (3, 4):
            guest.write(report.model_copy(update={"epoch": epoch}))
        guest.close()
    history = wandb_server.server.runs[run.id].history
    assert [(row["_step"], row["gwa/epoch"]) for row in history][6:] == [(6, 3), (7, 4)]
