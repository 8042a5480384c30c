"""The journal: an append-only file of JSON Lines, to which every record is written before any tracker receives it.

Each line is one record. It is written with one call and flushed, and synced to disk at the end of an epoch. The file can be
read with `pandas.read_json(path, lines=True)`. A line that is torn (the process or the machine died while writing it) or is
not a valid record is skipped and counted.

The most recent lines are also kept in memory. The backends read them from there (`JournalFeed`). If another process deletes,
renames, replaces or truncates the file, the journal continues at the same path with these lines.
"""

import json
import os
from array import array
from collections import deque
from collections.abc import Iterator
from io import FileIO
from itertools import islice
from pathlib import Path
from threading import Lock
from time import time
from typing import BinaryIO

from pydantic import ValidationError

from gwa_logging._journal_file import JournalFile, line_offsets, lock, unlock
from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.records import JOURNAL_VERSION, RECORDS, AnyRecord, RunRecord, TimedRecord

FILE_NAME = "journal.jsonl"
_LONGEST_FIRST_LINE = 1 << 20  # bytes
_LONGEST_LINE = 1 << 25  # bytes: more than 1,000 suspects with pictures
_MAX_WAITING = 10_000  # lines that wait in memory while the disk is full
_MAX_IN_MEMORY = 4 << 20  # bytes of written lines that stay in memory: about 4,000 intervals


