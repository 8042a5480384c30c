"""W&B: real offline runs, read back from disk, and a stand-in for the server."""

import json
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb

import gwa_logging
from gwa_logging import BackendError, EarlyStop, InvalidInputError, Monitor, delivery
from gwa_logging.errors import GwaError
from gwa_logging.integrations import _reachable
from gwa_logging.integrations._wandb_contents import offline_rows
from gwa_logging.integrations.wandb import WandbBackend, open_backend
from gwa_logging.journal import read_journal
from gwa_logging.protocols import RunContext
from gwa_logging.records import (
    EPOCH_KEYS,
    OPTIONAL_KEYS,
    QUANTILE_KEYS,
    STEP_KEYS,
    EpochReport,
    IntervalRecord,
    StopAlert,
    Suspect,
    SuspectsRecord,
)
from gwa_logging.thumbnail import thumbnail
from tests import trackers
from tests.records import close_record, epoch_report, interval_record, stop_alert
from tests.trackers import BATCH, BATCHES, OnDisk, OnWandb, folder_of, inspect_by_wandb, read_back, run_of, start_run

EPOCHS = 6
SAMPLES = EPOCHS * BATCHES * BATCH


# --- a training, a user, and what is on disk afterwards ---------------------------------------------------------------


class Pattern(NamedTuple):
    """How a user logs to the run."""

    name: str
    moment: str  # "step", "before end_epoch", "after end_epoch" or "never"
    explicit: bool = False  # passes step=
    every: int = 1
    since: int = 0
    counted: bool = False  # its steps count the rows, not the epochs


PATTERNS = [
    Pattern("explicit step=epoch before end_epoch", "before end_epoch", explicit=True),
    Pattern("explicit step=epoch after end_epoch", "after end_epoch", explicit=True),
    Pattern("implicit step per training step", "step"),
    Pattern("explicit step per training step", "step", explicit=True),
    Pattern("never", "never"),
    Pattern("explicit step=epoch every second epoch", "before end_epoch", explicit=True, every=2),
    Pattern("explicit step=evaluation every second epoch", "before end_epoch", explicit=True, every=2, counted=True),
    Pattern("implicit step per epoch before end_epoch", "before end_epoch"),
    Pattern("implicit step per epoch after end_epoch", "after end_epoch"),
    Pattern("implicit step every second epoch", "after end_epoch", every=2),
    Pattern("later, explicit step=epoch before end_epoch", "before end_epoch", explicit=True, since=4),
    Pattern("later, explicit step=epoch after end_epoch", "after end_epoch", explicit=True, since=3),
]

SLOW = (
    "explicit step=epoch after end_epoch",
    "explicit step per training step",
    "explicit step=epoch every second epoch",
    "implicit step per epoch before end_epoch",
    "later, explicit step=epoch before end_epoch",
)
"""Patterns that differ from a fast one in a single property."""


class User:
    """Logs by a pattern, and records the rows that must result and what W&B's step would be without this library."""

    def __init__(self, run: wandb.Run, pattern: Pattern) -> None:
        self.run, self.pattern = run, pattern
        self.rows: dict[int, float] = {}
        self.step_without_watch = 0
        self.steps_without_watch: list[int] = []
        self.steps: list[int] = []
        """Both after each row of the user."""
        self.ahead: list[int] = []
        """After each epoch: by how much the run's step exceeds the number of epochs that have ended."""

    def at(self, moment: str, index: int) -> None:
        pattern = self.pattern
        if moment == pattern.moment and index % pattern.every == 0 and index >= pattern.since:
            value, step = 0.5 + index, self.step_without_watch
            if pattern.explicit:
                step = len(self.rows) if pattern.counted else index
                self.run.log({"user/loss": value}, step=step)
                self.step_without_watch = step
            else:
                self.run.log({"user/loss": value})
                self.step_without_watch = step + 1
            self.rows[step] = value
            self.steps_without_watch.append(self.step_without_watch)
            self.steps.append(self.run.step)
        if moment == "after end_epoch":
            self.ahead.append(self.run.step - index)


class Training(trackers.Training):
    """The same, tracked by W&B."""

    def watch(self, directory: Path, **options: Any) -> Monitor:
        return super().watch(directory, **{"backend": "wandb"} | options)


def samples_in(history: list[dict[str, Any]], prefix: str = "gwa") -> int:
    return sum(sum(row.get(f"{prefix}/scores.values", [])) for row in history)


@pytest.fixture(autouse=True)
def _quiet_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    if wandb.run is not None:
        wandb.run.finish()
    wandb.teardown()


