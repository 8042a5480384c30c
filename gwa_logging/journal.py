"""The journal: an append-only file of JSON Lines that holds everything before any tracker sees it.

One record per line, written in one piece and flushed; synced to disk at the end of an epoch. Readable with
`pandas.read_json(path, lines=True)`. A line that is torn (the process or the machine died while writing it) or foreign
is skipped and counted, never fatal.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from time import time
from typing import BinaryIO

from pydantic import ValidationError

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.types import JOURNAL_VERSION, RECORDS, AnyRecord, TimedRecord

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "journal.jsonl"
_LONGEST_FIRST_LINE = 1 << 20  # bytes
_LONGEST_LINE = 1 << 25  # bytes: more than 1,000 suspects with pictures
_HELD_BACK = 10_000  # lines kept in memory while the disk takes none


class Journal:
    """Writes a journal. A full or failing disk is counted as a fault; what it did not take is tried again."""

    def __init__(self, path: Path, faults: Faults) -> None:
        """Creates the file, and its folder.

        Raises:
            BackendError: the folder cannot be written, or another process writes this journal.
        """
        self.path = path
        self._faults = faults
        self._lock = Lock()
        self._waiting: deque[bytes] = deque()
        self._torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            lock(self._file)
        except OSError as error:
            raise BackendError(
                f"directory={str(path.parent)!r} cannot be written ({error.strerror}); "
                "give watch() a directory= that can"
            ) from error

    def append(self, record: AnyRecord, *, sync: bool = False) -> None:
        """Writes one record, with the time; `sync` waits until the disk has it. Never raises."""
        if isinstance(record, TimedRecord):
            record = record.model_copy(update={"time": time()})
        with self._lock:
            self._waiting.append(record.model_dump_json().encode() + b"\n")
            try:
                while self._waiting:
                    self._write(self._waiting[0])
                    self._waiting.popleft()
                if sync:
                    os.fsync(self._file.fileno())
            except (OSError, ValueError) as error:  # ValueError: the file is closed
                self._faults.record("journal", f"{self.path} cannot be written ({error})")
                while len(self._waiting) > _HELD_BACK:
                    self._waiting.popleft()
                    self._faults.record("records lost", "the journal could not be written for too long")

    def _write(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line  # ends the piece that a full disk left behind
        self._torn = True
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._torn = False

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._waiting:
                self._faults.record("records lost", f"{self.path} could not be written", len(self._waiting))
            self._file.close()


class JournalReader:
    """Reads a journal from where it last stopped, also while it is being written.

    Attributes:
        skipped: lines that were torn or not ours.
    """

    def __init__(self, path: Path) -> None:
        """Begins at the beginning.

        Raises:
            InvalidInputError: the journal is of another version.
        """
        check_version(path)
        self.path = path
        self.skipped = 0
        self._offset = 0

    def __iter__(self) -> Iterator[AnyRecord]:
        """Reads the rest, one record at a time."""
        while records := self.take():
            yield from records

    def take(self, limit: int = 1) -> list[AnyRecord]:
        """The next records, `limit` at most; moves on."""
        records, self._offset = self.peek(limit)
        return records

    def peek(self, limit: int = 1) -> tuple[list[AnyRecord], int]:
        """The next records, `limit` at most, and the position after them; none at the end. Does not move on: see `advance`."""
        records: list[AnyRecord] = []
        with self.path.open("rb") as file:
            position = file.seek(self._offset)
            while len(records) < limit and (line := _whole_line(file)) is not None:
                try:
                    records += [RECORDS.validate_json(line)] if line.strip() else []
                except ValidationError:
                    if records:  # the line is left for the next time, so that it is skipped only once
                        break
                    self.skipped += 1
                position = file.tell()
                self._offset = self._offset if records else position
        return records, position

    def behind(self) -> bool:
        """Whether there may be more to read. Changes nothing, so any thread may ask."""
        try:
            return self._offset < self.path.stat().st_size
        except FileNotFoundError:  # somebody has deleted the run's folder: nothing will ever come from it
            return False

    def count(self) -> int:
        """How many lines are still to be read. Changes nothing."""
        if not self.behind():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            return sum(1 for line in file if line.strip())

    def advance(self, position: int) -> None:
        """Moves on to a position that `peek` gave."""
        self._offset = position


def _whole_line(file: BinaryIO) -> bytes | None:
    """The next line; None if it is not finished. Of one that is too long to be ours, a piece that is no record."""
    line = piece = file.readline(_LONGEST_LINE)
    while piece and not piece.endswith(b"\n"):
        line, piece = b"too long", file.readline(_LONGEST_LINE)
    return line if piece else None


def lock(file: BinaryIO) -> None:
    """Keeps other processes off a journal until the file is closed, or this process ends in whatever way.

    Raises:
        BackendError: another process has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BackendError(
            f"{file.name}: another process is writing this journal; wait until that run has ended, and give a run that you "
            "start a directory= of its own"
        ) from None
    except OSError:  # a file system that has no locks, such as some network folders: then nobody can be kept off
        return


def check_version(path: Path) -> None:
    """Looks at a journal's first line, if it is a whole one.

    Raises:
        InvalidInputError: it was written by a version of gwa_logging whose journals are of another form.
    """
    with path.open("rb") as file:
        line = file.readline(_LONGEST_FIRST_LINE)
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # torn or foreign: will be skipped and counted
        return
    version = first.get("version", JOURNAL_VERSION) if isinstance(first, dict) else JOURNAL_VERSION
    if version != JOURNAL_VERSION:
        raise InvalidInputError(
            f"{path}: the journal is of version {version!s:.20}, this gwa_logging reads version {JOURNAL_VERSION}; take the "
            "gwa_logging that the run was watched with, or a newer one"
        )


def read_journal(path: Path) -> tuple[list[AnyRecord], int]:
    """All records of a journal, and how many lines were skipped because they were torn or not ours.

    Raises:
        InvalidInputError: the journal is of another version.
    """
    reader = JournalReader(path)
    return list(reader), reader.skipped
