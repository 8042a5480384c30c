"""Faults in the middle of training: warned about once, counted, never raised."""

import logging
from collections import Counter
from threading import Lock

logger = logging.getLogger("gwa_logging")


class Faults:
    """Counts what went wrong, by kind; the first of each kind is logged as a warning.

    A logger is used rather than `warnings`, because a warning filter can turn a warning into an exception, and
    nothing here may reach the training step.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def record(self, kind: str, detail: object, times: int = 1) -> None:
        """Counts `times` faults of `kind`; logs `detail` if it is the first one of its kind."""
        with self._lock:
            first = kind not in self._counts
            self._counts[kind] += times
        if first:
            logger.warning("gwa_logging: %s: %s. Training goes on; further ones are only counted.", kind, detail)

    def renew_lock(self) -> None:
        """For a forked process: a thread of the parent may have held the lock, and would never release this copy of it."""
        self._lock = Lock()

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind has happened so far."""
        with self._lock:
            return dict(self._counts)
