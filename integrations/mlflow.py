"""MLflow: writes records into a run, from a worker thread.

MLflow's active run belongs to the thread that started it, and its calls wait four minutes for a server that is gone. So
the tracking URI and the run are settled on the caller's thread, where a server that does not answer is an error; from
then on there is only a client with that URI and that run id, on a thread that may wait as long as it likes.

MLflow has no histograms: the quantiles are metrics, and the distribution over time is a picture with a step slider.
"""

import gc
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import metadata
from queue import SimpleQueue
from threading import Thread
from time import sleep
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from gwa_logging.errors import BackendError, InvalidInputError, MissingDependencyError
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.integrations.heatmap_picture import PictureSeries
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
    TrackerRunRef,
)
from gwa_logging.redact import redact_urls

logger = logging.getLogger("gwa_logging")

METRICS_PER_CALL = 1000  # MLflow's limit
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PICTURE_TRIES = 3  # so many pictures in a row may fail; then there are no more
BREATH = 0.05
"""Seconds between writing numbers, drawing a picture and encoding it. Each takes the interpreter for 5 to 10 ms; without a
pause a single training step could wait for all three."""


def open_backend(context: RunContext) -> "MlflowBackend":
    """Takes the user's run, or the active one; if there is neither, starts one of its own. Waits for the server.

    Raises:
        InvalidInputError: `run=` is neither a run of MLflow nor a run id.
        BackendError: the server does not answer, there is no such run, or no run can be started.
    """
    uri = mlflow.get_tracking_uri()
    _knock(uri)
    wanted = _wanted_run(context.run)
    try:
        client = MlflowClient(tracking_uri=uri)
        own = _OwnRun() if wanted is None else None
        run = client.get_run(own.run_id if own else wanted)
        if run.info.lifecycle_stage != "active":
            raise LookupError("the run is deleted")
    except Exception as error:  # noqa: BLE001 - whatever MLflow raises here: nothing could ever be logged
        what = "backend='mlflow'" if wanted is None else f"run={wanted!r}"
        remedy = "Pass a run that is there"
        if uri.startswith(DATABASES) and not _is_whole():
            remedy = "mlflow-skinny needs a server: pip install mlflow"
        raise BackendError(
            f"{what}: MLflow at {uri} refuses: {error!r}. {remedy}, or choose another server with "
            "mlflow.set_tracking_uri() or MLFLOW_TRACKING_URI"
        ) from None
    if own:
        logger.info("gwa_logging: no MLflow run is active in this thread; started one: %s", own.run_id)
    # Loading MLflow makes a full garbage collection due, which would otherwise stop a training step for 0.2 to 0.4 s.
    gc.collect()
    return MlflowBackend(client, run, context, own)


def locate(context: RunContext) -> TrackerRunRef:
    """The place of the run that `open_backend` would take; empty if it would start one."""
    return TrackerRunRef(run=_wanted_run(context.run))


