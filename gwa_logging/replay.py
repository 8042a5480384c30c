"""Sends the records that a tracker lacks, from a run's journals: after an outage, a crash, or a run without that tracker.

The tracker is read back, and every record that it lacks is sent, wherever it belongs in the run. A second replay sends
nothing.

A run that was killed and resumed has several journals. They overlap if the resumed run repeated the steps after its
checkpoint. Of two records about the same interval or epoch, only the one from the later journal is sent.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from gwa_logging import registry
from gwa_logging._journal_file import lock
from gwa_logging.errors import BackendError, GwaError, InvalidInputError
from gwa_logging.journal import FILE_NAME, JournalReader
from gwa_logging.protocols import Backend, RunContext
from gwa_logging.records import (
    AlertWithdrawal,
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
    TimedRecord,
    TrackerRunRef,
)
from gwa_logging.redact import MASK, has_secret
from gwa_logging.report.page import REPORT_NAME, write_report
from gwa_logging.saved_run import is_allowed

logger = logging.getLogger("gwa_logging")

NEW = "new"
"""The value of `run=` that starts a new run."""


class Replayed(NamedTuple):
    """The result of a replay. Only intervals with a score, epochs, alerts and lists of suspects are counted.

    Attributes:
        sent: number of records that were missing and were sent.
        had: number of records that the tracker already had.
        skipped: number of lines of the journals that were torn or are not valid records.
        run_ref: the tracker's run.
        repeated: number of records that were not sent, because a later one about the same subject replaces them.
    """

    sent: int
    had: int
    skipped: int
    run_ref: TrackerRunRef
    repeated: int = 0


def replay(journals: Path | Sequence[Path], backend: str, run: str | None = None) -> Replayed:
    """Sends the missing records to a tracker's run.

    Args:
        journals: the journal.jsonl of a run; for a resumed run its journals, from the first to the last. No process may
            still be writing to them.
        backend: "wandb", "mlflow", ... as in `watch`.
        run: the tracker's run, as text for `watch(run=)`; None for the run that the journals were written for; "new" for a
            new one.

    Raises:
        InvalidInputError: a journal is empty or of another version, or no run is known and none was passed.
        BackendError: the tracker cannot be used or refuses records, or a process is still writing to a journal.
    """
    if backend == "local":
        raise InvalidInputError("backend='local': this is the journal itself; choose a tracker")
    paths = [journals] if isinstance(journals, Path) else list(journals)
    for path in paths:
        if not path.is_file():
            raise InvalidInputError(f"{path}: expected a file")
    with ExitStack() as locks:
        for path in paths:
            lock(locks.enter_context(path.open("rb")))
        first, folder = _run_record(paths[-1]), paths[-1].parent
        context = RunContext(first.name, _run_to_open(first, folder, backend, run), folder)
        tracker = registry.open_backend(backend, context)
        assert tracker is not None  # it is not "local"
        _renew_report(folder)
        return _send(paths, tracker)


def _renew_report(folder: Path) -> None:
    """Writes the report, which the tracker may upload when it is closed. The replay continues if that fails."""
    try:
        write_report(folder)
    except GwaError as error:
        logger.info("gwa_logging: %s is not renewed: %s", folder / REPORT_NAME, error)


def _run_record(journal: Path) -> RunRecord:
    reader = JournalReader(journal)
    for record in reader:
        if isinstance(record, RunRecord):
            return record
    raise InvalidInputError(f"{journal}: it contains no run (lines skipped: {reader.skipped})")


def _run_to_open(first: RunRecord, folder: Path, backend: str, run: str | None) -> str | None:
    """Returns the run to open; None to start one."""
    if run is not None:
        return None if run == NEW else run
    known = first.places.get(backend, TrackerRunRef()).run
    if known is None or MASK in known:  # an address whose credentials were masked
        raise InvalidInputError(
            f"this journal does not name a run of {backend} that can be opened again: pass --run ID or --run {NEW}"
        )
    _check_run(known, first.name, folder, backend)
    return known


def _check_run(known: str, name: str, folder: Path, backend: str) -> None:
    """Checks the run that a journal names. The journal may be untrusted, so its run must not be any path on this machine.

    Raises:
        InvalidInputError: this is not a run of the backend, or it is a folder outside the journal's and the working directory.
    """
    if not is_allowed(backend, known, name, (folder, Path.cwd())):
        outside = f"outside {str(folder)!r} and the working directory. If you trust it, pass --run PATH"
        unknown = f"which is not a run of {backend}. Pass --run ID or --run {NEW}"
        remedy = outside if backend == "tensorboard" else unknown
        raise InvalidInputError(f"this journal was logged to {known[:300]!r}, {remedy}")


def _send(journals: list[Path], tracker: Backend) -> Replayed:
    sent = had = repeated = 0
    failure: Exception | None = None
    readers = [JournalReader(journal) for journal in journals]
    try:
        contents = tracker.contents()
        last = _last_of_each_subject(journals)
        for records in _batches(readers, tracker.records_per_call):
            wanted = [record for number, record in records if last[_subject(record)] == number]
            missing = [record for record in wanted if not contents.has(record)]
            if missing:
                tracker.write_many(missing)
            sent += _counted(missing)
            had += _counted(wanted) - _counted(missing)
            repeated += _counted([record for _, record in records]) - _counted(wanted)
    except Exception as error:  # noqa: BLE001 - whatever a tracker raises; see below
        failure = error
    try:
        tracker.close()
    except Exception as error:  # noqa: BLE001 - as above; the first error is more informative
        failure = failure or error
    if failure is not None:
        raise BackendError(
            f"backend {tracker.name}: {sent} missing records were sent, then: {type(failure).__name__}: {failure}. "
            "Replay again to send the rest"
        ) from (None if has_secret(failure) else failure)
    return Replayed(sent, had, sum(reader.skipped for reader in readers), tracker.run_ref, repeated)


def _batches(readers: Sequence[JournalReader], size: int) -> Iterator[list[tuple[int, AnyRecord]]]:
    """Yields the records of all journals in order, in lists of at most `size`. They are numbered over all journals."""
    number = 0
    for reader in readers:
        while records := reader.take(size):
            yield list(enumerate(records, number))
            number += len(records)


def _subject(record: AnyRecord) -> tuple[str, int]:
    """Returns what a record is about. Of two records about the same subject only the later one is sent."""
    if isinstance(record, IntervalRecord | SuspectsRecord):
        return record.kind, record.step
    if isinstance(record, EpochReport | StopAlert | AlertWithdrawal):
        return record.kind, record.epoch
    return record.kind, 0


def _last_of_each_subject(journals: Sequence[Path]) -> dict[tuple[str, int], int]:
    """Returns the number of the last record about each subject, in the numbering of `_batches`."""
    readers = [JournalReader(journal) for journal in journals]
    return {_subject(record): number for batch in _batches(readers, 1000) for number, record in batch}


def _counted(records: list[AnyRecord]) -> int:
    """Returns how many of these records `Replayed` counts."""
    return sum(_is_counted(record) for record in records)


def _is_counted(record: AnyRecord) -> bool:
    if isinstance(record, IntervalRecord):
        return record.count > 0
    return not isinstance(record, RunRecord | CloseRecord | AlertWithdrawal)


class TrackedRun(NamedTuple):
    """The journals that were written for one run of a tracker under one name, in the order in which they were written."""

    run: str
    name: str
    journals: list[Path]


def tracked_runs(directory: Path, backend: str) -> tuple[list[TrackedRun], dict[Path, str]]:
    """Groups all journals in a folder by the tracker's run that they were written for.

    Returns:
        The runs, oldest first, and the journals that belong to no run, with the reason.
    """
    found: dict[tuple[str, str], list[tuple[str, float, Path]]] = {}
    others: dict[Path, str] = {}
    for journal in sorted(directory.glob(f"**/{FILE_NAME}")):
        try:
            first = _run_record(journal)
        except (InvalidInputError, OSError) as error:
            others[journal] = str(error)
            continue
        run = first.places.get(backend, TrackerRunRef()).run
        if run is None:
            others[journal] = f"{journal}: it does not name a run of {backend} that can be opened again"
            continue
        # Two runs can be created in the same second. The times of their records show which was first.
        began = next((record.time for record in JournalReader(journal) if isinstance(record, TimedRecord)), 0.0)
        found.setdefault((run, first.name), []).append((first.created, began, journal))
    ordered = sorted((sorted(journals), key) for key, journals in found.items())
    return [TrackedRun(*key, [path for *_, path in journals]) for journals, key in ordered], others


def journals_of(folder: Path) -> Iterator[Path]:
    """Yields the journals of one run: that of the first head, then those of further heads."""
    yield folder / FILE_NAME
    yield from sorted(path for path in folder.glob(f"**/{FILE_NAME}") if path.parent != folder)
