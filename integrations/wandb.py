"""Weights & Biases: writes records to a run.

In a run that this library started, and in W&B's shared mode (which has no steps that users control), every record is a row.
In a run that the user started, records are added to the user's rows: see `_wandb_rows`.
"""

import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

from gwa_logging import __version__
from gwa_logging.errors import BackendError
from gwa_logging.faults import logger
from gwa_logging.integrations._drawing_thread import DrawingThread
from gwa_logging.integrations._tracker import Tracker
from gwa_logging.integrations._wandb_contents import read_contents
from gwa_logging.integrations._wandb_rows import RunWriters, UserRunWriter, define_metrics, row_of, writers_of
from gwa_logging.integrations._wandb_runs import (
    check_run,
    check_server,
    discard_run,
    is_finished,
    new_run_options,
    parse_path,
    resume,
)
from gwa_logging.journal import FILE_NAME
from gwa_logging.protocols import RunContext, TrackerContents
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
from gwa_logging.redact import has_secret, redact_urls
from gwa_logging.report.page import REPORT_NAME

if TYPE_CHECKING:
    from PIL.Image import Image

    from gwa_logging.integrations.heatmap_picture import PictureSeries

ARTIFACT_TYPE = "gwa"

UPLOAD_FAILURE = b"filestream: fatal error"
"""W&B writes this to its log when it stops uploading a run."""


def open_backend(context: RunContext) -> "WandbBackend":
    """Uses the run that the user passed, or the active one; without either, starts a run.

    A run id (or `[entity/]project/id`) is resumed, and finished on close.

    Raises:
        InvalidInputError: `run=` is not a W&B run, or the run is finished.
        BackendError: no run can be started or resumed, or the active run does not respond.
    """
    wanted = wandb.run if context.run is None else context.run
    owned = wanted is None or isinstance(wanted, str)
    if isinstance(wanted, str):
        parse_path(wanted)
    if owned:
        check_server()
    run = None if owned else check_run(wanted)
    try:
        if isinstance(wanted, str):
            run = resume(wanted)
        elif run is None:
            # A plain init() would return any active run, and `close` would finish it.
            run = wandb.init(reinit="create_new", **new_run_options(context.directory))
        define_metrics(run, context.name)
        _import_pandas()
    except Exception as error:  # noqa: BLE001 - whatever wandb raises: logging would be impossible
        raise BackendError(
            f"backend='wandb': there is no run to log to ({type(error).__name__}: {error}). Run `wandb login` or set "
            "WANDB_API_KEY; or set WANDB_MODE=offline to keep the run on disk; or pass run=wandb.init(...)"
        ) from (None if has_secret(error) else error)
    return WandbBackend(run, context.name, owned=owned, directory=context.directory)


def locate(context: RunContext) -> TrackerRunRef:
    """Returns the run that `open_backend` would use; empty if it would start one."""
    wanted = wandb.run if context.run is None else context.run
    if isinstance(wanted, str):
        known = [run.path for run in writers_of if f"/{run.path}".endswith(f"/{wanted.strip('/')}")]
        return TrackerRunRef(run=known[0] if known else wanted)
    return TrackerRunRef() if wanted is None else _reference_to(check_run(wanted))


