"""Counts errors during training instead of raising them, and logs the first of each kind."""

import logging
from collections import Counter
from collections.abc import Mapping
from threading import Lock

from gwa_logging.redact import redact_urls

logger = logging.getLogger("gwa_logging")


class Faults:
    """Counts faults by kind. The first of each kind is logged as a warning.

    Faults go to a logger and not to `warnings`: a warning filter could turn them into exceptions in the training step.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._notes: dict[str, bool] = {}  # True until a report has included the note
        self._lock = Lock()

    def record(self, kind: str, detail: object, times: int = 1) -> None:
        """Counts `times` faults of a kind, and logs `detail` if they are the first of their kind."""
        with self._lock:
            first = kind not in self._counts
            self._counts[kind] += times
        if first:
            masked = redact_urls(str(detail))
            logger.warning(
                "gwa_logging: %s: %s. Training continues; further occurrences are only counted.", kind, masked
            )

    def note(self, text: str) -> None:
        """Logs, once, a remark that is not a fault, and adds it to the notes of the next report."""
        with self._lock:
            is_new = text not in self._notes
            if is_new:
                self._notes[text] = True
        if is_new:
            logger.warning("gwa_logging: %s.", text)

    def take_notes(self) -> tuple[str, ...]:
        """Returns the notes since the last call."""
        with self._lock:
            notes = tuple(text for text, is_pending in self._notes.items() if is_pending)
            self._notes = dict.fromkeys(self._notes, False)
        return notes

    def renew_lock(self) -> None:
        """Replaces the lock in a forked process: if a thread of the parent held it, this copy would never be released."""
        self._lock = Lock()

    def record_once(self, problems: Mapping[str, str]) -> None:
        """Counts each kind of problem only the first time, for conditions that persist. `problems` maps kinds to details."""
        for kind, detail in problems.items():
            if kind not in self.counts:
                self.record(kind, detail)

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults so far, by kind."""
        with self._lock:
            return dict(self._counts)
