"""From the journal to the backends.

A backend is fed from the journal, one record after the other, from where it last stopped. So the journal is the queue:
it cannot fill the memory, keeps the order, and a tracker that was away catches up when it is back. A record that a
backend does not take is tried again with a growing pause; nothing raises into training and nothing waits for a tracker.

Each backend has a thread of its own, so that one that hangs holds nothing but itself. For a backend that must not write
beside the user, the training thread stands still meanwhile, and loses patience soon. The deliveries of one `watch` are a
`DeliveryGroup`: whatever their number, a training step is blocked for `PATIENCE` at most, and `flush` and `close` have one
deadline.
"""

from collections import deque
from collections.abc import Iterable
from threading import Event, Lock, Thread
from time import monotonic

from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, JournalFeed
from gwa_logging.protocols import Backend, TrackerContents
from gwa_logging.records import AnyRecord

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
RECORDS_PER_NOTICE = 8  # while the training thread stands still, so that catching up never holds a step for long
RECORDS_PER_CALL = 100  # for a backend that takes many at once
PATIENCE = 0.02  # seconds that the training thread stands still; a backend that takes longer is not waited for again
HANGS_AFTER = 30.0  # seconds in one call until a backend is reported
LOOK_EVERY = 10.0  # seconds between two looks at the backends


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
        self._reader = JournalFeed(journal)
        self._faults = faults
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._held: TrackerContents | None = (
            TrackerContents()
        )  # what the tracker need not be sent; None: it has to be asked
        self._called: float | None = None  # when the call into the backend that is under way began
        self._reported: float | None = None  # the last such call that was reported because it hangs
        self._refusal: str | None = None
        self._deadline = 0.0  # of `close`
        self._after: tuple[Delivery, ...] = ()
        self._news, self._rested, self._closing, self._done = Event(), Event(), Event(), Event()
        self._rested.set()
        Thread(target=self._work, name=f"gwa_logging {backend.name}", daemon=True).start()

    def notify(self, patience: float | None = None) -> None:
        """Says that the journal has grown. Never raises; takes microseconds, or, if the backend must not write beside the
        user, its `write`, `patience` at most, which is `PATIENCE` if it is None.
        """
        if self.backend.threaded:
            self._news.set()
        elif self._rested.is_set():  # otherwise it still hangs in the last one
            self._rested.clear()
            self._news.set()
            self._rested.wait(PATIENCE if patience is None else patience)

    def go_on(self) -> None:
        """Says that the run goes on from an earlier state: what the tracker has already of the steps since then is not sent
        again.
        """
        self._held = None

    def wait(self, deadline: float) -> bool:
        """Waits until the backend has everything, at most until `deadline` on the monotonic clock."""
        return wait_for([self], deadline)

    def begin_close(self, deadline: float, after: "Iterable[Delivery]" = ()) -> None:
        """Has the backend given what is left, and closed as soon as those in `after` have been, or at `deadline`."""
        self._deadline, self._after = deadline, tuple(after)
        self._closing.set()
        self._news.set()

    def close(self, deadline: float) -> bool:
        """Delivers what is left and closes the backend, at most until `deadline`; whether it managed to."""
        self.begin_close(deadline)
        return self.shortfall() is None

    def shortfall(self) -> str | None:
        """After `begin_close`: waits until its deadline, and says what the backend lacks then; None if it lacks nothing."""
        self._done.wait(max(0.0, self._deadline - monotonic()))
        if left := self.left:
            return f"has not taken everything in time: {left} records are left"
        if lost := self._reader.lost:
            return f"lacks {lost} records: they were removed from the journal before they could be sent"
        if refusal := self.refusal():
            return f"has not kept everything: {refusal}"
        if not self._done.is_set():
            return "has taken everything, but has not finished in time: the tracker may show the run as unfinished"
        return None

    def refusal(self) -> str | None:
        """Why the tracker refuses for good what it is sent, if the backend can tell. It is recorded as a fault, once."""
        if self._refusal is None and (ask := getattr(self.backend, "refusal", None)):
            try:
                self._refusal = ask()
            except Exception as error:  # noqa: BLE001 - as in `_drain`
                self._faults.record(f"backend {self.backend.name}", f"{type(error).__name__}: {error}")
            if self._refusal:
                self._faults.record(f"backend {self.backend.name}", self._refusal)
        return self._refusal

    @property
    def is_behind(self) -> bool:
        """Whether there is something that the backend has not taken."""
        return self._reader.behind()

    @property
    def is_whole(self) -> bool:
        """Whether the backend has kept everything up to where it is."""
        return not self._reader.lost and self.refusal() is None

    def pause(self, seconds: float) -> None:
        """Waits for a while, or until the backend may be notified again."""
        (self._closing if self._rested.is_set() else self._rested).wait(seconds)

    def look(self) -> None:
        """Reports a backend that hangs in a call or refuses for good. Called by the group's watchdog."""
        called = self._called
        if called is not None and called != self._reported and monotonic() - called > HANGS_AFTER:
            self._reported = called
            self._faults.record(
                f"backend {self.backend.name}", f"it has not returned from a call for {monotonic() - called:.0f} s"
            )
        self.refusal()

    @property
    def left(self) -> int:
        """How many records the backend has not taken."""
        return self._reader.count()

    def _drain(self, limit: int | None = None) -> None:
        """Writes what is new. Stops at the first record that is not taken."""
        if monotonic() < self._not_before:
            return
        self._called = monotonic()
        try:
            while limit != 0 and (found := self._reader.peek(batch_of(self.backend)))[0]:
                held = self._held  # after the records were read: those of a run that goes on come after `go_on`
                if held is None:
                    # What an earlier close has written is replaced by what this one will know.
                    self._held = held = getattr(self.backend, "contents", TrackerContents)()._replace(
                        closes=frozenset()
                    )
                    if not self.backend.threaded and not self._closing.is_set():
                        return  # the training thread may not have waited
                records, position = found
                send(self.backend, [record for record in records if not held.has(record)])
                self._reader.advance(position)
                self._called = monotonic()
                self.delivered += len(records)
                self._pause = FIRST_PAUSE
                limit = None if limit is None else limit - 1
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which would end this thread without a word
            self._not_before = monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._faults.record(f"backend {self.backend.name}", f"{type(error).__name__}: {error}")
        finally:
            self._called = None

    def _close_backend(self) -> None:
        try:
            self.backend.close()
        except BaseException as error:  # noqa: BLE001 - as above
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
        for other in self._after:
            other._done.wait(max(0.0, self._deadline - monotonic()))
        self._close_backend()
        self._done.set()

    def _next_try(self) -> float | None:
        """Seconds until a record that was not taken may be tried again; None if news must come first."""
        if self.backend.threaded and self._reader.behind():
            return max(0.0, self._not_before - monotonic())
        return None


