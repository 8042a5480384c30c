"""Reads back which of this library's records a W&B run contains: from the server, or from the file of an offline run."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import wandb
from wandb.proto import wandb_internal_pb2

from gwa_logging.errors import BackendError
from gwa_logging.protocols import TrackerContents, samples_by_epoch

SUMMARY_LISTS = ("stop_epochs", "suspects_steps")
"""Keys of the summary that list the alerts and the lists of suspects so far."""

_BLOCK = 1 << 15  # bytes; W&B writes the log format of LevelDB
_FILE_HEADER = 7  # bytes
_CHUNK_HEADER = Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4  # kinds of chunks


def read_contents(run: wandb.Run, prefix: str) -> TrackerContents:
    """Returns which records a run contains under a prefix.

    Raises:
        BackendError: the file of an offline run cannot be read.
    """
    begin = f"{prefix}/"
    intervals: list[Sequence[int]] = []
    reports: list[tuple[int, float]] = []
    alerts, suspects = set[int](), set[int]()
    for row in _rows(run, prefix) if not run.disabled else ():
        values = {key.removeprefix(begin): value for key, value in row.items() if key.startswith(begin)}
        if "step" in values:
            intervals += values.get("covers", [(values["step"], values["step"])])
        if "stats/count" in values:
            reports.append((values["epoch"], values["stats/count"] + values["stats/excluded"]))
        alerts.update(values.get("stop_epochs", ()))
        suspects.update(values.get("suspects_steps", ()))
    return TrackerContents(StepRanges(intervals), samples_by_epoch(reports), alerts, suspects)


def run_folders(run: wandb.Run) -> list[Path]:
    """Returns the local folders of a run. W&B creates one each time that the run is started or resumed."""
    return sorted(Path(run.settings.wandb_dir).glob(f"*run-*-{run.id}"))


def project_of(folder: Path) -> str | None:
    """Returns the project that an offline run belongs to; None if its folder does not name one.

    Raises:
        BackendError: the run's file is damaged.
    """
    records = (record for record in offline_records(folder) if record.HasField("run"))
    return next((record.run.project for record in records if record.run.project), None)


class StepRanges:
    """A set of steps, stored as ranges, so that a long run needs little memory."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        """Takes ranges (first, last), both inclusive, in any order; they may overlap."""
        by_first = np.array(sorted(map(tuple, ranges)), dtype=np.int64).reshape(-1, 2)
        self._firsts, self._lasts = by_first[:, 0], np.maximum.accumulate(by_first[:, 1])

    def __contains__(self, step: object) -> bool:
        before = int(np.searchsorted(self._firsts, step, side="right"))  # type: ignore[call-overload]
        return before > 0 and bool(step <= self._lasts[before - 1])


def _rows(run: wandb.Run, prefix: str) -> Iterator[Mapping[str, Any]]:
    """The rows of the history that contain the prefix's axes, and `SUMMARY_LISTS`.

    The rest of the summary is left out, because it can be ahead of the history.
    """
    lists = [f"{prefix}/{key}" for key in SUMMARY_LISTS]
    if run.offline:
        for folder in run_folders(run):
            for is_history, row in offline_rows(folder):
                yield row if is_history else {key: row[key] for key in lists if key in row}
    else:
        stored = wandb.Api().run(run.path)
        yield {key: stored.summary.get(key, ()) for key in lists}  # type: ignore[no-untyped-call]
        # A scan returns only the rows that have all of its keys, and only these keys.
        for keys in (["step"], ["step", "covers"], ["epoch", "stats/count", "stats/excluded"]):
            yield from stored.scan_history(keys=[f"{prefix}/{key}" for key in keys])


def offline_rows(folder: Path) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Reads the rows of an offline run's history (with True) and the changes of its summary (with False).

    Raises:
        BackendError: the run's file is damaged.
    """
    for record in offline_records(folder):
        if record.HasField("history"):
            yield True, values_of(record.history.item)
        elif record.HasField("summary"):
            yield False, values_of(record.summary.update)


def offline_records(folder: Path) -> Iterator[Any]:
    """Reads the messages of type `Record` that W&B has stored in the folder of an offline run.

    `wandb leet inspect` prints the same, but only exists in wandb 0.29 and later.

    Raises:
        BackendError: the run's file is damaged.
    """
    for path in folder.glob("*.wandb"):
        try:
            yield from map(wandb_internal_pb2.Record.FromString, _messages(path))  # type: ignore[attr-defined]
        except Exception as error:
            raise BackendError(f"the file {str(path)!r} of this W&B run cannot be read: {error}") from error


def values_of(items: Iterable[Any]) -> dict[str, Any]:
    """Decodes the items of a history or summary record."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _messages(path: Path) -> Iterator[bytes]:
    """Reads the messages of a file in LevelDB's log format. An unfinished one at its end, of a killed process, is left out."""
    chunks: list[bytes] = []
    with path.open("rb") as file:
        file.seek(_FILE_HEADER)
        while True:
            left = _BLOCK - file.tell() % _BLOCK
            if left < _CHUNK_HEADER.size:  # a chunk never begins here
                file.seek(left, 1)
            header = file.read(_CHUNK_HEADER.size)
            if len(header) < _CHUNK_HEADER.size:
                return
            _, length, kind = _CHUNK_HEADER.unpack(header)
            if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
                raise ValueError(f"unknown chunk of kind {kind}")
            chunk = file.read(length)
            if len(chunk) < length:
                return
            if kind in (_WHOLE, _FIRST):
                chunks = []
            chunks.append(chunk)
            if kind in (_WHOLE, _LAST):
                yield b"".join(chunks)
