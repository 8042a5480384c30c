"""Real trackers: starts them, logs to them as a user would, and reads back what they contain."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import mlflow
import numpy as np
import pytest
import torch
import wandb
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import gwa_logging
from benchmarks.trackers import MlflowServer
from gwa_logging import Monitor
from gwa_logging.integrations._wandb_contents import offline_records, values_of
from gwa_logging.records import (
    EPOCH_KEYS,
    OPTIONAL_KEYS,
    QUANTILE_KEYS,
    STEP_KEYS,
    AnyRecord,
    EpochReport,
    IntervalRecord,
)

FOLDER = TemporaryDirectory(prefix="gwa_logging-tests-")
"""For what each test process creates once: an empty MLflow database, Trackio's folder."""

if "gwa_logging-tests-" not in os.environ.get(
    "TRACKIO_DIR", ""
):  # a process that a test starts uses the folder of the test
    os.environ |= {"TRACKIO_DIR": f"{FOLDER.name}/trackio", "HF_HUB_OFFLINE": "1"}  # read when Trackio is imported
import trackio  # noqa: E402
from trackio.sqlite_storage import SQLiteStorage  # noqa: E402

BATCHES, BATCH = 7, 8
INTERVAL_KEYS = (*STEP_KEYS, *QUANTILE_KEYS)

Series = list[tuple[int, float]]
"""Steps and values of a metric, in the order of the tracker."""


class Training:
    """Trains a classifier on random samples, always the same and in the same order."""

    def __init__(self, lr: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.batches = [(torch.randn(BATCH, 5), torch.randint(0, 3, (BATCH,))) for _ in range(BATCHES)]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)

    def watch(self, directory: Path, **options: Any) -> Monitor:
        options = {"log_every_n_steps": 3, "early_stop": None} | options
        return gwa_logging.watch(self.model, directory=directory / "gwa", **options)

    def step(self, index: int) -> None:
        x, y = self.batches[index % BATCHES]
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def epoch(self, monitor: Monitor, each_step: Callable[[int], Any] = int) -> EpochReport:
        for index in range(BATCHES):
            self.step(index)
            each_step(index)
        return monitor.end_epoch()


def run_of(monitor: Monitor, backend: str) -> Any:
    """The run of a backend, in the form that `watch(run=)` accepts."""
    (run,) = (d.backend.run for d in monitor._deliveries if d.backend.name == backend)
    return run


def numbers_in(records: list[AnyRecord]) -> dict[str, Series]:
    """The numbers of a journal that a tracker should contain, by metric key without the prefix."""
    found: dict[str, Series] = {}
    for record in records:
        if isinstance(record, IntervalRecord | EpochReport):
            step = record.step if isinstance(record, IntervalRecord) else record.epoch
            for key, value in record.metrics.items():
                found.setdefault(key, []).append((step, float(value)))
    return found


def totals_in(records: list[AnyRecord]) -> Series:
    """The number of samples in each histogram of a journal."""
    return [(r.step, r.histogram.total) for r in records if isinstance(r, IntervalRecord)]


# --- any tracker ------------------------------------------------------------------------------------------------------


class TrackerContents(NamedTuple):
    """What a tracker contains of one run."""

    numbers: dict[str, Series]
    totals: Series
    """The number of samples in each histogram; empty where the tracker has no histograms."""
    alerts: list[str]
    users: Series
    """The user's own metric, "user/loss"."""


class Tracker:
    """A tracker, with the actions of its users."""

    backend: str
    precision: type = float
    """The precision of its numbers."""

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        """Sets the tracker's folder with environment variables."""

    def start(self) -> Any:
        """Starts a run as a user does. Returns it in a form that `watch(run=)` accepts."""
        raise NotImplementedError

    def log(self, run: Any, value: float) -> None:
        """Logs the user's metric, at the next of the user's steps."""
        raise NotImplementedError

    def end(self, run: Any) -> None:
        """Ends the run as a user does."""
        raise NotImplementedError

    def ended(self, run: Any) -> bool:
        """Returns True if the run has ended."""
        raise NotImplementedError

    def read(self, run: Any) -> TrackerContents:
        """Returns what is stored now."""
        raise NotImplementedError

    def read_again(self, run: str) -> TrackerContents:
        """As `read`, for a run that is named as in `gwa-logging replay --run`."""
        return self.read(run)


