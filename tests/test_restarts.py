"""A run whose processes are killed or preempted continues by itself: one journal, one run of the tracker, each record once."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import mlflow
import pytest
import torch
import wandb

from gwa_logging.journal import read_journal
from gwa_logging.records import EPOCH_KEYS, RunRecord
from tests.resumed_trainer import STEPS, uninterrupted
from tests.test_kills import Lives, numbers_of
from tests.trackers import (
    INTERVAL_KEYS,
    OnMlflow,
    OnTensorBoard,
    OnTrackio,
    OnWandb,
    Series,
    Tracker,
    numbers_in,
)
from tests.wandb_server import OnWandbServer, WandbServer

KILLS = 10
TRACKERS = {
    "MLflow": OnMlflow,
    "TensorBoard": OnTensorBoard,
    "Trackio": OnTrackio,
    "W&B offline": OnWandb,
    "W&B online": OnWandbServer,
}


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()


def runs_of(tracker: Tracker) -> int:
    """The number of runs in the tracker that were not deleted."""
    if isinstance(tracker, OnWandbServer):
        return len(tracker.server.runs)
    if isinstance(tracker, OnMlflow):
        return len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    if isinstance(tracker, OnWandb):
        return len({path.name.rpartition("-")[2] for path in (tracker.folder / "wandb").glob("offline-run-*")})
    return 1


def only_journal(folder: Path) -> Path:
    (journal,) = (folder / "runs").glob("**/journal.jsonl")
    return journal


def check_journal(journal: Path, folder: Path, steps: int) -> None:
    """Checks that the journal has the records of the uninterrupted training, each once."""
    records, skipped = read_journal(journal)
    wanted, _ = read_journal(uninterrupted(folder / "whole", steps))
    assert skipped == 0
    assert numbers_in(records) == numbers_in(wanted)
    assert [record.kind for record in records] == [record.kind for record in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_is_killed_ten_times_has_each_record_once_in_its_journal_and_its_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is given `run=`, and nothing is replayed."""
    chance = random.Random(3)
    with WandbServer() as server:
        tracker = OnWandbServer(server) if name == "W&B online" else TRACKERS[name]()
        tracker.set_up(tmp_path, monkeypatch)
        lives = Lives(tmp_path, tracker, None, 30 * KILLS // STEPS * STEPS)
        for _ in range(KILLS):
            last, lives.linger = lives.done + chance.randint(1, 50), chance.uniform(0.0005, 0.01)
            assert lives.live(lambda done, last=last: done >= last) == -signal.SIGKILL
        lives.finish()
        journal = only_journal(tmp_path)
        check_journal(journal, tmp_path, lives.steps)
        run = next(record for record in read_journal(journal)[0] if isinstance(record, RunRecord))
        lives.run = run.places[tracker.backend].run
        lives.check()
        assert runs_of(tracker) == 1
        wandb.teardown()


# --- torchrun -----------------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "restarts.py"
EPOCHS = 24  # of 20 steps each


class NoTracker(Tracker):
    """Only the journal."""

    backend = "local"


class Torchrun:
    """The example under torchrun, with two workers.

    At times Gloo cannot connect the workers, even after several restarts. Then the command is started again, as a user would.
    """

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder, self.tracker = folder, tracker
        self.output = folder / "output.txt"
        self.start()

    def start(self) -> None:
        """Starts the command, which may continue an earlier one."""
        arguments = ["--standalone", "--nproc-per-node=2", "--max-restarts=9", str(EXAMPLE)]
        arguments += [f"--epochs={EPOCHS}", f"--backend={self.tracker.backend}", "--directory=runs", "--timeout=30"]
        with self.output.open("a") as output:
            self.begin = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *arguments],
                cwd=self.folder,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "PYTHONPATH": str(EXAMPLE.parents[1]),
                },
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def was_not_connected(self) -> bool:
        """Returns True if the command has ended because Gloo could not connect the workers."""
        said = self.output.read_text()[self.begin :]
        return bool(self.process.poll()) and "connectFullMesh failed" in said.rpartition("Traceback")[0]

    def wait_for_steps(self, steps: int) -> None:
        """Waits until the checkpoint of the training has reached this step; fails after ten minutes."""
        deadline = monotonic() + 600
        while monotonic() < deadline and (self.process.poll() is None or self.was_not_connected):
            if self.process.poll() is not None:
                self.start()
            with suppress(OSError):
                if torch.load(self.folder / "checkpoint.pt", weights_only=True)["step"] >= steps:
                    return
            sleep(0.01)
        raise AssertionError(self.output.read_text()[-4000:])

    def finish(self) -> None:
        """Waits for the end of the training."""
        while self.process.wait(600) and self.was_not_connected:
            self.start()
        assert self.process.returncode == 0, self.output.read_text()[-4000:]

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = [int(pid) for path in children for pid in path.read_text().split()]
        return [pid for pid in found if EXAMPLE.name in Path(f"/proc/{pid}/cmdline").read_text()]

    def end(self, how: int) -> None:
        """Sends a signal to torchrun, or SIGKILL to all processes, and waits for the end."""
        if how == signal.SIGKILL:
            os.killpg(self.process.pid, how)
            for pid in self.workers():  # torchrun starts them in sessions of their own
                os.kill(pid, how)
        else:
            self.process.send_signal(how)
        self.process.wait(600)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Series]:
    """The numbers of the same training without any signal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Torchrun(folder, NoTracker()).finish()
    return numbers_in(read_journal(only_journal(folder))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "MLflow", "W&B offline", "W&B online"])
def test_workers_that_die_and_a_preempted_job_leave_each_record_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Series]
) -> None:
    """A worker dies and torchrun restarts all; SIGTERM and a new job; SIGKILL without notice and a new job."""
    with WandbServer() as server:
        makers = {"local": NoTracker, "W&B online": lambda: OnWandbServer(server)}
        tracker = (makers.get(name) or TRACKERS[name])()
        tracker.set_up(tmp_path, monkeypatch)
        job = Torchrun(tmp_path, tracker)
        for steps, worker in ((30, 1), (110, 0)):
            job.wait_for_steps(steps)
            os.kill(job.workers()[worker], signal.SIGKILL)
        job.wait_for_steps(190)
        job.end(signal.SIGTERM)
        assert not (tmp_path / "finished").exists()
        job = Torchrun(tmp_path, tracker)
        job.wait_for_steps(290)
        job.end(signal.SIGKILL)
        Torchrun(tmp_path, tracker).finish()
        assert (tmp_path / "finished").exists()
        journal = only_journal(tmp_path)
        records, skipped = read_journal(journal)
        assert skipped == 0
        found = numbers_in(records)
        assert found.keys() == undisturbed.keys()
        for key, points in undisturbed.items():
            assert [step for step, _ in found[key]] == [step for step, _ in points], key
            assert [v for _, v in found[key]] == pytest.approx([v for _, v in points], rel=1e-6, nan_ok=True), key
        if name == "local":
            return
        run = next(record for record in records if isinstance(record, RunRecord)).places[tracker.backend].run
        assert run is not None
        arrived = numbers_of(tracker, run)
        for key in (*INTERVAL_KEYS, *EPOCH_KEYS):
            assert [step for step, _ in arrived[key]] == [step for step, _ in undisturbed[key]], key
        assert runs_of(tracker) == 1
        wandb.teardown()
