"""Continues the journal of an earlier process that was killed or preempted, from the state that was loaded.

The records after the state belong to steps that are trained again. They are moved to `superseded.jsonl` in the same folder, so
that the journal has each interval and epoch once. The journal is replaced in one step: a process that is killed meanwhile
leaves the earlier one.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from gwa_logging._journal_file import lock
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, check_version
from gwa_logging.records import (
    RECORDS,
    AlertWithdrawal,
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
)

SUPERSEDED = "superseded.jsonl"


class StatePosition(NamedTuple):
    """Where in a run a state was saved.

    Attributes:
        recorded_steps: number of steps in finished intervals.
        steps: number of training steps.
        epochs: number of finished epochs.
    """

    recorded_steps: int
    steps: int
    epochs: int

    def covers(self, record: AnyRecord) -> bool:
        """Returns True if the record was written before the state, so that a process that resumes does not write it again."""
        match record:
            case IntervalRecord():
                return record.step < self.recorded_steps
            case EpochReport() | StopAlert() | AlertWithdrawal():
                return record.epoch < self.epochs
            case SuspectsRecord():
                return record.step < self.steps
            case CloseRecord():
                return False
        return True


class EarlierJournal:
    """The journal of an earlier process, locked until this process continues it or releases it.

    Attributes:
        path: path of the file.
        run: its first line.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Opens and locks the file, and changes nothing.

        Args:
            path: path of the file.
            name: prefix of the metric keys, which must be that of the journal.

        Raises:
            OSError: the file does not exist, or cannot be opened.
            BackendError: another process is writing it.
            InvalidInputError: it is not a journal of this name and version.
        """
        self.path = path
        self._file = path.open("r+b")
        try:
            lock(self._file)
            check_version(path)
            first = self._record(self._file.readline())
            if not isinstance(first, RunRecord) or first.name != name:
                raise InvalidInputError(f"{path}: its first line is not that of a run with the name {name!r}")
        except BaseException:
            self.release()
            raise
        self.run = first

    def continue_with(self, run: RunRecord, position: StatePosition | None, faults: Faults) -> Journal:
        """Moves the records after the state to `superseded.jsonl`, and opens the journal. Unlocks it for a moment.

        Args:
            run: replaces the first line.
            position: of the state; None to keep all records.
            faults: of the journal.

        Raises:
            OSError: the folder cannot be written to. The journal is unchanged.
            BackendError: another process has just begun to write it.
        """
        unfinished = self.path.with_name(f"{self.path.name}.new")
        superseded = self.path.with_name(SUPERSEDED)
        try:
            with unfinished.open("wb") as kept, superseded.open("ab") as dropped:
                kept.write(run.model_dump_json().encode() + b"\n")
                self._file.seek(0)
                self._file.readline()
                for line in self._file:
                    record = self._record(line)
                    if record is not None and (position is None or position.covers(record)):
                        kept.write(line)
                    elif line.strip():
                        dropped.write(line if line.endswith(b"\n") else line + b"\n")
                for file in (dropped, kept):
                    file.flush()
                    os.fsync(file.fileno())
                is_empty = not dropped.tell()
            if is_empty:
                superseded.unlink()
            unfinished.replace(self.path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        finally:
            self.release()
        return Journal(self.path, faults, is_continued=True)

    def release(self) -> None:
        """Unlocks the journal."""
        self._file.close()

    @staticmethod
    def _record(line: bytes) -> AnyRecord | None:
        """Returns None for a line that is torn or is not a record."""
        try:
            return RECORDS.validate_json(line) if line.endswith(b"\n") else None
        except ValidationError:
            return None
