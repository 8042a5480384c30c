"""MLflow: real runs in a real database and on a real server, read back with MLflow's own client."""

import logging
import math
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torch import nn

import gwa_logging
from gwa_logging import BackendError, EarlyStop, InvalidInputError, Monitor
from gwa_logging.histogram import Histogram
from gwa_logging.integrations import heatmap_picture
from gwa_logging.integrations.heatmap_picture import FIRST_COLUMNS, PICTURES, SIZE, PictureSeries
from gwa_logging.integrations.mlflow import open_backend
from gwa_logging.journal import read_journal
from gwa_logging.protocols import RunContext
from gwa_logging.records import (
    EPOCH_KEYS,
    QUANTILE_KEYS,
    RECORDS,
    STEP_KEYS,
    AnyRecord,
    CloseRecord,
    IntervalRecord,
    RunRecord,
)
from gwa_logging.report.page import _packed_plotly
from tests.records import epoch_report, interval_record, stop_alert
from tests.trackers import Server, empty_database, new_database, point_mlflow_to, series

EPOCHS, BATCHES, EVERY = 3, 7, 3
INTERVAL_STEPS = [0, 3, 6, 9, 12, 13, 15, 18, 20]  # every third, and the last one of an epoch
EPOCH_ENDS = [6, 13, 20]
INTERVAL_KEYS = (*STEP_KEYS, *QUANTILE_KEYS)
ALERT_AT_ONCE = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)  # no epoch can exceed the first one by this much


