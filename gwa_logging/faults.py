"""Faults in the middle of training: warned about once, counted, never raised."""

import logging
from collections import Counter
from collections.abc import Mapping
from threading import Lock

from gwa_logging.redact import redact_urls

logger = logging.getLogger("gwa_logging")


class Faults:
    """Counts what went wrong, by kind; the first of each kind is logged as a warning.

    A logger is used rather than `warnings`, because a warning filter can turn a warning into an exception, and
    nothing here may reach the training step.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._notes: dict[str, bool] = {}  # and whether they are waiting for a report
        self._lock = Lock()

    def record(self, kind: str, detail: object, times: int = 1) -> None:
        """Counts `times` faults of `kind`; logs `detail` if it is the first one of its kind."""
        with self._lock:
            first = kind not in self._counts
            self._counts[kind] += times
        if first:
            shown = redact_urls(str(detail))
            logger.warning("gwa_logging: %s: %s. Training goes on; further ones are only counted.", kind, shown)

    def note(self, text: str) -> None:
        """Logs, once, something that is no fault but that readers of the next report must know."""
        with self._lock:
            is_new = text not in self._notes
            if is_new:
                self._notes[text] = True
        if is_new:
            logger.warning("gwa_logging: %s.", text)

    def take_notes(self) -> tuple[str, ...]:
        """The notes since the last call."""
        with self._lock:
            notes = tuple(text for text, waits in self._notes.items() if waits)
            self._notes = dict.fromkeys(self._notes, False)
        return notes

    def renew_lock(self) -> None:
        """For a forked process: a thread of the parent may have held the lock, and would never release this copy of it."""
        self._lock = Lock()

    def record_once(self, problems: Mapping[str, str]) -> None:
        """Counts each kind of problem the first time that it is given, with its description: for conditions that last."""
        for kind, detail in problems.items():
            if kind not in self.counts:
                self.record(kind, detail)

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind has happened so far."""
        with self._lock:
            return dict(self._counts)