# --- the user's run ---------------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """A training during which a user logged by a pattern."""

    user: User
    reports: list[EpochReport]
    faults: dict[str, int]
    seen: list[dict[str, Any]]
    """What W&B's dashboard shows of the last row, after each epoch."""
    disk: OnDisk


@pytest.fixture(scope="module")
def patient() -> Iterator[None]:
    """Makes training wait for W&B even on a busy machine, so that the user's rows come when the pattern says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "MAX_BLOCKING", 30.0)
        yield


class Visits(dict[str, Visit]):
    """The patterns by name; each is trained and read back when it is first looked up."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, name: str) -> Visit:
        (pattern,) = (pattern for pattern in PATTERNS if pattern.name == name)
        directory = self._factory.mktemp("visit")
        run = start_run(directory)
        user, training = User(run, pattern), Training()
        monitor = training.watch(directory, run=run)
        seen = []
        for epoch in range(EPOCHS):
            for batch in range(BATCHES):
                training.step(batch)
                user.at("step", epoch * BATCHES + batch)
            user.at("before end_epoch", epoch)
            monitor.end_epoch()
            user.at("after end_epoch", epoch)
            seen.append(dict(run.summary))
        monitor.close()
        run.finish()
        self[name] = Visit(user, monitor.history, monitor.faults, seen, read_back(folder_of(run)))
        return self[name]


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory, patient: None) -> Visits:
    return Visits(tmp_path_factory)


@pytest.fixture(params=[pytest.param(p.name, marks=pytest.mark.slow if p.name in SLOW else ()) for p in PATTERNS])
def visit(request: pytest.FixtureRequest, visits: Visits) -> Visit:
    return visits[request.param]


def test_every_row_of_the_user_keeps_its_step_and_value(visit: Visit) -> None:
    assert visit.disk.column("user/loss", "_step") == [(value, step) for step, value in visit.user.rows.items()]


def test_every_sample_is_in_the_histograms_exactly_once(visit: Visit) -> None:
    assert samples_in(visit.disk.history) == SAMPLES


def test_every_epoch_is_logged_once_and_in_order(visit: Visit) -> None:
    expected = [(r.epoch, r.gwa, r.stable_gwa, r.mean, r.count) for r in visit.reports]
    keys = ("gwa/epoch", "gwa/gwa", "gwa/stable", "gwa/stats/mean", "gwa/stats/count")
    assert len(expected) == EPOCHS
    assert visit.disk.column(*keys) == expected


def test_the_step_after_each_row_of_the_user_is_the_same_as_without_this_library(visit: Visit) -> None:
    assert visit.user.steps == visit.user.steps_without_watch
    assert len(visit.user.steps) == len(visit.user.rows)


def test_if_the_user_never_logs_the_step_advances_once_per_epoch_and_never_exceeds_the_epoch(
    visits: Visits,
) -> None:
    visit = visits["never"]
    assert visit.user.ahead == [0] * EPOCHS
    assert [seen.get("gwa/epoch") for seen in visit.seen] == [None, *range(EPOCHS - 1)]
    assert [seen.get("gwa/stats/mean") for seen in visit.seen[1:]] == [report.mean for report in visit.reports[:-1]]
    assert all(seen["gwa/scores"]["_type"] == "histogram" for seen in visit.seen[1:])
    assert visit.disk.column("_step", "gwa/epoch") == [(epoch, epoch) for epoch in range(EPOCHS)]


@pytest.mark.parametrize(
    "name",
    [
        "later, explicit step=epoch after end_epoch",
        pytest.param("later, explicit step=epoch before end_epoch", marks=pytest.mark.slow),
    ],
)
def test_the_step_advances_only_until_the_user_starts_to_log(visits: Visits, name: str) -> None:
    visit = visits[name]
    assert visit.user.ahead == [0] * EPOCHS
    assert visit.seen[2]["gwa/epoch"] == 1
    assert min(visit.user.rows) >= 3


@pytest.mark.parametrize("name", ["explicit step=evaluation every second epoch", "implicit step every second epoch"])
def test_if_the_user_logs_less_than_once_per_epoch_the_step_advances_by_one_row_at_most(
    visits: Visits, name: str
) -> None:
    visit = visits[name]
    assert max(visit.user.ahead[-2:]) < 0  # with a row for every epoch it would be 0


def test_the_steps_of_the_histograms_ascend_up_to_the_last_training_step(visit: Visit) -> None:
    steps = visit.disk.column("gwa/step")
    assert steps == sorted(set(steps))
    assert steps[-1] == EPOCHS * BATCHES - 1


def test_the_users_config_is_unchanged_and_there_are_no_faults(visit: Visit) -> None:
    assert visit.faults == {}
    assert "gwa" not in visit.disk.config