# --- databases, servers, trainings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _no_minimum_time_between_pictures() -> Iterator[None]:
    """Removes the minimum time between pictures, so that a short run has one for each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heatmap_picture, "PAUSE", 0.0)
        patch.setattr("gwa_logging.integrations.mlflow.YIELD", 0.0)
        yield


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    yield new_database(tmp_path, monkeypatch)
    while mlflow.active_run():
        mlflow.end_run()


def runs_of(client: MlflowClient) -> list[Run]:
    return list(client.search_runs([client.get_experiment_by_name("gwa").experiment_id]))


def new_run(client: MlflowClient) -> str:
    return str(client.create_run(client.get_experiment_by_name("gwa").experiment_id).info.run_id)


def watch(directory: Path, **options: Any) -> tuple[nn.Module, Monitor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, gwa_logging.watch(
        model, backend="mlflow", log_every_n_steps=EVERY, directory=directory / "gwa_runs", **options
    )


def train(model: nn.Module, monitor: Monitor, epochs: int = EPOCHS, each_epoch: Callable[[int], Any] = int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(BATCHES, 16, 8)
    labels = x[..., :4].argmax(-1)
    for epoch in range(len(monitor.history), len(monitor.history) + epochs):
        for i in range(BATCHES):
            nn.functional.cross_entropy(model(x[i]), labels[i]).backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.end_epoch()
        each_epoch(epoch)


def picture_steps(client: MlflowClient, run_id: str, key: str = "gwa~picture") -> list[int]:
    """The steps of a picture's slider, read from the file names as MLflow's page does."""
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    found = [re.match(rf"{re.escape(key)}\+step\+(\d+)\+timestamp\+\d+\+[-0-9a-f]+\.png", name) for name in names]
    return sorted({int(match[1]) for match in found if match})


# --- one training in the user's active run ----------------------------------------------------------------------------


class Trained(NamedTuple):
    """A finished training and its run."""

    client: MlflowClient
    run_id: str
    monitor: Monitor
    journal: list[AnyRecord]
    active_after_close: str | None
    status_after_close: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        client = new_database(folder, monkeypatch)
        with mlflow.start_run(description="my own words") as run:
            model, monitor = watch(folder, early_stop=ALERT_AT_ONCE)
            train(model, monitor, each_epoch=lambda epoch: mlflow.log_metric("loss", 1.0 / (1 + epoch), step=epoch))
            monitor.close()
            assert monitor.faults == {}
            active, status = mlflow.active_run(), client.get_run(run.info.run_id).info.status
        journal, _ = read_journal(monitor.journal)
        yield Trained(client, run.info.run_id, monitor, journal, active and active.info.run_id, status)


@pytest.mark.parametrize(
    ("key", "attribute"),
    EPOCH_KEYS.items(),
)
def test_every_epoch_has_its_numbers_at_its_own_step(trained: Trained, key: str, attribute: str) -> None:
    expected = {report.epoch: float(getattr(report, attribute)) for report in trained.monitor.history}
    assert len(expected) == EPOCHS
    assert series(trained.client, trained.run_id, f"gwa/{key}") == expected


@pytest.mark.parametrize("key", INTERVAL_KEYS)
def test_every_interval_has_its_quantiles_at_its_training_step(trained: Trained, key: str) -> None:
    intervals = [record for record in trained.journal if isinstance(record, IntervalRecord)]
    expected = {
        r.step: r.quantiles[QUANTILE_KEYS[key]] if key in QUANTILE_KEYS else getattr(r, STEP_KEYS[key])
        for r in intervals
    }
    assert list(expected) == INTERVAL_STEPS
    assert series(trained.client, trained.run_id, f"gwa/{key}") == expected


def test_a_short_run_has_pictures_at_step_0_after_its_epochs_and_in_between(trained: Trained) -> None:
    assert picture_steps(trained.client, trained.run_id) == [0, 3, 6, 9, 13, 15, 18, 20]


def test_the_newest_picture_is_a_file_of_a_fixed_name(trained: Trained, tmp_path: Path) -> None:
    path = trained.client.download_artifacts(trained.run_id, "gwa/scores.png", str(tmp_path))
    colours = [heatmap_picture._BEST, heatmap_picture._ALERT]
    with Image.open(path) as picture:
        found = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert found >= set(colours)  # the best epoch and the alert are marked


def test_the_slider_opens_at_the_newest_picture(trained: Trained, tmp_path: Path) -> None:
    """MLflow's page opens at step 0, and of several pictures of one step it shows the last one by file name."""
    names = [f.path for f in trained.client.list_artifacts(trained.run_id, "images") if "+step+0+" in f.path]
    (shown, newest) = (
        Path(trained.client.download_artifacts(trained.run_id, path, str(tmp_path)))
        for path in (max(name for name in names if name.endswith(".png")), "gwa/scores.png")
    )
    assert len(names) > 2
    with Image.open(shown) as first, Image.open(newest) as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_picture_can_be_downloaded_and_shows_something(trained: Trained, tmp_path: Path) -> None:
    paths = [f.path for f in trained.client.list_artifacts(trained.run_id, "images") if "+step+20+" in f.path]
    (path,) = (path for path in paths if path.endswith(".png"))
    with Image.open(trained.client.download_artifacts(trained.run_id, path, str(tmp_path))) as picture:
        assert picture.size == SIZE
        assert len(picture.getcolors(1 << 20) or []) > 20


def test_the_journal_and_the_report_are_in_the_run(trained: Trained, tmp_path: Path) -> None:
    files = {f.path: f.file_size for f in trained.client.list_artifacts(trained.run_id, "gwa")}
    assert files["gwa/report.html"] > 10_000
    copy = Path(trained.client.download_artifacts(trained.run_id, "gwa/journal.jsonl", str(tmp_path)))
    assert copy.read_bytes() == trained.monitor.journal.read_bytes()


def test_the_users_run_stays_active_and_keeps_the_users_metrics(trained: Trained) -> None:
    run = trained.client.get_run(trained.run_id)
    assert trained.active_after_close == trained.run_id
    assert trained.status_after_close == "RUNNING"
    assert run.data.tags["mlflow.note.content"] == "my own words"
    assert series(trained.client, trained.run_id, "loss") == {0: 1.0, 1: 0.5, 2: 1 / 3}


def test_runs_with_an_alert_can_be_searched_for(trained: Trained) -> None:
    alert = trained.monitor.alert
    assert alert is not None
    experiment = trained.client.get_run(trained.run_id).info.experiment_id
    found = trained.client.search_runs([experiment], "tags.`gwa.alert` LIKE 'stop%' AND tags.`gwa.alert.epoch` = '1'")
    assert [run.info.run_id for run in found] == [trained.run_id]
    tags = found[0].data.tags
    assert tags["gwa.alert"] == f"stop: {alert.text}"
    assert tags["gwa.alert.best_epoch"] == str(alert.best_epoch) == "0"


