"""Weights & Biases: writes records to a run.

In a run that this library started, and in W&B's shared mode (which has no steps that users control), every record is a row.
In a run that the user started, records are added to the user's rows: see `_wandb_rows`.
"""

import json
from base64 import b64decode
from collections.abc import Mapping
from datetime import datetime
from importlib.util import find_spec
from inspect import signature
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from time import sleep
from typing import TYPE_CHECKING, Any

import wandb

from gwa_logging import __version__
from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import logger
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.integrations._tracker import Tracker, invalid_run
from gwa_logging.integrations._wandb_contents import read_contents, run_folders
from gwa_logging.integrations._wandb_rows import RunWriters, UserRunWriter, define_metrics, row_of, writers_of
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

if TYPE_CHECKING:
    from gwa_logging.integrations.heatmap_picture import PictureSeries

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
    resume_options: dict[str, Any] = _resume_options(wanted) if isinstance(wanted, str) else {}
    run = None if resume_options or wanted is None else _check_run(wanted)
    owned = run is None
    if run is None:
        _check_reachable()
    try:
        if run is None:
            if resume_options:
                _wait_for_free_folder_name(resume_options["id"])
            # A plain init() would return any active run, and `close` would finish it.
            run = wandb.init(reinit="create_new", **resume_options or _new_run_options(context.directory))
        if resume_options and run.offline and len(run_folders(run)) < 2:  # offline, W&B accepts any id
            run.finish()
            rmtree(run.settings.sync_dir)
            raise LookupError(f"run={wanted!r} is not in {run.settings.wandb_dir}")
        define_metrics(run, context.name)
        _import_pandas()
    except Exception as error:  # noqa: BLE001 - whatever wandb raises: logging would be impossible
        raise BackendError(
            f"backend='wandb': there is no run to log to ({type(error).__name__}: {error}). Run `wandb login` or set "
            "WANDB_API_KEY; or set WANDB_MODE=offline to keep the run on disk; or pass run=wandb.init(...)"
        ) from (None if has_secret(error) else error)
    return WandbBackend(run, context.name, owned=owned)


def locate(context: RunContext) -> TrackerRunRef:
    """Returns the run that `open_backend` would use; empty if it would start one."""
    wanted = wandb.run if context.run is None else context.run
    if isinstance(wanted, str):
        known = [run.path for run in writers_of if f"/{run.path}".endswith(f"/{wanted.strip('/')}")]
        return TrackerRunRef(run=known[0] if known else wanted)
    return TrackerRunRef() if wanted is None else _reference_to(_check_run(wanted))


