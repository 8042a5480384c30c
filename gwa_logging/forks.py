"""Monitors belong to the process that made them: what `os.fork` copies of one into another process does nothing there.

A child has the copies of the journal's file and of the trackers' connections, but none of the threads: what it writes would be
mixed into the parent's run, and what waits for a thread would wait forever. A worker of a DataLoader that leaves the monitor
alone pays microseconds for this.
"""

import logging
import os
from weakref import WeakSet

logger = logging.getLogger("gwa_logging")


class Owned:
    """Base of what belongs to the process that made it.

    Attributes:
        is_copy: whether this is the copy of it in a forked process.
    """

    def __init__(self) -> None:
        self.is_copy = False
        self._owner = os.getpid()
        self._has_warned = False
        _owned.add(self)

    def _disown(self) -> None:
        """Called in a forked process, before anything else runs there. Takes no lock: a thread of the parent may hold it."""
        self.is_copy = True

    def _is_refused(self, call: str) -> bool:
        """Whether a call must do nothing since this is a copy; the first such call is warned about."""
        if self.is_copy and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "gwa_logging: %s does nothing in process %d: the monitor belongs to process %d, in which watch() was called. "
                "To watch the training in this process, call watch() in it",
                *(call, os.getpid(), self._owner),
            )
        return self.is_copy


_owned: "WeakSet[Owned]" = WeakSet()


def _disown_all() -> None:
    for owned in list(_owned):
        owned._disown()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_disown_all)
