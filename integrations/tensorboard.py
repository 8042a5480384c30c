"""TensorBoard: writes records into an event file, with the `tensorboard` package alone, no TensorFlow and no PyTorch.

Of the event files in one folder, TensorBoard's own reader follows only the newest: were ours among the user's, it would
hide what the user logs from then on. So ours has a folder of its own in the log directory, named like the metrics, and
TensorBoard shows it as a run beside the user's.

A record is one event: it is in the file as a whole or not at all. TensorBoard keeps numbers as float32.
"""

import os
from collections import Counter
from os import PathLike
from pathlib import Path
from time import sleep, time
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator, ScalarEvent
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.histogram import DISPLAY_BINS
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


def open_backend(context: RunContext) -> "TensorBoardBackend":
    """Takes the user's log directory, or the run's own folder, and opens an event file in its subfolder `<name>`.

    `run=` is a folder, or a SummaryWriter (PyTorch's, tensorboardX's; also Lightning's TensorBoardLogger), whose folder
    is taken. None takes the folder that the journal is in: `tensorboard --logdir gwa_runs` shows all of them.

    Raises:
        InvalidInputError: `run=` is neither a folder nor something that has one.
        BackendError: the folder cannot be written.
    """
    log_directory = _log_directory(context.directory if context.run is None else context.run)
    try:
        return TensorBoardBackend(log_directory, context.name)
    except Exception as error:  # noqa: BLE001 - whatever a file system raises, also a remote one
        raise BackendError(
            f"backend='tensorboard': {log_directory!r} cannot be written ({type(error).__name__}: {error}). "
            "Pass a log directory that can: watch(..., run='runs/experiment')"
        ) from (None if has_secret(error) else error)


def locate(context: RunContext) -> TrackerRunRef:
    """The place of the log directory that `open_backend` would take."""
    return TrackerRunRef(run=_absolute(_log_directory(context.directory if context.run is None else context.run)))


