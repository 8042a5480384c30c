"""Trackio: writes each record to a run, as a separate row.

Rows can have any step, in any order: an interval's row has the training step, an epoch's row the number of the epoch. The
user's rows do not change. Logging a row moves the step that Trackio gives to the user's next row, so this module restores
that step.

Trackio queues rows and alerts, and its thread stores them half a second later. If that fails, it only warns; then only the
journal has them. The run itself is stored with its first row. If the process is killed before, a replay must start a new run.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any, NamedTuple

import trackio
from PIL.Image import Image
from trackio import context_vars
from trackio.run import Run
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import TRACKIO_DIR

from gwa_logging.errors import BackendError
from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.integrations._drawing_thread import DrawingThread
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.integrations._tracker import Tracker, invalid_run
from gwa_logging.integrations.heatmap_picture import PICTURE_KEY, PictureSeries
from gwa_logging.protocols import RunContext, TrackerContents, samples_by_epoch
from gwa_logging.records import (
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
    TrackerRunRef,
)
from gwa_logging.redact import has_secret, redact_urls

logger = logging.getLogger("gwa_logging")

_RUN_IS_MISSING = (
    " and contains this run (a run that was killed within half a second is never stored: "
    "gwa-logging replay DIR --backend trackio --run new)"
)


def open_backend(context: RunContext) -> "TrackioBackend":
    """Uses the run that the user passed, or the active one; without either, starts a run in the project `<name>`.

    A text, "project/run", names an ended run in Trackio's folder. It is resumed, and finished on close.

    Raises:
        InvalidInputError: `run=` is neither a Trackio run nor such a text.
        BackendError: no run can be started or resumed, or Trackio's folder is not writable.
    """
    wanted = context_vars.current_run.get() if context.run is None else _check_run(context.run)
    path, users = (wanted, None) if isinstance(wanted, str) else (None, wanted)
    try:
        if users is None or users.url is None:  # stored here, not sent to a server
            _check_writable()
        if users is None and (server := os.environ.get("TRACKIO_SERVER_URL")):
            check_reachable(server)
        run = users or (_resume(path) if path else _start(context.name))
        _ = run._next_step  # private, so other versions may not have it
    except Exception as error:  # noqa: BLE001 - whatever trackio raises: logging would be impossible
        raise BackendError(
            f"backend='trackio': there is no run to log to ({type(error).__name__}: {error}). Set TRACKIO_DIR to a "
            f"folder that can be written{_RUN_IS_MISSING if path else ''}, or pass run=trackio.init(project=...)"
        ) from (None if has_secret(error) else error)
    return TrackioBackend(run, context.name, owned=users is None)


def locate(context: RunContext) -> TrackerRunRef:
    """Returns the run that `open_backend` would use; empty if it would start one."""
    wanted = context_vars.current_run.get() if context.run is None else _check_run(context.run)
    if isinstance(wanted, str):
        return TrackerRunRef(run=wanted)
    return TrackerRunRef() if wanted is None else _reference_to(wanted)


class TrackioBackend(Tracker):
    """Writes to one run. A write takes 0.2 ms, since Trackio queues it.

    The training thread waits meanwhile: in another thread the user's `log` could come between the row and the restored step.
    So pictures are drawn in a thread, and logged with the next record.
    """

    name = "trackio"
    threaded = False

    def __init__(self, run: Run, prefix: str, *, owned: bool) -> None:
        """Writes to `run` under `prefix`. `owned` means that this library started or resumed the run and finishes it."""
        super().__init__(prefix)
        self.run: Run = run
        self.run_ref = _reference_to(run)
        self._owned = self.owns_run = owned
        self._pictures = PictureSeries()
        self._drawing = DrawingThread[_Drawing]()
        self._draws = True

    def contents(self) -> TrackerContents:
        """Reads which records Trackio's folder contains; none if the run is on a server."""
        project, name, run_id = self.run.project, self.run.name, self.run.id
        rows = SQLiteStorage.get_logs(project, name, run_id=run_id)
        alerts = SQLiteStorage.get_alerts(project, name, run_id=run_id)
        count, excluded = (f"{self.prefix}/{key}" for key in ("stats/count", "stats/excluded"))

        def steps(key: str) -> frozenset[int]:
            return frozenset(row["step"] for row in rows if f"{self.prefix}/{key}" in row)

        return TrackerContents(
            intervals=steps("steps/mean"),
            epochs=samples_by_epoch((row["step"], row[count] + row[excluded]) for row in rows if count in row),
            alerts=frozenset(alert["step"] for alert in alerts if alert["title"] == StopAlert.TITLE),
            suspects=steps("stats/suspects_of"),
            closes=frozenset(step + 1 for step in steps("best")),
        )

    def on_run(self, run: RunRecord) -> None:
        """Adds the head and the settings to the config of a run that this library started."""
        if self._owned:
            self.run.config[self.prefix] = {"head": run.head, **run.settings}

    def on_interval(self, interval: IntervalRecord) -> None:
        """Logs the histogram and its numbers; starts to draw a picture if one is due."""
        histogram = interval.histogram.to_display(DISPLAY_BINS, interval.display_limit)
        self._log(interval.step, {"scores": trackio.Histogram(np_histogram=histogram), **interval.metrics})
        self._log_drawing()
        if self._pictures.add(interval):
            self._draw()

    def on_epoch(self, report: EpochReport) -> None:
        """Logs the numbers; starts to draw a picture if one is due."""
        self._log(report.epoch, report.metrics)
        self._log_drawing()
        if self._pictures.add_epoch(report):
            self._draw()

    def on_alert(self, alert: StopAlert) -> None:
        """Sends an alert."""
        self.run.alert(title=alert.TITLE, text=alert.text, level=trackio.AlertLevel.WARN, step=alert.epoch)
        self._pictures.add_alert(alert)

    def on_suspects(self, suspects: SuspectsRecord) -> None:
        """Logs a table."""
        table = trackio.Table(columns=list(suspects.columns), data=suspects.rows())
        self._log(suspects.step, {"suspects": table, "stats/suspects_of": suspects.samples})

    def on_close(self, end: CloseRecord) -> None:
        """Logs the best epoch as a text, which Trackio does not plot, and the pictures that the series lacks."""
        if end.best_epoch is not None:
            self._log(end.epochs - 1, {"best": f"epoch {end.best_epoch}: {end.best_value:.6g}"})
        self._drawing.wait()
        self._log_drawing()
        for step in self._pictures.missing_steps():
            self._draw(step)
            self._drawing.wait()
            self._log_drawing()

    def close(self) -> None:
        """Finishes the run if this library started it, which stores what is still in Trackio's queue."""
        if self._owned:
            self.run.finish()  # type: ignore[no-untyped-call]

    def _draw(self, step: int | None = None) -> None:
        if self._draws and self._drawing.is_free:
            draw = self._pictures.snapshot(step)
            self._drawing.start(partial(_stored, self._pictures.last_step if step is None else step, draw))

    def _log_drawing(self) -> None:
        """Logs the picture that was drawn, if there is one.

        Does not raise, because a record that fails is written again, but its numbers are in the run already.
        """
        try:
            if drawing := self._drawing.take():
                try:
                    self._log(drawing.step, {PICTURE_KEY: trackio.Image(drawing.path)})  # copies the file
                finally:
                    drawing.path.unlink(missing_ok=True)
        except Exception as error:  # noqa: BLE001 - whatever Pillow, the disk or trackio raises
            self._draws = False
            logger.warning(
                "gwa_logging: backend trackio: no picture (%s); no more will be tried", redact_urls(repr(error))
            )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        users_step = self.run._next_step  # there is no public name for it
        self.run.log(self.keyed(values), step=step)
        self.run._next_step = users_step


