"""A run whose processes are killed or preempted continues by itself: one journal, one run of the tracker, each record once."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import wandb

from gwa_logging.journal import read_journal
from gwa_logging.records import RunRecord
from tests.resumed_trainer import STEPS, uninterrupted
from tests.test_kills import Lives
from tests.trackers import OnMlflow, OnTensorBoard, OnTrackio, OnWandb, Tracker, numbers_in
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