def test_a_user_who_logs_per_step_gets_a_histogram_per_interval(visits: Visits) -> None:
    per_step = visits["implicit step per training step"].disk
    never = visits["never"].disk
    assert len(per_step.column("gwa/scores.values")) > EPOCHS * (BATCHES // 3)
    assert len(never.column("gwa/scores.values")) == EPOCHS - 1  # intervals that fell into the same row were added up


def test_a_row_that_the_user_logged_before_training_keeps_the_step_from_advancing(
    tmp_path: Path, patient: None
) -> None:
    run, training = start_run(tmp_path), Training()
    run.log({"user/accuracy": 0.1}, step=1)  # the row is open, so W&B's summary does not have it yet
    monitor = training.watch(tmp_path, run=run)
    for _ in range(4):
        training.epoch(monitor)
    assert run.step == 1
    run.log({"user/accuracy": 0.2}, step=2)
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert disk.column("user/accuracy", "_step") == [(0.1, 1), (0.2, 2)]
    assert disk.column("gwa/epoch") == [0, 1, 2, 3]
    assert samples_in(disk.history) == 4 * BATCHES * BATCH


def test_a_summary_value_of_the_user_keeps_the_step_from_advancing(tmp_path: Path, patient: None) -> None:
    run, training = start_run(tmp_path), Training()
    run.summary["epochs"] = 3
    monitor = training.watch(tmp_path, run=run)
    for _ in range(3):
        training.epoch(monitor)
    for epoch in range(3):
        run.log({"user/loss": 0.5 - epoch}, step=epoch)
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert disk.column("user/loss", "_step") == [(0.5, 0), (-0.5, 1), (-1.5, 2)]
    assert disk.column("gwa/epoch") == [0, 1, 2]
    assert samples_in(disk.history) == 3 * BATCHES * BATCH


def test_two_models_in_a_run_without_watcher_rows_advance_the_step_together(tmp_path: Path, patient: None) -> None:
    run, trainings = start_run(tmp_path), {"gwa": Training(), "discriminator": Training()}
    monitors = {name: training.watch(tmp_path, run=run, name=name) for name, training in trainings.items()}
    for epoch in range(4):
        for name, training in trainings.items():
            training.epoch(monitors[name])
        assert run.step == epoch
    shown = run.summary.get("gwa/epoch"), run.summary.get("discriminator/epoch")
    assert shown == (2, 2)
    for monitor in monitors.values():
        monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    for name in monitors:
        assert disk.column(f"{name}/epoch", "_step") == [(epoch, epoch) for epoch in range(4)]
        assert samples_in(disk.history, name) == 4 * BATCHES * BATCH


def test_rows_that_the_user_logs_with_a_step_after_close_are_kept(tmp_path: Path) -> None:
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run)
    for epoch in range(3):
        training.epoch(monitor)
        run.log({"user/loss": 1.0}, step=epoch)
    monitor.close()
    run.log({"test/accuracy": 0.9}, step=2)
    run.log({"test/accuracy": 0.8}, step=3)
    run.finish()
    disk = read_back(folder_of(run))
    assert disk.column("test/accuracy", "_step") == [(0.9, 2), (0.8, 3)]
    assert len(disk.column("gwa/gwa")) == 3


def test_close_commits_nothing_if_the_open_row_is_empty(tmp_path: Path) -> None:
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run)
    training.epoch(monitor)
    run.log({"user/loss": 1.0})
    monitor.close()
    assert run.step == 1
    run.finish()


@pytest.mark.parametrize("owned", [False, True])
def test_an_interval_without_a_score_leaves_no_row(tmp_path: Path, owned: bool) -> None:
    run = start_run(tmp_path)
    backend = WandbBackend(run, "gwa", owned=owned)
    scored = gwa_logging.AlignmentSummary.from_scores([0.1, -0.2])
    nothing = gwa_logging.AlignmentSummary.from_scores([float("nan")])
    for step, summary in enumerate((nothing, scored, nothing)):
        backend.write(interval_record(step, summary))
    backend.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert [row["gwa/step"] for row in disk.history] == [1]
    assert samples_in(disk.history) == 2


