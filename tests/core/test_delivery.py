"""Delivery: every record arrives once and in order, and a tracker that fails or hangs does not affect training."""

import os
import resource
import sys
from collections.abc import Callable
from threading import Event
from time import monotonic
from types import ModuleType

import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import InvalidInputError, _all_heads, registry
from gwa_logging import delivery as delivery_module
from gwa_logging.backend_defaults import with_defaults
from gwa_logging.delivery import Delivery, DeliveryGroup, wait_for
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, read_journal
from gwa_logging.protocols import Backend, TrackerContents
from gwa_logging.records import AnyRecord, RunRecord, TrackerRunRef


class Tracker(Backend):
    """A backend that stores the records in a list. The tests make it fail or hang."""

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
def test_a_tracker_that_comes_back_catches_up(journal, faults, threaded, monkeypatch):
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


def test_a_hanging_tracker_blocks_neither_the_training_thread_nor_close(journal, faults):
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


def test_close_retries_without_waiting_for_the_end_of_the_pause(journal, faults):
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

    class Batching(Tracker):
        records_per_call = 100
        calls = 0

        def write_many(self, records) -> None:
            self.calls += 1
            if self.away:
                raise ConnectionError("tracker is away")
            for record in records:
                self.taken.append(record.name)

    tracker = Batching(threaded=True)
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
def test_a_hanging_tracker_is_waited_for_only_once_and_its_records_are_counted(journal, faults, threaded):
    tracker = Tracker(threaded)
    tracker.free.clear()
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a", "b", "c")
    start = monotonic()
    for _ in range(100):
        delivery.notify()
    assert monotonic() - start < 100 * delivery_module.MAX_BLOCKING / 2  # only the first call waits
    assert not delivery.close(monotonic() + 0.1)
    assert delivery.left == 3
    tracker.free.set()


