"""Sends the records of the journal to the backends.

Each backend reads the journal record by record, from where it last stopped. So the journal is the queue: it cannot exhaust the
memory, it keeps the order, and a tracker that was unreachable catches up once it is back. If a backend does not accept a
record, the delivery retries after a pause that doubles each time. Errors never reach the training thread.

Each backend has its own thread, so one that hangs does not block the others. A backend with `threaded=False` must not write
while users log to the same run; for it the training thread waits, for `MAX_BLOCKING` seconds at most. The deliveries of one
`watch` call form a `DeliveryGroup`: however many heads and backends there are, they block a training step for `MAX_BLOCKING`
at most in total, and share one deadline in `flush` and `close`.
"""

from collections import deque
from collections.abc import Callable, Iterable
from threading import Event, Lock, Thread
from time import monotonic

from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, JournalFeed
from gwa_logging.protocols import Backend, TrackerContents

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts
RECORDS_PER_NOTICE = 8  # while the training thread waits, so that catching up does not block a step for long
MAX_BLOCKING = 0.02  # seconds that the training thread waits; a backend that takes longer is not waited for again
HANGS_AFTER = 30.0  # seconds in one call after which a backend is reported as hanging
CHECK_EVERY = 10.0  # seconds between two checks of the backends
CLOSING_TAKES = 5.0  # seconds that remain for closing a backend if the report is late