def test_the_run_shows_the_head_and_the_best_epoch(trained: Trained) -> None:
    run = trained.client.get_run(trained.run_id)
    assert "'2' (Linear 16 -> 4)" in run.data.tags["gwa.head"]
    assert run.data.tags["gwa.best_epoch"] == "0"
    assert float(run.data.tags["gwa.best_value"]) == pytest.approx(trained.monitor.history[0].separation, rel=1e-5)
    assert not {"gwa/best_epoch", "gwa/best_value", "gwa/stop_epoch"} & run.data.metrics.keys()


# --- which run --------------------------------------------------------------------------------------------------------


def test_a_run_that_watch_starts_is_never_the_active_run(client: MlflowClient, tmp_path: Path) -> None:
    model, monitor = watch(tmp_path)
    assert mlflow.active_run() is None
    (own,) = runs_of(client)
    assert own.info.status == "RUNNING"
    with mlflow.start_run() as users:  # would raise if the other run were active in this thread
        train(model, monitor, epochs=1)
        monitor.close()
        assert mlflow.active_run().info.run_id == users.info.run_id
    assert mlflow.active_run() is None
    own = client.get_run(own.info.run_id)
    assert (own.info.status, own.info.end_time >= own.info.start_time) == ("FINISHED", True)
    assert "mlflow.source.name" in own.data.tags
    assert set(own.data.metrics) >= {"gwa/gwa", "gwa/steps/q50"}
    assert not client.get_run(users.info.run_id).data.metrics


