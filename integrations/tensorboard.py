"""TensorBoard: writes records to an event file. Needs only the `tensorboard` package, neither TensorFlow nor PyTorch.

TensorBoard follows only the newest event file in each folder. In the user's folder this library's file would hide what the
user logs from then on. So it is in a subfolder of the log directory, named like the prefix of the metrics, which TensorBoard
shows as another run.

A record is one event, so the file contains it completely or not at all. TensorBoard stores numbers as float32.
"""

import os
from io import BytesIO
from os import PathLike
from pathlib import Path
from time import sleep, time

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator, ScalarEvent
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from gwa_logging.errors import BackendError
from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.integrations._tracker import Tracker, invalid_run
from gwa_logging.integrations.heatmap_picture import PictureSeries
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

PICTURE_TAG = "distribution"
"""The tag of the pictures, without the prefix. TensorBoard sorts cards by tag, and only two of them, at the top, are visible
without scrolling. So this tag is before those of all numbers."""


def open_backend(context: RunContext) -> "TensorBoardBackend":
    """Opens an event file in the subfolder `<name>` of a log directory.

    The log directory is `run=`: a folder, or a writer (PyTorch's or tensorboardX's SummaryWriter, Lightning's
    TensorBoardLogger), whose folder is used. Without `run=` it is the journal's folder: `tensorboard --logdir
    gwa_runs` shows all runs.

    Raises:
        InvalidInputError: `run=` is neither a folder nor a writer.
        BackendError: the folder is not writable.
    """
    log_directory = _log_directory(context.directory if context.run is None else context.run)
    try:
        is_further_head = "/" in context.name and Path(log_directory) == context.directory.parent
        return TensorBoardBackend(log_directory, context.name, is_in_folder=context.run is None or is_further_head)
    except Exception as error:  # noqa: BLE001 - whatever a local or remote file system raises
        raise BackendError(
            f"backend='tensorboard': {log_directory!r} cannot be written to ({type(error).__name__}: {error}). "
            "Pass a log directory that can: watch(..., run='runs/experiment')"
        ) from (None if has_secret(error) else error)


def locate(context: RunContext) -> TrackerRunRef:
    """Returns the log directory that `open_backend` would use."""
    return TrackerRunRef(run=_absolute(_log_directory(context.directory if context.run is None else context.run)))


