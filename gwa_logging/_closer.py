"""Closes what was dropped without `close()`, in a thread.

The garbage collector can run at any point of any thread, even while that thread holds a lock that closing needs. So finalizers
only put the object into a queue, which is always safe, and the thread closes it. The thread starts with the first `watch` and
waits for the queue from then on.
"""

import logging
import os
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Protocol

logger = logging.getLogger("gwa_logging")


class Closable(Protocol):
    """Anything that has to be closed."""

    def close(self) -> None:
        """Releases files, threads and connections."""
        ...


class Closer:
    """A queue of objects to close, and the thread that closes them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Closable | Event] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Starts the thread if it does not run."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=_close_all_in, args=(self._queue,), name="gwa_logging closer", daemon=True)
            self._thread.start()

    def close_later(self, closable: Closable) -> None:
        """Schedules an object to be closed. Safe in finalizers: takes no lock and does not block."""
        self._queue.put(closable)

    def wait(self, timeout: float) -> bool:
        """Waits until everything scheduled so far is closed. Returns False after `timeout` seconds."""
        if self._thread is None or self._thread is current_thread():
            return True
        reached = Event()
        self._queue.put(reached)
        return reached.wait(timeout)

    def reset(self) -> None:
        """In a forked process: forgets the thread, which does not exist there, and the queue, which belongs to the parent."""
        self._queue, self._thread = SimpleQueue(), None


def _close_all_in(queue: "SimpleQueue[Closable | Event]") -> None:
    while True:
        item = queue.get()
        try:
            item.set() if isinstance(item, Event) else item.close()
        except Exception:
            logger.debug("gwa_logging: closing %r failed", item, exc_info=True)
        del item  # would otherwise live until the next one arrives


closer = Closer()

if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=closer.reset)
