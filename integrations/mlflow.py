"""MLflow: writes records to a run, from the delivery's thread.

MLflow's active run belongs to the thread that started it, and its calls wait four minutes for a server that does not
respond. So the tracking URI and the run are determined on the user's thread, where a server that does not respond is an
error. From then on only a client with this URI and this run id is used, on a thread that may block for as long as it needs.

MLflow has no histograms: the quantiles are metrics, and the distribution over time is a picture with a step slider.
"""

import gc
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import sleep
from typing import Any, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from gwa_logging.errors import BackendError
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.integrations._tracker import Tracker, invalid_run
from gwa_logging.integrations.heatmap_picture import PICTURE_KEY, PictureSeries
from gwa_logging.journal import FILE_NAME
from gwa_logging.protocols import RunContext, TrackerContents, samples_by_epoch
from gwa_logging.records import (
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
    TimedRecord,
    TrackerRunRef,
)
from gwa_logging.redact import redact_urls
from gwa_logging.report.page import REPORT_NAME

logger = logging.getLogger("gwa_logging")

METRICS_PER_REQUEST = 1000  # MLflow's limit
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PICTURE_TRIES = 3  # after this many failures in a row no more pictures are drawn
YIELD = 0.05
"""Seconds between writing numbers, drawing a picture and encoding it. Each of these holds the interpreter lock for 5 to 10 ms;
without a pause a single training step could wait for all three."""


def open_backend(context: RunContext) -> "MlflowBackend":
    """Uses the run that the user passed, or the active one; without either, starts a run. Waits for the server.

    Raises:
        InvalidInputError: `run=` is neither an MLflow run nor a run id.
        BackendError: the server does not respond, the run does not exist, or no run can be started.
    """
    uri = mlflow.get_tracking_uri()
    _check_reachable(uri)
    wanted = _wanted_run(context.run)
    try:
        client = MlflowClient(tracking_uri=uri)
        own = _OwnRun() if wanted is None else _RestartedRun(wanted) if context.is_restart else None
        run = client.get_run(own.run_id if own else wanted)
        if run.info.lifecycle_stage != "active":
            raise LookupError("the run is deleted")
        if context.is_restart:
            client.update_run(run.info.run_id, status="RUNNING")
    except Exception as error:  # noqa: BLE001 - whatever MLflow raises: logging would be impossible
        what = "backend='mlflow'" if wanted is None else f"run={wanted!r}"
        if uri.startswith(DATABASES) and not _is_full_mlflow():
            raise BackendError(
                f"pip install mlflow, or name a server with MLFLOW_TRACKING_URI: mlflow-skinny cannot open {uri}. "
                f"{what}: {error!r}"
            ) from None
        raise BackendError(
            f"{what}: MLflow at {uri} refuses: {error!r}. Pass a run that exists, or choose another server with "
            "mlflow.set_tracking_uri() or MLFLOW_TRACKING_URI"
        ) from None
    if wanted is None and own:
        logger.info("gwa_logging: no MLflow run is active in this thread; started one: %s", own.run_id)
    # Importing MLflow makes a full garbage collection due, which would otherwise delay a training step by 0.2 to 0.4 s.
    gc.collect()
    return MlflowBackend(client, run, context, own)


def locate(context: RunContext) -> TrackerRunRef:
    """Returns the run that `open_backend` would use; empty if it would start one."""
    return TrackerRunRef(run=_wanted_run(context.run))