class TensorBoardBackend(Tracker):
    """Writes one event file, in a thread: a write to a local disk is fast, but log directories are often on a network."""

    name = "tensorboard"

    def __init__(self, log_directory: str, prefix: str, *, is_in_folder: bool = False) -> None:
        """Opens an event file in the folder `prefix` of `log_directory`; `is_in_folder` if that is the journal's folder."""
        super().__init__(prefix)
        self.run: str = log_directory
        self.is_in_folder = self.owns_run = is_in_folder
        absolute = _absolute(log_directory)
        self.run_ref = TrackerRunRef(run=absolute)
        self._folder = os.path.join(absolute, prefix)  # noqa: PTH118 - it may be an address, gs://
        self._pictures = PictureSeries()
        self._file: EventFileWriter | None = self._open()

    def contents(self) -> TrackerContents:
        """Reads all event files in the subfolder."""
        events = EventAccumulator(self._folder, size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
        tags, texts = events.Tags()[SCALARS], events.Tags()[TENSORS]

        def scalars(key: str) -> list[ScalarEvent]:
            tag = f"{self.prefix}/{key}"
            return events.Scalars(tag) if tag in tags else []

        # Both numbers are in the same event, so they are in the same order.
        reports = zip(scalars("stats/count"), scalars("stats/excluded"), strict=True)

        def text_steps(key: str) -> frozenset[int]:
            tag = f"{self.prefix}/{key}"
            return frozenset(event.step for event in events.Tensors(tag)) if tag in texts else frozenset()

        return TrackerContents(
            intervals=frozenset(event.step for event in scalars("steps/mean")),
            epochs=samples_by_epoch((count.step, count.value + excluded.value) for count, excluded in reports),
            alerts=text_steps("alert"),
            suspects=text_steps("suspects"),
            closes=frozenset(step + 1 for step in text_steps("best")),
        )

    def on_run(self, run: RunRecord) -> None:
        """Adds the head as a text."""
        self._add(run, 0, self._text("head", run.head))

    def on_interval(self, interval: IntervalRecord) -> None:
        """Adds the histogram and its numbers; adds a picture if it is due."""
        self._add(interval, interval.step, self._histogram("scores", interval), *self._scalars(interval.metrics))
        if self._pictures.add(interval):
            self._draw(interval, self._pictures.last_step)

    def on_epoch(self, report: EpochReport) -> None:
        """Adds the numbers; adds a picture if it is due."""
        self._add(report, report.epoch, *self._scalars(report.metrics))
        if self._pictures.add_epoch(report):
            self._draw(report, self._pictures.last_step)

    def on_alert(self, alert: StopAlert) -> None:
        """Adds the alert as a text."""
        self._add(alert, alert.epoch, self._text("alert", alert.text))
        self._pictures.add_alert(alert)

    def on_suspects(self, suspects: SuspectsRecord) -> None:
        """Adds the suspects as a text with a table."""
        self._add(suspects, suspects.step, self._text("suspects", _markdown_table(suspects)))

    def on_close(self, end: CloseRecord) -> None:
        """Adds the best epoch as a text, and the pictures that the series lacks."""
        if end.best_epoch is not None:
            text = f"Best epoch: {end.best_epoch} (statistic of the stop alert: {end.best_value:.6g})"
            self._add(end, end.epochs - 1, self._text("best", text))
        for step in self._pictures.missing_steps():
            self._draw(end, step)

    def close(self) -> None:
        """Closes the event file."""
        if self._file:
            self._file.close()

    def discard(self) -> None:
        """Closes the event file, and deletes it and its folder if that is in the journal's folder."""
        self.close()
        if self.is_in_folder:
            for path in Path(self._folder).glob("events.out.tfevents.*"):
                path.unlink()
            Path(self._folder).rmdir()

    def _draw(self, record: AnyRecord, step: int) -> None:
        png = BytesIO()
        image = self._pictures.draw(step)
        image.save(png, "png")
        shown = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=png.getvalue())
        self._add(record, step, Summary.Value(tag=f"{self.prefix}/{PICTURE_TAG}", image=shown))

    def _open(self) -> EventFileWriter:
        # Event files are read in the order of their names, which begin with the second: two of one second have no
        # fixed order.
        while list(Path(self._folder).glob(f"events.out.tfevents.{int(time()):010}.*")):
            sleep(0.02)
        return EventFileWriter(self._folder)

    def _add(self, record: AnyRecord, step: int, *values: Summary.Value) -> None:
        """Adds one event and flushes it. A file that has failed is left as it is, and the next attempt starts another one."""
        file, self._file = self._file or self._open(), None
        when = getattr(record, "time", 0.0) or time()  # a record that is sent late has the time at which it happened
        file.add_event(Event(step=step, wall_time=when, summary=Summary(value=values)))
        file.flush()
        self._file = file

    def _scalars(self, values: dict[str, float]) -> list[Summary.Value]:
        return [Summary.Value(tag=tag, simple_value=value) for tag, value in self.keyed(values).items()]

    def _text(self, key: str, text: str) -> Summary.Value:
        return text_pb(f"{self.prefix}/{key}", text).value[0]

    def _histogram(self, key: str, record: IntervalRecord) -> Summary.Value:
        counts, edges = record.histogram.to_display(DISPLAY_BINS, record.display_limit)
        # Without the empty bins at both ends, because TensorBoard re-bins the whole range into few bins. It takes the
        # outer edges from min and max.
        first, last = np.flatnonzero(counts)[[0, -1]]
        histogram = HistogramProto(
            min=edges[first],
            max=edges[last + 1],
            num=record.count,
            sum=record.mean * record.count,
            bucket_limit=edges[first + 1 : last + 2].tolist(),
            bucket=counts[first : last + 1].tolist(),
        )
        return Summary.Value(tag=f"{self.prefix}/{key}", histo=histogram)


def _absolute(log_directory: str) -> str:
    return log_directory if "://" in log_directory else os.path.abspath(log_directory)  # noqa: PTH100 - a text


def _log_directory(run: object) -> str:
    """Returns the path of a log directory, or of a writer's folder."""
    folder = run
    if not isinstance(run, str | PathLike | type):
        folder = getattr(run, "log_dir", None) or getattr(run, "logdir", None)  # PyTorch, Lightning; tensorboardX
        if folder is None and callable(ask := getattr(run, "get_logdir", None)):  # any writer of event files
            folder = ask()
    path = os.fspath(folder) if isinstance(folder, str | PathLike) else None
    if not isinstance(path, str) or not path:
        raise invalid_run(run, "a log directory such as 'runs/experiment', or a SummaryWriter, whose log_dir is used")
    return path


def _markdown_table(suspects: SuspectsRecord) -> str:
    rows = [suspects.columns, ["---"] * len(suspects.columns), *suspects.rows()]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows)
