"""Weights & Biases: writes records into a run.

In W&B a row can only be added at the end: once the run's step has moved on, a row that the user logs with an earlier
`step=` is dropped. So on a run that the user started what we have is added to the row that is open, with `commit=False`,
and the user's own next `log` commits it. Within one row the last value of a key wins; hence two rules that lose nothing:

- intervals that meet in one row are merged, and the sum is logged again: histograms add up;
- of the epochs that meet in one row the first goes out; the others wait, one for each later row.

A user who never logs would see nothing before the end. So while the run holds nothing of theirs, epoch k's report goes
into row k, as if they logged it with `step=epoch`: that commits the row before, and when they begin to log with
`step=epoch` theirs still lands. W&B's summary says whether they log: it has every key of the rows that are committed.
Their first row, while it is open, is overlooked, and may be committed by ours.

A late record is appended like any other: its axis, `gwa/step` or `gwa/epoch`, is a metric of the row and may be lower than in
the row before. So what an outage kept from W&B can be sent in any order. A row of merged intervals says which steps it
covers, `gwa/covers`, so that it can be read back which intervals the run holds.

All this takes that the user does not log between our look at the step and our log: the training thread stands still
meanwhile, but not for ever. Where W&B has taken longer, an interval can be missing in it or be counted twice; rows of
the user's cannot, and the journal has every interval.

On a run that we started, and in W&B's shared mode, which has no such steps, every record is a row of its own.
"""