class Noted(Faults):
    """Faults that set an event when one is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.happened = Event()
        self.details: list[str] = []

    def record(self, kind: str, detail: object, times: int = 1) -> None:
        super().record(kind, detail, times)
        self.details.append(f"{kind}: {detail}")
        self.happened.set()


def test_while_the_disk_is_full_the_delivery_does_not_poll(journal, faults, monkeypatch):
    looks, many, drain = [], Event(), Delivery._write_new

    def counted(self, limit=None) -> None:
        looks.append(limit)
        if len(looks) > 10:
            many.set()
        drain(self, limit)

    monkeypatch.setattr(Delivery, "_write_new", counted)
    tracker = Tracker(threaded=True)
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, before[1]))
    try:
        write(journal, "b")
        delivery.notify()
        assert not many.wait(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(journal, "c")
    assert delivery.close(monotonic() + 10)
    assert tracker.taken == ["a", "b", "c"]
    assert read_journal(journal.path)[1] == 0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_backend_that_raises_a_base_exception_is_counted_and_called_again(journal, error, monkeypatch):
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE", 0.01)

    class Leaving(Tracker):
        def write(self, record) -> None:
            if self.away:
                self.away = False
                raise error
            super().write(record)

    faults, tracker = Noted(), Leaving(threaded=True)
    tracker.away = True
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a")
    delivery.notify()
    assert faults.happened.wait(10)
    assert type(error).__name__ in faults.details[0]
    assert delivery.wait(monotonic() + 10)
    assert tracker.taken == ["a"]


def test_a_backend_that_hangs_or_refuses_for_good_is_a_fault_during_the_run(journal, monkeypatch):
    monkeypatch.setattr(delivery_module, "HANGS_AFTER", 0.05)
    monkeypatch.setattr(delivery_module, "CHECK_EVERY", 0.01)

    class Refusing(Tracker):
        name = "refusing"

        def refusal(self) -> str:
            return "it takes no more"

    group, faults = DeliveryGroup(), [Noted(), Noted()]
    hanging, refusing = Tracker(threaded=True), Refusing(threaded=True)
    hanging.free.clear()
    deliveries = [Delivery(tracker, journal, f) for tracker, f in zip((hanging, refusing), faults, strict=True)]
    for delivery in deliveries:
        group.add(delivery)
    write(journal, "a")
    group.notify(deliveries)
    assert all(noted.happened.wait(10) for noted in faults)
    assert "backend tracker: it has not returned from a call for" in faults[0].details[0]
    assert faults[1].details == ["backend refusing: it takes no more"]
    assert not wait_for(deliveries[1:], monotonic() + 10)  # it received everything, but has not kept it
    group.remove(deliveries)
    hanging.free.set()


def test_the_training_thread_waits_no_longer_for_several_backends_than_for_one(journal, faults):
    group, trackers = DeliveryGroup(), [Tracker(threaded=False) for _ in range(8)]
    for tracker in trackers:
        tracker.free.clear()
    deliveries = [Delivery(tracker, journal, faults) for tracker in trackers]
    write(journal, "a")
    group.notify(deliveries)
    left = []
    for head in ("one", "other", "one", "other", "other", "one"):  # four training steps; the second head is not in each
        group.take_turns(head)
        left.append(len(group.waiting))
    assert left == [7, 7, 6, 6, 5, 5]
    for tracker in trackers:
        tracker.free.set()
    assert wait_for(deliveries, monotonic() + 10)
    assert [tracker.taken for tracker in trackers] == 8 * [["a"]]


def test_a_backend_that_had_no_time_is_first_in_the_next_step(journal, faults, monkeypatch):
    monkeypatch.setattr(delivery_module, "MAX_BLOCKING", 10.0)
    group, trackers = DeliveryGroup(), [Tracker(threaded=False) for _ in range(3)]
    deliveries = [Delivery(tracker, journal, faults) for tracker in trackers]
    write(journal, "a")
    group.notify(deliveries)
    group._callers, group._blocking_left = {"head"}, 0.0  # nothing is left of the time in this step
    group.take_turns("other head")
    assert [tracker.taken for tracker in trackers] == [[], [], []]
    group.take_turns("head")
    assert [tracker.taken for tracker in trackers] == [["a"], ["a"], ["a"]]


class Minimal:
    """The required methods of a backend and nothing else; not hashable."""

    __hash__ = None

    def __init__(self) -> None:
        self.records: list[AnyRecord] = []
        self.closed = 0

    def write(self, record: AnyRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def test_an_object_with_only_write_and_close_is_a_backend(tmp_path):
    minimal, model = Minimal(), nn.Linear(4, 3)
    monitor = gwa_logging.watch(model, backend=minimal, directory=tmp_path, log_every_n_steps=1)
    for _ in range(2):
        nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
    monitor.end_epoch()
    assert monitor.flush()
    monitor.close()
    assert minimal.records == read_journal(monitor.journal)[0]
    assert minimal.closed == 1
    assert monitor.faults == {}


def test_two_models_cannot_write_to_the_same_object(tmp_path):
    minimal, models = Minimal(), [nn.Linear(4, 3), nn.Linear(4, 3)]
    first = gwa_logging.watch(models[0], backend=minimal, directory=tmp_path)
    with pytest.raises(InvalidInputError, match="backend='Minimal': the monitor of another model"):
        gwa_logging.watch(models[1], backend=minimal, directory=tmp_path)
    first.close()
    gwa_logging.watch(models[1], backend=minimal, directory=tmp_path).close()
    assert minimal.closed == 2


def test_every_optional_member_of_a_backend_has_a_default_and_an_objects_own_one_wins():
    class Full(Minimal):
        name, run, run_ref = "full", 7, TrackerRunRef(run="7")
        threaded, records_per_call, is_notifier = False, 5, True
        owns_run, is_in_folder = True, True

        def contents(self) -> TrackerContents:
            return TrackerContents(alerts={3})

        def discard(self) -> None:
            self.records.clear()

        def move_to(self, directory) -> None:
            self.records.append(directory)

        def write_many(self, records) -> None:
            self.records.append(records)

        def refusal(self) -> str:
            return "full"

    members = [name for name in vars(Backend) if not name.startswith("_") and name not in ("write", "close")]
    full, completed = Full(), with_defaults(minimal := Minimal())
    assert sorted(members) == sorted(name for name in vars(Full) if not name.startswith("_"))
    for name in members:
        assert getattr(with_defaults(full), name) == getattr(full, name)
    assert completed == minimal
    assert completed == with_defaults(minimal)
    assert completed != with_defaults(Minimal())
    assert (completed.name, completed.run, completed.run_ref) == ("Minimal", None, TrackerRunRef())
    assert (completed.threaded, completed.records_per_call, completed.refusal()) == (True, 1, None)
    assert completed.contents() == TrackerContents()
    completed.write_many([1, 2])
    assert minimal.records == [1, 2]


class Heads(nn.Module):
    """A body with many heads."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(number))

    def forward(self, x):
        return sum(nn.functional.cross_entropy(head(self.body(x)), torch.zeros(5, dtype=int)) for head in self.heads)


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize(
    "end", [lambda monitor: monitor.close(), lambda monitor: monitor.flush(0.5)], ids=["close", "flush"]
)
def test_eight_heads_of_hanging_backends_have_one_deadline(threaded: bool, end: Callable, monkeypatch):
    free, module = Event(), ModuleType("hanging_tracker")

    def open_backend(context) -> Tracker:
        tracker = Tracker(threaded)
        tracker.free = free
        return tracker

    module.open_backend = open_backend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.BACKENDS, "hanging", module.__name__)
    monkeypatch.setattr(_all_heads, "CLOSE_WITHIN", 0.5)
    model = Heads(8)
    monitor = gwa_logging.watch(model, backend="hanging", head=[f"heads.{i}" for i in range(8)])
    model(torch.randn(5, 4)).backward()
    begin = monotonic()
    end(monitor)
    assert 0.5 <= monotonic() - begin < 2.5
    free.set()
    monitor.close()