class WandbBackend(Tracker):
    """Writes to one run. A write takes about a millisecond and does not wait for the network."""

    name = "wandb"

    def __init__(self, run: wandb.Run, prefix: str, *, owned: bool, directory: Path | None = None) -> None:
        """Opens a backend.

        Args:
            run: the run to write to.
            prefix: of the metric keys.
            owned: this library started the run and finishes it.
            directory: the folder of the journal and the report, which become an artifact of an owned run.
        """
        super().__init__(prefix)
        self.run: wandb.Run = run
        self.run_ref = _reference_to(run)
        self._owned = self.owns_run = owned
        writers = writers_of.setdefault(run, RunWriters())
        writers.prefixes.add(prefix)
        self._folders = writers.folders
        if directory is not None:
            self._folders[prefix] = directory
        self._lock = writers.lock
        self._log_position = 0  # bytes of W&B's internal log that were read
        has_no_steps = run.settings.mode == "shared" or run.disabled
        self._user_run = None if owned or has_no_steps else UserRunWriter(run, prefix, writers)
        # If the user logs between the look at the step and the log call, W&B prints a warning, and the row is made again.
        self.threaded = self._user_run is None
        self._pictures = None if run.disabled else _picture_series()
        self._drawing = DrawingThread[wandb.Image]()

    def contents(self) -> TrackerContents:
        """Reads which records the run contains: from the server, or from disk if the run is offline."""
        return read_contents(self.run, self.prefix)

    def write(self, record: AnyRecord) -> None:
        """Writes one record.

        Raises:
            BackendError: the run is finished.
        """
        with self._lock:
            if is_finished(self.run):
                raise BackendError("the W&B run was finished before monitor.close(): close the monitor first")
            super().write(record)

    def on_run(self, run: RunRecord) -> None:
        """Adds the settings to the config of a run that this library started."""
        if self._owned:
            config = {**run.settings, "head": run.head, "classes": run.classes, "version": __version__}
            self.run.config.update({self.prefix: config}, allow_val_change=True)  # type: ignore[no-untyped-call]

    def on_interval(self, interval: IntervalRecord) -> None:
        """Logs the histogram and its numbers, and a picture if it is time for one."""
        self._log(interval, picture=self._pictures is not None and self._pictures.add(interval))

    def on_epoch(self, report: EpochReport) -> None:
        """Logs the numbers, and a picture if it is time for one."""
        self._log(report, picture=self._pictures is not None and self._pictures.add_epoch(report))

    def on_alert(self, alert: StopAlert) -> None:
        """Sends an alert, notes it in the summary, and marks it in later pictures."""
        if self._pictures is not None:
            self._pictures.add_alert(alert)
        self._summarise({**alert.metrics, **self._with_entry("stop_epochs", alert.epoch)})
        # Last, because a record that fails is written again, and W&B does not drop the second of two equal alerts.
        self.run.alert(title=alert.TITLE, text=alert.text, level="WARN")

    def on_suspects(self, suspects: SuspectsRecord) -> None:
        """Logs a table, and notes it in the summary."""
        self.run.log(self.keyed({"suspects": _table(suspects)}), commit=self._user_run is None)
        self._summarise(self._with_entry("suspects_steps", suspects.step))

    def on_close(self, end: CloseRecord) -> None:
        """Adds the best epoch to the summary, and logs the last picture."""
        self._summarise(end.metrics)
        self._drawing.wait()
        self._log_picture(self._picture(self._drawing.take))
        self._log_picture(self._picture(self._newest))

    def refusal(self) -> str | None:
        """Returns why W&B has stopped uploading this run, or None.

        After a response such as 401, W&B never tries again, but still accepts rows. Only its internal log says so.
        """
        path = Path(self.run.settings.log_internal)
        if self.run.disabled or self.run.offline or not path.is_file():
            return None
        with path.open("rb") as log:
            log.seek(self._log_position)
            lines = log.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        self._log_position += sum(map(len, lines))
        for line in lines:
            if UPLOAD_FAILURE in line:
                message = json.loads(line)["msg"].partition(UPLOAD_FAILURE.decode())[2].strip(": ")
                return (
                    f"W&B has stopped uploading this run ({message}); from now on it is only in {self.run.settings.sync_dir}. "
                    "Send it with `wandb sync` when W&B accepts it again"
                )
        return None

    def close(self) -> None:
        """Writes what is left, and finishes the run if this library started it. Does nothing if the run is already finished.

        Before it finishes the run, adds the journals and the reports to it as an artifact.
        """
        with self._lock:
            if is_finished(self.run):
                return
            if self._user_run:
                self._user_run.drain()
            if self._owned:
                self._log_files()
                self.run.finish()

    def discard(self) -> None:
        """Deletes the run if this library started it. Its row would be empty in the project forever."""
        with self._lock:
            if self._owned and not is_finished(self.run):
                discard_run(self.run)

    def move_to(self, directory: Path) -> None:
        """Uploads the journal and the report from another folder."""
        self._folders[self.prefix] = directory

    def _log(self, record: IntervalRecord | EpochReport, *, picture: bool) -> None:
        if self._user_run is None:
            self.run.log(row_of(self.prefix, record) | (self._picture(self._newest) if picture else {}), commit=True)
            return
        self._user_run.log(record)
        self._log_picture(self._picture(self._drawing.take))
        if picture and self._drawing.is_free and (draw := self._snapshot()):
            self._drawing.start(lambda: wandb.Image(draw()))

    def _snapshot(self) -> "Callable[[], Image] | None":
        """A function that draws the scores so far; None if there is nothing new.

        W&B shows histograms on a run's page, but not in a project's workspace, where people compare runs.
        """
        has_news = self._pictures is not None and self._pictures.has_news and self._pictures.has_columns
        return self._pictures.snapshot() if self._pictures is not None and has_news else None

    def _newest(self) -> wandb.Image | None:
        draw = self._snapshot()
        return None if draw is None else wandb.Image(draw())

    def _picture(self, make: Callable[[], wandb.Image | None]) -> dict[str, Any]:
        """A picture by its key; empty if there is none, or if it cannot be drawn.

        Does not raise, because a record that fails is written again, but its numbers may be in the run already.
        """
        try:
            picture = make()
            return {} if picture is None else self.keyed({"picture": picture})
        except Exception as error:  # noqa: BLE001 - whatever Pillow or the disk raises
            logger.warning("gwa_logging: backend wandb: no picture (%s)", redact_urls(repr(error)))
            return {}

    def _log_picture(self, values: dict[str, Any]) -> None:
        """Logs a picture in a separate call. Does not raise, as `_picture`."""
        if values:
            try:
                self.run.log(values, commit=self._user_run is None)
            except Exception as error:  # noqa: BLE001 - whatever wandb raises
                logger.warning("gwa_logging: backend wandb: no picture (%s)", redact_urls(repr(error)))

    def _log_files(self) -> None:
        """Adds the journals and the reports of all heads to the run, as the artifact `<prefix>-<run id>`.

        Does not raise, because the run must be finished in any case.
        """
        files = dict(_files_of(self._folders))
        if self.run.disabled or not files:
            return
        try:
            artifact = wandb.Artifact(f"{self.prefix.partition('/')[0]}-{self.run.id}", type=ARTIFACT_TYPE)
            for name, path in files.items():  # "immutable": W&B uploads the file instead of a copy in its cache
                artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact)
        except Exception as error:  # noqa: BLE001 - whatever wandb or the disk raises
            logger.warning("gwa_logging: backend wandb: no artifact (%s)", redact_urls(repr(error)))

    def _with_entry(self, key: str, entry: int) -> dict[str, list[int]]:
        """A list in the run's summary, with one more entry."""
        entries = self.run.summary.get(f"{self.prefix}/{key}") or ()  # type: ignore[no-untyped-call]
        return {key: sorted({*entries, entry})}

    def _summarise(self, values: Mapping[str, Any]) -> None:
        if values:
            self.run.summary.update(self.keyed(values))