class MlflowBackend(Tracker):
    """Writes to one run. A write takes 10 to 100 ms, and minutes while the server does not respond."""

    name = "mlflow"
    records_per_call = 100

    def __init__(
        self, client: MlflowClient, run: Run, context: RunContext, own: "_OwnRun | _RestartedRun | None" = None
    ) -> None:
        """Writes to `run`. `own` is the same run if this library started it, and is ended by `close`."""
        super().__init__(context.name)
        address = redact_urls(client.tracking_uri)
        page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        self._client = client
        self.run: str = str(run.info.run_id)
        self.run_ref = TrackerRunRef(
            run=self.run, url=address.rstrip("/") + page if address.startswith("http") else None
        )
        self._directory = context.directory
        self._own = own
        self.owns_run = own is not None
        self._begun = False
        self._pictures = PictureSeries()
        self._picture_tries = PICTURE_TRIES
        # What the records of the current call add to the run. Files come last.
        self._metrics: list[Metric] = []
        self._tags: dict[str, str] = {}
        self._add_files: list[Callable[[], None]] = []

    def write(self, record: AnyRecord) -> None:
        """Writes one record. Writing it again is harmless: MLflow drops metrics that it already has.

        Raises:
            BackendError: MLflow has not accepted it.
        """
        self.write_many([record])

    def write_many(self, records: Sequence[AnyRecord]) -> None:
        """Writes records with as few requests as MLflow allows.

        Raises:
            BackendError: MLflow has not accepted all of them.
        """
        self._begun = True
        self._metrics, self._tags, self._add_files = [], {}, []
        for record in records:
            super().write(record)
        with _as_backend_errors():
            for start in range(0, len(self._metrics), METRICS_PER_REQUEST):
                part = self._metrics[start : start + METRICS_PER_REQUEST]
                self._client.log_batch(self.run, metrics=part, synchronous=True)
            if self._tags:
                tags = [RunTag(f"{self.prefix}.{key}", value) for key, value in self._tags.items()]
                self._client.log_batch(self.run, tags=tags, synchronous=True)
        # These do not raise, so an interval that has to be written again has not been added to the pictures.
        for add in self._add_files:
            add()

    def on_run(self, run: RunRecord) -> None:
        """Sets a tag with the head."""
        self._tags["head"] = run.head

    def on_interval(self, interval: IntervalRecord) -> None:
        """Logs the metrics; adds a picture if it is time for one."""
        self._add_metrics(interval, interval.step, interval.metrics)
        self._add_files.append(lambda: self._draw_due(interval) if self._pictures.add(interval) else None)

    def on_epoch(self, report: EpochReport) -> None:
        """Logs the metrics; updates the newest picture, and adds one to the series if it is due."""
        self._add_metrics(report, report.epoch, report.metrics)
        self._add_files.append(lambda: self._draw_epoch(report))

    def on_alert(self, alert: StopAlert) -> None:
        """Sets tags, by which runs can be searched for."""
        self._tags |= {
            "alert": f"stop: {alert.text}",
            "alert.epoch": str(alert.epoch),
            "alert.best_epoch": str(alert.best_epoch),
        }
        self._add_files.append(lambda: self._pictures.add_alert(alert))

    def on_suspects(self, suspects: SuspectsRecord) -> None:
        """Adds the suspects as a CSV file, which MLflow shows as a table."""
        self._add_files.append(lambda: self._add_table(suspects))

    def on_close(self, end: CloseRecord) -> None:
        """Sets tags with the best epoch, and adds the pictures that the series lacks."""
        self._tags |= {key: f"{value:.6g}" for key, value in end.metrics.items()} | {"epochs": str(end.epochs)}
        self._add_files.append(lambda: self._draw_missing(end))

    def contents(self) -> TrackerContents:
        """Reads which records the run contains. Waits for the server.

        Raises:
            BackendError: MLflow does not respond.
        """
        with _as_backend_errors():
            tags = self._client.get_run(self.run).data.tags
            samples = Counter[tuple[int, int]]()  # by epoch and time, because an epoch can have several reports
            for metric in self._history("stats/count") + self._history("stats/excluded"):
                samples[metric.step, metric.timestamp] += metric.value
            return TrackerContents(
                intervals=frozenset(metric.step for metric in self._history("steps/mean")),
                epochs=samples_by_epoch((epoch, total) for (epoch, _), total in samples.items()),
                # MLflow keeps only the last alert and the last list: sending an older one would replace it.
                alerts=range(int(tags.get(f"{self.prefix}.alert.epoch", -1)) + 1),
                suspects=range(int(tags.get(f"{self.prefix}.suspects.step", -1)) + 1),
                closes={int(tags.get(f"{self.prefix}.epochs", -1))},
            )

    def close(self) -> None:
        """Ends the run if this library started it. Adds the journal to it, and the report if it is written.

        Both are in a folder named like the prefix.

        Raises:
            BackendError: MLflow has not accepted the end or the files.
        """
        with _as_backend_errors():
            # The end first: it must not wait for uploads, and a run that has ended still accepts files.
            if self._own:
                self._own.end(self._client, "FINISHED" if self._begun else "FAILED")
            if not self._begun:  # watch() failed before the first record
                return
            self._client.log_artifact(self.run, str(self._directory / FILE_NAME), self.prefix)
            if (report := self._directory / REPORT_NAME).exists():
                self._client.log_artifact(self.run, str(report), self.prefix)

    def discard(self) -> None:
        """Deletes the run if this library started it; `mlflow gc` removes it for good.

        Raises:
            BackendError: MLflow has not accepted it.
        """
        if self._own:
            with _as_backend_errors():
                self._own.end(self._client, "KILLED")
                self._client.delete_run(self.run)

    def move_to(self, directory: Path) -> None:
        """Uploads the journal and the report from another folder."""
        self._directory = directory

    def _history(self, key: str) -> list[Metric]:
        """All values of a metric. The client requests as many pages as there are."""
        return list(self._client.get_metric_history(self.run, f"{self.prefix}/{key}"))

    def _add_metrics(self, record: TimedRecord, step: int, values: Mapping[str, float]) -> None:
        """Adds metrics to the current call. Infinities become NaN: MLflow would store them as 1.8e308."""
        for key, value in self.keyed(values).items():
            finite = float(value) if math.isfinite(value) else math.nan
            self._metrics.append(Metric(key, finite, int(1000 * record.time), step))

    def _draw_epoch(self, report: EpochReport) -> None:
        if self._pictures.add_epoch(report):
            self._draw_due(report)
        elif self._pictures.rested and self._pictures.has_news:
            self._draw(report, self._pictures.last_step, ())

    def _draw_due(self, record: TimedRecord) -> None:
        """Adds a picture to the series."""
        self._draw(record, self._pictures.last_step, (self._pictures.last_step, 0))

    def _draw_missing(self, end: CloseRecord) -> None:
        """Adds the pictures that the series lacks, and the newest one with all markers."""
        for step in self._pictures.missing_steps():
            self._draw(end, step, (step,))
        self._draw(end, self._pictures.last_step, (0,))

    def _draw(self, record: TimedRecord, step: int, positions: Sequence[int]) -> None:
        """Draws the run up to `step`, and adds it at some positions of the slider.

        MLflow's slider opens at position 0, so that is where the newest picture is. If there are several at a position, MLflow
        shows the one with the latest timestamp. The newest picture is also a file with a fixed name.

        Does not raise, because files are often not allowed where metrics are, and must not delay them.
        """
        if not self._picture_tries or not self._pictures.has_columns:
            return
        pause = 0.0 if isinstance(record, CloseRecord) else YIELD  # at the end, training has nothing to wait for
        key, timestamp = f"{self.prefix}/{PICTURE_KEY}", int(1000 * record.time)
        try:
            sleep(pause)
            image = self._pictures.draw(step, in_series=step in positions)
            for at in positions:
                sleep(pause)
                self._client.log_image(self.run, image, key=key, step=at, timestamp=timestamp, synchronous=True)
            if 0 in positions or not positions:
                sleep(pause)
                self._client.log_image(self.run, image, artifact_file=f"{self.prefix}/scores.png")
            self._picture_tries = PICTURE_TRIES
        except Exception as error:  # noqa: BLE001 - whatever an artifact store raises
            self._picture_tries -= 1
            outlook = "the next one will be tried" if self._picture_tries else "no more will be tried"
            logger.warning("gwa_logging: backend mlflow: no picture (%s); %s", redact_urls(repr(error)), outlook)

    def _add_table(self, suspects: SuspectsRecord) -> None:
        """Adds the suspects. Does not raise, as `_draw`."""
        try:
            self._client.log_text(self.run, suspects.csv(), f"{self.prefix}/suspects.csv")
            self._client.set_tag(self.run, f"{self.prefix}.suspects.step", suspects.step)
        except Exception as error:  # noqa: BLE001 - whatever an artifact store raises
            logger.warning("gwa_logging: backend mlflow: no suspects.csv (%s)", redact_urls(repr(error)))