class MlflowBackend:
    """Writes into one run. See `gwa_logging.protocols.Backend`."""

    name = "mlflow"
    threaded = True
    """A write takes 10 to 100 ms, and minutes while the server is away."""

    def __init__(self, client: MlflowClient, run: Run, context: RunContext, own: "_OwnRun | None" = None) -> None:
        """Writes into `run`; `own` is given if nobody else does, and is ended by `close`."""
        address, page = (
            redact_urls(client.tracking_uri),
            f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
        )
        self._client = client
        self.run = self._run_id = str(run.info.run_id)
        self.run_ref = TrackerRunRef(
            run=self.run, url=address.rstrip("/") + page if address.startswith("http") else None
        )
        self._prefix = context.name
        self._directory = context.directory
        self._own = own
        self._begun = False
        self._pictures = PictureSeries()
        self._picture_tries = PICTURE_TRIES

    def write(self, record: AnyRecord) -> None:
        """Writes one record. The same record may be written again: MLflow drops metrics that it already has.

        Raises:
            BackendError: MLflow has not taken it.
        """
        self.write_many([record])

    def write_many(self, records: Sequence[AnyRecord]) -> None:
        """Writes records in as few calls as MLflow allows; what `write` says holds for all of them together.

        Raises:
            BackendError: MLflow has not taken them all.
        """
        self._begun = True
        with _without_passwords():
            metrics = [metric for record in records for metric in self._metrics(record)]
            for start in range(0, len(metrics), METRICS_PER_CALL):
                part = metrics[start : start + METRICS_PER_CALL]
                self._client.log_batch(self._run_id, metrics=part, synchronous=True)
            for record in records:
                self._tag(record)
        # Nothing below raises, so an interval that is written again has not been added yet.
        for record in records:
            if self._pictures_of(record):
                self._show(record)
            elif isinstance(record, SuspectsRecord):
                self._list(record)

    def contents(self) -> TrackerContents:
        """What the run has of ours. Waits for the server.

        Raises:
            BackendError: MLflow does not answer.
        """
        with _without_passwords():
            tags = self._client.get_run(self._run_id).data.tags
            intervals, ends = (self._history(key) for key in ("step_mean", "best_epoch"))
            samples = Counter[tuple[int, int]]()  # by epoch and time, because an epoch can have several reports
            for metric in self._history("count") + self._history("excluded"):
                samples[metric.step, metric.timestamp] += metric.value
            return TrackerContents(
                intervals=frozenset(metric.step for metric in intervals),
                epochs=samples_by_epoch((epoch, total) for (epoch, _), total in samples.items()),
                # Only the last alert and the last list can be in MLflow: sending an older one would replace it.
                alerts=range(int(tags.get(f"{self._prefix}.alert.epoch", -1)) + 1),
                suspects=range(int(tags.get(f"{self._prefix}.suspects.step", -1)) + 1),
                closes=frozenset(metric.step + 1 for metric in ends),
            )

    def _history(self, key: str) -> list[Metric]:
        """All values of a metric; MLflow's client asks for as many pages as there are."""
        return list(self._client.get_metric_history(self._run_id, f"{self._prefix}/{key}"))

    def close(self) -> None:
        """Ends the run if it is ours; adds the journal and the report to it, in a folder of the name that metrics have.

        Raises:
            BackendError: MLflow has not taken the end or the files.
        """
        with _without_passwords():
            # The run first: its end must not wait for uploads, and a run that has ended still takes files.
            if self._own:
                self._own.end(self._client, "FINISHED" if self._begun else "FAILED")
            if not self._begun:  # watch() has failed, before the first record
                return
            self._client.log_artifact(self._run_id, str(self._directory / FILE_NAME), self._prefix)
            try:
                from gwa_logging.report.page import write_report  # here, because it needs plotly

                self._client.log_artifact(self._run_id, str(write_report(self._directory)), self._prefix)
            except MissingDependencyError as error:
                logger.info("gwa_logging: no report.html for MLflow: %s", error)

    def _metrics(self, record: AnyRecord) -> list[Metric]:
        """What a record has for MLflow's charts. Infinities become NaN: MLflow would make them 1.8e308."""
        if isinstance(record, IntervalRecord) and record.count:
            step, values = record.step, record.metrics
        elif isinstance(record, EpochReport):
            step, values = record.epoch, record.metrics
        elif isinstance(record, CloseRecord) and record.best_epoch is not None:
            step, values = record.epochs - 1, {"best_epoch": record.best_epoch, "best_value": record.best_value}
        else:
            return []
        finite = {key: float(value) if math.isfinite(value) else math.nan for key, value in values.items()}
        return [Metric(f"{self._prefix}/{key}", finite[key], int(1000 * record.time), step) for key in finite]

    def _tag(self, record: AnyRecord) -> None:
        if isinstance(record, StopAlert):
            text = f"stop: {record.message}"
            values = {"alert": text, "alert.epoch": record.epoch, "alert.best_epoch": record.best_epoch}
        elif isinstance(record, RunRecord):
            values = {"head": record.head}
        else:
            return
        tags = [RunTag(f"{self._prefix}.{key}", str(value)) for key, value in values.items()]
        self._client.log_batch(self._run_id, tags=tags, synchronous=True)

    def _pictures_of(self, record: AnyRecord) -> bool:
        """Adds an interval to the pictures; whether it is time for one."""
        if isinstance(record, IntervalRecord):
            return self._pictures.add(record)
        if isinstance(record, EpochReport):
            return self._pictures.news and self._pictures.rested
        return isinstance(record, CloseRecord) and self._pictures.news

    def _show(self, record: AnyRecord) -> None:
        """Adds a picture. Files are often not allowed where numbers are; that must not hold the numbers up."""
        if not self._picture_tries:
            return
        assert isinstance(record, IntervalRecord | EpochReport | CloseRecord)
        step = record.steps - 1 if isinstance(record, CloseRecord) else record.step
        key, timestamp = f"{self._prefix}/scores", int(1000 * record.time)
        try:
            sleep(BREATH)
            image = self._pictures.draw()
            sleep(BREATH)
            self._client.log_image(self._run_id, image, key=key, step=step, timestamp=timestamp, synchronous=True)
            self._picture_tries = PICTURE_TRIES
        except Exception as error:  # noqa: BLE001 - whatever an artifact store raises; see above
            self._picture_tries -= 1
            outlook = "the next will be tried" if self._picture_tries else "there will be no more"
            logger.warning("gwa_logging: backend mlflow: no picture (%s); %s", redact_urls(repr(error)), outlook)

    def _list(self, record: SuspectsRecord) -> None:
        """Adds the suspects, as a CSV file, which MLflow shows as a table. See `_show`."""
        try:
            self._client.log_text(self._run_id, record.csv(), f"{self._prefix}/suspects.csv")
            self._client.set_tag(self._run_id, f"{self._prefix}.suspects.step", record.step)
        except Exception as error:  # noqa: BLE001 - see `_show`
            logger.warning("gwa_logging: backend mlflow: no suspects.csv (%s)", redact_urls(repr(error)))