def _files_of(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yields the journal and the report in each folder, with the path in the artifact: `<prefix>/<file>`."""
    for prefix, folder in folders.items():
        for name in (FILE_NAME, REPORT_NAME):
            if (path := folder / name).is_file():
                yield f"{prefix}/{name}", path


def _picture_series() -> "PictureSeries | None":
    """Returns None if Pillow is not installed."""
    if find_spec("PIL") is None:
        return None
    from gwa_logging.integrations.heatmap_picture import PictureSeries

    return PictureSeries()


def _table(suspects: SuspectsRecord) -> wandb.Table:
    """The suspects as a table, with pictures if there are any and Pillow is installed."""
    columns, rows = list(suspects.columns), suspects.rows()
    if any(suspect.thumbnail for suspect in suspects.suspects) and find_spec("PIL"):
        from PIL import Image

        columns.append("picture")
        for row, suspect in zip(rows, suspects.suspects, strict=True):
            png = suspect.thumbnail and BytesIO(b64decode(suspect.thumbnail))
            row.append(png and wandb.Image(Image.open(png)))  # type: ignore[arg-type]
    # A mutable table is replaced when it is logged again; older versions of W&B keep the first one.
    options: dict[str, Any] = {"log_mode": "MUTABLE"} if "log_mode" in signature(wandb.Table).parameters else {}
    return wandb.Table(columns=columns, data=rows, **options)  # type: ignore[arg-type]


def _import_pandas() -> None:
    """Makes W&B import pandas now. Otherwise it would do so at the first histogram, half a second within a training step."""
    getattr(wandb.util, "is_pandas_data_frame", bool)(None)


def _reference_to(run: wandb.Run) -> TrackerRunRef:
    """The run's path, and its page or, if it is offline, its folder; empty if W&B is disabled."""
    if run.disabled:
        return TrackerRunRef()
    return TrackerRunRef(run=run.path, url=str(run.settings.sync_dir) if run.offline else run.url)