class Delivery:
    """Feeds one backend from its own thread.

    The thread goes through these states::

          idle  --- notify(), or the end of a pause --->  writing
            ^                                                |
            +--- end of the journal, error, or limit --------+

          from both, after begin_close():
          writing the rest  --->  waiting for `after` and the report  --->  closing the backend  --->  closed

    Four events connect it to the other threads: `_wake` (the thread has something to do), `_idle` (it is not writing; for
    an unthreaded backend the training thread waits for this one), `_closing` (`begin_close` was called), `_closed` (the end).

    Attributes:
        backend: the backend.
        delivered: number of records that the backend has accepted.
    """

    def __init__(
        self, backend: Backend, journal: Journal, faults: Faults, *, first: int = 0, is_restart: bool = False
    ) -> None:
        """Starts the thread.

        Args:
            backend: where to send the records.
            journal: what to send.
            faults: counts errors.
            first: number of the first line to send.
            is_restart: True if the tracker may have some of the records, which are then not sent again; see `resume`.
        """
        self.backend = backend
        self.delivered = 0
        self._folder = journal.path.parent
        self._feed = JournalFeed(journal)
        self._feed.advance(first)
        self._faults = faults
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        # What the tracker already has and need not be sent. None: to be read from the tracker.
        self._contents: TrackerContents | None = None if is_restart else TrackerContents()
        self._call_began: float | None = None  # when the current call into the backend began
        self._reported: float | None = None  # the `_call_began` of the last call that was reported as hanging
        self._refusal: str | None = None
        self._deadline = 0.0  # of `begin_close`
        self._after: tuple[Delivery, ...] = ()
        self._report: Event | None = None
        self._instead_of_close: Callable[[], None] | None = None
        self._wake, self._idle, self._closing, self._closed = Event(), Event(), Event(), Event()
        self._idle.set()
        Thread(target=self._run, name=f"gwa_logging {backend.name}", daemon=True).start()

    def notify(self, timeout: float | None = None) -> None:
        """Announces that the journal has grown. Never raises.

        Takes microseconds for a threaded backend. For an unthreaded one, waits until it has written: at most `timeout` seconds,
        by default `MAX_BLOCKING`.
        """
        if self.backend.threaded:
            self._wake.set()
        elif self._idle.is_set():  # otherwise it still hangs in the previous call
            self._idle.clear()
            self._wake.set()
            self._idle.wait(MAX_BLOCKING if timeout is None else timeout)

    def resume(self) -> None:
        """Announces that the run resumes from an earlier state: records that the tracker already has are not sent again."""
        self._contents = None

    def wait(self, deadline: float) -> bool:
        """Waits until the backend has everything, or until `deadline` on the monotonic clock. Returns True if it has."""
        return wait_for([self], deadline)

    def begin_close(self, deadline: float, after: "Iterable[Delivery]" = (), report: Event | None = None) -> None:
        """Starts to send what is left and to close the backend; does not block.

        Args:
            deadline: on the monotonic clock.
            after: deliveries to be closed before this one, unless the deadline comes first.
            report: set once the run's report is written. The backend is closed after it, because it may upload the report, or
                without it `CLOSING_TAKES` seconds before the deadline.
        """
        self._deadline, self._after, self._report = deadline, tuple(after), report
        self._closing.set()
        self._wake.set()

    def retire(self, deadline: float, close: Callable[[], None]) -> bool:
        """Ends the thread, because another delivery takes over: sends no more, and calls `close` instead of the backend's.

        Returns:
            False if that has not happened before `deadline` on the monotonic clock.
        """
        self._instead_of_close = close
        self.begin_close(deadline)
        return self._closed.wait(max(0.0, deadline - monotonic()))

    def close(self, deadline: float) -> bool:
        """Sends what is left and closes the backend, until `deadline` at the latest. Returns True if that succeeded."""
        self.begin_close(deadline)
        return self.shortfall() is None

    def shortfall(self) -> str | None:
        """Waits for the end of `begin_close`. Returns what went wrong in it, as a clause after the backend's name, or None."""
        self._closed.wait(max(0.0, self._deadline - monotonic()))
        if left := self.left:
            return f"has not taken everything in time: {left} records are left"
        if lost := self._feed.lost:
            return f"lacks {lost} records: they were removed from the journal before they could be sent"
        if refusal := self.refusal():
            return f"has not kept everything: {refusal}"
        if not self._closed.is_set():
            return "has taken everything, but has not finished in time: the tracker may show the run as unfinished"
        return None

    @property
    def remedy(self) -> str:
        """How to send what `shortfall` reports."""
        if self.backend.is_notifier:
            return f"An alert is in the journal. To send it: gwa-logging notify {self._folder} URL"
        return f"To send what it lacks: gwa-logging replay {self._folder} --backend {self.backend.name}"

    @property
    def position(self) -> int:
        """Number of the next line of the journal."""
        return self._feed.position

    def refusal(self) -> str | None:
        """Returns why the tracker refuses records for good, or None. Records the reason as a fault, once."""
        if self._refusal is None:
            try:
                self._refusal = self.backend.refusal()
            except Exception as error:  # noqa: BLE001 - as in `_write_new`
                self._record_fault(error)
            if self._refusal:
                self._faults.record(f"backend {self.backend.name}", self._refusal)
        return self._refusal

    @property
    def is_behind(self) -> bool:
        """Returns True if there are records that the backend has not accepted yet."""
        return self._feed.behind()

    @property
    def is_whole(self) -> bool:
        """Returns True if the backend has kept every record that it was sent."""
        return not self._feed.lost and self.refusal() is None

    @property
    def left(self) -> int:
        """Number of records that the backend has not accepted yet."""
        return self._feed.count()

    def pause(self, seconds: float) -> None:
        """Waits for some seconds, but not longer than until the backend can be notified again."""
        (self._closing if self._idle.is_set() else self._idle).wait(seconds)

    def check(self) -> None:
        """Reports a backend that hangs or refuses records for good. Called by the group's watchdog thread."""
        began = self._call_began
        if began is not None and began != self._reported and monotonic() - began > HANGS_AFTER:
            self._reported = began
            self._faults.record(
                f"backend {self.backend.name}", f"it has not returned from a call for {monotonic() - began:.0f} s"
            )
        self.refusal()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._next_attempt())
            self._wake.clear()
            if not self._closing.is_set():
                self._write_new(None if self.backend.threaded else RECORDS_PER_NOTICE)
            self._idle.set()
        self._not_before = 0.0
        if self._instead_of_close is None:
            self._write_new()
        for other in self._after:
            other._closed.wait(max(0.0, self._deadline - monotonic()))
        if self._report is not None:
            self._report.wait(max(0.0, self._deadline - CLOSING_TAKES - monotonic()))
        try:
            (self._instead_of_close or self.backend.close)()
        except BaseException as error:  # noqa: BLE001 - as in `_write_new`
            self._record_fault(error)
        self._closed.set()

    def _next_attempt(self) -> float | None:
        """Seconds until a refused record may be sent again; None to wait for a notification."""
        if self.backend.threaded and self._feed.behind():
            return max(0.0, self._not_before - monotonic())
        return None

    def _write_new(self, limit: int | None = None) -> None:
        """Writes new records, in `limit` calls at most. Stops at the first record that is refused."""
        if monotonic() < self._not_before:
            return
        self._call_began = monotonic()
        try:
            while limit != 0 and (found := self._feed.peek(self.backend.records_per_call))[0]:
                contents = self._contents  # read after the records: those of a resumed run come after `resume`
                if contents is None:
                    # A close record of the earlier run is replaced by the one that this run will write.
                    self._contents = contents = self.backend.contents()._replace(closes=frozenset())
                    if not self.backend.threaded and not self._closing.is_set():
                        return  # the training thread may not have waited
                records, position = found
                if missing := [record for record in records if not contents.has(record)]:
                    self.backend.write_many(missing)
                self._feed.advance(position)
                self._call_began = monotonic()
                self.delivered += len(records)
                self._pause = FIRST_PAUSE
                limit = None if limit is None else limit - 1
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which would end this thread silently
            self._not_before = monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._record_fault(error)
        finally:
            self._call_began = None

    def _record_fault(self, error: BaseException) -> None:
        self._faults.record(f"backend {self.backend.name}", f"{type(error).__name__}: {error}")