class TensorBoardBackend:
    """Writes one event file. See `gwa_logging.protocols.Backend`."""

    name = "tensorboard"
    threaded = True
    """A write takes well under a millisecond on a local disk, but a log directory is often on a network."""

    def __init__(self, log_directory: str, prefix: str) -> None:
        """Opens an event file in the folder `prefix` of `log_directory`."""
        self.run = log_directory
        where = _absolute(log_directory)
        self.run_ref = TrackerRunRef(run=where)
        self._prefix = prefix
        self._folder = os.path.join(where, prefix)  # noqa: PTH118 - it may be an address, gs://
        self._file: EventFileWriter | None = self._open()

    def contents(self) -> TrackerContents:
        """What the event files in our folder hold. Reads them."""
        events = EventAccumulator(self._folder, size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
        tags, texts = events.Tags()[SCALARS], events.Tags()[TENSORS]

        def scalars(key: str) -> list[ScalarEvent]:
            tag = f"{self._prefix}/{key}"
            return events.Scalars(tag) if tag in tags else []

        # Both numbers are in the same event, so they come in the same order.
        reports = zip(scalars("count"), scalars("excluded"), strict=True)
        alerts = Counter(event.step for event in scalars("stop_epoch"))
        # Each alert names the best epoch, and so does the end.
        ends = Counter(event.step for event in scalars("best_epoch")) - alerts
        table = f"{self._prefix}/suspects"
        return TrackerContents(
            intervals=frozenset(event.step for event in scalars("step_mean")),
            epochs=samples_by_epoch((count.step, count.value + excluded.value) for count, excluded in reports),
            alerts=frozenset(alerts),
            suspects=frozenset(event.step for event in events.Tensors(table)) if table in texts else frozenset(),
            closes=frozenset(step + 1 for step in ends),
        )

    def write(self, record: AnyRecord) -> None:
        """Writes one record, and has the file hold it before it returns."""
        if isinstance(record, IntervalRecord):
            if record.count:
                self._add(record, record.step, self._histogram("scores", record), *self._scalars(record.metrics))
        elif isinstance(record, EpochReport):
            self._add(record, record.epoch, *self._scalars(record.metrics))
        elif isinstance(record, StopAlert):
            best = {"best_epoch": record.best_epoch, "best_value": record.best_value, "stop_epoch": record.epoch}
            self._add(record, record.epoch, self._text("alert", _markdown(record)), *self._scalars(best))
        elif isinstance(record, SuspectsRecord):
            self._add(record, record.step, self._text("suspects", _table(record)))
        elif isinstance(record, RunRecord):
            self._add(record, 0, self._text("head", record.head))
        elif isinstance(record, CloseRecord) and record.best_epoch is not None:
            best = {"best_epoch": record.best_epoch, "best_value": record.best_value}
            self._add(record, record.epochs - 1, *self._scalars(best))

    def close(self) -> None:
        """Closes the event file."""
        if self._file:
            self._file.close()

    def _open(self) -> EventFileWriter:
        # Event files are read in the order of their names, which begin with the second; in one, the order would be by chance.
        while list(Path(self._folder).glob(f"events.out.tfevents.{int(time()):010}.*")):
            sleep(0.02)
        return EventFileWriter(self._folder)

    def _add(self, record: AnyRecord, step: int, *values: Summary.Value) -> None:
        """Adds one event. A file that has failed stays as it is; the next try begins another."""
        file, self._file = self._file or self._open(), None
        when = getattr(record, "time", 0.0) or time()  # a record that is sent later may know when it happened
        file.add_event(Event(step=step, wall_time=when, summary=Summary(value=values)))
        file.flush()
        self._file = file

    def _scalars(self, values: dict[str, float]) -> list[Summary.Value]:
        return [Summary.Value(tag=f"{self._prefix}/{key}", simple_value=value) for key, value in values.items()]

    def _text(self, key: str, text: str) -> Summary.Value:
        return text_pb(f"{self._prefix}/{key}", text).value[0]

    def _histogram(self, key: str, record: IntervalRecord) -> Summary.Value:
        counts, edges = record.histogram.to_display(DISPLAY_BINS, record.display_limit)
        # Without the empty bins at both ends: TensorBoard spreads what it is given over the width of its picture, in few
        # bins. It takes the outer edges from min and max.
        first, last = np.flatnonzero(counts)[[0, -1]]
        histogram = HistogramProto(
            min=edges[first],
            max=edges[last + 1],
            num=record.count,
            sum=record.mean * record.count,
            bucket_limit=edges[first + 1 : last + 2].tolist(),
            bucket=counts[first : last + 1].tolist(),
        )
        return Summary.Value(tag=f"{self._prefix}/{key}", histo=histogram)


def _absolute(log_directory: str) -> str:
    return log_directory if "://" in log_directory else os.path.abspath(log_directory)  # noqa: PTH100 - a text


def _log_directory(run: Any) -> str:
    """The folder of a log directory or of a writer."""
    folder = run
    if not isinstance(run, str | PathLike | type):
        folder = getattr(run, "log_dir", None) or getattr(run, "logdir", None)  # PyTorch, Lightning; tensorboardX
        if folder is None and callable(ask := getattr(run, "get_logdir", None)):  # any writer of event files
            folder = ask()
    path = os.fspath(folder) if isinstance(folder, str | PathLike) else None
    if not isinstance(path, str) or not path:
        raise InvalidInputError(
            f"run={run!r}: expected a log directory such as 'runs/experiment', or a SummaryWriter, whose log_dir is "
            f"taken, found {type(run).__module__}.{type(run).__qualname__}"
        )
    return path


def _markdown(alert: StopAlert) -> str:
    """What TensorBoard shows: the sentence, and below it what speaks against it."""
    return "\n".join([f"**{alert.message}**\n", *(f"- but: {caveat}" for caveat in alert.caveats)])


def _table(record: SuspectsRecord) -> str:
    """In Markdown."""
    rows = [record.COLUMNS, ["---"] * len(record.COLUMNS), *record.rows()]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows)
