"""The journal: an append-only file of JSON Lines that holds everything before any tracker sees it.

One record per line, written in one piece and flushed; synced to disk at the end of an epoch. Readable with
`pandas.read_json(path, lines=True)`. A line that is torn (the process or the machine died while writing it) or foreign
is skipped and counted, never fatal.

The recent lines are also kept in memory. The backends are fed from there (`JournalFeed`), and a journal that somebody else
deletes, renames, replaces or truncates continues at the same path with these lines.
"""

import json
import os
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from threading import Lock
from time import time
from typing import BinaryIO

from pydantic import ValidationError

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.records import JOURNAL_VERSION, RECORDS, AnyRecord, RunRecord, TimedRecord

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "journal.jsonl"
_LONGEST_FIRST_LINE = 1 << 20  # bytes
_LONGEST_LINE = 1 << 25  # bytes: more than 1,000 suspects with pictures
_HELD_BACK = 10_000  # lines kept in memory while the disk takes none
_RECENT = 4 << 20  # bytes of written lines kept in memory: about 4,000 intervals


class _Part:
    """A file of the journal. There are several only if somebody else deleted, renamed, replaced or truncated one.

    Attributes:
        first: number of the first line in it.
        file: open for reading and appending.
        end: if it was truncated, the number of bytes that were left of it.
    """

    def __init__(self, first: int, file: FileIO) -> None:
        self.first, self.file = first, file
        self.end: int | None = None

    def line(self, offset: int) -> bytes:
        """The line that begins at `offset`, with its line break; empty or unfinished if the file has not all of it."""
        pieces: list[bytes] = []
        self.file.seek(offset)
        while piece := self.file.read(1 << 16):
            head, line_break, _ = piece.partition(b"\n")
            pieces += [head, line_break]
            if line_break:
                break
        line = b"".join(pieces)
        return line if self.end is None or offset + len(line) <= self.end else b""