@pytest.mark.slow
def test_the_run_of_an_unclosed_monitor_is_finished_when_the_process_ends(client: MlflowClient, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, torch, gwa_logging\n"
        "model = torch.nn.Linear(4, 3)\n"
        "monitor = gwa_logging.watch(model, backend='mlflow', directory=sys.argv[1])\n"
        "torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED", done.stderr
    assert run.data.metrics["gwa/stats/count"] == 8
    files = [f.path for f in client.list_artifacts(run.info.run_id, "gwa")]
    assert files == ["gwa/journal.jsonl", "gwa/report.html"]  # and no picture of a single interval


def test_a_run_is_ended_on_its_own_server_even_if_the_user_has_changed_the_tracking_uri(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, monitor = watch(tmp_path)
    (own,) = runs_of(client)
    shutil.copy(empty_database(), tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    train(model, monitor, epochs=1)
    monitor.close()
    assert monitor.faults == {}
    assert client.get_run(own.info.run_id).info.status == "FINISHED"
    assert list(series(client, own.info.run_id, "gwa/gwa")) == [0]


@pytest.mark.parametrize("as_id", [True, False])
def test_a_run_can_be_named_from_a_thread_in_which_it_is_not_active(
    client: MlflowClient, tmp_path: Path, as_id: bool
) -> None:
    with mlflow.start_run() as run:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                model, monitor = watch(tmp_path, run=run.info.run_id if as_id else run)
                train(model, monitor, epochs=1)
                monitor.close()
            except BaseException as error:  # noqa: BLE001 - shown below
                failed.append(error)

        thread = Thread(target=work)
        thread.start()
        thread.join()
        assert failed == []
        assert list(series(client, run.info.run_id, "gwa/gwa")) == [0]
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_if_watch_fails_its_run_is_marked_as_failed(client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"backend='tensorboard'.*cannot be written"):
        gwa_logging.watch(
            nn.Linear(4, 3),
            backend=["mlflow", "tensorboard"],
            run={"tensorboard": tmp_path / "file"},
            directory=tmp_path / "gwa",
        )
    (own,) = runs_of(client)
    assert own.info.status == "FAILED"
    assert client.list_artifacts(own.info.run_id) == []


def test_watch_with_an_unknown_backend_starts_no_run(client: MlflowClient) -> None:
    with pytest.raises(InvalidInputError, match="unknown backend 'nonsense'"):
        gwa_logging.watch(nn.Linear(4, 3), backend=["mlflow", "nonsense"])
    assert runs_of(client) == []


def test_the_run_of_a_launcher_is_used_and_not_ended(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = new_run(client)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    model, monitor = watch(tmp_path)
    train(model, monitor, epochs=1)
    monitor.close()
    assert list(series(client, run_id, "gwa/gwa")) == [0]
    with mlflow.start_run() as run:
        assert run.info.run_id == run_id


def test_an_unknown_run_is_named_together_with_the_server(client: MlflowClient, tmp_path: Path) -> None:
    unknown = "0123456789abcdef0123456789abcdef"
    with pytest.raises(BackendError, match=rf"run='{unknown}'.*{re.escape(client.tracking_uri)}"):
        watch(tmp_path, run=unknown)


def test_with_mlflow_skinny_the_error_about_a_database_begins_with_the_remedy(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gwa_logging.integrations.mlflow._is_full_mlflow", lambda: False)
    with pytest.raises(BackendError, match=r"^pip install mlflow, or name a server.*sqlite:"):
        watch(tmp_path, run="0123456789abcdef0123456789abcdef")


def test_a_deleted_run_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    run_id = new_run(client)
    client.delete_run(run_id)
    with pytest.raises(BackendError, match="deleted"):
        watch(tmp_path, run=run_id)


def test_a_run_of_a_wrong_type_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"run=17: expected an MLflow run.*found builtins\.int"):
        watch(tmp_path, run=17)


@pytest.mark.parametrize("user", ["someone:hidden", "some@one:hid@den", "someone:hid/den"])
def test_an_unreachable_server_is_an_error_within_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        point_mlflow_to(f"http://{user}@{address}", monkeypatch)
        started = time.monotonic()
        with pytest.raises(BackendError, match="nothing answers") as error:
            watch(tmp_path)
        assert time.monotonic() - started < 5
    assert f"http://***@{address}" in str(error.value)
    assert "MLFLOW_TRACKING_URI" in str(error.value)
    shown = "".join(traceback.format_exception(error.value))
    assert not re.search("some|one:|hid|den", shown.partition("BackendError")[2])


# --- single records ---------------------------------------------------------------------------------------------------


def interval(step: int, epoch: int = 0, steps: int = 1, seed: int = 0) -> IntervalRecord:
    scores = np.random.default_rng(seed).normal(0.1, 0.1, 200).clip(-1, 1)
    return interval_record(step, scores, epoch=epoch, steps=steps)


def context(client: MlflowClient, directory: Path, name: str = "gwa") -> RunContext:
    return RunContext(name=name, run=new_run(client), directory=directory)


@pytest.mark.parametrize("infinite", [math.inf, -math.inf, math.nan])
def test_an_infinite_gwa_arrives_as_nan(client: MlflowClient, tmp_path: Path, infinite: float) -> None:
    where = context(client, tmp_path)
    open_backend(where).write(epoch_report(gwa=infinite, mean=0.1))
    assert math.isnan(series(client, where.run, "gwa/gwa")[0])
    assert series(client, where.run, "gwa/stats/mean") == {0: 0.1}


def test_writing_a_record_again_changes_nothing(client: MlflowClient, tmp_path: Path) -> None:
    records: list[AnyRecord] = [
        RunRecord(name="gwa", head="the head", created="", settings={}),
        interval(0),
        interval(9, steps=9),
        epoch_report(gwa=math.nan),
        stop_alert(epoch=0, best_epoch=0, message="no improvement"),
        CloseRecord(epochs=1, steps=10, best_epoch=0, best_value=0.5, faults={}),
    ]
    where = context(client, tmp_path)
    backend = open_backend(where)
    for record in records:
        backend.write(record)
        time.sleep(0.002)  # MLflow distinguishes metrics by the millisecond
        backend.write(RECORDS.validate_json(record.model_dump_json()))  # as read from the journal
    data = client.get_run(where.run).data
    assert len(data.metrics) == 16
    for key in data.metrics:
        assert list(series(client, where.run, key)) == ([0, 9] if key[4:] in INTERVAL_KEYS else [0])
    assert {k: v for k, v in data.tags.items() if k.startswith("gwa.")} == {
        "gwa.head": "the head",
        "gwa.alert": "stop: no improvement",
        "gwa.alert.epoch": "0",
        "gwa.alert.best_epoch": "0",
        "gwa.best_epoch": "0",
        "gwa.best_value": "0.5",
        "gwa.epochs": "1",
    }
    assert picture_steps(client, where.run) == [0, 9]


def test_an_interval_without_a_score_writes_nothing(client: MlflowClient, tmp_path: Path) -> None:
    where = context(client, tmp_path)
    nothing = {"count": 0, "mean": math.nan, "minimum": math.nan, "maximum": math.nan, "histogram": Histogram()}
    open_backend(where).write(interval(0).model_copy(update=nothing))
    assert client.get_run(where.run).data.metrics == {}
    assert picture_steps(client, where.run) == []


def test_contents_reads_more_intervals_than_fit_on_a_page_of_mlflow(client: MlflowClient, tmp_path: Path) -> None:
    backend = open_backend(context(client, tmp_path))
    steps = [step for step in range(26_000) if step != 25_007]
    rows = [("gwa/steps/mean", 0.5, step, step, backend.run, 0) for step in steps]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        columns = "key, value, timestamp, step, run_uuid, is_nan"
        database.executemany(f"INSERT INTO metrics ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)
    held = backend.contents()
    assert [step for step in range(26_002) if step not in held.intervals] == [25_007, 26_000, 26_001]
    backend.close()


def test_every_key_and_tag_has_the_prefix_that_the_user_chose(client: MlflowClient, tmp_path: Path) -> None:
    where = context(client, tmp_path, name="student-1.b")
    backend = open_backend(where)
    backend.write(RunRecord(name="student-1.b", head="h", created="", settings={}))
    backend.write(interval(0))
    backend.write(interval(1))
    backend.write(CloseRecord(epochs=0, steps=2, best_epoch=None, best_value=math.nan, faults={}))
    data = client.get_run(where.run).data
    assert {key.partition("/")[0] for key in data.metrics} == {"student-1.b"}
    assert data.tags["student-1.b.head"] == "h"
    assert picture_steps(client, where.run, "student-1.b~picture") == [0, 1]


def test_metrics_are_logged_even_if_no_files_can_be_stored(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    experiment = client.create_experiment("no files", artifact_location=(tmp_path / "a file" / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    backend = open_backend(RunContext(name="gwa", run=run_id, directory=tmp_path))
    for epoch in range(6):
        backend.write(interval(epoch, epoch))
        backend.write(epoch_report(epoch, step=epoch))
    assert list(series(client, run_id, "gwa/steps/q50")) == list(series(client, run_id, "gwa/gwa")) == list(range(6))
    warnings = [record.message for record in caplog.records if "picture" in record.message]
    assert len(warnings) == 3
    assert "NotADirectoryError" in warnings[0]
    assert "no more will be tried" in warnings[-1]


class NoPlotly:
    """An import hook that behaves as if plotly were not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "plotly":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.report
def test_without_plotly_only_the_journal_is_uploaded_and_a_message_says_so(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [NoPlotly(), *sys.meta_path])
    _packed_plotly.cache_clear()
    model, monitor = watch(tmp_path)
    (own,) = runs_of(client)
    train(model, monitor, epochs=1)
    with caplog.at_level(logging.INFO, "gwa_logging"):
        monitor.close()
    assert monitor.faults == {}
    assert [f.path for f in client.list_artifacts(own.info.run_id, "gwa")] == ["gwa/journal.jsonl", "gwa/scores.png"]
    assert any("plotly is not installed" in record.message for record in caplog.records)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_long_epoch_has_its_first_picture_after_20_intervals_and_then_few() -> None:
    pictures = PictureSeries()
    due = []
    for step in range(200):
        if pictures.add(interval(step)):
            due.append(step)
            pictures.draw()
    assert due == [FIRST_COLUMNS - 1, 29, 44, 67, 101, 152]
    assert pictures.has_news


@pytest.mark.parametrize("intervals", [2, 3, 20, 160])
def test_a_finished_run_has_about_ten_pictures_at_equal_distances(intervals: int) -> None:
    pictures = PictureSeries()
    for step in range(intervals):
        if pictures.add(interval(step)):
            pictures.draw()
    missing = pictures.missing_steps()
    steps = sorted({*pictures._drawn_steps, *missing})
    for step in missing:
        pictures.draw(step)
    assert steps[-1] == intervals - 1
    assert 0 not in steps
    assert min(PICTURES, intervals) - 1 <= len(steps) <= 1.5 * PICTURES
    assert max(np.diff([0, *steps])) <= max(2, 1.6 * intervals / PICTURES)
    assert pictures.missing_steps() == []


def test_an_earlier_picture_shows_only_what_was_known_then() -> None:
    pictures = PictureSeries()
    for step in range(40):
        pictures.add(interval(step, epoch=step // 10))
        if step % 10 == 9:
            pictures.add_epoch(epoch_report(step // 10, step=step, is_best=step in (9, 29)))
    pictures.add_alert(stop_alert(epoch=3))

    def has(image: Image.Image, colour: tuple[int, int, int]) -> bool:
        return colour in {found for _, found in image.getcolors(1 << 20) or []}

    late, early, before = pictures.draw(), pictures.draw(19), pictures.draw(5)
    marks = [(has(p, heatmap_picture._BEST), has(p, heatmap_picture._ALERT)) for p in (late, early, before)]
    assert marks == [(True, True), (True, False), (False, False)]


def test_the_last_picture_is_drawn_again_if_it_lacks_the_alert() -> None:
    pictures = PictureSeries()
    for step in range(PICTURES):
        pictures.add(interval(step))
    pictures.add_epoch(epoch_report(0, step=PICTURES - 1))
    for step in pictures.missing_steps():
        pictures.draw(step)
    assert pictures.missing_steps() == []
    pictures.add_alert(stop_alert(epoch=0))
    assert pictures.missing_steps() == [PICTURES - 1]
    pictures.draw()
    assert pictures.missing_steps() == []


def test_steps_that_the_tracker_already_has_are_white_in_the_picture() -> None:
    pictures = PictureSeries()
    for step in (19, 29, 79, 9, 89):  # the fourth one is late
        pictures.add(interval(step, steps=10))
    heatmap = pictures._timeline.heatmap()
    assert heatmap.steps.tolist() == [10, 20, 30, 70, 80, 90]
    assert heatmap.shares.sum(axis=0) == pytest.approx([1, 1, 0, 1, 1])


def test_there_is_a_minimum_time_between_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap_picture, "PAUSE", 3600.0)
    pictures = PictureSeries()
    assert [pictures.add(interval(step)) for step in range(FIRST_COLUMNS)][-1]
    pictures.draw()
    assert not any(pictures.add(interval(step)) for step in range(FIRST_COLUMNS, 60))
    assert not pictures.rested


def test_close_adds_the_last_picture_even_in_a_short_run(client, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(heatmap_picture, "PAUSE", 3600.0)
    model, monitor = watch(tmp_path)
    train(model, monitor)
    monitor.close()
    (run,) = runs_of(client)
    steps = picture_steps(client, run.info.run_id)
    assert (steps[0], len(steps) >= 7, steps[-1]) == (0, True, EPOCHS * BATCHES - 1)


def test_drawing_the_picture_of_a_long_run_takes_a_few_milliseconds() -> None:
    pictures = PictureSeries()
    for step in range(heatmap_picture.COLUMNS - 1):
        pictures.add(interval(step, epoch=step, seed=step))

    def seconds() -> float:
        begin = time.thread_time()  # without the time of other processes
        pictures.draw()
        return time.thread_time() - begin

    assert min(seconds() for _ in range(5)) < 0.03  # matplotlib: 0.1 s


def test_a_picture_is_drawn_without_matplotlib() -> None:
    code = (
        "import sys\n"
        "from gwa_logging.integrations.heatmap_picture import SIZE, PictureSeries\n"
        "from gwa_logging.records import IntervalRecord\n"
        "pictures = PictureSeries()\n"
        "pictures.add(IntervalRecord.model_validate_json(sys.stdin.read()))\n"
        "assert pictures.draw().size == SIZE\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    record = interval(0).model_dump_json()
    subprocess.run([sys.executable, "-c", code], input=record, text=True, check=True)


def test_a_picture_shows_the_medians_and_zero_where_they_are() -> None:
    pictures = PictureSeries()
    for step in range(50):
        pictures.add(interval(step, seed=step))  # normal(0.1, 0.1), shown from -0.5 to 0.5
    inside = np.s_[heatmap_picture._TOP : heatmap_picture._BOTTOM, heatmap_picture._LEFT : heatmap_picture._RIGHT]
    pixels = np.asarray(pictures.draw()).astype(int)[inside]
    is_median = (pixels == heatmap_picture._MEDIAN).all(axis=-1)
    assert is_median.any(axis=0).all()
    middle = np.nonzero(is_median)[0].mean() / len(pixels)
    assert 0.5 - middle == pytest.approx(0.1, abs=0.01)
    zero = pixels[len(pixels) // 2]
    assert {tuple(pixel) for pixel in zero.tolist()} == {heatmap_picture._INK, heatmap_picture._WHITE}


def test_a_picture_has_white_where_there_are_no_scores_and_colour_where_there_are() -> None:
    pictures = PictureSeries()
    pictures.add(interval(0))  # normal(0.1, 0.1), shown from -0.5 to 0.5
    pixels = np.asarray(pictures.draw()).astype(int)
    column = pixels[heatmap_picture._TOP : heatmap_picture._BOTTOM, 300]
    white = (column == 255).all(axis=-1)
    height = len(white)
    assert white[: height // 10].all()
    assert white[-height // 5 :].all()
    assert not white[int(0.3 * height) : int(0.4 * height)].all()


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.mark.slow
def test_a_server_stores_nan_and_the_url_is_the_page_of_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = point_mlflow_to(f"http://someone:hidden@{server.address}", monkeypatch)
    experiment = client.create_experiment("single records")
    where = RunContext("gwa", client.create_run(experiment).info.run_id, tmp_path)
    backend = open_backend(where)
    backend.write(epoch_report(gwa=-math.inf))
    assert math.isnan(series(client, where.run, "gwa/gwa")[0])
    assert backend.run_ref.url == f"http://***@{server.address}/#/experiments/{experiment}/runs/{where.run}"


@pytest.mark.slow
@pytest.mark.report
def test_a_server_that_was_down_receives_everything_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # otherwise MLflow retries for minutes
    client = point_mlflow_to(f"http://someone:hidden@{server.address}", monkeypatch, "outage")
    experiment = client.create_experiment("outage")
    model, monitor = watch(tmp_path, early_stop=ALERT_AT_ONCE)
    (run,) = client.search_runs([experiment])
    train(model, monitor, epochs=1)
    assert monitor.flush(30)

    server.stop()
    train(model, monitor, epochs=1)
    assert not monitor.flush(2)
    server.start()
    train(model, monitor, epochs=1)
    assert monitor.flush(30)
    monitor.close()

    assert list(monitor.faults) == ["backend mlflow"]
    assert "hidden" not in caplog.text
    run_id = run.info.run_id
    assert series(client, run_id, "gwa/gwa") == {r.epoch: r.gwa for r in monitor.history}
    assert list(series(client, run_id, "gwa/steps/q50")) == INTERVAL_STEPS
    assert set(picture_steps(client, run_id)) >= set(EPOCH_ENDS)
    assert [f.path for f in client.list_artifacts(run_id, "gwa")] == [
        "gwa/journal.jsonl",
        "gwa/report.html",
        "gwa/scores.png",
    ]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.tags["gwa.alert.epoch"] == "1"
