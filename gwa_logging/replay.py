"""Sends what a tracker has missed, from a run's journal: after an outage, a crash, or a run that was not tracked at all.

The tracker is asked what it has. Records come to it in order, so everything after the last one that it has is missing;
nothing is kept on the side, and sending twice sends nothing the second time.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gwa_logging import registry
from gwa_logging.delivery import batch_of, send
from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.journal import FILE_NAME, JournalReader, lock
from gwa_logging.redact import MASK, has_secret
from gwa_logging.types import (
    AnyRecord,
    Backend,
    CloseRecord,
    RunContext,
    RunPlace,
    RunRecord,
)

NEW = "new"
"""In place of a run: one that is started for it."""


class Replayed(NamedTuple):
    """What a replay did.

    Attributes:
        sent: intervals, epochs, alerts and lists of suspects that were missing and are in the tracker now.
        had: intervals, epochs, alerts and lists of suspects that the tracker had.
        skipped: lines of the journal that were torn or not ours.
        place: the tracker's run.
    """

    sent: int
    had: int
    skipped: int
    place: RunPlace


def replay(journal: Path, backend: str, run: str | None = None) -> Replayed:
    """Sends what is missing to a tracker's run.

    Args:
        journal: a run's journal.jsonl, which no process is writing any more.
        backend: "wandb", "mlflow", ... as in `watch`.
        run: the tracker's run: what `watch(run=)` takes as text; None for the one that the journal was written for; "new" to
            start one.

    Raises:
        InvalidInputError: the journal is empty or of another version, or no run is known and none was given.
        BackendError: the tracker cannot be used, stops taking records, or a process is still writing the journal.
    """
    if backend == "local":
        raise InvalidInputError("backend='local': that is the journal itself; name a tracker")
    if not journal.is_file():
        raise InvalidInputError(f"{journal}: expected a file")
    with journal.open("rb") as file:
        lock(file)
        reader = JournalReader(journal)
        first = next((record for record in reader if isinstance(record, RunRecord)), None)
        if first is None:
            raise InvalidInputError(f"{journal}: there is no run in it (lines skipped: {reader.skipped})")
        context = RunContext(first.name, _wanted(first, journal.parent, backend, run), journal.parent)
        tracker = registry.open_backend(backend, context)
        assert tracker is not None  # it is not "local"
        return _send(JournalReader(journal), tracker)


def _wanted(first: RunRecord, folder: Path, backend: str, run: str | None) -> str | None:
    """The run to take; None to start one."""
    if run is not None:
        return None if run == NEW else run
    known = first.places.get(backend, RunPlace()).run
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


def _send(reader: JournalReader, tracker: Backend) -> Replayed:
    sent = had = 0
    problem: Exception | None = None
    try:
        held = tracker.held()
        while records := reader.take(batch_of(tracker)):
            missing = [record for record in records if not held.has(record)]
            send(tracker, missing)
            sent += _counted(missing)
            had += _counted(records) - _counted(missing)
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
    return Replayed(sent, had, reader.skipped, tracker.place)


def _counted(records: list[AnyRecord]) -> int:
    return sum(not isinstance(record, RunRecord | CloseRecord) for record in records)


def journals_of(folder: Path) -> Iterator[Path]:
    """The journals of one run: its own, and those of the further heads that were watched beside it."""
    yield folder / FILE_NAME
    yield from sorted(path for path in folder.glob(f"**/{FILE_NAME}") if path.parent != folder)
