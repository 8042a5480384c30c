"""Trackio: real runs in its local store, read back from there."""

import math
import subprocess
import sys
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest
from PIL import Image

from tests.records import interval_record, stop_alert
from tests.trackers import BATCH, BATCHES, Training, rows_of, run_of, start_trackio_run, trackio

# isort: split
# After the imports above, which set Trackio's folder: Trackio reads it when it is imported.
from trackio.context_vars import current_run
from trackio.utils import MEDIA_DIR

from gwa_logging import AlignmentSummary, BackendError, EarlyStop, InvalidInputError
from gwa_logging.integrations import heatmap_picture
from gwa_logging.integrations.trackio import TrackioBackend, open_backend
from gwa_logging.protocols import RunContext, TrackerContents
from gwa_logging.records import CloseRecord, TrackerRunRef

ALERT = stop_alert()


@pytest.fixture(autouse=True)
def _no_active_run() -> Any:
    yield
    current_run.set(None)


def column(run: Any, key: str) -> list[tuple[int, Any]]:
    return [(row["step"], row[key]) for row in rows_of(run) if key in row]


# --- which run --------------------------------------------------------------------------------------------------------


def test_a_run_that_watch_starts_is_never_the_active_run(tmp_path: Path) -> None:
    training = Training()
    monitor = training.watch(tmp_path, backend="trackio", name="own.run")
    own = run_of(monitor, "trackio")
    assert current_run.get() is None
    users = trackio.init("the-user", auto_log_cpu=False)  # would end the active run
    training.epoch(monitor)
    trackio.log({"loss": 1.0})
    monitor.close()
    assert current_run.get() is users
    trackio.finish()
    assert (own.project, own._cpu_monitor, own._gpu_monitor) == ("own.run", None, None)
    assert [step for step, _ in column(own, "own.run/gwa")] == [0]
    assert column(users, "loss") == [(0, 1.0)]
    assert {key for row in rows_of(users) for key in row} == {"loss", "step", "timestamp"}


def test_only_a_run_that_watch_started_has_the_settings_and_the_head_in_its_config(tmp_path: Path) -> None:
    users = start_trackio_run("config")
    for run in (None, users):
        training = Training()
        monitor = training.watch(tmp_path, backend="trackio", run=run)
        training.epoch(monitor)
        monitor.close()
        assert ("gwa" in run_of(monitor, "trackio").config) == (run is None)
        if run is None:
            (stored,) = [r for r in trackio.Api().runs("gwa") if r.id == run_of(monitor, "trackio").id]
            assert stored.config["gwa"]["log_every_n_steps"] == 3
            assert "Linear 8 -> 3" in stored.config["gwa"]["head"]
    users.finish()


def test_the_active_run_is_used_and_not_finished(tmp_path: Path) -> None:
    users = trackio.init("active", auto_log_cpu=False)
    backend = open_backend(RunContext("gwa", None, tmp_path))
    assert backend.run is users
    backend.close()
    trackio.log({"still": "open"})
    trackio.finish()
    assert column(users, "still") == [(0, "open")]


def test_a_run_can_be_passed_to_a_thread_in_which_it_is_not_active(tmp_path: Path) -> None:
    users = trackio.init("threads", auto_log_cpu=False)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            assert current_run.get() is None
            training = Training()
            monitor = training.watch(tmp_path, backend="trackio", run=users)
            training.epoch(monitor)
            monitor.close()
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    trackio.finish()
    assert failed == []
    assert [step for step, _ in column(users, "gwa/gwa")] == [0]