def test_a_run_that_heads_share_is_closed_last(tmp_path):
    order, free = [], Event()

    class Named(Tracker):
        def __init__(self, first: bool) -> None:
            super().__init__(threaded=True)
            self.first = first

        def close(self) -> None:
            if not self.first:
                free.wait(10)
            order.append(self.first)

    journals = [Journal(tmp_path / name / "journal.jsonl", Faults()) for name in "ab"]
    main, head = (Delivery(Named(journal is journals[0]), journal, Faults()) for journal in journals)
    deadline = monotonic() + 10
    main.begin_close(deadline, after=[head])
    head.begin_close(deadline)
    free.set()
    assert main.shortfall() is None
    assert order == [False, True]


@pytest.mark.parametrize(
    ("tracker_state", "said"),
    [
        ("hangs in write", "has not taken everything in time: 2 records are left"),
        ("hangs in close", "has taken everything, but has not finished in time"),
        ("lost", "lacks 1 records: they were removed from the journal before they could be sent"),
    ],
)
def test_the_shortfall_states_what_the_backend_lacks(journal, faults, tracker_state, said, monkeypatch):
    monkeypatch.setattr("gwa_logging.journal._MAX_IN_MEMORY", 1)
    never = Event()
    tracker = Tracker(threaded=True)
    if tracker_state == "hangs in close":
        tracker.close = never.wait
    else:
        tracker.free.clear()
    delivery = Delivery(tracker, journal, faults)
    write(journal, "a", "b")
    if tracker_state == "lost":
        os.truncate(journal.path, 0)
        write(journal, "c")
        tracker.free.set()
    delivery.begin_close(monotonic() + (10 if tracker_state == "lost" else 0.3))
    assert said in delivery.shortfall()
    tracker.free.set()
    never.set()
