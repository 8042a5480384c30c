"""A process that writes a journal, for test_replay.py. It imports nothing else, so that it starts quickly."""

from multiprocessing.synchronize import Event
from pathlib import Path

from gwa_logging.faults import Faults
from gwa_logging.journal import Journal


def hold(path: Path, ready: Event, done: Event) -> None:
    """Opens a journal, sets `ready`, and closes the journal when `done` is set."""
    journal = Journal(path, Faults())
    ready.set()
    done.wait()
    journal.close()
