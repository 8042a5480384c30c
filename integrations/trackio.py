"""Trackio: writes records into a run, as rows of their own.

A row in Trackio can have any step, in any order, so an interval has its training step and an epoch its number, as in
MLflow; the user's rows stay as they are. One thing must be put back: logging a row moves the step that the run gives to
the user's next row without one.

Trackio takes rows and alerts into a queue and stores them half a second later, in a thread of its own. If it cannot, it
warns, and raises nothing: they are in the journal then, and nowhere else. The run itself is stored with its first row, so
that of a process that is killed before, a replay must start a new one.
"""

import os
from contextvars import copy_context
from tempfile import TemporaryFile
from typing import Any

import trackio
from trackio import context_vars
from trackio.run import Run
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import TRACKIO_DIR

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.integrations._reachable import check_reachable
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
from gwa_logging.redact import has_secret

ALERT_TITLE = "GWA: stop"

_WITH_PATH = (
    " and has this run (one that is killed within its first half second is never stored: "
    "gwa-logging replay DIR --backend trackio --run new)"
)


def open_backend(context: RunContext) -> "TrackioBackend":
    """Takes the user's run, or the active one; if there is neither, starts one of its own, in the project `<name>`.

    A text, "project/run", names a run in Trackio's folder that has ended; it is taken up again, and finished on close.

    Raises:
        InvalidInputError: `run=` is neither a run of Trackio nor such a text.
        BackendError: no run can be started or taken up, or Trackio's folder cannot be written.
    """
    wanted = context_vars.current_run.get() if context.run is None else _checked(context.run)
    path, users = (wanted, None) if isinstance(wanted, str) else (None, wanted)
    try:
        if users is None or users.url is None:  # stored here, not sent to a server
            _knock()
        if users is None and (server := os.environ.get("TRACKIO_SERVER_URL")):
            check_reachable(server)
        run = users or (_resume(path) if path else _start(context.name))
        _ = run._next_step  # other versions may have it under another name
    except Exception as error:  # noqa: BLE001 - whatever trackio raises here: nothing could ever be logged
        raise BackendError(
            f"backend='trackio': there is no run to log to ({type(error).__name__}: {error}). Set TRACKIO_DIR to a "
            f"folder that can be written{_WITH_PATH if path else ''}, or pass run=trackio.init(project=...)"
        ) from (None if has_secret(error) else error)
    return TrackioBackend(run, context.name, owned=users is None)


def locate(context: RunContext) -> TrackerRunRef:
    """The place of the run that `open_backend` would take; empty if it would start one."""
    wanted = context_vars.current_run.get() if context.run is None else _checked(context.run)
    if isinstance(wanted, str):
        return TrackerRunRef(run=wanted)
    return TrackerRunRef() if wanted is None else _place(wanted)


class TrackioBackend:
    """Writes into one run. See `gwa_logging.protocols.Backend`."""

    name = "trackio"
    threaded = False
    """A write takes 0.2 ms, into Trackio's own queue; and on another thread the user's `log` could come between ours and
    putting the step back."""

    def __init__(self, run: Run, prefix: str, *, owned: bool) -> None:
        """Writes into `run` under `prefix`; `owned` says that nobody else does, and that `close` finishes it."""
        self.run = run
        self.run_ref = _place(run)
        self._prefix = prefix
        self._owned = owned

    def contents(self) -> TrackerContents:
        """What Trackio has stored of ours; nothing if it is not stored here."""
        where, name, run_id = self.run.project, self.run.name, self.run.id
        rows = SQLiteStorage.get_logs(where, name, run_id=run_id, scalar_only=True)
        alerts = SQLiteStorage.get_alerts(where, name, run_id=run_id)
        count, excluded = (f"{self._prefix}/{key}" for key in ("count", "excluded"))

        def steps(key: str) -> frozenset[int]:
            return frozenset(row["step"] for row in rows if f"{self._prefix}/{key}" in row)

        return TrackerContents(
            intervals=steps("step_mean"),
            epochs=samples_by_epoch((row["step"], row[count] + row[excluded]) for row in rows if count in row),
            alerts=frozenset(alert["step"] for alert in alerts if alert["title"] == ALERT_TITLE),
            suspects=steps("suspects_of"),
            closes=frozenset(step + 1 for step in steps("best_epoch")),
        )

    def write(self, record: AnyRecord) -> None:
        """Hands one record to Trackio."""
        if isinstance(record, IntervalRecord):
            if record.count:
                histogram = record.histogram.to_display(DISPLAY_BINS, record.display_limit)
                self._log(record.step, {"scores": trackio.Histogram(np_histogram=histogram), **record.metrics})
        elif isinstance(record, EpochReport):
            self._log(record.epoch, record.metrics)
        elif isinstance(record, StopAlert):
            text = "\n".join([record.message, *(f"But: {caveat}." for caveat in record.caveats)])
            self.run.alert(title=ALERT_TITLE, text=text, level=trackio.AlertLevel.WARN, step=record.epoch)
        elif isinstance(record, SuspectsRecord):
            table = trackio.Table(columns=list(record.COLUMNS), data=record.rows())
            self._log(record.step, {"suspects": table, "suspects_of": record.samples})
        elif isinstance(record, CloseRecord):
            if record.best_epoch is not None:
                self._log(record.epochs - 1, {"best_epoch": record.best_epoch, "best_value": record.best_value})
        elif isinstance(record, RunRecord) and self._owned:
            self.run.config[self._prefix] = {"head": record.head, **record.settings}

    def close(self) -> None:
        """Finishes the run if it is ours, which stores what is still in Trackio's queue."""
        if self._owned:
            self.run.finish()  # type: ignore[no-untyped-call]

    def _log(self, step: int, values: dict[str, Any]) -> None:
        users = self.run._next_step  # Trackio has no public name for it
        self.run.log({f"{self._prefix}/{key}": value for key, value in values.items()}, step=step)
        self.run._next_step = users


def _place(run: Run) -> TrackerRunRef:
    return TrackerRunRef(run=f"{run.project}/{run.name}") if run.url is None else TrackerRunRef(url=_page(run.url))


def _page(url: str) -> str:
    """Where to look at a run that is sent to a server, or to a Space, which has only a name."""
    return url if "://" in url else f"https://huggingface.co/spaces/{url}"


def _knock() -> None:
    """Looks whether Trackio could store anything: it would only warn, after a while."""
    TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=TRACKIO_DIR).close()


def _start(project: str, **options: Any) -> Run:
    """A run of our own. Not the active one: the user's `trackio.init` would finish it, and `trackio.log` write into it."""
    return copy_context().run(trackio.init, project, embed=False, auto_log_gpu=False, auto_log_cpu=False, **options)


def _resume(path: str) -> Run:
    project, _, name = path.partition("/")
    run = _start(project, name=name, resume="must")
    run.config |= SQLiteStorage.get_run_config(project, name, run_id=run.id) or {}  # or Trackio would forget it
    return run


def _checked(run: Any) -> Run | str:
    if not isinstance(run, Run | str) or (isinstance(run, str) and not all(run.partition("/"))):
        raise InvalidInputError(
            f"run={run!r}: expected a run of Trackio, as trackio.init() returns it, or 'project/run', found "
            f"{type(run).__module__}.{type(run).__qualname__}"
        )
    return run
