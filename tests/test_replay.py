"""Replay sends exactly the missing records, and nothing the second time."""

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient

from gwa_logging import BackendError, EarlyStop, InvalidInputError
from gwa_logging.cli import main
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal, read_journal
from gwa_logging.records import RECORDS, AnyRecord
from gwa_logging.replay import replay
from tests.journal_writer import hold
from tests.trackers import (
    OnMlflow,
    OnMlflowServer,
    OnTensorBoard,
    OnTrackio,
    OnWandb,
    Tracker,
    Training,
    new_database,
    numbers_in,
    totals_in,
)

EPOCHS = 4
TRACKERS = {
    "MLflow": OnMlflow,
    "MLflow server": OnMlflowServer,
    "W&B": OnWandb,
    "TensorBoard": OnTensorBoard,
    "Trackio": OnTrackio,
}

ANY = [pytest.param(name, marks=pytest.mark.slow if name == "MLflow server" else ()) for name in TRACKERS]


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()
    OnMlflowServer.stop()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a tracker, with an alert in the second to last epoch."""
    training = Training()
    with training.watch(
        tmp_path_factory.mktemp("recorded"),
        early_stop=EarlyStop(warmup=0, patience=EPOCHS - 2, min_delta=1e9, drop=0),
    ) as monitor:
        for _ in range(EPOCHS):
            training.epoch(monitor)
        assert monitor.alert is not None
        assert monitor.alert.epoch == EPOCHS - 2
    return monitor.journal.parent


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def cut(folder: Path, share: float) -> Path:
    """A copy of a journal that ends in the middle of a line, as after kill -9."""
    text = (folder / FILE_NAME).read_bytes()
    other = folder.parent / "cut" / FILE_NAME
    other.parent.mkdir()
    other.write_bytes(text[: int(share * len(text))])
    return other


def check(tracker: Tracker, run: str, records: list[AnyRecord]) -> None:
    """Checks that the tracker contains the numbers of these records, each once, in order."""
    held = tracker.read_again(run)
    expected = {k: [(step, float(tracker.precision(v))) for step, v in s] for k, s in numbers_in(records).items()}
    assert {key: held.numbers.get(key) for key in expected} == expected
    assert held.totals == (totals_in(records) if held.totals else [])
    assert len(held.alerts) == sum(record.kind == "alert" for record in records)


@pytest.mark.parametrize("name", ANY)
def test_missing_records_are_sent_once_and_none_the_second_time(name: str, folder: Path, monkeypatch) -> None:
    tracker = TRACKERS[name]()
    tracker.set_up(folder.parent, monkeypatch)
    half = cut(folder, 0.6)
    first = replay(half, tracker.backend, "new")
    run = first.run_ref.run
    assert run is not None
    check(tracker, run, read_journal(half)[0])

    records = read_journal(folder / FILE_NAME)[0]
    counted = [record for record in records if record.kind not in ("run", "close")]
    rest = replay(folder / FILE_NAME, tracker.backend, run)
    assert (rest.sent, rest.had, rest.skipped) == (len(counted) - first.sent, first.sent, 0)
    check(tracker, run, records)

    again = replay(folder / FILE_NAME, tracker.backend, run)
    assert (again.sent, again.had) == (0, len(counted))
    check(tracker, run, records)


def without(folder: Path, missing: Callable[[AnyRecord], bool], name: str = "outage") -> Path:
    """A copy of a journal without some records: what a tracker received that was down for a while."""
    lines = (folder / FILE_NAME).read_bytes().splitlines(keepends=True)
    other = folder.parent / name / FILE_NAME
    other.parent.mkdir(parents=True)
    other.write_bytes(b"".join(line for line in lines if not missing(RECORDS.validate_json(line))))
    return other


@pytest.mark.parametrize("name", ANY)
def test_records_lost_in_an_outage_are_sent_although_the_tracker_has_later_ones(
    name: str, folder: Path, monkeypatch
) -> None:
    tracker = TRACKERS[name]()
    tracker.set_up(folder.parent, monkeypatch)
    records = read_journal(folder / FILE_NAME)[0]
    (alert,) = (record for record in records if record.kind == "alert")

    def missed(record: AnyRecord) -> bool:
        if record.kind == "interval":
            return 5 <= record.step < 16 or record.step == 20
        return record.kind == "alert" or (record.kind == "epoch" and record.epoch == alert.epoch)

    first = replay(without(folder, missed), tracker.backend, "new")
    run = first.run_ref.run
    rest = replay(folder / FILE_NAME, tracker.backend, run)
    assert (rest.sent, rest.had) == (sum(map(missed, records)), first.sent)
    held = tracker.read_again(run)
    for key, values in numbers_in(records).items():
        assert sorted(held.numbers[key]) == [(step, float(tracker.precision(value))) for step, value in values]
    assert sorted(held.totals) == (totals_in(records) if held.totals else [])
    assert len(held.alerts) == 1
    assert replay(folder / FILE_NAME, tracker.backend, run).sent == 0


@pytest.fixture
def killed_and_resumed(recorded: Path, tmp_path: Path) -> tuple[Path, str]:
    """A folder with two journals for one run of TensorBoard: killed after step 13, resumed from a checkpoint after 9; and
    beside them one for no tracker, and one of a process that was killed before its first line. Of the records that are in both
    journals, the second has other numbers."""
    run = str(tmp_path / "log directory")
    runs = tmp_path / "runs"
    for name, steps, created, shift in (("b", (0, 13), "01", 0.0), ("a", (10, 99), "02", 0.5)):
        records = []
        for record in read_journal(recorded / FILE_NAME)[0]:
            if record.kind == "run":
                places = {"tensorboard": {"run": run, "url": None}}
                records.append({**record.model_dump(mode="json"), "created": f"2026-01-{created}", "places": places})
            elif record.kind not in ("interval", "epoch") or steps[0] <= record.step <= steps[1]:
                change = {"mean": record.mean + shift} if record.kind in ("interval", "epoch") else {}
                records.append({**record.model_dump(mode="json"), **change})
        (runs / name).mkdir(parents=True)
        (runs / name / FILE_NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(recorded, runs / "untracked")
    (runs / "empty").mkdir()
    (runs / "empty" / FILE_NAME).touch()
    return runs, run


def means(run: str) -> dict[str, dict[int, float]]:
    numbers = OnTensorBoard().read(run).numbers
    found = {key: dict(numbers[key]) for key in ("steps/mean", "stats/mean")}
    assert {key: len(values) for key, values in found.items()} == {key: len(numbers[key]) for key in found}
    return found


def test_a_folder_with_the_journals_of_a_resumed_run_is_sent_as_one_run(killed_and_resumed, recorded, capsys) -> None:
    runs, run = killed_and_resumed
    assert main(["replay", str(runs), "--backend", "tensorboard"]) == 0
    told = capsys.readouterr()
    records = [r for r in read_journal(recorded / FILE_NAME)[0] if r.kind in ("interval", "epoch")]
    expected = {
        kind: {position(r): pytest.approx(r.mean + (0.5 if r.step >= 10 else 0.0)) for r in records if r.kind == kind}
        for kind, position in (("interval", lambda r: r.step), ("epoch", lambda r: r.epoch))
    }
    assert means(run) == {"steps/mean": expected["interval"], "stats/mean": expected["epoch"]}
    both = sum(10 <= r.step <= 13 for r in records) + 1  # and the alert
    assert re.fullmatch(
        rf"b, a: sent {len(records) + 1}, 0 were already there, {both} were repeated after a resume; \S+",
        told.out.strip().replace(run, "run"),
    )
    assert "untracked" in told.err
    assert "it contains no run" in told.err
    assert main(["replay", str(runs), "--backend", "tensorboard"]) == 0
    assert f"sent 0, {len(records) + 1} were already there" in capsys.readouterr().out


def test_records_of_the_first_journal_are_not_sent_again_from_the_second(killed_and_resumed) -> None:
    runs, run = killed_and_resumed
    replay(runs / "b" / FILE_NAME, "tensorboard")
    before = means(run)
    assert main(["replay", str(runs), "--backend", "tensorboard"]) == 0
    after = means(run)
    assert {key: {step: after[key][step] for step in before[key]} for key in before} == before
    assert len(after["stats/mean"]) == EPOCHS


def test_a_run_that_cannot_be_replayed_does_not_stop_the_others(killed_and_resumed, capsys) -> None:
    runs, run = killed_and_resumed
    text = (runs / "b" / FILE_NAME).read_text()
    (runs / "a file").touch()
    (runs / "c").mkdir()
    (runs / "c" / FILE_NAME).write_text(text.replace(run, f"{runs}/a file"))
    assert main(["replay", str(runs), "--backend", "tensorboard"]) == 2
    told = capsys.readouterr()
    assert "b, a: sent" in told.out
    assert re.search("c: .*cannot be written", told.err)


def test_a_folder_without_a_run_of_this_backend_and_one_run_for_several_journals_are_refused(
    killed_and_resumed, capsys
) -> None:
    runs, run = killed_and_resumed
    assert main(["replay", str(runs), "--backend", "mlflow"]) == 2
    assert "no journal in it was written for a run of mlflow" in capsys.readouterr().err
    assert main(["replay", str(runs), "--backend", "tensorboard", "--run", run]) == 2
    assert "with --run, name one of them: a, b, empty, untracked" in capsys.readouterr().err


def test_the_run_of_a_journal_is_found_without_naming_it(tmp_path: Path, monkeypatch, capsys) -> None:
    client = new_database(tmp_path, monkeypatch)
    training = Training()
    with training.watch(tmp_path, backend="mlflow") as monitor:
        training.epoch(monitor)
    (run,) = client.search_runs([client.get_experiment_by_name("gwa").experiment_id])
    assert main(["replay", str(monitor.journal.parent), "--backend", "mlflow"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"sent 0, 4 were already there", said)
    assert run.info.run_id in said


def test_further_heads_are_sent_to_the_same_run(tmp_path: Path, monkeypatch, capsys) -> None:
    client = new_database(tmp_path, monkeypatch)
    training = Training()
    with training.watch(tmp_path, head=["2", "0"]) as monitor:
        training.step(0)
        monitor.end_epoch()
    assert main(["replay", str(monitor.journal.parent), "--backend", "mlflow", "--run", "new"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (run,) = client.search_runs([client.get_experiment_by_name("gwa").experiment_id])
    assert {"gwa/stats/mean", "gwa/0/stats/mean"} <= run.data.metrics.keys()


def test_a_tracker_that_refuses_records_is_an_error_and_the_next_replay_sends_the_rest(
    folder: Path, monkeypatch, capsys
) -> None:
    tracker = OnMlflow()
    tracker.set_up(folder.parent, monkeypatch)
    run = tracker.start()
    records = read_journal(folder / FILE_NAME)[0]

    log, calls = MlflowClient.log_batch, count()
    with monkeypatch.context() as broken:
        broken.setattr("gwa_logging.integrations.mlflow.MlflowBackend.records_per_call", 3)

        def failing(self: MlflowClient, *arguments: Any, **options: Any) -> None:
            if next(calls) == 4:
                raise ConnectionError("gone away")
            log(self, *arguments, **options)

        broken.setattr(MlflowClient, "log_batch", failing)
        assert main(["replay", str(folder), "--backend", "mlflow", "--run", run]) == 2
    said = capsys.readouterr().err
    assert "gone away" in said
    assert "Replay again to send the rest" in said
    assert main(["replay", str(folder), "--backend", "mlflow", "--run", run]) == 0
    check(tracker, run, records)


def test_torn_and_invalid_lines_are_skipped_and_reported(folder: Path, monkeypatch, capsys) -> None:
    tracker = OnMlflow()
    tracker.set_up(folder.parent, monkeypatch)
    path = folder / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"kind": "stranger"}\n', lines[3][:40] + b"\n", *lines[4:]]))
    assert main(["replay", str(folder), "--backend", "mlflow", "--run", "new"]) == 0
    said = capsys.readouterr().out
    assert "2 lines of the journal skipped" in said
    check(tracker, re.search(r"[0-9a-f]{32}", said)[0], read_journal(path)[0])


@pytest.mark.parametrize(
    ("backend", "run", "said"),
    [
        ("local", "new", "this is the journal itself"),
        ("nonsense", "new", "nonsense"),
        ("mlflow", "0123456789abcdef0123456789abcdef", "refuses.*0123456789abcdef"),
        ("mlflow", None, "pass --run ID or --run new"),
    ],
)
def test_a_wrong_backend_or_run_is_named(
    folder: Path, monkeypatch, capsys, backend: str, run: str | None, said: str
) -> None:
    new_database(folder.parent, monkeypatch)
    command = ["replay", str(folder), "--backend", backend, *(["--run", run] if run else [])]
    assert main(command) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_empty_journal_one_of_another_version_and_a_folder_of_runs_are_refused(folder: Path, capsys) -> None:
    def refused(directory: Path, said: str) -> None:
        assert main(["replay", str(directory), "--backend", "tensorboard", "--run", str(folder.parent / "tb")]) == 2
        assert re.search(said, capsys.readouterr().err)

    shutil.copytree(folder, folder.parent / "another run")
    refused(folder.parent, "is a folder of runs.*another run, run")
    refused(folder.parent / "nowhere", "is not a folder")
    path = folder / FILE_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(lines[0]) | {"version": 2, "new": []}) + "\n", *lines[1:]]))
    refused(folder, r"format version 2.*reads version 1")
    path.write_text("")
    refused(folder, "it contains no run")
    assert not (folder.parent / "tb").exists()


def test_a_journal_belongs_to_one_process_until_that_process_is_killed(folder: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, never = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(folder / FILE_NAME, ready, never))
    other.start()
    assert ready.wait(120)
    with pytest.raises(BackendError, match="another process is writing this journal"):
        Journal(folder / FILE_NAME, Faults())
    with pytest.raises(BackendError, match="another process is writing this journal"):
        replay(folder / FILE_NAME, "tensorboard", str(folder.parent / "tb"))
    other.kill()
    other.join(120)
    Journal(folder / FILE_NAME, Faults()).close()


def test_a_journal_of_a_later_version_has_no_report(folder: Path) -> None:
    from gwa_logging.report.page import write_report

    path = folder / FILE_NAME
    path.write_text(path.read_text().replace('"version":1', '"version":7', 1))
    with pytest.raises(InvalidInputError, match="format version 7"):
        write_report(folder)