def test_a_row_of_merged_intervals_lists_the_steps_it_covers(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    backend = WandbBackend(run, "gwa", owned=False)
    scored = gwa_logging.AlignmentSummary.from_scores([0.1, -0.2])
    for step in (0, 1, 2, 10, 11, 12):  # a resumed run does not send what the tracker has
        backend.write(interval_record(step, scored))
    run.log({"step": 7, "epoch": 0, "count": 3, "excluded": 0})  # the user's keys, without our prefix
    backend.write(interval_record(20, scored))
    backend.close()
    run.finish()
    rows = [(row["gwa/step"], row.get("gwa/covers")) for row in read_back(folder_of(run)).history]
    assert rows == [(12, [[0, 2], [10, 12]]), (20, None)]
    held = backend.contents()
    assert [step for step in range(-1, 25) if step in held.intervals] == [0, 1, 2, 10, 11, 12, 20]
    assert held.epochs == {}


def test_an_offline_run_is_read_as_wandbs_own_reader_reads_it(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    for step in range(40):
        run.log(
            {
                "gwa/step": step,
                "gwa/covers": [[0, step]],
                "user/text": "x" * 1500 * (step % 3),
                "nested": {"a": {"b": step}},
            }
        )
    run.summary["gwa/stop_epochs"] = [3, 7]
    run.finish()
    wandb.teardown()
    rows = list(offline_rows(Path(folder_of(run))))
    assert [row for is_history, row in rows if is_history] == inspect_by_wandb(folder_of(run))
    assert len(rows) > 40
    assert [row["gwa/stop_epochs"] for is_history, row in rows if "gwa/stop_epochs" in row][-1] == [3, 7]


@pytest.mark.parametrize("damage", ["torn", "overwritten"])
def test_a_damaged_file_of_an_offline_run_is_read_up_to_its_end_or_refused(tmp_path: Path, damage: str) -> None:
    run = start_run(tmp_path)
    for step in range(30):
        run.log({"gwa/step": step, "text": "x" * 5000})
    run.finish()
    read_back(folder_of(run))
    folder = tmp_path / "damaged"
    folder.mkdir()
    (whole,) = (path.read_bytes() for path in Path(folder_of(run)).glob("*.wandb"))
    half = len(whole) // 2
    damaged = {
        "torn": whole[:half],
        "overwritten": whole[:half] + b"\xff" * half,
    }
    (folder / "run.wandb").write_bytes(damaged[damage])
    if damage == "overwritten":
        with pytest.raises(BackendError, match=r"run\.wandb' of this W&B run cannot be read"):
            list(offline_rows(folder))
    else:
        steps = [row["gwa/step"] for is_history, row in offline_rows(folder) if is_history]
        assert steps == list(range(len(steps)))
        assert 10 < len(steps) < 20


def test_contents_reports_every_alert_and_list_of_suspects(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    backend = WandbBackend(run, "gwa", owned=True)
    for epoch in (9, 5):
        backend.write(stop_alert(epoch))
        backend.write(SuspectsRecord(step=10 * epoch, epoch=epoch, samples=3, suspects=()))
    backend.close()
    wandb.teardown()  # finish() alone can return before the last rows are on disk
    held = backend.contents()
    assert (held.alerts, held.suspects) == ({5, 9}, {50, 90})


def test_a_write_that_failed_can_be_repeated_without_counting_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tmp_path)
    backend = open_backend(RunContext(name="gwa", run=run, directory=tmp_path))
    first, second = (interval_record(step, [0.1] * n) for step, n in enumerate((3, 4)))
    backend.write(first)
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", _refuse)
        with pytest.raises(ConnectionResetError):
            backend.write(second)
    backend.write(second)
    backend.close()
    run.finish()
    assert samples_in(read_back(folder_of(run)).history) == 7


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("fails", ["drawing", "logging"])
def test_a_picture_that_fails_costs_no_record_and_counts_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, owned: bool
) -> None:
    run = start_run(tmp_path)
    backend, log = WandbBackend(run, "gwa", owned=owned), run.log

    def log_without_pictures(row: dict[str, Any], **options: Any) -> None:
        if list(row) == ["gwa/picture"]:
            raise ConnectionResetError
        log(row, **options)

    if fails == "drawing":
        monkeypatch.setattr("gwa_logging.integrations.heatmap_picture.draw", _refuse)
    else:
        monkeypatch.setattr(run, "log", log_without_pictures)
    for step in range(4):
        backend.write(interval_record(step, [0.1, 0.2]))
        backend.write(epoch_report(epoch=step, step=step, count=2))
    backend.write(close_record(epochs=4))
    backend.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert samples_in(disk.history) == 8
    assert disk.column("gwa/epoch") == [0, 1, 2, 3]
    assert ("gwa/picture.path" in str(disk.history)) is (
        owned and fails == "logging"
    )  # these are in the record's own row


def test_a_picture_in_the_users_run_is_drawn_in_a_thread_and_logged_with_a_later_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tmp_path)
    backend = WandbBackend(run, "gwa", owned=False)
    drawing, go_on, encode = Event(), Event(), wandb.Image

    def encode_slowly(*arguments: Any, **options: Any) -> wandb.Image:
        drawing.set()
        assert go_on.wait(60)
        return encode(*arguments, **options)

    monkeypatch.setattr(wandb, "Image", encode_slowly)
    for step in range(3):
        backend.write(interval_record(step, [0.1, 0.2], epoch=step))
        backend.write(epoch_report(epoch=step, step=step, count=2))
    assert drawing.wait(60)
    run.log({"user/loss": 1.0})
    assert "gwa/picture" not in dict(run.summary)
    go_on.set()
    backend._drawing.wait(60)
    backend.write(interval_record(3, [0.1, 0.2], epoch=3))
    run.log({"user/loss": 2.0})
    assert run.summary["gwa/picture"]["_type"] == "image-file"
    backend.write(close_record(epochs=3))
    backend.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert [row["_step"] for row in disk.history if "gwa/picture.path" in row] == [3, 4]
    assert disk.column("gwa/epoch") == [0, 1, 2]
    assert samples_in(disk.history) == 8


