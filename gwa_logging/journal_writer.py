"""Writes records to a journal in a thread, in their order, so that a slow or hanging disk does not block training.

A training step puts a record into a queue, which takes microseconds. The calls that promise a written journal wait for the
thread, for `WAITS` seconds at most: the end of an epoch, `flush`, `state_dict` and `close`. So a killed process loses what was
in the queue, normally less than a millisecond's records, and never what a state or an epoch's report was built on.
"""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread
from time import time
from typing import NamedTuple

from gwa_logging.faults import Faults
from gwa_logging.journal import Journal
from gwa_logging.records import AnyRecord

WAITS = 10.0
"""Seconds that a call waits for the disk. While the disk still hangs, later calls do not wait again."""

SOON = 0.05
"""Seconds that a call waits at least: what an idle thread needs to answer, also on a busy machine."""

MAX_QUEUED = 10_000
"""Number of records that wait for a hanging disk. Further ones are lost, and counted as a fault."""


class _Item(NamedTuple):
    """What the thread has to do.

    Attributes:
        record: to be written, or None.
        time: when it was recorded, in seconds since 1970.
        sync: write it to the disk and not only to the file.
        closes: close the journal and end the thread.
        done: set afterwards.
    """

    record: AnyRecord | None
    time: float = 0.0
    sync: bool = False
    closes: bool = False
    done: Event | None = None


class JournalWriter:
    """The queue in front of a journal, and its thread.

    Attributes:
        listeners: called after records were written, from the thread.
    """

    def __init__(self, journal: Journal | None, faults: Faults) -> None:
        """Starts the thread; without a journal (in a process that does not write) nothing happens in any call."""
        self.listeners: list[Callable[[], None]] = []
        self._journal, self._faults = journal, faults
        self._queue: SimpleQueue[_Item] = SimpleQueue()
        self._lost = 0
        self._is_closed = journal is None
        self._awaited, self._waited = Event(), 0.0  # for what a call has waited in vain, and for how many seconds
        if journal is not None:  # the thread must not keep the writer, so that a dropped monitor can be collected
            arguments = (self._queue, journal, faults, self.listeners)
            Thread(target=_write_all, args=arguments, name="gwa_logging journal", daemon=True).start()

    def append(self, record: AnyRecord, *, sync: bool = False) -> None:
        """Queues a record. Never raises.

        Args:
            record: the record.
            sync: wait until it is on the disk.
        """
        if self._is_closed:
            return
        if self._queue.qsize() >= MAX_QUEUED:
            self._lost += 1
            self._faults.record("records lost", f"{self._path} hangs, and {MAX_QUEUED} records are waiting for it")
            return
        done = Event() if sync else None
        self._queue.put(_Item(record, time(), sync, done=done))
        if done is not None:
            self._wait(done, WAITS)

    def drain(self, timeout: float = WAITS) -> bool:
        """Waits until everything queued so far is in the file. Returns False if it is not after `timeout` seconds."""
        if self._is_closed:
            return True
        done = Event()
        self._queue.put(_Item(None, done=done))
        return self._wait(done, max(timeout, SOON))

    @property
    def is_complete(self) -> bool:
        """Returns True if the files contain every record; call `drain` before."""
        return self._journal is None or (self._journal.is_complete and not self._lost)

    def close(self) -> bool:
        """Writes the rest and closes the journal. If the disk hangs, leaves that to the thread and returns False."""
        if self._is_closed:
            return True
        self._is_closed = True
        done = Event()
        self._queue.put(_Item(None, closes=True, done=done))
        return self._wait(done, WAITS)

    @property
    def _path(self) -> str:
        return "" if self._journal is None else str(self._journal.path)

    def _wait(self, done: Event, timeout: float) -> bool:
        hangs = self._waited > 0 and not self._awaited.is_set()
        if done.wait(0.0 if hangs and timeout <= self._waited else timeout):
            self._waited = 0.0
        elif not hangs or timeout > self._waited:
            self._awaited, self._waited = done, timeout
            if timeout >= WAITS:
                self._faults.record("journal", f"{self._path} hangs: a record has not been written for {timeout:.0f} s")
        return done.is_set()


def _write_all(
    queue: SimpleQueue[_Item], journal: Journal, faults: Faults, listeners: list[Callable[[], None]]
) -> None:
    is_open = True
    while is_open:
        item = queue.get()
        is_open = not item.closes
        try:
            if item.record is not None:
                journal.append(item.record, sync=item.sync, at=item.time)
                for listener in listeners:
                    listener()
            if item.closes:
                journal.close()
        except Exception as error:  # noqa: BLE001 - the thread must write the following records
            faults.record("journal", f"{type(error).__name__}: {error}")
        finally:
            if item.done is not None:
                item.done.set()
