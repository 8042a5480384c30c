"""From the journal to the backends.

A backend is fed from the journal, one record after the other, from where it last stopped. So the journal is the queue:
it cannot fill the memory, keeps the order, and a tracker that was away catches up when it is back. A record that a
backend does not take is tried again with a growing pause; nothing raises into training and nothing waits for a tracker.

Each backend has a thread of its own, so that one that hangs holds nothing but itself. For a backend that must not write
beside the user, the training thread stands still meanwhile, and loses patience soon.
"""

from threading import Event, Thread
from time import monotonic

from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, JournalReader
from gwa_logging.types import AnyRecord, Backend, Held

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
RECORDS_PER_NOTICE = 8  # while the training thread stands still, so that catching up never holds a step for long
RECORDS_PER_CALL = 100  # for a backend that takes many at once
PATIENCE = 0.02  # seconds that the training thread stands still; a backend that takes longer is not waited for again


def batch_of(backend: Backend) -> int:
    """How many records a backend takes at once."""
    return RECORDS_PER_CALL if hasattr(backend, "write_many") else 1


def send(backend: Backend, records: list[AnyRecord]) -> None:
    """Writes records, `batch_of(backend)` at most."""
    if len(records) > 1:
        backend.write_many(records)  # type: ignore[attr-defined]  # not every backend has it
    else:
        for record in records:
            backend.write(record)


class Delivery:
    """Feeds one backend.

    Attributes:
        backend: the backend.
        delivered: records that it has taken.
    """

    def __init__(self, backend: Backend, journal: Journal, faults: Faults) -> None:
        self.backend = backend
        self.delivered = 0
        self._reader = JournalReader(journal.path)
        self._faults = faults
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._held: Held | None = Held()  # what the tracker need not be sent; None: it has to be asked
        self._news, self._rested, self._closing, self._done = Event(), Event(), Event(), Event()
        self._rested.set()
        Thread(target=self._work, name=f"gwa_logging {backend.name}", daemon=True).start()

    def notify(self) -> None:
        """Says that the journal has grown. Never raises; takes microseconds, or, if the backend must not write beside the
        user, its `write`, `PATIENCE` at most.
        """
        if self.backend.threaded:
            self._news.set()
        elif self._rested.is_set():  # otherwise it still hangs in the last one
            self._rested.clear()
            self._news.set()
            self._rested.wait(PATIENCE)

    def go_on(self) -> None:
        """Says that the run goes on from an earlier state: what the tracker has already of the steps since then is not sent
        again.
        """
        self._held = None

    def wait(self, deadline: float) -> bool:
        """Waits until the backend has everything, at most until `deadline` on the monotonic clock."""
        while (left := deadline - monotonic()) > 0:
            self.notify()
            if not self._reader.behind():
                return True
            self._closing.wait(min(left, 0.01))
        return False

    def close(self, deadline: float) -> bool:
        """Delivers what is left and closes the backend, at most until `deadline`; whether it managed to."""
        self._closing.set()
        self._news.set()
        self._done.wait(max(0.0, deadline - monotonic()))
        return self._done.is_set() and not self._reader.behind()

    @property
    def left(self) -> int:
        """How many records the backend has not taken."""
        return self._reader.count()

    def _drain(self, limit: int | None = None) -> None:
        """Writes what is new. Stops at the first record that is not taken."""
        if monotonic() < self._not_before:
            return
        try:
            while limit != 0 and (found := self._reader.peek(batch_of(self.backend)))[0]:
                held = self._held  # after the records were read: those of a run that goes on come after `go_on`
                if held is None:
                    # What an earlier close has written is replaced by what this one will know.
                    self._held = held = getattr(self.backend, "held", Held)()._replace(closes=frozenset())
                    if not self.backend.threaded and not self._closing.is_set():
                        return  # the training thread may not have waited
                records, position = found
                send(self.backend, [record for record in records if not held.has(record)])
                self._reader.advance(position)
                self.delivered += len(records)
                self._pause = FIRST_PAUSE
                limit = None if limit is None else limit - 1
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises must not reach training
            self._not_before = monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._faults.record(f"backend {self.backend.name}", f"{type(error).__name__}: {error}")

    def _close_backend(self) -> None:
        try:
            self.backend.close()
        except Exception as error:  # noqa: BLE001 - as above
            self._faults.record(f"backend {self.backend.name}", f"{type(error).__name__}: {error}")

    def _work(self) -> None:
        while not self._closing.is_set():
            self._news.wait(self._next_try())
            self._news.clear()
            if not self._closing.is_set():
                self._drain(None if self.backend.threaded else RECORDS_PER_NOTICE)
            self._rested.set()
        self._not_before = 0.0
        self._drain()
        self._close_backend()
        self._done.set()

    def _next_try(self) -> float | None:
        """Seconds until a record that was not taken may be tried again; None if news must come first."""
        if self.backend.threaded and self._reader.behind():
            return max(0.0, self._not_before - monotonic())
        return None