def test_without_pillow_everything_but_pictures_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = thumbnail(np.zeros((4, 4)))
    monkeypatch.setitem(sys.modules, "PIL", None)  # then importing it raises ImportError
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run)
    for _ in range(2):
        training.epoch(monitor)
    monitor.close()
    backend = WandbBackend(run, "other", owned=False)
    suspect = Suspect(id=7, mean_score=-0.5, times_seen=2, label=1, predicted=0, thumbnail=png)
    backend.write(SuspectsRecord(step=14, epoch=1, samples=56, suspects=(suspect,)))
    backend.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert monitor.faults == {}
    assert disk.column("gwa/epoch") == [0, 1]
    assert "picture" not in str(disk.history)
    (table,) = (json.loads(path.read_text()) for path in Path(folder_of(run)).glob("files/media/table/**/*.json"))
    assert table["data"] == [[7, -0.5, 2, 1, 0]]


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("explicit", [False, True], ids=["implicit steps", "step=epoch"])
@pytest.mark.parametrize(
    "moments", [("before", ""), ("after",), ("before and after", ""), ("", "before", "after", "before", "before")]
)
def test_a_row_of_the_user_at_the_moment_of_a_write_costs_no_record_and_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: tuple[str, ...], explicit: bool
) -> None:
    """On a loaded machine W&B takes longer than training waits, and the user logs while this library does."""
    run = start_run(tmp_path)
    backend, log, moment_of_next = WandbBackend(run, "gwa", owned=False), run.log, cycle(moments)
    rows = 0

    def user_logs() -> None:
        nonlocal rows
        log({"user/loss": rows}, step=rows if explicit else None)
        rows += 1

    def log_while_the_user_does(row: dict[str, Any], **options: Any) -> None:
        moment = next(moment_of_next)
        if "before" in moment:
            user_logs()
        log(row, **options)
        if "after" in moment:
            user_logs()

    user_logs()
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log_while_the_user_does)
        for epoch in range(5):
            for step in (2 * epoch, 2 * epoch + 1):
                backend.write(interval_record(step, [0.1] * (step + 1), epoch=epoch))
            backend.write(epoch_report(epoch))
        backend.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert disk.column("gwa/epoch") == [0, 1, 2, 3, 4]
    assert samples_in(disk.history) == sum(range(1, 11))
    assert disk.column("gwa/step")[-1] == 9
    assert disk.column("user/loss", "_step") == [(index, index) for index in range(rows)]


def test_a_run_whose_step_moves_all_the_time_keeps_the_record_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tmp_path)
    backend, log = WandbBackend(run, "gwa", owned=False), run.log
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", lambda *row, **options: (log({"user/loss": 1}), log(*row, **options)))
        with pytest.raises(BackendError, match="step moved"):
            backend.write(interval_record(0, [0.1] * 3))
    backend.write(interval_record(0, [0.1] * 3))
    backend.close()
    run.finish()
    assert samples_in(read_back(folder_of(run)).history) == 3


# --- a run that `watch` starts ----------------------------------------------------------------------------------------