class _OwnRun:
    """A run of our own, started and ended by one thread that does nothing else.

    So it is never the active run of the user's thread: none is left there when it has ended, `mlflow.start_run()` works
    as before, and MLflow's exit hook, which waits four minutes for a server that is gone, knows nothing of it.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        Thread(target=self._live, name="gwa_logging mlflow run", daemon=True).start()
        self.run_id: str = self._do(mlflow.start_run).info.run_id

    def end(self, client: MlflowClient, status: str) -> None:
        """Ends the run, also if the user has turned MLflow to another server in the meantime."""
        try:
            self._do(lambda: mlflow.end_run(status))
        except Exception:  # noqa: BLE001 - if it was something else, it is raised here
            client.set_terminated(self.run_id, status)

    def _do(self, call: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._calls.put((call, done))
        return done.result()

    def _live(self) -> None:
        for _ in ("start", "end"):
            call, done = self._calls.get()
            try:
                done.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                done.set_exception(error)
                return


def _wanted_run(run: Any) -> str | None:
    """The id of the run that the user wants; None if there is none."""
    if run is None:
        run = mlflow.active_run() or os.environ.get("MLFLOW_RUN_ID")  # set by `mlflow run` and by jobs
    if run is None or isinstance(run, str):
        return run
    if not isinstance(run, Run):
        raise InvalidInputError(
            f"run={run!r}: expected an MLflow run, as mlflow.start_run() returns it, or a run id (Lightning: "
            f"logger.run_id), found {type(run).__module__}.{type(run).__qualname__}"
        )
    return str(run.info.run_id)


def _is_whole() -> bool:
    """Whether all of MLflow is installed: mlflow-skinny, which the extra asks for, has no database."""
    try:
        return bool(metadata.version("mlflow"))
    except metadata.PackageNotFoundError:
        return False


def _knock(uri: str) -> None:
    """Looks whether anybody is there: MLflow itself would try for four minutes. Behind a proxy there is no telling."""
    try:
        check_reachable(uri, "/health")
    except (OSError, ValueError) as error:
        # The message of a ValueError quotes the port, which is a piece of the password if that has odd characters.
        reason = error if isinstance(error, OSError) else "its port is not a number"
        raise BackendError(
            f"backend='mlflow': nothing answers at {uri} ({reason}). Start the server, or choose another "
            "with mlflow.set_tracking_uri() or MLFLOW_TRACKING_URI, or use backend='local' and replay the journal later"
        ) from None


@contextmanager
def _without_passwords() -> Iterator[None]:
    """Errors of MLflow show the address of the server, and they will be logged."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again
        raise BackendError(repr(error)) from None
