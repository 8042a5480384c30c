"""Disables the copies of a monitor that `os.fork` makes: a monitor works only in the process that created it.

A forked process inherits the open journal and the connections to trackers, but no threads. So a copy would mix its records
into the parent's run, and would wait forever for threads that do not exist. For a DataLoader worker, which does not use the
monitor, this costs microseconds.
"""

import logging
import os
from weakref import WeakSet

from gwa_logging.errors import InvalidInputError

logger = logging.getLogger("gwa_logging")


class Owned:
    """Base class of objects that belong to the process that created them.

    Attributes:
        is_copy: True for the copy in a forked process.
    """

    def __init__(self) -> None:
        self.is_copy = False
        self._owner = os.getpid()
        self._has_warned = False
        _owned.add(self)

    def _disown(self) -> None:
        """Called first thing in a forked process. Takes no lock, because a thread of the parent may have held it."""
        self.is_copy = True

    def _is_refused(self, call: str) -> bool:
        """Returns True if this is a copy, so that the call must do nothing. Logs a warning for the first such call."""
        if self.is_copy and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "gwa_logging: %s does nothing in process %d: the monitor belongs to process %d, in which watch() was called. "
                "To watch the training in this process, call watch() in it",
                *(call, os.getpid(), self._owner),
            )
        return self.is_copy

    def _refuse_copy(self, call: str) -> None:
        """For calls that need the device, whose state a fork does not copy.

        Raises:
            InvalidInputError: this is a copy.
        """
        if self.is_copy:
            raise InvalidInputError(f"{call}: the monitor belongs to process {self._owner}; call it there")


_owned: "WeakSet[Owned]" = WeakSet()


def _disown_all() -> None:
    for owned in list(_owned):
        owned._disown()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_disown_all)