def test_a_run_that_watch_started_has_a_row_per_record_and_is_finished_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    bystander = start_run(tmp_path)  # not the active run, so it is neither used nor finished
    training = Training()
    monitor = training.watch(tmp_path)
    for _ in range(2):
        training.epoch(monitor)
    monitor.close()
    with pytest.raises(BackendError, match="finished"):  # before reading back, which ends every run
        monitor._deliveries[0].backend.write(monitor.history[0])
    bystander.log({"still": "open"})
    bystander.finish()
    records, _ = read_journal(monitor.journal)
    (ours,) = {str(folder) for folder in tmp_path.glob("wandb/offline-run-*")} - {folder_of(bystander)}
    disk = read_back(ours)
    kinds = Counter(type(record) for record in records)
    assert len(disk.column("gwa/scores.values")) == kinds[IntervalRecord] > 2
    assert disk.column("gwa/epoch") == [0, 1]
    assert len(disk.history) == kinds[IntervalRecord] + kinds[EpochReport] + 1  # the last one has the last picture
    pictures = disk.column("gwa/picture.path", "gwa/picture._type")
    assert [kind for _, kind in pictures] == 2 * ["image-file"]
    assert all(Path(ours, "files", path).is_file() for path, _ in pictures)
    assert samples_in(disk.history) == 2 * BATCHES * BATCH
    config = disk.config["gwa"]
    assert config["log_every_n_steps"] == 3
    assert config["version"] == gwa_logging.__version__
    assert "Linear 8 -> 3" in config["head"]
    assert config["classes"] == 3
    assert monitor.faults == {}


def test_the_active_run_is_used_and_not_finished(tmp_path: Path) -> None:
    run = start_run(tmp_path, reinit="default")
    assert wandb.run is run
    backend = open_backend(RunContext(name="gwa", run=None, directory=tmp_path))
    backend.close()
    assert backend.run_ref.url == folder_of(run)
    run.log({"still": "open"})
    run.finish()
    assert read_back(folder_of(run)).column("still") == ["open"]


def test_if_no_run_can_be_started_the_error_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as address:
        wandb.teardown()
        for key, value in {"BASE_URL": address, "API_KEY": "not a key", "MODE": "online"}.items():
            monkeypatch.setenv(f"WANDB_{key}", value)
        with pytest.raises(BackendError, match=r"(?s)wandb login.*WANDB_MODE=offline.*run=wandb\.init"):
            Training().watch(tmp_path)


@pytest.mark.parametrize("project", [None, "mine"])
def test_a_run_that_watch_starts_goes_to_project_gwa_and_is_named_like_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None
) -> None:
    OnWandb().set_up(tmp_path, monkeypatch)
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    monitor = Training().watch(tmp_path)
    run = run_of(monitor, "wandb")
    assert (run.project, run.name) == (project or "gwa", monitor.journal.parent.name)
    monitor.close()


def test_in_the_users_run_a_picture_lies_beside_the_histogram(visits: Visits) -> None:
    pictures = visits["explicit step=epoch before end_epoch"].disk.column("gwa/picture._type", "gwa/picture.size")
    assert len(pictures) >= 2
    assert min(size for _, size in pictures) > 5000


def test_an_argument_of_wandb_init_is_answered_with_how_to_pass_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown argument 'project'.*run=wandb\.init\(project="):
        Training().watch(tmp_path, project="x")


# --- alerts and summary -----------------------------------------------------------------------------------------------


def test_one_alert_says_when_to_stop_and_the_summary_keeps_the_best_epoch(tmp_path: Path) -> None:
    run, training = start_run(tmp_path), Training(lr=0.0)
    monitor = training.watch(tmp_path, run=run, early_stop=EarlyStop(patience=1, warmup=0, drop=0))
    for _ in range(5):
        training.epoch(monitor)
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    alert = monitor.alert
    assert isinstance(alert, StopAlert)
    assert [(a["title"], a["level"]) for a in disk.alerts] == [("GWA: stop", "WARN")]
    (text,) = (a["text"] for a in disk.alerts)
    assert text == alert.text
    summary = {key: disk.summary[f"gwa/{key}"] for key in ("best_epoch", "best_value", "stop_epoch")}
    assert summary == {"best_epoch": 0, "best_value": alert.best_value, "stop_epoch": 1}


def test_a_run_without_an_alert_keeps_its_best_epoch_too(tmp_path: Path) -> None:
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run, early_stop=EarlyStop(patience=99, warmup=0))
    for _ in range(3):
        training.epoch(monitor)
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    best = max(monitor.history, key=lambda report: report.separation)
    assert (disk.summary["gwa/best_epoch"], disk.summary["gwa/best_value"]) == (best.epoch, best.separation)
    assert "gwa/stop_epoch" not in disk.summary
    assert disk.alerts == []


# --- mistakes of users ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["run.finish()", "wandb.teardown()"])
def test_a_run_that_is_finished_before_close_neither_delays_nor_interrupts_training(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run)
    training.epoch(monitor)
    run.finish() if ending == "run.finish()" else wandb.teardown()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "gwa_logging"):
        report = training.epoch(monitor)
        monitor.close()
    assert time.monotonic() - begin < 5.0
    assert report.count == BATCHES * BATCH
    assert monitor.faults["backend wandb"] >= 1
    if ending == "run.finish()":
        assert "finished before monitor.close()" in caplog.text