class Journal:
    """Writes a journal. A full or failing disk is recorded as a fault, and the lines are written later.

    The lines are numbered from 0, over all files of the journal.

    Attributes:
        path: path of the file.
        lost: number of lines that were written and no longer exist, because another process damaged the file.
    """

    def __init__(self, path: Path, faults: Faults, *, is_continued: bool = False) -> None:
        """Creates the file and its folder, or opens the file to append to it.

        Args:
            path: path of the file.
            faults: counts errors.
            is_continued: True if the lines in the file belong to this journal, which then numbers and reads them as its own.

        Raises:
            BackendError: the folder is not writable, or another process is writing this journal.
        """
        self.path = path
        self.lost = 0
        self._faults = faults
        self._lock = Lock()
        self._run_line = b""  # the line of the RunRecord; every file begins with it
        self._waiting: deque[bytes] = deque()  # lines that are not written yet
        self._prefix = b""  # to be written before the next line
        self._partial = 0  # bytes of the prefix and the next line that a full disk has already accepted
        self._lines: deque[bytes] = deque()  # the most recent written lines
        self._line_bytes = 0
        self._offsets = array("Q")  # of every written line, in the last file that contains it
        try:
            file = self._open()
        except OSError as error:
            raise BackendError(
                f"directory={str(path.parent)!r} cannot be written to ({error.strerror}); pass another directory= to watch()"
            ) from error
        self._files = [JournalFile(0, file)]
        self._size = os.fstat(file.fileno()).st_size  # of the current file, when last seen
        if is_continued:
            self._offsets = line_offsets(file)
            self._run_line = self._files[-1].line(0)

    def append(self, record: AnyRecord, *, sync: bool = False, at: float | None = None) -> None:
        """Writes one record. Never raises.

        Args:
            record: the record.
            sync: block until the record is on the disk.
            at: its time, in seconds since 1970; None takes the current time.
        """
        if isinstance(record, TimedRecord):
            record = record.model_copy(update={"time": time() if at is None else at})
        line = record.model_dump_json().encode() + b"\n"
        with self._lock:
            if isinstance(record, RunRecord):
                self._run_line = line
            self._waiting.append(line)
            try:
                self._check_file()
                while self._waiting:
                    self._write(self._waiting[0])
                if sync:
                    os.fsync(self._files[-1].file.fileno())
            except (OSError, ValueError, BackendError) as error:  # ValueError: the file is closed
                self._faults.record("journal", f"{self.path} cannot be written to ({error})")
                while len(self._waiting) > _MAX_WAITING:
                    self._waiting.popleft()
                    if self._partial:
                        self._prefix, self._partial = b"\n", 0
                    self._faults.record("records lost", "the journal could not be written to for too long")

    @property
    def is_complete(self) -> bool:
        """Returns True if the files contain every record."""
        return not (self._waiting or self.lost)

    @property
    def count(self) -> int:
        """Number of lines in the files."""
        return len(self._offsets)

    def read(self, number: int, limit: int) -> list[bytes]:
        """Returns lines from memory or, if they are too old, from the files.

        Args:
            number: number of the first line.
            limit: maximum number of lines.

        Returns:
            At least one line unless `number` is past the end. A line that the files have lost is incomplete or empty.
        """
        with self._lock:
            in_memory = len(self._offsets) - len(self._lines)
            if number >= in_memory:
                return list(islice(self._lines, number - in_memory, number - in_memory + limit))
            return [self._read_from_file(n) for n in range(number, min(number + limit, in_memory))]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._waiting:
                self._faults.record("records lost", f"{self.path} could not be written to", len(self._waiting))
            unlock(self._files[-1].file)
            self.disown()

    def disown(self) -> None:
        """Closes the files and nothing else. For a forked process: they belong to its parent."""
        for each in self._files:
            each.file.close()

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b", buffering=0)
        lock(file)
        return file

    def _write(self, line: bytes) -> None:
        """Writes the next line. If the disk becomes full in the middle of it, the next call writes the rest."""
        whole = self._prefix + line
        while self._partial < len(whole):
            written = self._files[-1].file.write(memoryview(whole)[self._partial :])
            self._partial += written
            self._size += written
        self._waiting.popleft()
        self._prefix, self._partial = b"", 0
        self._offsets.append(self._size - len(line))
        self._lines.append(line)
        self._line_bytes += len(line)
        while self._line_bytes > _MAX_IN_MEMORY and len(self._lines) > 1:
            self._line_bytes -= len(self._lines.popleft())

    def _read_from_file(self, number: int) -> bytes:
        owner = self._files[-1]
        for owner in reversed(self._files):
            if owner.first <= number:
                break
        if not owner.file.closed:
            return owner.line(self._offsets[number])
        if owner is not self._files[-1]:
            return b""
        with self.path.open("rb", buffering=0) as file:
            return JournalFile(owner.first, file).line(self._offsets[number])

    def _check_file(self) -> None:
        """Checks that the file exists and contains what was written; otherwise continues in another file."""
        mine = os.fstat(self._files[-1].file.fileno())
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return self._continue_in(self._open(), "deleted or renamed")
        if not os.path.samestat(found, mine):
            return self._continue_in(self._open(), "replaced")
        if mine.st_size < self._size:
            return self._continue_in(self._files[-1].file, "truncated")
        if mine.st_size > self._size and self._partial:  # the partial line can no longer be completed
            self._prefix, self._partial = b"\n", 0
        self._size = mine.st_size
        return None

    def _continue_in(self, file: FileIO, damage: str) -> None:
        """Continues in another file, or in the rest of this one: writes the lines in memory that it does not contain again.

        Args:
            file: the file.
            damage: what happened to the previous file, for the fault.
        """
        before, total = self._files[-1], len(self._offsets)
        in_memory = total - len(self._lines)
        size = os.fstat(file.fileno()).st_size
        for each in self._files:
            if each.file is file:
                each.truncated_to = size if each.truncated_to is None else min(each.truncated_to, size)
        ends = (*self._offsets[before.first + 1 :], self._size)  # of the lines in the previous file
        lost = sum(before.truncated_to is None or end > before.truncated_to for end in ends[: in_memory - before.first])
        new = JournalFile(in_memory, file)
        for number in reversed(range(in_memory, total)):  # the last line that the file contains, if any
            if new.line(self._offsets[number]) == self._lines[number - in_memory]:
                new.first, lost = number + 1, 0
                break
        missing = [self._lines.pop() for _ in range(new.first, total)]  # the newest first
        self._line_bytes -= sum(map(len, missing))
        self._waiting.extendleft(missing)
        del self._offsets[new.first :]
        if self._lines and not missing:  # the file is a copy, or only a partial line was cut off
            self._files[-1] = new = JournalFile(before.first, file)
            if file is not before.file:
                before.file.close()
        else:
            self._files.append(new)
        self._size, self._partial = size, 0
        self._prefix = b"\n" if size and new.line(size - 1) != b"\n" else b""
        if not size and new.first:
            self._prefix += self._run_line
        if missing or lost:
            detail = (
                f"{self.path} was {damage} by another process; it continues there with the {len(missing)} latest lines"
            )
            self._faults.record("journal", detail)
        if lost:
            self.lost += lost
            self._faults.record("records lost", f"{detail}, and the {lost} lines before these are lost", lost)


