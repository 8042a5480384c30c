"""One file of the journal: reads single lines of it, and locks it against other processes."""

from array import array
from contextlib import suppress
from io import FileIO
from typing import BinaryIO

from gwa_logging.errors import BackendError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


class JournalFile:
    """One of the files of a journal. There are several only if another process deleted, renamed, replaced or truncated one.

    Attributes:
        first: number of the first line in the file.
        file: open for reading and appending.
        truncated_to: if the file was truncated, the number of bytes that were left.
    """

    def __init__(self, first: int, file: FileIO) -> None:
        self.first, self.file = first, file
        self.truncated_to: int | None = None

    def line(self, offset: int) -> bytes:
        """Returns the line that begins at `offset`, with its line break; incomplete or empty if the file lacks a part of it."""
        pieces: list[bytes] = []
        self.file.seek(offset)
        while piece := self.file.read(1 << 16):
            head, line_break, _ = piece.partition(b"\n")
            pieces += [head, line_break]
            if line_break:
                break
        line = b"".join(pieces)
        return line if self.truncated_to is None or offset + len(line) <= self.truncated_to else b""


def line_offsets(file: FileIO) -> "array[int]":
    """Returns where each complete line of a file begins."""
    offsets, begin, position = array("Q"), 0, 0
    file.seek(0)
    while piece := file.read(1 << 20):
        found = -1
        while (found := piece.find(b"\n", found + 1)) >= 0:
            offsets.append(begin)
            begin = position + found + 1
        position += len(piece)
    return offsets


def lock(file: BinaryIO | FileIO) -> None:
    """Locks a journal against other processes, until the file is closed or this process ends.

    Raises:
        BackendError: another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BackendError(
            f"{file.name}: another process is writing this journal; wait until that run has ended, and pass another "
            "directory= for a new run"
        ) from None
    except OSError:  # a file system without locks, such as some network folders
        return


def unlock(file: BinaryIO | FileIO) -> None:
    """Unlocks a journal. Closing the file is not enough if a forked process has it open too."""
    if fcntl is not None and not file.closed:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