def wait_for(deliveries: Iterable[Delivery], deadline: float) -> bool:
    """Waits until all backends have everything, or until `deadline` on the monotonic clock. Returns True if they have."""
    behind = every = list(deliveries)
    while True:
        for delivery in behind:
            delivery.notify(timeout=0.0)
        behind = [delivery for delivery in behind if delivery.is_behind]
        left = deadline - monotonic()
        if not behind or left <= 0:
            return not behind and all(delivery.is_whole for delivery in every)
        behind[0].pause(min(left, 0.01))


class DeliveryGroup:
    """The deliveries of one `watch` call: one for each head and backend.

    Attributes:
        waiting: deliveries that have new records and need the training thread to wait for them.
    """

    def __init__(self) -> None:
        self.waiting: deque[Delivery] = deque()
        self._deliveries: list[Delivery] = []
        self._lock = Lock()
        self._callers: set[object] = set()  # of `take_turns` in the current training step
        self._blocking_left = 0.0  # seconds in the current training step
        self._closed = Event()

    def add(self, delivery: Delivery) -> None:
        """Adds a delivery. The first one starts the watchdog thread."""
        self._deliveries.append(delivery)
        if len(self._deliveries) == 1:
            Thread(target=self._watch, name="gwa_logging watchdog", daemon=True).start()

    def notify(self, deliveries: Iterable[Delivery]) -> None:
        """Announces that the journals of these deliveries have grown."""
        for delivery in deliveries:
            if delivery.backend.threaded:
                delivery.notify()
            elif delivery not in self.waiting:
                self.waiting.append(delivery)

    def take_turns(self, caller: object) -> None:
        """Lets the deliveries in `waiting` write, one after the other.

        Blocks for `MAX_BLOCKING` seconds at most in one training step. The rest stays in `waiting` until the next step.

        Args:
            caller: a head's monitor, which calls this at most once in a training step. A second call of the same one shows that
                a new step has begun.
        """
        with self._lock:
            if caller in self._callers or not self._callers:
                self._callers.clear()
                self._blocking_left = MAX_BLOCKING
            self._callers.add(caller)
            while self.waiting and self._blocking_left > 0:
                begin = monotonic()
                self.waiting.popleft().notify(self._blocking_left)
                self._blocking_left -= monotonic() - begin

    def remove(self, deliveries: Iterable[Delivery]) -> None:
        """Removes closed deliveries. The last one ends the watchdog thread."""
        for delivery in deliveries:
            self._deliveries.remove(delivery)
        if not self._deliveries:
            self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_EVERY):
            for delivery in tuple(self._deliveries):
                delivery.check()