def wait_for(deliveries: Iterable[Delivery], deadline: float) -> bool:
    """Waits until all backends have everything, at most until `deadline` on the monotonic clock; whether they have."""
    behind = every = list(deliveries)
    while True:
        for delivery in behind:
            delivery.notify(patience=0.0)
        behind = [delivery for delivery in behind if delivery.is_behind]
        left = deadline - monotonic()
        if not behind or left <= 0:
            return not behind and all(delivery.is_whole for delivery in every)
        behind[0].pause(min(left, 0.01))


class DeliveryGroup:
    """The deliveries of one `watch`: of all its heads and backends."""

    def __init__(self) -> None:
        self.waiting: deque[Delivery] = deque()
        """Those that have news, and for which the training thread must wait."""
        self._deliveries: list[Delivery] = []
        self._lock = Lock()
        self._asked: set[object] = set()
        self._left = 0.0  # of the patience, in the present step
        self._closed = Event()

    def add(self, delivery: Delivery) -> None:
        """Adds a delivery. The first one starts the watchdog."""
        self._deliveries.append(delivery)
        if len(self._deliveries) == 1:
            Thread(target=self._watch, name="gwa_logging watchdog", daemon=True).start()

    def notify(self, deliveries: Iterable[Delivery]) -> None:
        """Says that the journal of some deliveries has grown."""
        for delivery in deliveries:
            if delivery.backend.threaded:
                delivery.notify()
            elif delivery not in self.waiting:
                self.waiting.append(delivery)

    def take_turns(self, caller: object) -> None:
        """Waits for those in `waiting`, one after the other, `PATIENCE` at most in one training step; the others stay there.

        Args:
            caller: who asks, each of the heads at most once in one training step.
        """
        with self._lock:
            if caller in self._asked or not self._asked:
                self._asked.clear()
                self._left = PATIENCE
            self._asked.add(caller)
            while self.waiting and self._left > 0:
                begin = monotonic()
                self.waiting.popleft().notify(self._left)
                self._left -= monotonic() - begin

    def remove(self, deliveries: Iterable[Delivery]) -> None:
        """Forgets deliveries that are closed. The last one ends the watchdog."""
        for delivery in deliveries:
            self._deliveries.remove(delivery)
        if not self._deliveries:
            self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            for delivery in tuple(self._deliveries):
                delivery.look()