@pytest.mark.parametrize("wrong", ["a run", 7, object(), trackio.Run])
def test_a_run_of_a_wrong_type_is_named(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(
        InvalidInputError, match=r"run=.*expected a Trackio run, as trackio\.init\(\) returns it, or 'project/run'"
    ):
        Training().watch(tmp_path, backend="trackio", run=wrong)


def test_an_unwritable_folder_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    program = (
        "import pathlib, gwa_logging\n"
        "from gwa_logging.registry import RunContext, open_backend\n"
        "try:\n"
        "    open_backend('trackio', RunContext('gwa', None, pathlib.Path('run')))\n"
        "except gwa_logging.BackendError as error:\n"
        "    print(error)\n"
    )
    environment = {"TRACKIO_DIR": str(tmp_path / "a file"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert "backend='trackio': there is no run to log to (FileExistsError" in done.stdout
    assert "Set TRACKIO_DIR" in done.stdout


@pytest.mark.parametrize(
    ("url", "page"),
    [("http://127.0.0.1:9", "http://127.0.0.1:9"), ("me/space", "https://huggingface.co/spaces/me/space")],
)
def test_a_run_on_a_server_has_a_page(url: str, page: str) -> None:
    run = start_trackio_run("pages")
    run.finish()
    run.url = url
    assert TrackioBackend(run, "gwa", owned=False).run_ref == TrackerRunRef(url=page)


def test_a_run_can_be_resumed_by_its_path_and_keeps_its_config(tmp_path: Path) -> None:
    users = trackio.init("taken-up", config={"lr": 0.1}, auto_log_cpu=False)
    first = open_backend(RunContext("gwa", users, tmp_path))
    first.write(AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report(epoch=3))
    first.write(ALERT)
    trackio.finish()
    assert first.contents() == TrackerContents(epochs={3: 3}, alerts={7})
    second = open_backend(RunContext("gwa", first.run_ref.run, tmp_path))
    assert second.contents() == TrackerContents(epochs={3: 3}, alerts={7})
    second.write(CloseRecord(epochs=8, steps=41, best_epoch=2, best_value=0.5, faults={}))
    second.close()
    assert second.contents() == TrackerContents(epochs={3: 3}, alerts={7}, closes={8})
    (stored,) = trackio.Api().runs("taken-up")
    assert (stored.id, stored.config["lr"]) == (users.id, 0.1)


def test_an_unknown_path_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"Run 'unknown' does not exist in project 'nowhere'"):
        open_backend(RunContext("gwa", "nowhere/unknown", tmp_path))


# --- the user's rows and steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
def test_the_users_steps_are_the_same_as_without_this_library(tmp_path: Path, explicit: bool) -> None:
    users, training = start_trackio_run("steps"), Training()
    monitor = training.watch(tmp_path, backend="trackio", run=users)
    for epoch in range(3):
        training.epoch(monitor)
        users.log({"loss": 0.5}, **{"step": 10 * epoch} if explicit else {})
    users.log({"test": 1.0})
    monitor.close()
    users.log({"test": 2.0})
    users.finish()
    assert [step for step, _ in column(users, "loss")] == ([0, 10, 20] if explicit else [0, 1, 2])
    assert [step for step, _ in column(users, "test")] == ([21, 22] if explicit else [3, 4])
    assert all(set(row) == {"loss", "step", "timestamp"} for row in rows_of(users) if "loss" in row)


def test_records_after_the_users_finish_are_stored(tmp_path: Path) -> None:
    users, training = start_trackio_run("finished"), Training()
    monitor = training.watch(tmp_path, backend="trackio", run=users)
    training.epoch(monitor)
    users.finish()
    training.epoch(monitor)
    monitor.close()
    assert [step for step, _ in column(users, "gwa/gwa")] == [0, 1]
    assert sum(sum(h["values"]) for _, h in column(users, "gwa/scores")) == 2 * BATCHES * BATCH


# --- alerts, and what cannot be shown ---------------------------------------------------------------------------------


def test_there_is_one_alert_with_the_whole_text(tmp_path: Path) -> None:
    users, training = start_trackio_run("alerts"), Training(lr=0.0)
    monitor = training.watch(tmp_path, backend="trackio", run=users, early_stop=EarlyStop(patience=1, warmup=0, drop=0))
    for _ in range(4):
        training.epoch(monitor)
    monitor.close()
    users.finish()
    (alert,) = trackio.Api().alerts("alerts", run=users.name)
    assert (alert["title"], alert["level"], alert["step"]) == ("GWA: stop", "warn", 1)
    assert alert["text"] == monitor.alert.text
    assert monitor.alert.caveats  # a training with so few samples always has caveats
    assert column(users, "gwa/best") == [(3, f"epoch 0: {monitor.history[0].separation:.6g}")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_stored_as_they_are(tmp_path: Path, value: float) -> None:
    users = start_trackio_run("numbers")
    report = AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report().model_copy(update={"gwa": value})
    TrackioBackend(users, "gwa", owned=False).write(report)
    users.finish()
    assert column(users, "gwa/gwa")[0][1] == pytest.approx(value, nan_ok=True)


def test_a_run_without_a_best_epoch_adds_no_row() -> None:
    users = start_trackio_run("nothing")
    backend = TrackioBackend(users, "gwa", owned=False)
    backend.write(CloseRecord(epochs=0, steps=0, best_epoch=None, best_value=math.nan, faults={}))
    users.finish()
    assert rows_of(users) == []


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures_of(run: Any) -> dict[int, Image.Image]:
    """The pictures of a run by step, as Trackio's page reads them."""
    found = column(run, "gwa/picture")
    assert {value["_type"] for _, value in found} <= {"trackio.image"}
    assert len({step for step, _ in found}) == len(found)
    return {step: Image.open(MEDIA_DIR / value["file_path"]) for step, value in found}


def test_a_run_has_pictures_of_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap_picture, "PAUSE", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    users, training = start_trackio_run("pictures"), Training(lr=0.0)
    monitor = training.watch(tmp_path, backend="trackio", run=users, early_stop=EarlyStop(patience=1, warmup=0, drop=0))
    for _ in range(4):
        training.epoch(monitor)
    monitor.close()
    users.finish()
    assert monitor.faults == {}
    pictures = pictures_of(users)
    assert len(pictures) >= 5
    assert max(pictures) == 4 * BATCHES - 1
    assert {picture.size for picture in pictures.values()} == {heatmap_picture.SIZE}
    newest = {colour[:3] for _, colour in pictures[max(pictures)].getcolors(1 << 20) or []}
    assert newest >= {heatmap_picture._BEST, heatmap_picture._ALERT, heatmap_picture._MEDIAN}
    assert not list(tmp_path.glob("*.png"))  # the temporary files are removed


def test_a_picture_is_not_drawn_on_the_thread_that_writes() -> None:
    users, threads = start_trackio_run("threads of pictures"), set()
    backend = TrackioBackend(users, "gwa", owned=False)
    real = backend._pictures.snapshot

    def snapshot(step: int | None = None) -> Any:
        draw = real(step)
        return lambda: threads.add(current_thread().name) or draw()

    backend._pictures.snapshot = snapshot
    for step in range(heatmap_picture.FIRST_COLUMNS):
        backend.write(interval_record(step))
    backend._drawing.wait(60)
    backend.write(interval_record(step + 1))  # logs the picture
    users.finish()
    assert threads == {"gwa_logging picture"}
    assert list(pictures_of(users)) == [step]


def test_a_picture_that_fails_costs_no_record_and_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heatmap_picture, "PAUSE", 0.0)
    monkeypatch.setattr(heatmap_picture, "draw", lambda *arguments: 1 / 0)
    users = start_trackio_run("no pictures")
    backend = TrackioBackend(users, "gwa", owned=False)
    for step in range(60):
        backend.write(interval_record(step))
        backend._drawing.wait(60)
    backend.write(CloseRecord(epochs=1, steps=60, best_epoch=None, best_value=math.nan, faults={}))
    users.finish()
    assert len(column(users, "gwa/steps/mean")) == 60
    assert [r.message for r in caplog.records if "picture" in r.message] == [
        "gwa_logging: backend trackio: no picture (ZeroDivisionError('division by zero')); no more will be tried"
    ]