class OnMlflow(Tracker):
    """MLflow with a new database."""

    backend = "mlflow"

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.client = new_database(folder, patch)
        self.steps = count()

    def start(self) -> str:
        experiment = self.client.get_experiment_by_name("gwa").experiment_id
        return str(self.client.create_run(experiment).info.run_id)

    def log(self, run: str, value: float) -> None:
        mlflow.log_metric("user/loss", value, step=next(self.steps), run_id=run)

    def end(self, run: str) -> None:
        self.client.set_terminated(run)

    def ended(self, run: str) -> bool:
        return bool(self.client.get_run(run).info.status != "RUNNING")

    def read(self, run: str) -> TrackerContents:
        data = self.client.get_run(run).data
        keys = [key.removeprefix("gwa/") for key in data.metrics if key.startswith("gwa/")]
        of = {key: list(series(self.client, run, f"gwa/{key}").items()) for key in keys}
        alerts = [data.tags["gwa.alert"]] if "gwa.alert" in data.tags else []
        return TrackerContents(of, [], alerts, list(series(self.client, run, "user/loss").items()))


class OnMlflowServer(OnMlflow):
    """MLflow on a local server, which all tests share from the first `set_up` until `stop`."""

    server: ClassVar["Server | None"] = None

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        if OnMlflowServer.server is None:
            OnMlflowServer.server = Server(folder)
            OnMlflowServer.server.start()
        self.client = point_mlflow_to(f"http://{OnMlflowServer.server.address}", patch)
        if self.client.get_experiment_by_name("gwa") is None:
            self.client.create_experiment("gwa")
        self.steps = count()

    @classmethod
    def stop(cls) -> None:
        if OnMlflowServer.server is not None:
            OnMlflowServer.server.stop()
            OnMlflowServer.server = None


class OnWandb(Tracker):
    """Offline W&B. Reading it ends every run of it in this process."""

    backend = "wandb"

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        wandb.teardown()  # a session of another test would keep the old environment
        for key, value in {"MODE": "offline", "DIR": folder, "SILENT": "true", "CONSOLE": "off"}.items():
            patch.setenv(f"WANDB_{key}", str(value))
        self.folder = folder

    def start(self) -> wandb.Run:
        return start_run(self.folder)

    def log(self, run: wandb.Run, value: float) -> None:
        run.log({"user/loss": value})

    def end(self, run: wandb.Run) -> None:
        run.finish()

    def ended(self, run: wandb.Run) -> bool:
        return bool(run._is_finished)

    def read(self, run: wandb.Run) -> TrackerContents:
        return self._held(read_back(folder_of(run)))

    def read_again(self, run: str) -> TrackerContents:
        """W&B creates a folder each time that an offline run is started or resumed."""
        folders = sorted((self.folder / "wandb").glob(f"offline-run-*-{run.rpartition('/')[2]}"))
        parts = [self._held(read_back(str(folder))) for folder in folders]
        numbers = {key: [pair for part in parts for pair in part.numbers.get(key, [])] for key in parts[0].numbers}
        return TrackerContents(numbers, *([item for part in parts for item in part[i]] for i in (1, 2, 3)))  # type: ignore[misc]

    @staticmethod
    def _held(disk: "OnDisk") -> TrackerContents:
        axes = {"gwa/step": (*INTERVAL_KEYS, "scores.values"), "gwa/epoch": tuple(EPOCH_KEYS)}
        of = {key: disk.column(axis, f"gwa/{key}") for axis, keys in axes.items() for key in keys}
        for key in OPTIONAL_KEYS:  # only some epochs have them
            of[key] = [(epoch, value) for value, epoch in disk.column(f"gwa/{key}", "gwa/epoch")]
        totals = [(step, sum(values)) for step, values in of.pop("scores.values")]
        users = [(step, value) for value, step in disk.column("user/loss", "_step")]
        return TrackerContents(of, totals, [alert["text"] for alert in disk.alerts], users)


class OnTensorBoard(Tracker):
    """Event files, read with TensorBoard's own reader."""

    backend = "tensorboard"
    precision = np.float32

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.steps = count()

    def start(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder / "runs")

    def log(self, run: Any, value: float) -> None:
        run.add_scalar("user/loss", value, next(self.steps))

    def end(self, run: Any) -> None:
        run.close()

    def ended(self, run: Any) -> bool:
        return getattr(run, "file_writer", None) is None

    def read(self, run: Any) -> TrackerContents:
        folder = Path(getattr(run, "log_dir", run))
        ours, users = (read_events(path) for path in (folder / "gwa", folder))
        of = {
            tag.removeprefix("gwa/"): [(event.step, event.value) for event in ours.Scalars(tag)]
            for tag in ours.Tags()["scalars"]
        }
        totals = [(e.step, sum(e.histogram_value.bucket)) for e in events_of(ours.Histograms, "gwa/scores")]
        alerts = [e.tensor_proto.string_val[0].decode() for e in events_of(ours.Tensors, "gwa/alert")]
        return TrackerContents(of, totals, alerts, [(e.step, e.value) for e in events_of(users.Scalars, "user/loss")])


