"""os.fork after watch(): the monitor still works in the parent; its copy in the child does nothing and never hangs."""

import json
import os
import select
import signal
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import gwa_logging
from gwa_logging import InvalidInputError, _watch
from gwa_logging.journal import Journal, read_journal

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
SECONDS = 30


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def train(model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        F.cross_entropy(model(torch.randn(10, 8)), torch.randint(0, 5, (10,))).backward()


def in_child(call: Callable[[], Any]) -> Any:
    """What `call` returns in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = json.dumps(call())
        except BaseException as error:  # noqa: BLE001 - the child must not continue with pytest
            answer = json.dumps(repr(error))
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], SECONDS)[0], "the child hangs"
        return json.loads(os.read(reading, 1 << 16))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


def kinds(monitor: gwa_logging.Monitor) -> list[str]:
    return [record.kind for record in read_journal(monitor.journal)[0]]


def step_in(monitor: gwa_logging.Monitor, model: nn.Module) -> list[bool]:
    train(model, 1)
    return [bool(module._forward_hooks) for module in model]


DOES_NOTHING: dict[str, tuple[Callable[[gwa_logging.Monitor, nn.Module], Any], Any]] = {
    "the exit handler": (lambda m, _: _watch._close_all(), None),
    "close()": (lambda m, _: m.close(), None),
    "the with block": (lambda m, _: m.__exit__(None, None, None), None),
    "flush()": (lambda m, _: m.flush(), False),
    "end_epoch()": (lambda m, _: m.end_epoch().count, 0),
    "epochs()": (lambda m, _: list(m.epochs(3)), [1, 2]),
    "tag()": (lambda m, _: m.tag(torch.arange(10)), None),
    "update()": (lambda m, _: m.update(torch.zeros(3)), None),
    "log_suspects()": (lambda m, _: m.log_suspects(), []),
    "load_state_dict()": (lambda m, _: m.load_state_dict({}), None),
    "a training step": (step_in, [False, False, False]),
}


@pytest.mark.parametrize("call", DOES_NOTHING)
def test_in_a_forked_process_nothing_is_written_and_nothing_hangs(model, call, tmp_path, caplog):
    monitor = gwa_logging.watch(model, num_samples=100, backend="tensorboard", log_every_n_steps=1)
    train(model, 2)
    monitor.end_epoch()
    train(model, 2)
    assert monitor.flush(SECONDS)
    before = kinds(monitor)
    events = sorted((path, path.stat().st_size) for path in tmp_path.rglob("*tfevents*"))
    do, expected = DOES_NOTHING[call]

    def twice() -> Any:
        return [do(monitor, model), do(monitor, model), [r.getMessage() for r in caplog.records if r.process != parent]]

    parent = os.getpid()
    *answers, logged = in_child(twice)
    assert answers == [expected, expected]
    if call == "the exit handler":
        assert logged == []
    else:
        (message,) = logged
        assert f"belongs to process {parent}" in message
    assert kinds(monitor) == before
    assert sorted((path, path.stat().st_size) for path in tmp_path.rglob("*tfevents*")) == events
    train(model, 1)
    monitor.close()
    assert kinds(monitor) == [*before, "interval", "epoch", "suspects", "close"]
    assert monitor.history[1].count == 30
    assert set(monitor.faults) <= {"samples without ids"}


def test_a_forked_process_can_read_reports_but_nothing_on_the_device(model):
    monitor = gwa_logging.watch(model, num_samples=100)
    train(model, 2)
    report = monitor.end_epoch()

    def read() -> list[Any]:
        with pytest.raises(InvalidInputError, match=f"belongs to process {os.getppid()}"):
            monitor.suspects()
        with pytest.raises(InvalidInputError, match="call it there"):
            monitor.state_dict()
        return [monitor.history[0].gwa, str(monitor.journal), monitor.should_stop, monitor.alert, repr(monitor)]

    assert in_child(read) == [report.gwa, str(monitor.journal), False, None, repr(monitor)]


def test_a_lock_that_a_thread_held_at_the_fork_does_not_hang_the_child(model):
    monitor = gwa_logging.watch(model)
    train(model, 1)
    held, done = Event(), Event()

    def hold() -> None:
        recording = monitor._recording
        with recording.lock, recording.faults._lock, recording.journal._lock:
            held.set()
            done.wait(SECONDS)

    Thread(target=hold, daemon=True).start()
    assert held.wait(SECONDS)
    calls = lambda: [monitor.faults, monitor.flush(), monitor.end_epoch().count, monitor.close()]  # noqa: E731
    assert in_child(calls) == [{}, False, 0, None]
    done.set()


def test_a_forked_process_that_trains_may_watch_for_itself(model, tmp_path):
    monitor = gwa_logging.watch(model)
    train(model, 1)

    def watch_again() -> list[Any]:
        own = gwa_logging.watch(model, directory=tmp_path / "child")
        train(model, 3)
        own.close()
        return [own.history[0].count, kinds(own)]

    assert in_child(watch_again) == [30, ["run", "interval", "interval", "epoch", "close"]]
    assert monitor.flush()
    assert kinds(monitor) == ["run", "interval"]


def test_a_forked_process_does_not_lock_the_journal(model):
    monitor = gwa_logging.watch(model)
    train(model, 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)  # lives until the parent writes
        os._exit(0)
    monitor.close()
    Journal(monitor.journal, monitor._faults).close()  # fails if another process still has the lock
    os.write(writing, b".")
    assert os.waitpid(child, 0) == (child, 0)  # it was alive until now


def test_the_workers_of_a_data_loader_neither_warn_nor_write(model, capfd):
    monitor = gwa_logging.watch(model)
    capfd.readouterr()
    loader = DataLoader(torch.randn(40, 8), batch_size=10, num_workers=2, multiprocessing_context="fork")
    for _ in monitor.epochs(2):
        for x in loader:
            F.cross_entropy(model(x), torch.zeros(10, dtype=torch.int64)).backward()
    monitor.close()
    assert [report.count for report in monitor.history] == [40, 40]
    assert kinds(monitor) == ["run", "interval", "interval", "epoch", "interval", "epoch", "close"]
    assert "gwa_logging" not in capfd.readouterr().err
