"""The journal: an append-only file of JSON Lines that holds everything before any tracker sees it.

One record per line, written in one piece and flushed; synced to disk at the end of an epoch. Readable with
`pandas.read_json(path, lines=True)`. A line that is torn (the process or the machine died while writing it) or foreign
is skipped and counted, never fatal.
"""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from gwa_logging.errors import BackendError
from gwa_logging.faults import Faults
from gwa_logging.types import RECORDS, AnyRecord

FILE_NAME = "journal.jsonl"
_HELD_BACK = 10_000  # lines kept in memory while the disk takes none


class Journal:
    """Writes a journal. A full or failing disk is counted as a fault; what it did not take is tried again."""

    def __init__(self, path: Path, faults: Faults) -> None:
        """Creates the file, and its folder.

        Raises:
            BackendError: the folder cannot be written.
        """
        self.path = path
        self._faults = faults
        self._lock = Lock()
        self._waiting: deque[bytes] = deque()
        self._torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise BackendError(
                f"directory={str(path.parent)!r} cannot be written ({error.strerror}); "
                "give watch() a directory= that can"
            ) from error

    def append(self, record: AnyRecord, *, sync: bool = False) -> None:
        """Writes one record; `sync` waits until the disk has it. Never raises."""
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
        self.path = path
        self.skipped = 0
        self._offset = 0

    def peek(self) -> tuple[AnyRecord, int] | None:
        """The next record and the position after it; None at the end. Does not move on: see `advance`."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                if line.strip():
                    try:
                        return RECORDS.validate_json(line), file.tell()
                    except ValidationError:
                        self.skipped += 1
                self._offset = file.tell()
        return None

    def behind(self) -> bool:
        """Whether there may be more to read. Changes nothing, so any thread may ask."""
        return self._offset < self.path.stat().st_size

    def advance(self, position: int) -> None:
        """Moves on to a position that `peek` gave."""
        self._offset = position


def read_journal(path: Path) -> tuple[list[AnyRecord], int]:
    """All records of a journal, and how many lines were skipped because they were torn or not ours."""
    reader = JournalReader(path)
    return list(_records(reader)), reader.skipped


def _records(reader: JournalReader) -> Iterator[AnyRecord]:
    while found := reader.peek():
        record, position = found
        reader.advance(position)
        yield record