@pytest.mark.parametrize("wrong", [7, object(), wandb.Run])
def test_a_run_of_a_wrong_type_is_named(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"run=.*expected a wandb\.Run"):
        Training().watch(tmp_path, run=wrong)


def test_two_heads_never_write_to_the_same_run_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, records = start_run(tmp_path), read_journal(_journal(tmp_path))[0]
    owner, guest = (WandbBackend(run, name, owned=name == "gwa") for name in ("gwa", "gwa/other"))
    (interval, *_) = (record for record in records if isinstance(record, IntervalRecord))
    inside, go_on, log = Event(), Event(), run.log

    def slow(*arguments: Any, **options: Any) -> None:
        inside.set()
        go_on.wait(10)
        log(*arguments, **options)

    monkeypatch.setattr(run, "log", slow)
    threads = [Thread(target=backend.write, args=(interval,)) for backend in (owner, guest)]
    threads[0].start()
    assert inside.wait(10)
    inside.clear()
    threads[1].start()
    assert not inside.wait(0.2)  # the second waits for the first
    go_on.set()
    assert inside.wait(10)
    for thread in threads:
        thread.join(10)
    run.finish()


def _journal(folder: Path) -> Path:
    training = Training()
    with training.watch(folder, backend="local") as monitor:
        training.step(0)
    return monitor.journal


def test_a_run_id_resumes_the_run_and_close_finishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OnWandb().set_up(tmp_path, monkeypatch)
    first = start_run(tmp_path, project="digits")
    first.log({"user/loss": 1.0})
    first.finish()
    for wanted in (first.id, f"digits/{first.id}"):
        monitor = Training().watch(tmp_path, run=wanted, backend="wandb")
        again = run_of(monitor, "wandb")
        monitor.close()
        assert (again.id, again.project) == (first.id, "digits")
        assert again._is_finished
    wandb.teardown()


