"""Continues the run of a loaded state: its journal, and the trackers' runs that it names.

`watch` has already started new runs, because it cannot know that a state follows. They hold nothing but their beginning, so
they are discarded. A run that the user names, with `run=` or by making it the active one, stays; the journal is then a new one
too, because the two runs are branches of the same training.

Nothing here raises: if something cannot be continued, that is a fault, and the new run or the new journal is used.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from gwa_logging import registry
from gwa_logging._announce import announce
from gwa_logging._continued_journal import EarlierJournal, StatePosition
from gwa_logging.checkpoint import MonitorState
from gwa_logging.delivery import Delivery, wait_for
from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.protocols import Backend, RunContext
from gwa_logging.recording import Recording
from gwa_logging.records import TrackerRunRef
from gwa_logging.saved_run import SavedRun, SavedTracker, is_allowed

logger = logging.getLogger("gwa_logging")

RETIRE_WITHIN = 10.0
"""Seconds that discarding the new runs may take."""

FAULT = "restart"


def continue_run(recordings: Sequence[Recording], states: Sequence[MonitorState]) -> None:
    """Continues the run of the states, if training has not begun. Waits for the trackers.

    Args:
        recordings: of all heads of a model, the first head first.
        states: their states.
    """
    first, saved = recordings[0], states[0].run
    if first.journal is not None and first.awaits_first_step and states[0].step < first.intervals.steps:
        first.faults.record(
            FAULT,
            f"a state of step {states[0].step} was loaded after one of step {first.intervals.steps}: the journal keeps the "
            "records between them, and training repeats them. Load a state once, into a new monitor",
        )
    if saved is None or first.journal is None or first.intervals.steps or first.journal.count > 1:
        return
    with ExitStack() as locks:
        for recording in recordings:
            locks.enter_context(recording.lock)
        try:
            _Continuation(recordings, states, saved).apply()
        except Exception as error:  # noqa: BLE001 - whatever a tracker or the disk raises; the training must start
            first.faults.record(FAULT, f"the run of the state is not continued: {type(error).__name__}: {error}")


class _Continuation:
    """One call of `continue_run`.

    Attributes:
        earlier: the journals of the state's run, one for each head; empty if they are not continued.
    """

    def __init__(self, recordings: Sequence[Recording], states: Sequence[MonitorState], saved: SavedRun) -> None:
        self._recordings, self._states, self._saved = recordings, states, saved
        self._first = recordings[0]
        self.earlier: list[EarlierJournal] = []

    def apply(self) -> None:
        """Opens everything first, then replaces what was opened anew."""
        replaceable, is_branch = self._replaceable()
        if not is_branch:
            self.earlier = self._open_journals()
        opened = {name: backends for name in replaceable if (backends := self._open(name, self._saved.trackers[name]))}
        if not (self.earlier or opened):
            return
        journals = self.earlier or self._own_journals()
        wait_for(self._first.deliveries, monotonic() + 1)  # for backends whose contents cannot be read back
        deadline = monotonic() + RETIRE_WITHIN
        for index in reversed(range(len(self._recordings))):  # the first head's backend removes the run
            self._retire(
                self._recordings[index], {name: backends[index] for name, backends in opened.items()}, deadline
            )
        for index in reversed(range(len(self._recordings))):  # the folders of further heads are in that of the first
            self._replace(index, journals, {name: backends[index] for name, backends in opened.items()})
        if self.earlier:
            announce(f"continuing the run in {self._folder}")

    @property
    def _folder(self) -> Path:
        """The folder of the state's run."""
        assert self._first.journal is not None
        return self._first.journal.path.parent.parent / self._saved.folder

    def _replaceable(self) -> tuple[list[str], bool]:
        """Returns the trackers whose new runs the state's may replace, and whether the user has named another run."""
        replaceable: list[str] = []
        is_branch = False
        for name, delivery in self._first.trackers.items():
            saved, backend = self._saved.trackers.get(name), delivery.backend
            if saved is None or (saved.run is not None and saved.run == backend.run_ref.run):
                continue
            if backend.owns_run and self._first.settings.run_of(name) is None:
                replaceable.append(name)
            else:
                is_branch = True
                logger.warning(
                    "gwa_logging: backend %s: the state was saved in the run %s, and this process logs to %s, because it is "
                    "the active run or was passed as run=. The records go there, and the journal begins where the state ends",
                    *(name, saved.run or self._saved.folder, backend.run_ref.run or "another one"),
                )
        return replaceable, is_branch

    def _open_journals(self) -> list[EarlierJournal]:
        """Locks the journals of all heads of the state's run; returns none if one of them cannot be continued."""
        found: list[EarlierJournal] = []
        try:
            for recording in self._recordings:
                assert recording.journal is not None
                own = recording.journal.path.parent
                folder = self._folder if recording is self._first else self._folder / own.name
                found.append(EarlierJournal(folder / FILE_NAME, recording.name))
        except (OSError, BackendError, InvalidInputError) as error:
            for journal in found:
                journal.release()
            logger.warning(
                "gwa_logging: the journal of the state's run is not continued (%s); the new one begins where the state ends",
                error,
            )
            return []
        return found

    def _own_journals(self) -> list[EarlierJournal]:
        """Closes the new journals, to open them again with another first line."""
        own = [recording.journal for recording in self._recordings if recording.journal is not None]
        for journal in own:
            journal.close()
        return [EarlierJournal(j.path, recording.name) for j, recording in zip(own, self._recordings, strict=True)]

    def _open(self, name: str, saved: SavedTracker) -> list[Backend]:
        """Opens a tracker's run for each head; returns none if that is impossible, which is a fault."""
        first, backends = self._first, list[Backend]()
        if saved.run is None and not self.earlier:
            return []
        try:
            if saved.run is not None:
                folders = (self._folder.parent, Path.cwd())
                if not is_allowed(name, saved.run, first.name, folders):
                    raise InvalidInputError(f"{saved.run[:300]!r} is not a run of {name} that a checkpoint may name")
                if first.is_taken(name, TrackerRunRef(run=saved.run)):
                    raise InvalidInputError("another monitor of this process still writes to it; close that one first")
            for recording in self._recordings:
                run = backends[0].run if backends else saved.run
                context = RunContext(recording.name, run, self._folder_of(recording), saved.owned and not backends)
                opened = registry.open_backend(name, context)
                assert opened is not None  # it is not "local"
                backends.append(opened)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises
            for backend in reversed(backends):
                backend.close()
            first.faults.record(
                FAULT,
                f"backend {name}: the state's run {saved.run or self._saved.folder} cannot be continued, so the records go to "
                f"a new one ({error})",
            )
            return []
        return backends

    def _folder_of(self, recording: Recording) -> Path:
        """The folder in which a head's journal will be."""
        if self.earlier:
            return self.earlier[self._recordings.index(recording)].path.parent
        assert recording.journal is not None
        return recording.journal.path.parent

    def _retire(self, recording: Recording, opened: dict[str, Backend], deadline: float) -> None:
        """Ends the deliveries of a head, and discards the runs that others replace."""
        replaced = [delivery for name, delivery in recording.trackers.items() if name in opened]
        for delivery in recording.deliveries:
            close = delivery.backend.discard if delivery in replaced else _nothing
            if not delivery.retire(deadline, close):
                recording.faults.record(
                    FAULT,
                    f"backend {delivery.backend.name} has not ended its new run within {RETIRE_WITHIN:.0f} s; it may remain, "
                    "without any scores",
                )

    def _replace(self, index: int, journals: list[EarlierJournal], opened: dict[str, Backend]) -> None:
        """Moves a head to its journal and its trackers' runs."""
        recording, state = self._recordings[index], self._states[index]
        own, names = recording.journal, {id(delivery): name for name, delivery in recording.trackers.items()}
        assert own is not None
        backends = [opened.get(names.get(id(old), ""), old.backend) for old in recording.deliveries]
        position = StatePosition(state.recorded_steps, state.step, len(state.history)) if self.earlier else None
        run = recording.run_record(backends, created=journals[index].run.created)
        try:
            journal = journals[index].continue_with(run, position, recording.faults)
        except (OSError, BackendError) as error:
            recording.faults.record(FAULT, f"the journal cannot be continued: {error}")
            journal = own if self.earlier else Journal(own.path, recording.faults, is_continued=True)
        deliveries: list[Delivery] = []
        for backend in backends:
            backend.move_to(journal.path.parent)
        for old, backend in zip(recording.deliveries, backends, strict=True):
            can_read_back = getattr(backend.contents, "__func__", None) is not Backend.contents
            if can_read_back:
                first = 0
            elif journal.path == own.path and backend is old.backend:
                first = old.position
            else:  # it has the earlier records, or cannot show them
                first = journal.count
            deliveries.append(Delivery(backend, journal, recording.faults, first=first, is_restart=can_read_back))
        recording.replace_deliveries(deliveries)
        if journal is not own:
            recording.move_to(journal)


def _nothing() -> None:
    """Closes nothing: another delivery continues with the backend."""