class JournalFeed:
    """Reads the journal that this process is writing, for one backend.

    Attributes:
        lost: number of lines that another process removed from the file before the backend received them.
    """

    def __init__(self, journal: Journal) -> None:
        self.lost = 0
        self._journal = journal
        self._next = 0

    def peek(self, limit: int = 1) -> tuple[list[AnyRecord], int]:
        """Returns the next records, `limit` at most (none at the end), and the position after them, for `advance`."""
        records: list[AnyRecord] = []
        position = self._next
        while len(records) < limit and (lines := self._journal.read(position, limit - len(records))):
            for line in lines:
                try:
                    records.append(RECORDS.validate_json(line))
                except ValidationError:
                    if records:  # the next call reads this line again and counts it
                        return records, position
                    self.lost += 1
                    self._next = position + 1
                position += 1
        return records, position

    def advance(self, position: int) -> None:
        """Continues at a position that `peek` returned."""
        self._next = position

    @property
    def position(self) -> int:
        """Number of the next line."""
        return self._next

    def behind(self) -> bool:
        """Returns True if there is more to read. Any thread may call it."""
        return self._next < self._journal.count

    def count(self) -> int:
        """Number of lines that are still to be read. Any thread may call it."""
        return max(0, self._journal.count - self._next)


class JournalReader:
    """Reads a journal file record by record, even while it is being written.

    Attributes:
        skipped: number of lines that were torn or are not valid records.
    """

    def __init__(self, path: Path) -> None:
        """Starts at the first line.

        Raises:
            InvalidInputError: the journal is of another version.
        """
        check_version(path)
        self.path = path
        self.skipped = 0
        self._offset = 0

    def __iter__(self) -> Iterator[AnyRecord]:
        """Yields the remaining records."""
        while records := self.take():
            yield from records

    def take(self, limit: int = 1) -> list[AnyRecord]:
        """Returns the next records, `limit` at most; none at the end, or before an unfinished line."""
        records: list[AnyRecord] = []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while len(records) < limit and (line := _read_line(file)) is not None:
                self._offset = file.tell()
                try:
                    records += [RECORDS.validate_json(line)] if line.strip() else []
                except ValidationError:
                    self.skipped += 1
        return records


def _read_line(file: BinaryIO) -> bytes | None:
    """Returns the next line; None if it is unfinished. Replaces a line that is too long for a record by an invalid one."""
    line = piece = file.readline(_LONGEST_LINE)
    while piece and not piece.endswith(b"\n"):
        line, piece = b"too long", file.readline(_LONGEST_LINE)
    return line if piece else None


def check_version(path: Path) -> None:
    """Checks the version in a journal's first line, if that line is complete.

    Raises:
        InvalidInputError: a version of gwa_logging with another journal format wrote it.
    """
    with path.open("rb") as file:
        line = file.readline(_LONGEST_FIRST_LINE)
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # torn or invalid: the reader will skip and count it
        return
    version = first.get("version", JOURNAL_VERSION) if isinstance(first, dict) else JOURNAL_VERSION
    if version != JOURNAL_VERSION:
        raise InvalidInputError(
            f"{path}: the journal has format version {version!s:.20}, but this gwa_logging reads version {JOURNAL_VERSION}; "
            "use the gwa_logging that wrote it, or a newer one"
        )


def read_journal(path: Path) -> tuple[list[AnyRecord], int]:
    """Returns all records of a journal, and the number of lines that were torn or are not valid records.

    Raises:
        InvalidInputError: the journal is of another version.
    """
    reader = JournalReader(path)
    return list(reader), reader.skipped