@pytest.mark.parametrize(("wanted", "said"), [("nowhere1", "is not in"), ("a/b/c/d", "expected a run id")])
def test_an_unknown_run_id_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, said: str
) -> None:
    OnWandb().set_up(tmp_path, monkeypatch)
    with pytest.raises(GwaError, match=f"run='{wanted}'.*{said}"):
        Training().watch(tmp_path, run=wanted, backend="wandb")
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def test_a_finished_run_is_refused_at_once(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    run.finish()
    with pytest.raises(InvalidInputError, match=r"run=.*finished"):
        Training().watch(tmp_path, run=run)


def test_a_dead_active_run_is_an_error_at_the_start(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    wandb.teardown()
    with pytest.raises(GwaError, match="there is no run to log to"):
        Training().watch(tmp_path, run=run)


def test_a_disabled_run_accepts_everything(tmp_path: Path) -> None:
    run, training = start_run(tmp_path, mode="disabled"), Training(lr=0.0)
    monitor = training.watch(tmp_path, run=run, early_stop=EarlyStop(patience=1, warmup=0, drop=0))
    for _ in range(3):
        training.epoch(monitor)
    monitor.close()
    assert monitor.alert is not None
    assert monitor.faults == {}
    assert open_backend(RunContext(name="gwa", run=run, directory=tmp_path)).run_ref.url is None


# --- shared mode, which needs a server --------------------------------------------------------------------------------


PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
BUCKET = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": PROJECT}
ANSWER = {
    "viewer": {"id": "v", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}


class Server(BaseHTTPRequestHandler):
    """A stand-in for a W&B server that can start a run: it gives the same response to every request.

    Attributes:
        uploads: the status of its responses to uploads of rows.
    """

    protocol_version = "HTTP/1.1"
    uploads = 200

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"data": ANSWER, "limits": {}}).encode()
        self.send_response(self.uploads if self.path.endswith("/file_stream") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""


@contextmanager
def serving() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_in_shared_mode_every_record_is_a_row_and_the_run_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run, training = start_run(tmp_path, mode="shared", id=BUCKET["name"]), Training()
        with pytest.raises(Exception, match="shared mode"):
            _ = run.step  # the reason why this mode is a special case
        monitor = training.watch(tmp_path, run=run)
        for _ in range(2):
            training.epoch(monitor)
        monitor.close()
        run.log({"still": "open"})
        run.finish()
        disk = read_back(folder_of(run))
    records, _ = read_journal(monitor.journal)
    rows = [record for record in records if isinstance(record, IntervalRecord | EpochReport)]
    assert len(disk.history) == len(rows) + 2  # the last picture and the user's row
    assert samples_in(disk.history) == 2 * BATCHES * BATCH
    assert disk.column("gwa/epoch") == [0, 1]
    assert disk.column("still") == ["open"]
    assert monitor.faults == {}


# --- a server that does not respond, or refuses -----------------------------------------------------------------------


def test_if_wandb_stops_uploading_a_fault_is_recorded_during_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CHECK_EVERY", 0.05)
    with serving() as address:
        wandb.teardown()
        for key, value in {"BASE_URL": address, "API_KEY": "0" * 40, "MODE": "online", "DIR": str(tmp_path)}.items():
            monkeypatch.setenv(f"WANDB_{key}", value)
        quick = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_file_stream_transmit_interval=0.1)
        run = wandb.init(reinit="create_new", id=BUCKET["name"], settings=quick)
        training = Training()
        monitor = training.watch(tmp_path, run=run)
        training.epoch(monitor)
        assert monitor.flush(30)
        assert monitor.faults == {}
        monkeypatch.setattr(Server, "uploads", 401)
        deadline = time.monotonic() + 30
        while not monitor.faults:
            training.step(0)
            run.log({"user/loss": 0.5})
            assert time.monotonic() < deadline
        assert monitor.faults == {"backend wandb": 1}
        assert not monitor.flush(5)
        assert "401" in monitor._deliveries[0].refusal()
        monitor.close()
        run.finish()
    wandb.teardown()


@pytest.mark.parametrize("answering", ["no server listens", "it hangs"])
def test_a_server_that_does_not_respond_is_an_error_within_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answering: str
) -> None:
    monkeypatch.setattr(_reachable, "CONNECT_WITHIN", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answering == "it hangs":
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        wandb.teardown()
        for key, value in {"BASE_URL": address, "API_KEY": "0" * 40, "MODE": "online", "DIR": str(tmp_path)}.items():
            monkeypatch.setenv(f"WANDB_{key}", value)
        begin = time.monotonic()
        with pytest.raises(BackendError, match=f"backend='wandb': nothing answers at {address}.*WANDB_MODE=offline"):
            Training().watch(tmp_path)
        assert time.monotonic() - begin < 10
        wandb.teardown()


# --- names and axes ---------------------------------------------------------------------------------------------------

HISTOGRAM = ("scores", "scores._type", "scores.bins", "scores.values")
PICTURE = ("picture", *(f"picture.{key}" for key in ("_type", "format", "height", "path", "sha256", "size", "width")))
AXES = {
    "step": (*HISTOGRAM, *STEP_KEYS, *QUANTILE_KEYS, "covers"),
    "epoch": (*EPOCH_KEYS, *OPTIONAL_KEYS),
}


@pytest.mark.parametrize("prefix", ["other", "run.2"])
def test_another_name_becomes_the_prefix_of_every_key_and_axis(tmp_path: Path, prefix: str) -> None:
    run, training = start_run(tmp_path), Training()
    monitor = training.watch(tmp_path, run=run, name=prefix)
    training.epoch(monitor)
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    assert all(key.startswith((f"{prefix}/", "_")) for row in disk.history for key in row)
    assert samples_in(disk.history, prefix) == BATCHES * BATCH
    axis_of = {f"{prefix}/{key}": f"{prefix}/{axis}" for axis, keys in AXES.items() for key in keys}
    axis_of |= {f"{prefix}/{key}": "_step" for key in PICTURE}
    assert {name: m["step_metric"] for name, m in disk.metrics.items() if m["step_metric"]} == axis_of
    assert set(disk.metrics) == {*axis_of, f"{prefix}/step", f"{prefix}/epoch"}
    assert {key for row in disk.history for key in row if not key.startswith("_")} == set(disk.metrics) - {
        f"{prefix}/scores",
        f"{prefix}/picture",
        f"{prefix}/consensus",  # there was no look
        f"{prefix}/agreement",  # the stop alert watches something else
    }


@pytest.mark.parametrize("moment", ["before watch()", "after watch()"])
def test_a_pattern_that_the_user_defines_does_not_change_the_axes(tmp_path: Path, moment: str) -> None:
    run, training = start_run(tmp_path), Training()
    if moment == "before watch()":
        run.define_metric("*", step_metric="user/axis")
    monitor = training.watch(tmp_path, run=run)
    if moment == "after watch()":
        run.define_metric("*", step_metric="user/axis")
    run.log({"user/axis": 41.0})
    training.epoch(monitor)
    run.log({}, commit=True)
    run.log({"user/loss": 0.5})
    monitor.close()
    run.finish()
    disk = read_back(folder_of(run))
    # W&B adds the axis of a key to the key's row: the keys got their own axes, and not the user's.
    (ours,) = (row for row in disk.history if "gwa/gwa" in row)
    assert "user/axis" not in ours
    assert {"gwa/step", "gwa/epoch", "gwa/scores.values"} <= set(ours)
    assert disk.column("user/loss", "user/axis") == [(0.5, 41.0)]