class _OwnRun:
    """A run that this library started. A thread that does nothing else starts and ends it.

    So it is never the active run of the user's thread: `mlflow.start_run()` works as before, and MLflow's exit hook,
    which waits four minutes for a server that does not respond, does not know it.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        Thread(target=self._work, name="gwa_logging mlflow run", daemon=True).start()
        self.run_id: str = self._do(mlflow.start_run).info.run_id

    def end(self, client: MlflowClient, status: str) -> None:
        """Ends the run, even if the user has pointed MLflow to another server in the meantime."""
        try:
            self._do(lambda: mlflow.end_run(status))
        except Exception:  # noqa: BLE001 - any other cause raises here again
            client.set_terminated(self.run_id, status)

    def _do(self, call: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._calls.put((call, done))
        return done.result()

    def _work(self) -> None:
        for _ in ("start", "end"):
            call, done = self._calls.get()
            try:
                done.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised by `_do`
                done.set_exception(error)
                return


class _RestartedRun(NamedTuple):
    """A run that this library started in an earlier process."""

    run_id: str

    def end(self, client: MlflowClient, status: str) -> None:
        """Ends the run."""
        client.set_terminated(self.run_id, status)


def _wanted_run(run: object) -> str | None:
    """Returns the id of the run that the user passed, or of the active one; None if there is neither."""
    if run is None:
        run = mlflow.active_run() or os.environ.get("MLFLOW_RUN_ID")  # set by `mlflow run` and by jobs
    if run is None or isinstance(run, str):
        return run
    if not isinstance(run, Run):
        raise invalid_run(
            run, "an MLflow run, as mlflow.start_run() returns it, or a run id (Lightning: logger.run_id)"
        )
    return str(run.info.run_id)


def _is_full_mlflow() -> bool:
    """Returns True if all of MLflow is installed, not only mlflow-skinny, which has no databases."""
    try:
        return bool(metadata.version("mlflow"))
    except metadata.PackageNotFoundError:
        return False


def _check_reachable(uri: str) -> None:
    """Checks that the server responds; MLflow itself would retry for four minutes. Does nothing behind a proxy.

    Raises:
        BackendError: the server does not respond.
    """
    try:
        check_reachable(uri, "/health")
    except (OSError, ValueError) as error:
        # The message of a ValueError quotes the port, which is a part of the password if that has special characters.
        reason = error if isinstance(error, OSError) else "its port is not a number"
        raise BackendError(
            f"backend='mlflow': nothing answers at {uri} ({reason}). Start the server, or choose another "
            "with mlflow.set_tracking_uri() or MLFLOW_TRACKING_URI, or use backend='local' and replay the journal later"
        ) from None


@contextmanager
def _as_backend_errors() -> Iterator[None]:
    """Raises MLflow's errors as BackendErrors without a cause: they are logged, and MLflow's quote the server's address."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again
        raise BackendError(repr(error)) from None
