"""Delivery: everything, in order, once; a tracker that fails or hangs never reaches the training thread."""

from threading import Event
from time import monotonic

import pytest

from gwa_logging import delivery as delivery_module
from gwa_logging.delivery import Delivery
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal
from gwa_logging.types import RunRecord


class Tracker:
    """A backend that keeps what it is given, and fails or hangs when it is told to."""

    name = "tracker"

    def __init__(self, threaded: bool) -> None:
        self.threaded = threaded
        self.taken: list[str] = []
        self.away = False
        self.free = Event()
        self.free.set()
        self.closed = 0

    def write(self, record) -> None:
        self.free.wait()
        if self.away:
            raise ConnectionError("tracker is away")
        self.taken.append(record.name)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def journal(tmp_path, faults) -> Journal:
    return Journal(tmp_path / "journal.jsonl", faults)


def write(journal: Journal, *names: str) -> None:
    for name in names:
        journal.append(RunRecord(name=name, head="h", created="now", settings={}))


@pytest.mark.parametrize("threaded", [True, False])
def test_records_arrive_once_and_in_order(journal, faults, threaded):
    tracker = Tracker(threaded)
    delivery = Delivery(tracker, journal, faults)
    names = [str(i) for i in range(100)]
    for name in names:
        write(journal, name)
        delivery.notify()
    assert delivery.close(monotonic() + 10)
    assert tracker.taken == names
    assert tracker.closed == 1


@pytest.mark.parametrize("threaded", [True, False])
def test_a_tracker_that_comes_back_catches_up_by_itself(journal, faults, threaded, monkeypatch):
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE", 0.01)
    tracker = Tracker(threaded)
    tracker.away = True
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a", "b")
    delivery.notify()
    assert not delivery.wait(monotonic() + 0.1)
    assert faults.counts["backend tracker"] >= 1
    tracker.away = False
    write(journal, "c")
    delivery.notify()
    assert delivery.wait(monotonic() + 5)
    assert tracker.taken == ["a", "b", "c"]


def test_a_hanging_tracker_does_not_hold_the_training_thread_nor_close(journal, faults):
    tracker = Tracker(threaded=True)
    tracker.free.clear()
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a")
    start = monotonic()
    delivery.notify()
    assert monotonic() - start < 0.1
    assert not delivery.close(monotonic() + 0.2)
    assert monotonic() - start < 1
    tracker.free.set()


def test_an_unthreaded_tracker_gets_few_records_per_notice(journal, faults):
    tracker = Tracker(threaded=False)
    delivery = Delivery(tracker, journal, faults)
    write(journal, *map(str, range(20)))
    delivery.notify()
    assert len(tracker.taken) == delivery_module.RECORDS_PER_NOTICE
    delivery.close(monotonic() + 1)
    assert len(tracker.taken) == 20


def test_closing_tries_once_more_in_spite_of_the_pause(journal, faults):
    tracker = Tracker(threaded=False)
    tracker.away = True
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a")
    delivery.notify()
    tracker.away = False
    assert delivery.close(monotonic() + 1)
    assert tracker.taken == ["a"]


def test_a_backend_that_takes_many_at_once_catches_up_in_few_calls_and_in_order(journal, faults, monkeypatch):
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE", 0.01)

    class Wholesale(Tracker):
        calls = 0

        def write_many(self, records) -> None:
            self.calls += 1
            if self.away:
                raise ConnectionError("tracker is away")
            for record in records:
                self.taken.append(record.name)

    tracker = Wholesale(threaded=True)
    tracker.away = True
    delivery = Delivery(tracker, journal, faults)
    names = [str(i) for i in range(250)]
    write(journal, *names)
    delivery.notify()
    assert not delivery.wait(monotonic() + 0.1)
    tried, tracker.away = tracker.calls, False
    assert delivery.wait(monotonic() + 5)
    assert tracker.taken == names
    assert tracker.calls - tried <= 4
    assert delivery.left == 0


@pytest.mark.parametrize("threaded", [True, False])
def test_a_tracker_that_hangs_is_left_behind_and_counted(journal, faults, threaded):
    tracker = Tracker(threaded)
    tracker.free.clear()
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a", "b", "c")
    start = monotonic()
    for _ in range(100):
        delivery.notify()
    assert monotonic() - start < 100 * delivery_module.PATIENCE / 2  # only the first one waits
    assert not delivery.close(monotonic() + 0.1)
    assert delivery.left == 3
    tracker.free.set()