class _Drawing(NamedTuple):
    """A picture in a temporary file, which whoever takes it has to delete.

    Attributes:
        step: the training step up to which it shows the run.
        path: of the PNG file.
    """

    step: int
    path: Path


def _stored(step: int, draw: Callable[[], Image]) -> _Drawing:
    """Draws a picture into a temporary file."""
    image = draw()
    with NamedTemporaryFile(prefix="gwa_logging-", suffix=".png", delete=False) as file:
        image.save(file, "png")
    return _Drawing(step, Path(file.name))


def _reference_to(run: Run) -> TrackerRunRef:
    return TrackerRunRef(run=f"{run.project}/{run.name}") if run.url is None else TrackerRunRef(url=_page(run.url))


def _page(url: str) -> str:
    """Returns the page of a run on a server, or on a Space, for which Trackio's `url` is only a name."""
    return url if "://" in url else f"https://huggingface.co/spaces/{url}"


def _check_writable() -> None:
    """Raises OSError if Trackio's folder is not writable; Trackio itself would only warn, later."""
    TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=TRACKIO_DIR).close()


def _start(project: str, **options: Any) -> Run:
    """Starts a run without making it the active one, which `trackio.init` would finish and `trackio.log` would write to."""
    return copy_context().run(trackio.init, project, embed=False, auto_log_gpu=False, auto_log_cpu=False, **options)


def _resume(path: str) -> Run:
    project, _, name = path.partition("/")
    run = _start(project, name=name, resume="must")
    run.config |= SQLiteStorage.get_run_config(project, name, run_id=run.id) or {}  # otherwise Trackio drops it
    return run


def _check_run(run: object) -> Run | str:
    if not isinstance(run, Run | str) or (isinstance(run, str) and not all(run.partition("/"))):
        raise invalid_run(run, "a Trackio run, as trackio.init() returns it, or 'project/run'")
    return run