import json
import sys
from base64 import b64decode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from subprocess import PIPE, Popen
from threading import Lock
from time import sleep
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import wandb

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.protocols import RunContext, TrackerContents, samples_by_epoch
from gwa_logging.records import (
    EPOCH_KEYS,
    QUANTILES,
    STEP_KEYS,
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

UPLOAD_FAILURE = b"filestream: fatal error"
"""What W&B's log says when it has given up uploading."""

HISTOGRAM_SUBKEYS = ("", "._type", ".bins", ".values")
"""W&B stores a histogram under these, and looks each of them up by itself."""


def open_backend(context: RunContext) -> "WandbBackend":
    """Takes the user's run, or the active one; if there is neither, starts one of its own. A run id (or
    `[entity/]project/id`) is taken up again, as W&B resumes it, and finished on close.

    Raises:
        InvalidInputError: `run=` is not a run of W&B, or one that is finished.
        BackendError: no run can be started or resumed, or the active one does not answer.
    """
    wanted = wandb.run if context.run is None else context.run
    named: dict[str, Any] = _named(wanted) if isinstance(wanted, str) else {}
    run = None if named or wanted is None else _checked(wanted)
    owned = run is None
    if run is None:
        _knock()
    try:
        if run is None:
            if named:
                _wait_for_a_folder_of_its_own(named["id"])
            # Not a plain init(): that hands out any run that is active, and we would finish it.
            run = wandb.init(reinit="create_new", **named)
        if named and run.offline and len(_folders(run)) < 2:
            _discard(run)
            raise LookupError(f"run={wanted!r} is not in {run.settings.wandb_dir}")  # offline, W&B believes any id
        _define_metrics(run, context.name)
        _warm_up()
    except Exception as error:  # noqa: BLE001 - whatever wandb raises here: nothing could ever be logged
        raise BackendError(
            f"backend='wandb': there is no run to log to ({type(error).__name__}: {error}). Run `wandb login` or set "
            "WANDB_API_KEY; or set WANDB_MODE=offline to keep the run on disk; or pass run=wandb.init(...)"
        ) from (None if has_secret(error) else error)
    return WandbBackend(run, context.name, owned=owned)


def locate(context: RunContext) -> TrackerRunRef:
    """The place of the run that `open_backend` would take; empty if it would start one."""
    wanted = wandb.run if context.run is None else context.run
    if isinstance(wanted, str):
        known = [run.path for run in _writers if f"/{run.path}".endswith(f"/{wanted.strip('/')}")]
        return TrackerRunRef(run=known[0] if known else wanted)
    return TrackerRunRef() if wanted is None else _place(_checked(wanted))


def _knock() -> None:
    """Checks that the server answers: W&B itself would try for a minute and a half.

    Raises:
        BackendError: it does not.
    """
    settings = wandb.setup().settings
    if (
        settings.mode not in ("online", "run", "shared")
        or settings.http_proxy
        or settings.https_proxy
        or settings.x_proxies
    ):
        return
    try:
        check_reachable(settings.base_url)
    except (OSError, ValueError) as error:
        raise BackendError(
            f"backend='wandb': nothing answers at {settings.base_url} ({error}). Check the network and WANDB_BASE_URL; or set "
            "WANDB_MODE=offline to keep the run on disk; or use backend='local' and replay the journal later"
        ) from error


class _Writers:
    """Those that write into one run, one for each head, each from a thread of its own.

    Attributes:
        lock: held by the one that looks at the step and logs, undisturbed.
        prefixes: of their keys.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.prefixes: set[str] = set()

    def wrote(self, key: str) -> bool:
        """Whether a key of the run's summary is one of theirs, or W&B's."""
        return key.startswith(("_", *(f"{prefix}/" for prefix in self.prefixes)))


_writers: WeakKeyDictionary[wandb.Run, _Writers] = WeakKeyDictionary()


class WandbBackend:
    """Writes into one run. See `gwa_logging.protocols.Backend`."""

    name = "wandb"

    def __init__(self, run: wandb.Run, prefix: str, *, owned: bool) -> None:
        """Writes into `run` under `prefix`; `owned` says that nobody else does, and that `close` finishes it."""
        self.run = run
        self._prefix = prefix
        self._owned = owned
        writers = _writers.setdefault(run, _Writers())
        writers.prefixes.add(prefix)
        self._lock = writers.lock
        self._log_read = 0  # bytes of W&B's own log
        stepless = run.settings.mode == "shared" or run.disabled
        self._guest = None if owned or stepless else _Guest(run, prefix, writers)
        # As a guest, while the training thread waits: otherwise the user's `log` could come between looking at the step and
        # logging, and an interval would be counted twice. A write takes about a millisecond.
        self.threaded = self._guest is None

    @property
    def run_ref(self) -> TrackerRunRef:
        """The run's path, and its page; if it is offline, its folder. Nothing if W&B is disabled."""
        return _place(self.run)

    def contents(self) -> TrackerContents:
        """What the run has of ours: by its history on the server, or, if it is offline, by what W&B has put on disk.

        Raises:
            BackendError: what is on disk cannot be read.
        """
        begin = f"{self._prefix}/"
        intervals: list[tuple[int, int]] = []
        reports: list[tuple[int, float]] = []
        alerts, suspects = set[int](), set[int]()
        for row in self._rows() if not self.run.disabled else ():
            of = {key.removeprefix(begin): value for key, value in row.items() if key.startswith(begin)}
            if "step" in of:
                intervals += of.get("covers", [(of["step"], of["step"])])
            if "count" in of:
                reports.append((of["epoch"], of["count"] + of["excluded"]))
            alerts.update(of.get("stop_epochs", ()))
            suspects.update(of.get("suspects_steps", ()))
        return TrackerContents(_Steps(intervals), samples_by_epoch(reports), alerts, suspects)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """The rows of the history with our axes, and what only the summary has: the rest of it can be ahead of the history."""
        only_in_summary = [f"{self._prefix}/{key}" for key in ("stop_epochs", "suspects_steps")]
        if self.run.offline:
            for folder in _folders(self.run):
                for kind, row in _rows_in(folder):
                    yield row if kind == "history" else {key: row[key] for key in only_in_summary if key in row}
        else:
            run = wandb.Api().run(self.run.path)
            yield {key: run.summary.get(key, ()) for key in only_in_summary}  # type: ignore[no-untyped-call]
            # A scan gives the rows that have all of its keys, and nothing else of them.
            for keys in (["step"], ["step", "covers"], ["epoch", "count", "excluded"]):
                yield from run.scan_history(keys=[f"{self._prefix}/{key}" for key in keys])

    def write(self, record: AnyRecord) -> None:
        """Writes one record. Takes about a millisecond; does not wait for the network.

        Raises:
            BackendError: the run is finished.
        """
        with self._lock:
            self._write(record)

    def _write(self, record: AnyRecord) -> None:
        if _finished(self.run):
            raise BackendError("the W&B run was finished before monitor.close(): close the monitor first")
        if isinstance(record, IntervalRecord | EpochReport):
            self._log(record)
        elif isinstance(record, StopAlert):
            best = {"best_epoch": record.best_epoch, "best_value": record.best_value, "stop_epoch": record.epoch}
            self._summarise({**best, **self._with("stop_epochs", record.epoch)})
            # Last, because a record that fails is written again, and W&B does not drop the second of two alerts.
            self.run.alert(title=ALERT_TITLE, text=_alert_text(record), level="WARN")
        elif isinstance(record, SuspectsRecord):
            self.run.log({f"{self._prefix}/suspects": _table(record)}, commit=self._guest is None)
            self._summarise(self._with("suspects_steps", record.step))
        elif isinstance(record, CloseRecord):
            if record.best_epoch is not None:
                self._summarise({"best_epoch": record.best_epoch, "best_value": record.best_value})
        elif isinstance(record, RunRecord) and self._owned:
            config = {self._prefix: record.settings}
            self.run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]

    def refusal(self) -> str | None:
        """Why W&B has stopped uploading this run, if it has: after an answer such as 401 it never tries again, only prints a
        line, and takes rows as before. It tells that in its own log alone.
        """
        path = Path(self.run.settings.log_internal)
        if self.run.disabled or self.run.offline or not path.is_file():
            return None
        with path.open("rb") as log:
            log.seek(self._log_read)
            lines = log.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # is still being written
        self._log_read += sum(map(len, lines))
        for line in lines:
            if UPLOAD_FAILURE in line:
                message = json.loads(line)["msg"].partition(UPLOAD_FAILURE.decode())[2].strip(": ")
                return (
                    f"W&B has stopped uploading this run ({message}); from now on it is only in {self.run.settings.sync_dir}. "
                    "Send it with `wandb sync` when W&B takes it again"
                )
        return None

    def close(self) -> None:
        """Writes what is left; finishes the run if it is ours. Does nothing to a run that is finished already."""
        with self._lock:
            if _finished(self.run):
                return
            if self._guest:
                self._guest.drain()
            if self._owned:
                self.run.finish()

    def _log(self, record: IntervalRecord | EpochReport) -> None:
        if self._guest:
            self._guest.log(record)
        elif row := _row(self._prefix, record):
            self.run.log(row, commit=True)

    def _with(self, key: str, entry: int) -> dict[str, list[int]]:
        """A list of the summary, with one more entry."""
        entries = self.run.summary.get(f"{self._prefix}/{key}") or ()  # type: ignore[no-untyped-call]
        return {key: sorted({*entries, entry})}

    def _summarise(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update({f"{self._prefix}/{key}": value for key, value in values.items()})


class _Steps:
    """Steps as ranges: few, however long the run."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        """Takes ranges (first, last), both inclusive, in any order; they may overlap."""
        by_first = np.array(sorted(map(tuple, ranges)), dtype=np.int64).reshape(-1, 2)
        self._firsts, self._lasts = by_first[:, 0], np.maximum.accumulate(by_first[:, 1])

    def __contains__(self, step: object) -> bool:
        before = int(np.searchsorted(self._firsts, step, side="right"))  # type: ignore[call-overload]
        return before > 0 and bool(step <= self._lasts[before - 1])


class _Guest:
    """Adds to the rows of a run whose steps are the user's. What it remembers changes only after W&B took the row."""

    def __init__(self, run: wandb.Run, prefix: str, writers: _Writers) -> None:
        self.run = run
        self._prefix = prefix
        self._writers = writers
        self._step: int | None = None  # of the row that holds the following two; None: there is nothing of ours
        self._interval: IntervalRecord | None = None
        self._covers: tuple[tuple[int, int], ...] = ()  # the steps of that interval, as ranges
        self._has_epoch = False
        self._waiting: deque[EpochReport] = deque()

    def log(self, record: IntervalRecord | EpochReport) -> None:
        """Adds a record to the open row; an epoch's opens its own if the user does not log."""
        step = self._open_row()
        opens = isinstance(record, EpochReport) and step < record.epoch and not self._user_logs(step)
        if opens:
            step = record.epoch
        same_row = step == self._step
        interval, covers = (self._interval, self._covers) if same_row else (None, ())
        has_epoch = same_row and self._has_epoch
        waiting = deque(self._waiting)
        row: dict[str, Any] = {}
        if isinstance(record, EpochReport):
            waiting.append(record)
        elif record.count:
            interval = record if interval is None else interval.merge(record)
            covers = _covering(covers, record)
            row |= _row(self._prefix, interval)
            if interval is not record:
                row[f"{self._prefix}/covers"] = covers
        if waiting and not has_epoch:
            row |= _row(self._prefix, waiting.popleft())
            has_epoch = True
        if row:
            # With a step W&B rather drops ours than moves past a row that the user may have opened meanwhile.
            self.run.log(row, step=step if opens else None, commit=False)
            self._step, self._interval, self._covers, self._has_epoch = step, interval, covers, has_epoch
        self._waiting = waiting

    def _open_row(self) -> int:
        """The step of the open row. In a run that was resumed W&B says 0 before the first `log`."""
        return max(self.run.step, self.run.starting_step)

    def _user_logs(self, step: int) -> bool:
        keys = list(self.run.summary.keys())  # type: ignore[no-untyped-call]
        unanswered = step > 0 and not keys  # as W&B says it when it has no answer
        return unanswered or not all(self._writers.wrote(key) for key in keys)

    def drain(self) -> None:
        """Gives each epoch that still waits a row. The last one stays open, for what the user may log; W&B's finish takes it.

        So W&B's step moves only if epochs had to wait: if the user has logged less often than once per epoch.
        """
        while self._waiting:
            step = self._open_row()
            if step == self._step and self._has_epoch:
                self.run.log({}, commit=True)
                self._step = None
                continue
            self.run.log(_row(self._prefix, self._waiting[0]), commit=False)
            self._waiting.popleft()
            self._step, self._has_epoch = step, True


def _covering(ranges: tuple[tuple[int, int], ...], record: IntervalRecord) -> tuple[tuple[int, int], ...]:
    """Ranges of steps and those of one more interval; one that follows the last range makes it longer."""
    first = record.step - record.steps + 1
    if ranges and ranges[-1][1] + 1 == first:
        first = ranges[-1][0]
        ranges = ranges[:-1]
    return (*ranges, (first, record.step))


def _row(prefix: str, record: IntervalRecord | EpochReport) -> dict[str, Any]:
    """What a record is in W&B; empty for an interval without a score."""
    if isinstance(record, EpochReport):
        values: dict[str, Any] = {"epoch": record.epoch, **record.metrics}
    elif record.count:
        histogram = record.histogram.to_display(DISPLAY_BINS, record.display_limit)
        values = {
            "step": record.step,
            "scores": wandb.Histogram(np_histogram=histogram),
            **record.metrics,
        }
    else:
        values = {}
    return {f"{prefix}/{key}": value for key, value in values.items()}


def _table(record: SuspectsRecord) -> wandb.Table:
    """The suspects, with their pictures if there are any and Pillow is installed, without which W&B shows none."""
    columns, rows = list(record.COLUMNS), record.rows()
    if any(suspect.thumbnail for suspect in record.suspects) and find_spec("PIL"):
        from PIL import Image

        columns.append("picture")
        for row, suspect in zip(rows, record.suspects, strict=True):
            png = suspect.thumbnail and BytesIO(b64decode(suspect.thumbnail))
            row.append(png and wandb.Image(Image.open(png)))  # type: ignore[arg-type]
    return wandb.Table(columns=columns, data=rows)  # type: ignore[arg-type]


def _define_metrics(run: wandb.Run, prefix: str) -> None:
    """Gives every key its axis, by its exact name: a pattern would lose against the user's own, at random."""
    axes = {
        "step": (*(f"scores{subkey}" for subkey in HISTOGRAM_SUBKEYS), *STEP_KEYS, *QUANTILES, "covers"),
        "epoch": tuple(EPOCH_KEYS),
    }
    for axis, keys in axes.items():
        run.define_metric(f"{prefix}/{axis}", hidden=True)
        for key in keys:
            run.define_metric(f"{prefix}/{key}", step_metric=f"{prefix}/{axis}")


def _warm_up() -> None:
    """Has W&B import pandas now: its first look at a histogram would, half a second in the middle of a step."""
    getattr(wandb.util, "is_pandas_data_frame", bool)(None)


def _place(run: wandb.Run) -> TrackerRunRef:
    if run.disabled:
        return TrackerRunRef()
    return TrackerRunRef(run=run.path, url=str(run.settings.sync_dir) if run.offline else run.url)


def _checked(run: Any) -> wandb.Run:
    if not isinstance(run, wandb.Run):
        raise InvalidInputError(
            f"run={run!r}: expected a wandb.Run, as wandb.init() returns it (Lightning: logger.experiment), found "
            f"{type(run).__module__}.{type(run).__qualname__}"
        )
    if _finished(run):
        raise InvalidInputError(f"run={run.id!r}: this run is finished; pass one that is going on, or none")
    return run


def _named(run: str) -> dict[str, Any]:
    """What W&B must be told to resume a run of this id or path."""
    parts = run.strip("/").split("/")
    if len(parts) > 3 or not all(parts):
        raise InvalidInputError(f"run={run!r}: expected a run id, or [entity/]project/id")
    return dict(zip(("id", "project", "entity"), reversed(parts), strict=False)) | {"resume": "must"}


def _folders(run: wandb.Run) -> list[Path]:
    """Where W&B has put this run on disk: a folder for each time that it was taken up."""
    return sorted(Path(run.settings.wandb_dir).glob(f"*run-*-{run.id}"))


def _wait_for_a_folder_of_its_own(run: str) -> None:
    """Waits while the second lasts in which this run was last taken up, offline: W&B names its folder by the second, and would
    write over what it has."""
    folders = sorted(Path(wandb.setup().settings.wandb_dir).glob(f"offline-run-*-{run}"))
    taken = folders[-1].name.removesuffix(f"-{run}")[-2:] if folders else None
    while datetime.now().astimezone().strftime("%S") == taken:
        sleep(0.02)


def _discard(run: wandb.Run) -> None:
    run.finish()
    rmtree(run.settings.sync_dir)


def _rows_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an offline run's history, and the changes of its summary."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        for line in reading.stdout:
            record = json.loads(line)
            if record["type"] == "history":
                yield "history", record["history"]["item"]
            elif record["type"] == "summary":
                yield "summary", record["summary"].get("update", {})
        error = reading.stderr.read()
    if reading.returncode:
        raise BackendError(f"what W&B has put into {folder} cannot be read: {error.strip()[-300:]}")


def _finished(run: wandb.Run) -> bool:
    """Without asking W&B: most of what one can ask of a finished run waits half a minute for an answer."""
    return bool(getattr(run, "_is_finished", False))  # wandb has no public name for it


def _alert_text(alert: StopAlert) -> str:
    lines = [
        alert.message,
        f"Best epoch: {alert.best_epoch}, {alert.statistic} = {alert.best_value:.4g}; now {alert.value:.4g}.",
        f"Reason: {alert.reason.value}.",
        *(f"But: {caveat}." for caveat in alert.caveats),
    ]
    return "\n".join(lines)