class Journal:
    """Writes a journal. A full or failing disk is counted as a fault; what it did not take is tried again.

    The lines are numbered from 0, over all files of the journal.

    Attributes:
        path: where it is.
        lost: lines that were written and are gone, because somebody else damaged the file.
    """

    def __init__(self, path: Path, faults: Faults) -> None:
        """Creates the file, and its folder.

        Raises:
            BackendError: the folder cannot be written, or another process writes this journal.
        """
        self.path = path
        self.lost = 0
        self._faults = faults
        self._lock = Lock()
        self._heading = b""  # the line of the RunRecord, with which every file begins
        self._waiting: deque[bytes] = deque()  # lines that the file does not have yet
        self._prefix = b""  # to be written before the next line
        self._begun = 0  # bytes of the prefix and the next line that a full disk has already taken
        self._lines: deque[bytes] = deque()  # the recent ones of those that the file has
        self._line_bytes = 0
        self._offsets = array("Q")  # of every line, in the last file that has it
        try:
            file = self._open()
        except OSError as error:
            raise BackendError(
                f"directory={str(path.parent)!r} cannot be written ({error.strerror}); "
                "give watch() a directory= that can"
            ) from error
        self._parts = [_Part(0, file)]
        self._size = os.fstat(file.fileno()).st_size  # of the present file, as far as we know

    def append(self, record: AnyRecord, *, sync: bool = False) -> None:
        """Writes one record, with the time; `sync` waits until the disk has it. Never raises."""
        if isinstance(record, TimedRecord):
            record = record.model_copy(update={"time": time()})
        line = record.model_dump_json().encode() + b"\n"
        with self._lock:
            if isinstance(record, RunRecord):
                self._heading = line
            self._waiting.append(line)
            try:
                self._check_file()
                while self._waiting:
                    self._write(self._waiting[0])
                if sync:
                    os.fsync(self._parts[-1].file.fileno())
            except (OSError, ValueError, BackendError) as error:  # ValueError: the file is closed
                self._faults.record("journal", f"{self.path} cannot be written ({error})")
                while len(self._waiting) > _HELD_BACK:
                    self._waiting.popleft()
                    if self._begun:
                        self._prefix, self._begun = b"\n", 0
                    self._faults.record("records lost", "the journal could not be written for too long")

    @property
    def is_complete(self) -> bool:
        """Whether the files have every record."""
        return not (self._waiting or self.lost)

    @property
    def count(self) -> int:
        """The number of lines in the files."""
        return len(self._offsets)

    def read(self, number: int, limit: int) -> list[bytes]:
        """Lines from a number on, `limit` at most, and at least one if there is one: from memory, or, if they are too old for
        that, from the files. One that the files have lost is empty or unfinished.
        """
        with self._lock:
            in_memory = len(self._offsets) - len(self._lines)
            if number >= in_memory:
                return list(islice(self._lines, number - in_memory, number - in_memory + limit))
            return [self._stored(n) for n in range(number, min(number + limit, in_memory))]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._waiting:
                self._faults.record("records lost", f"{self.path} could not be written", len(self._waiting))
            unlock(self._parts[-1].file)
            self.disown()

    def disown(self) -> None:
        """Closes the files and does nothing else: in a forked process, where they are the other process's."""
        for part in self._parts:
            part.file.close()

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b", buffering=0)
        lock(file)
        return file

    def _write(self, line: bytes) -> None:
        """Writes the next line. Where the disk becomes full in the middle of it, the next call writes the rest."""
        whole = self._prefix + line
        while self._begun < len(whole):
            written = self._parts[-1].file.write(memoryview(whole)[self._begun :])
            self._begun += written
            self._size += written
        self._waiting.popleft()
        self._prefix, self._begun = b"", 0
        self._offsets.append(self._size - len(line))
        self._lines.append(line)
        self._line_bytes += len(line)
        while self._line_bytes > _RECENT and len(self._lines) > 1:
            self._line_bytes -= len(self._lines.popleft())

    def _stored(self, number: int) -> bytes:
        part = next(part for part in reversed(self._parts) if part.first <= number)
        if not part.file.closed:
            return part.line(self._offsets[number])
        if part is not self._parts[-1]:
            return b""
        with self.path.open("rb", buffering=0) as file:
            return _Part(part.first, file).line(self._offsets[number])

    def _check_file(self) -> None:
        """Looks whether the file is there, and has what was written into it; continues in another one if not."""
        mine = os.fstat(self._parts[-1].file.fileno())
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return self._start_over("deleted or renamed", self._open())
        if not os.path.samestat(found, mine):
            return self._start_over("replaced", self._open())
        if mine.st_size < self._size:
            return self._start_over("truncated", self._parts[-1].file)
        if mine.st_size > self._size and self._begun:  # the piece of a line that is there cannot be finished any more
            self._prefix, self._begun = b"\n", 0
        self._size = mine.st_size
        return None

    def _start_over(self, what: str, file: FileIO) -> None:
        """Continues in another file, or in what is left of this one, with the lines in memory that it does not have."""
        before, total = self._parts[-1], len(self._offsets)
        in_memory = total - len(self._lines)
        size = os.fstat(file.fileno()).st_size
        for part in self._parts:
            if part.file is file:
                part.end = size if part.end is None else min(part.end, size)
        ends = (*self._offsets[before.first + 1 :], self._size)  # of the lines in this file
        lost = sum(before.end is None or end > before.end for end in ends[: in_memory - before.first])
        new = _Part(in_memory, file)
        for number in reversed(range(in_memory, total)):  # the last one that the file has, if any
            if new.line(self._offsets[number]) == self._lines[number - in_memory]:
                new.first, lost = number + 1, 0
                break
        again = [self._lines.pop() for _ in range(new.first, total)]  # the newest first
        self._line_bytes -= sum(map(len, again))
        self._waiting.extendleft(again)
        del self._offsets[new.first :]
        if self._lines and not again:  # nothing is missing: it is a copy, or only a piece of a line was cut off
            self._parts[-1] = new = _Part(before.first, file)
            if file is not before.file:
                before.file.close()
        else:
            self._parts.append(new)
        self._size, self._begun = size, 0
        self._prefix = b"\n" if size and new.line(size - 1) != b"\n" else b""
        if not size and new.first:
            self._prefix += self._heading
        if again or lost:
            detail = f"{self.path} was {what} by somebody else; it continues there with the {len(again)} latest lines"
            self._faults.record("journal", detail)
        if lost:
            self.lost += lost
            self._faults.record("records lost", f"{detail}, and the {lost} lines before these are gone", lost)


class JournalFeed:
    """Reads the journal that this process is writing, for one backend.

    Attributes:
        lost: lines that somebody else has removed from the file before the backend had them.
    """

    def __init__(self, journal: Journal) -> None:
        self.lost = 0
        self._journal = journal
        self._next = 0

    def peek(self, limit: int = 1) -> tuple[list[AnyRecord], int]:
        """The next records, `limit` at most, and the position after them; none at the end. Does not move on: see `advance`."""
        records: list[AnyRecord] = []
        position = self._next
        while len(records) < limit and (lines := self._journal.read(position, limit - len(records))):
            for line in lines:
                try:
                    records.append(RECORDS.validate_json(line))
                except ValidationError:
                    if records:  # the line is left for the next time, so that it is counted only once
                        return records, position
                    self.lost += 1
                    self._next = position + 1
                position += 1
        return records, position

    def advance(self, position: int) -> None:
        """Moves on to a position that `peek` gave."""
        self._next = position

    def behind(self) -> bool:
        """Whether there is more to read. Changes nothing, so any thread may ask."""
        return self._next < self._journal.count

    def count(self) -> int:
        """How many lines are still to be read. Changes nothing."""
        return max(0, self._journal.count - self._next)


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


def lock(file: BinaryIO | FileIO) -> None:
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


def unlock(file: BinaryIO | FileIO) -> None:
    """Lets others write a journal. Closing it does not if a process that was forked meanwhile has it open too."""
    if fcntl is not None and not file.closed:
        with suppress(OSError):  # a file system that has no locks
            fcntl.flock(file, fcntl.LOCK_UN)


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
