"""Sends what a tracker has missed, from the journals of a run: after an outage, a crash, or a run that was not tracked at all.

The tracker is asked which records it has, and gets the others, whatever their place in the run. Nothing is kept on the
side, and sending twice sends nothing the second time.

A run that was killed and resumed has several journals. They overlap where the resumed run repeated steps after its
checkpoint: of two records about the same interval or epoch the later journal's counts, and is sent once.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from gwa_logging import registry
from gwa_logging.delivery import batch_of, send
from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.journal import FILE_NAME, JournalReader, lock
from gwa_logging.protocols import Backend, RunContext
from gwa_logging.records import (
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

NEW = "new"
"""In place of a run: one that is started for it."""


class Replayed(NamedTuple):
    """What a replay did.

    Attributes:
        sent: intervals with a score, epochs, alerts and lists of suspects that were missing and are in the tracker now.
        had: the same, which the tracker had already.
        skipped: lines of the journals that were torn or not ours.
        run_ref: the tracker's run.
        repeated: records that a later journal of the same run, or a later line, replaces; they were not sent.
    """

    sent: int
    had: int
    skipped: int
    run_ref: TrackerRunRef
    repeated: int = 0


def replay(journals: Path | Sequence[Path], backend: str, run: str | None = None) -> Replayed:
    """Sends what is missing to a tracker's run.

    Args:
        journals: a run's journal.jsonl, which no process is writing any more; or those of a run that was resumed, from
            the first to the last.
        backend: "wandb", "mlflow", ... as in `watch`.
        run: the tracker's run: what `watch(run=)` takes as text; None for the one that the journals were written for; "new" to
            start one.

    Raises:
        InvalidInputError: a journal is empty or of another version, or no run is known and none was given.
        BackendError: the tracker cannot be used, stops taking records, or a process is still writing a journal.
    """
    if backend == "local":
        raise InvalidInputError("backend='local': that is the journal itself; name a tracker")
    paths = [journals] if isinstance(journals, Path) else list(journals)
    for path in paths:
        if not path.is_file():
            raise InvalidInputError(f"{path}: expected a file")
    with ExitStack() as locks:
        for path in paths:
            lock(locks.enter_context(path.open("rb")))
        first, folder = _first(paths[-1]), paths[-1].parent
        context = RunContext(first.name, _wanted(first, folder, backend, run), folder)
        tracker = registry.open_backend(backend, context)
        assert tracker is not None  # it is not "local"
        return _send(paths, tracker)


def _first(journal: Path) -> RunRecord:
    reader = JournalReader(journal)
    first = next((record for record in reader if isinstance(record, RunRecord)), None)
    if first is None:
        raise InvalidInputError(f"{journal}: there is no run in it (lines skipped: {reader.skipped})")
    return first


def _wanted(first: RunRecord, folder: Path, backend: str, run: str | None) -> str | None:
    """The run to take; None to start one."""
    if run is not None:
        return None if run == NEW else run
    known = first.places.get(backend, TrackerRunRef()).run
    if known is None or MASK in known:  # an address with credentials, which were not written down
        raise InvalidInputError(
            f"this journal was not written for a run of {backend} that could be found again: give --run ID, or --run {NEW}"
        )
    _check_place(known, first.name, folder, backend)
    return known


_RUN_IDS = {
    "mlflow": r"[\w-]{1,256}",
    "wandb": r"(?:[^/\\#?%:]{1,128}/){0,2}[^/\\#?%:]{1,128}",  # [entity/]project/id
    "trackio": r"[^/\\]{1,256}/.{1,256}",  # project/run
}


def _check_place(known: str, name: str, folder: Path, backend: str) -> None:
    """Checks the run that a journal names: it may be somebody else's, and must not lead anywhere on this machine.

    Raises:
        InvalidInputError: it is no run of that backend, or a folder outside the run's own and the working directory.
    """
    if backend == "tensorboard":
        where = f"{known}/{name}"
        inside = "\0" not in where and "://" not in where and _is_inside(Path(where), (folder, Path.cwd()))
        remedy = f"outside {str(folder)!r} and the working directory. If it is yours, name it: --run PATH"
    else:
        shape = re.fullmatch(_RUN_IDS.get(backend, ".{1,4096}"), known)
        inside = bool(shape) and known.isprintable() and not {"", ".", ".."} & set(known.split("/"))
        remedy = f"which is no run of {backend}. Name the run: --run ID, or --run {NEW}"
    if not inside:
        raise InvalidInputError(f"this journal was logged to {known[:300]!r}, {remedy}")


def _is_inside(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


def _send(journals: list[Path], tracker: Backend) -> Replayed:
    sent = had = repeated = 0
    problem: Exception | None = None
    readers = [JournalReader(journal) for journal in journals]
    try:
        held = tracker.contents()
        last = _last_of_each(journals)
        for records in _batches(readers, batch_of(tracker)):
            wanted = [record for number, record in records if last[_subject(record)] == number]
            missing = [record for record in wanted if not held.has(record)]
            send(tracker, missing)
            sent += _counted(missing)
            had += _counted(wanted) - _counted(missing)
            repeated += _counted([record for _, record in records]) - _counted(wanted)
    except Exception as error:  # noqa: BLE001 - whatever a tracker raises; raised again below
        problem = error
    try:
        tracker.close()
    except Exception as error:  # noqa: BLE001 - as above; the first one says more
        problem = problem or error
    if problem is not None:
        raise BackendError(
            f"backend {tracker.name}: {sent} missing records were sent, then: {type(problem).__name__}: {problem}. "
            "Replay again to go on"
        ) from (None if has_secret(problem) else problem)
    return Replayed(sent, had, sum(reader.skipped for reader in readers), tracker.run_ref, repeated)


def _batches(readers: Sequence[JournalReader], size: int) -> Iterator[list[tuple[int, AnyRecord]]]:
    """The records of all journals with their numbers, counted through all of them."""
    number = 0
    for reader in readers:
        while records := reader.take(size):
            yield list(enumerate(records, number))
            number += len(records)


def _subject(record: AnyRecord) -> tuple[str, int]:
    """What a record is about: of two records about the same, the later one counts."""
    if isinstance(record, IntervalRecord | SuspectsRecord):
        return record.kind, record.step
    if isinstance(record, EpochReport | StopAlert):
        return record.kind, record.epoch
    return record.kind, 0


def _last_of_each(journals: Sequence[Path]) -> dict[tuple[str, int], int]:
    """The number of the last record about each subject, as `_batches` counts them."""
    readers = [JournalReader(journal) for journal in journals]
    return {_subject(record): number for batch in _batches(readers, 1000) for number, record in batch}


def _counted(records: list[AnyRecord]) -> int:
    """How many records leave something in a tracker that can be read back."""
    return sum(not isinstance(r, RunRecord | CloseRecord) and not _is_empty(r) for r in records)


def _is_empty(record: AnyRecord) -> bool:
    return isinstance(record, IntervalRecord) and not record.count


class TrackedRun(NamedTuple):
    """The journals that were written for one run of a tracker under one name, from the first to the last."""

    run: str
    name: str
    journals: list[Path]


def tracked_runs(directory: Path, backend: str) -> tuple[list[TrackedRun], dict[Path, str]]:
    """Groups all journals in a folder of runs by the run of the tracker that they were written for.

    Returns:
        The runs, the one that was begun first at the beginning; and the journals that belong to none, with the reason.
    """
    found: dict[tuple[str, str], list[tuple[str, float, Path]]] = {}
    others: dict[Path, str] = {}
    for journal in sorted(directory.glob(f"**/{FILE_NAME}")):
        try:
            first = _first(journal)
        except (InvalidInputError, OSError) as error:
            others[journal] = str(error)
            continue
        run = first.places.get(backend, TrackerRunRef()).run
        if run is None:
            others[journal] = f"{journal}: it was not written for a run of {backend} that could be found again"
            continue
        # Two runs can be created within a second; the times of their records tell them apart.
        began = next((record.time for record in JournalReader(journal) if isinstance(record, TimedRecord)), 0.0)
        found.setdefault((run, first.name), []).append((first.created, began, journal))
    ordered = sorted((sorted(journals), key) for key, journals in found.items())
    return [TrackedRun(*key, [path for *_, path in journals]) for journals, key in ordered], others


def journals_of(folder: Path) -> Iterator[Path]:
    """The journals of one run: its own, and those of the further heads that were watched beside it."""
    yield folder / FILE_NAME
    yield from sorted(path for path in folder.glob(f"**/{FILE_NAME}") if path.parent != folder)
