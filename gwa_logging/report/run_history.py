"""What a journal tells, put in order: for the report and its figures."""

from collections.abc import Callable, Iterable
from os import SEEK_END
from pathlib import Path
from typing import NamedTuple, TypeVar

from gwa_logging.errors import InvalidInputError
from gwa_logging.journal import FILE_NAME, read_journal
from gwa_logging.records import (
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
)

_R = TypeVar("_R")


class RunHistory(NamedTuple):
    """What a journal tells, everything once and in order, and what is missing from it."""

    run: RunRecord | None
    intervals: list[IntervalRecord]
    epochs: list[EpochReport]
    alert: StopAlert | None
    suspects: SuspectsRecord | None
    closed: CloseRecord | None
    skipped: int
    unfinished: bool

    @property
    def best(self) -> int | None:
        """The best epoch of all by the statistic that the stop rule watches."""
        return max((r.epoch for r in self.epochs if r.is_best), default=None)


def read_run_history(journal: Path) -> RunHistory:
    """Reads a run's journal.

    Raises:
        InvalidInputError: there is no such file, it cannot be read, or it holds no record.
    """
    where = f"directory={str(journal.parent)!r}"
    if not journal.is_file():
        raise InvalidInputError(
            f"{where}: there is no {FILE_NAME} in it; give the folder that watch() made for the run, such as "
            "gwa_runs/20260131-120000-a1b2c3"
        )
    try:
        records, skipped = read_journal(journal)
        with journal.open("rb") as file:
            size = file.seek(0, SEEK_END)
            file.seek(max(size - 1, 0))
            unfinished = file.read(1) not in (b"", b"\n")
    except OSError as error:
        raise InvalidInputError(f"{where}: its {FILE_NAME} cannot be read ({error.strerror})") from error
    if not records:
        raise InvalidInputError(
            f"{where}: its {FILE_NAME} holds no record (lines skipped: {skipped}); report on a run that has begun"
        )
    alerts = [r for r in records if isinstance(r, StopAlert)]
    suspects = [r for r in records if isinstance(r, SuspectsRecord)]
    return RunHistory(
        run=next((r for r in records if isinstance(r, RunRecord)), None),
        intervals=_as_seen_last((r for r in records if isinstance(r, IntervalRecord)), lambda r: r.step),
        epochs=_as_seen_last((r for r in records if isinstance(r, EpochReport)), lambda r: r.epoch),
        alert=alerts[-1] if alerts else None,
        suspects=suspects[-1] if suspects else None,
        closed=next((r for r in records if isinstance(r, CloseRecord)), None),
        skipped=skipped,
        unfinished=unfinished,
    )


def _as_seen_last(records: Iterable[_R], position: Callable[[_R], int]) -> list[_R]:
    """Records in order, without those that a run left behind when it went back to an earlier state."""
    kept: list[_R] = []
    for record in records:
        while kept and position(kept[-1]) >= position(record):
            kept.pop()
        kept.append(record)
    return kept