class WandbBackend(Tracker):
    """Writes to one run. A write takes about a millisecond and does not wait for the network."""

    name = "wandb"

    def __init__(self, run: wandb.Run, prefix: str, *, owned: bool) -> None:
        """Writes to `run` under `prefix`. `owned` means that this library started the run and finishes it."""
        super().__init__(prefix)
        self.run: wandb.Run = run
        self.run_ref = _reference_to(run)
        self._owned = owned
        writers = writers_of.setdefault(run, RunWriters())
        writers.prefixes.add(prefix)
        self._lock = writers.lock
        self._log_position = 0  # bytes of W&B's internal log that were read
        has_no_steps = run.settings.mode == "shared" or run.disabled
        self._user_run = None if owned or has_no_steps else UserRunWriter(run, prefix, writers)
        # If the user logs between the look at the step and the log call, W&B prints a warning, and the row is made again.
        self.threaded = self._user_run is None
        self._pictures = None if run.disabled else _picture_series()

    def contents(self) -> TrackerContents:
        """Reads which records the run contains: from the server, or from disk if the run is offline."""
        return read_contents(self.run, self.prefix)

    def write(self, record: AnyRecord) -> None:
        """Writes one record.

        Raises:
            BackendError: the run is finished.
        """
        with self._lock:
            if _is_finished(self.run):
                raise BackendError("the W&B run was finished before monitor.close(): close the monitor first")
            super().write(record)

    def on_run(self, run: RunRecord) -> None:
        """Adds the settings to the config of a run that this library started."""
        if self._owned:
            config = {**run.settings, "head": run.head, "version": __version__}
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
        self._log_picture()

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
        """Writes what is left, and finishes the run if this library started it. Does nothing if the run is already finished."""
        with self._lock:
            if _is_finished(self.run):
                return
            if self._user_run:
                self._user_run.drain()
            if self._owned:
                self.run.finish()

    def _log(self, record: IntervalRecord | EpochReport, *, picture: bool) -> None:
        if self._user_run is None:
            self.run.log(row_of(self.prefix, record) | (self._draw() if picture else {}), commit=True)
            return
        self._user_run.log(record)
        if picture:
            self._log_picture()

    def _draw(self) -> dict[str, Any]:
        """A picture of the scores so far, by its key; empty if there is nothing new, or if it cannot be drawn.

        W&B shows histograms on a run's page, but not in a project's workspace, where people compare runs. Does not raise,
        because a record that fails is written again, but its numbers may be in the run already.
        """
        if self._pictures is None or not (self._pictures.has_news and self._pictures.has_columns):
            return {}
        try:
            return self.keyed({"picture": wandb.Image(self._pictures.draw())})
        except Exception as error:  # noqa: BLE001 - whatever Pillow or the disk raises
            logger.warning("gwa_logging: backend wandb: no picture (%s)", redact_urls(repr(error)))
            return {}

    def _log_picture(self) -> None:
        """Logs a picture in a call of its own. Does not raise, as `_draw`."""
        if values := self._draw():
            try:
                self.run.log(values, commit=self._user_run is None)
            except Exception as error:  # noqa: BLE001 - whatever wandb raises
                logger.warning("gwa_logging: backend wandb: no picture (%s)", redact_urls(repr(error)))

    def _with_entry(self, key: str, entry: int) -> dict[str, list[int]]:
        """A list in the run's summary, with one more entry."""
        entries = self.run.summary.get(f"{self.prefix}/{key}") or ()  # type: ignore[no-untyped-call]
        return {key: sorted({*entries, entry})}

    def _summarise(self, values: Mapping[str, Any]) -> None:
        if values:
            self.run.summary.update(self.keyed(values))


def _check_reachable() -> None:
    """Checks that the server responds; W&B itself would retry for 90 seconds.

    Raises:
        BackendError: the server does not respond.
    """
    settings = wandb.setup().settings
    has_proxy = settings.http_proxy or settings.https_proxy or settings.x_proxies
    if settings.mode not in ("online", "run", "shared") or has_proxy:
        return
    try:
        check_reachable(settings.base_url)
    except (OSError, ValueError) as error:
        raise BackendError(
            f"backend='wandb': nothing answers at {settings.base_url} ({error}). Check the network and WANDB_BASE_URL; or set "
            "WANDB_MODE=offline to keep the run on disk; or use backend='local' and replay the journal later"
        ) from error


def _new_run_options(directory: Path) -> dict[str, Any]:
    """The project and the name of a run that this library starts, unless the user has set them for W&B."""
    settings = wandb.setup().settings
    options = {"project": settings.project or "gwa", "name": settings.run_name or directory.name}
    return {key: value for key, value in options.items() if value}


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


def _check_run(run: object) -> wandb.Run:
    if not isinstance(run, wandb.Run):
        raise invalid_run(run, "a wandb.Run, as wandb.init() returns it (Lightning: logger.experiment)")
    if _is_finished(run):
        raise InvalidInputError(f"run={run.id!r}: this run is finished; pass an unfinished one, or none")
    return run


def _resume_options(run: str) -> dict[str, Any]:
    """The arguments of `wandb.init` that resume the run with this id or path."""
    parts = run.strip("/").split("/")
    if len(parts) > 3 or not all(parts):
        raise InvalidInputError(f"run={run!r}: expected a run id, or [entity/]project/id")
    return dict(zip(("id", "project", "entity"), reversed(parts), strict=False)) | {"resume": "must"}


def _wait_for_free_folder_name(run: str) -> None:
    """Waits until W&B gives an offline run another folder than before.

    W&B names the folder by the current second, and would overwrite the files of a run that was started in the same second.
    """
    folders = sorted(Path(wandb.setup().settings.wandb_dir).glob(f"offline-run-*-{run}"))
    taken = folders[-1].name.removesuffix(f"-{run}")[-2:] if folders else None
    while datetime.now().astimezone().strftime("%S") == taken:
        sleep(0.02)


def _is_finished(run: wandb.Run) -> bool:
    """Returns True if the run is finished. Does not ask W&B: most calls on a finished run block for 30 seconds."""
    return bool(getattr(run, "_is_finished", False))  # there is no public name for it