class OnTrackio(Tracker):
    """Trackio's local store, one for each process."""

    backend = "trackio"
    projects: ClassVar = count()

    def start(self) -> Any:
        return start_trackio_run(f"users-{next(self.projects)}")

    def log(self, run: Any, value: float) -> None:
        run.log({"user/loss": value})

    def end(self, run: Any) -> None:
        run.finish()

    def ended(self, run: Any) -> bool:
        return bool(run._stop_flag.is_set())

    def read_again(self, run: str) -> TrackerContents:
        project, _, name = run.partition("/")
        (found,) = (other for other in trackio.Api().runs(project) if other.name == name)
        return self.read(found)

    def read(self, run: Any) -> TrackerContents:
        of: dict[str, Series] = {}
        for row in rows_of(run):
            for key, value in row.items():
                of.setdefault(key, []).append((row["step"], value))
        totals = [(step, sum(histogram["values"])) for step, histogram in of.pop("gwa/scores", [])]
        alerts = [alert["text"] for alert in trackio.Api().alerts(run.project, run=run.name)]
        ours = {key.removeprefix("gwa/"): values for key, values in of.items() if key.startswith("gwa/")}
        return TrackerContents(ours, totals, alerts, of.get("user/loss", []))


# --- MLflow -----------------------------------------------------------------------------------------------------------


@cache
def empty_database() -> Path:
    """Creating a database takes seconds, so the tests copy this one."""
    path = Path(FOLDER.name) / "template.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def point_mlflow_to(uri: str, monkeypatch: pytest.MonkeyPatch, experiment: str = "gwa") -> MlflowClient:
    """Sets MLflow's environment variables."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return MlflowClient(uri)


def new_database(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    shutil.copy(empty_database(), folder / "mlflow.db")
    client = point_mlflow_to(f"sqlite:///{folder / 'mlflow.db'}", monkeypatch)
    client.create_experiment("gwa", artifact_location=(folder / "artifacts").as_uri())
    return client


def series(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """Maps the steps of a metric to its values. Each step must have one value."""
    history = client.get_metric_history(run_id, key)
    values = {metric.step: metric.value for metric in history}
    assert len(values) == len(history), f"{key} has several values in one step"
    return values


class Server(MlflowServer):
    """`mlflow server` on loopback, whose database is a copy of the empty one."""

    def __init__(self, folder: Path) -> None:
        shutil.copy(empty_database(), folder / "server.db")
        super().__init__(folder)


# --- W&B --------------------------------------------------------------------------------------------------------------


def start_run(directory: Path, **options: Any) -> wandb.Run:
    """Starts an offline run without making it the active one, so that tests do not affect each other."""
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb.init(**{"mode": "offline", "dir": directory, "settings": settings, "reinit": "create_new"} | options)


class OnDisk(NamedTuple):
    """An offline run, read back."""

    history: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]

    def column(self, *keys: str) -> list[Any]:
        """The values of these keys in the rows that have the first key; tuples if there are several keys."""
        rows = [tuple(row[key] for key in keys) for row in self.history if keys[0] in row]
        return rows if len(keys) > 1 else [row[0] for row in rows]


def read_back(folder: str) -> OnDisk:
    """Reads the folder of an offline run, after everything has been written to it."""
    wandb.teardown()  # finish() alone can return before the last rows are on disk
    records = list(offline_records(Path(folder)))

    def of(kind: str) -> list[Any]:
        return [getattr(record, kind) for record in records if record.HasField(kind)]

    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for part in of("summary"):
        summary |= values_of(part.update)
    for part in of("config"):
        config |= values_of(part.update)
    return OnDisk(
        history=[values_of(part.item) for part in of("history")],
        alerts=[{"title": part.title, "text": part.text, "level": part.level} for part in of("alert")],
        metrics={part.name or part.glob_name: {"step_metric": part.step_metric} for part in of("metric")},
        summary=summary,
        config=config,
    )


def inspect_by_wandb(folder: str) -> list[dict[str, Any]]:
    """Reads the same with W&B's own reader, which takes a second or two: the rows of the history."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def folder_of(run: wandb.Run) -> str:
    return str(run.settings.sync_dir)


# --- TensorBoard and Trackio ------------------------------------------------------------------------------------------


def read_events(folder: Path) -> EventAccumulator:
    """Everything in the event files of one folder."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def events_of(events: Callable[[str], list[Any]], tag: str) -> list[Any]:
    """The events of a tag; an empty list if the tag does not exist."""
    try:
        return events(tag)
    except KeyError:
        return []


def start_trackio_run(project: str) -> trackio.Run:
    """Starts a run without making it the active one, so that tests do not affect each other."""
    run = trackio.init(project, auto_log_cpu=False, auto_log_gpu=False)
    trackio.context_vars.current_run.set(None)
    return run


def rows_of(run: trackio.Run) -> list[dict[str, Any]]:
    """The rows that Trackio has stored of a run, in order."""
    return SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
