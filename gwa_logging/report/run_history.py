"""The content of one journal in order, without repetitions: the input of the report and its figures."""

from collections.abc import Callable, Iterable
from os import SEEK_END
from pathlib import Path
from typing import NamedTuple, TypeVar

from gwa_logging.errors import InvalidInputError
from gwa_logging.journal import FILE_NAME, read_journal
from gwa_logging.records import (
    AlertWithdrawal,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
)

_R = TypeVar("_R")


class RunHistory(NamedTuple):
    """What the journal of a run records.

    Attributes:
        run: the first line of the journal; None if it is lost.
        intervals: in order of their steps. If the run returned to an earlier state, the repeated steps count.
        epochs: likewise.
        alert: the stop alert that stands, or None.
        suspects: the last list of suspects, or None.
        closed: the last line of the journal; None if the journal was not closed.
        skipped: number of lines that could not be read.
        unfinished: True if the last line has no end.
    """

    run: RunRecord | None
    intervals: list[IntervalRecord]
    epochs: list[EpochReport]
    alert: StopAlert | None
    suspects: SuspectsRecord | None
    closed: CloseRecord | None
    skipped: int
    unfinished: bool

    @property
    def best_epoch(self) -> int | None:
        """The best epoch of the run by the statistic that the stop rule watches; None if there is none."""
        return max((r.epoch for r in self.epochs if r.is_best), default=None)

    @property
    def steps(self) -> int:
        """The number of training steps so far."""
        if self.closed:
            return self.closed.steps
        return self.intervals[-1].step + 1 if self.intervals else 0


def read_run_history(journal: Path) -> RunHistory:
    """Reads a run's journal.

    Raises:
        InvalidInputError: the file does not exist, cannot be read or contains no record.
    """
    where = f"directory={str(journal.parent)!r}"
    if not journal.is_file():
        raise InvalidInputError(
            f"{where}: found no {FILE_NAME}; pass the folder that watch() created for the run, such as "
            "gwa_runs/20260131-120000-a1b2c3"
        )
    try:
        records, skipped = read_journal(journal)
        with journal.open("rb") as file:
            size = file.seek(0, SEEK_END)
            file.seek(max(size - 1, 0))
            unfinished = file.read(1) not in (b"", b"\n")
    except OSError as error:
        raise InvalidInputError(f"{where}: cannot read {FILE_NAME} ({error.strerror})") from error
    if not records:
        raise InvalidInputError(
            f"{where}: {FILE_NAME} contains no record (skipped lines: {skipped}); wait until the run has started"
        )
    alerts = [r for r in records if isinstance(r, StopAlert | AlertWithdrawal)]
    suspects = [r for r in records if isinstance(r, SuspectsRecord)]
    return RunHistory(
        run=next((r for r in records if isinstance(r, RunRecord)), None),
        intervals=_without_repeated((r for r in records if isinstance(r, IntervalRecord)), lambda r: r.step),
        epochs=_without_repeated((r for r in records if isinstance(r, EpochReport)), lambda r: r.epoch),
        alert=alerts[-1] if alerts and isinstance(alerts[-1], StopAlert) else None,
        suspects=suspects[-1] if suspects else None,
        closed=next((r for r in records if isinstance(r, CloseRecord)), None),
        skipped=skipped,
        unfinished=unfinished,
    )


def _without_repeated(records: Iterable[_R], position: Callable[[_R], int]) -> list[_R]:
    """Returns the records in order. A record replaces all earlier ones at its position or after it.

    A run writes such a record after it has returned to an earlier state.
    """
    kept: list[_R] = []
    for record in records:
        while kept and position(kept[-1]) >= position(record):
            kept.pop()
        kept.append(record)
    return kept
