"""The thread that writes the journal: order, a disk that hangs, kills, and its end."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from threading import Event, Timer
from time import monotonic, time

import pytest

from gwa_logging import journal_writer
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, read_journal
from gwa_logging.journal_writer import JournalWriter
from gwa_logging.records import RunRecord
from tests.records import interval_record

ROOT = Path(__file__).parents[2]

LONG = 60.0
"""Seconds after which a test gives up. None of them waits for so long."""


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def journal(tmp_path, faults):
    return Journal(tmp_path / "journal.jsonl", faults)


@pytest.fixture
def writer(journal, faults):
    writer = JournalWriter(journal, faults)
    yield writer
    writer.close()


def steps_in(journal):
    records, skipped = read_journal(journal.path)
    assert skipped == 0
    return [record.step for record in records]


def test_a_call_without_time_to_wait_knows_what_an_idle_thread_has_written(writer):
    writer.append(interval_record(0), sync=True)
    assert writer.drain(0.0)


def test_records_are_written_in_their_order_with_the_time_at_which_they_were_queued(writer, journal):
    before = time()
    with journal._lock:  # what writing needs: the disk hangs
        for step in range(50):
            writer.append(interval_record(step))
        queued = time()
    assert writer.drain(LONG)
    assert steps_in(journal) == list(range(50))
    assert all(before <= record.time <= queued for record in read_journal(journal.path)[0])


def test_a_synced_record_is_in_the_file_when_the_call_returns(writer, journal):
    for step in range(20):
        writer.append(interval_record(step), sync=True)
        assert steps_in(journal) == list(range(step + 1))


def test_listeners_are_called_after_the_record_is_in_the_journal(writer, journal):
    counts, called = [], Event()
    writer.listeners.append(lambda: (counts.append(journal.count), called.set()))
    writer.append(interval_record(0))
    assert called.wait(LONG)
    assert counts == [1]


def test_a_disk_that_hangs_blocks_a_step_not_at_all_and_an_epoch_once(writer, journal, faults, monkeypatch):
    monkeypatch.setattr(journal_writer, "WAITS", 0.5)
    with journal._lock:
        begin = monotonic()
        writer.append(interval_record(0))
        writer.append(interval_record(1), sync=True)
        assert monotonic() - begin >= 0.5
        assert faults.counts == {"journal": 1}
        begin = monotonic()
        for step in range(2, 200):
            writer.append(interval_record(step), sync=True)
        assert monotonic() - begin < 99 * 0.5  # none of them waited
        assert not writer.drain(0.5)
    assert writer.drain(LONG)
    assert steps_in(journal) == list(range(200))
    assert writer.is_complete
    writer.append(interval_record(200), sync=True)  # waits again
    assert steps_in(journal)[-1] == 200
    assert faults.counts == {"journal": 1}


def test_a_short_wait_in_vain_does_not_keep_an_epoch_from_waiting(writer, journal):
    journal._lock.acquire()
    writer.append(interval_record(0))
    assert not writer.drain(0.01)
    Timer(0.2, journal._lock.release).start()
    writer.append(interval_record(1), sync=True)
    assert steps_in(journal) == [0, 1]


def test_records_beyond_the_queue_are_lost_and_counted_and_the_others_written(writer, journal, faults, monkeypatch):
    monkeypatch.setattr(journal_writer, "MAX_QUEUED", 5)
    with journal._lock:
        for step in range(20):
            writer.append(interval_record(step))
    assert writer.drain(LONG)
    kept = steps_in(journal)
    assert kept[:5] == [0, 1, 2, 3, 4]
    assert (
        len(kept) == len(set(kept)) <= 6
    )  # the thread takes the first one at any time, which leaves room for a later one
    assert faults.counts == {"records lost": 20 - len(kept)}
    assert not writer.is_complete


def test_a_record_that_cannot_be_written_is_a_fault_and_the_following_ones_are_written(writer, journal, faults):
    writer.append(RunRecord(name="gwa", head="h", created="now", settings={"x": object()}))
    writer.append(interval_record(1), sync=True)
    assert steps_in(journal) == [1]
    assert faults.counts == {"journal": 1}


def test_closing_writes_the_rest_ends_the_thread_and_unlocks_the_file(journal, faults):
    before = set(threading.enumerate())
    writer = JournalWriter(journal, faults)
    (thread,) = set(threading.enumerate()) - before
    for step in range(30):
        writer.append(interval_record(step))
    assert writer.close()
    assert writer.close()
    thread.join(LONG)
    assert not thread.is_alive()
    Journal(journal.path, faults).close()  # fails if the file is locked
    writer.append(interval_record(30), sync=True)
    assert writer.drain()
    assert steps_in(journal) == list(range(30))
    assert faults.counts == {}


def test_closing_does_not_wait_for_a_disk_that_hangs(journal, faults, monkeypatch):
    monkeypatch.setattr(journal_writer, "WAITS", 0.1)
    writer = JournalWriter(journal, faults)
    with journal._lock:
        writer.append(interval_record(0))
        assert not writer.close()
    assert faults.counts == {"journal": 1}


def test_control_c_ends_the_wait_for_a_disk_that_hangs(writer, journal):
    with journal._lock:
        main = threading.main_thread().ident
        Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            writer.append(interval_record(0), sync=True)
    assert writer.drain(LONG)
    assert steps_in(journal) == [0]


def test_without_a_journal_nothing_happens(faults):
    before = threading.active_count()
    writer = JournalWriter(None, faults)
    writer.append(interval_record(0), sync=True)
    assert writer.drain()
    assert writer.is_complete
    assert writer.close()
    assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 7, 20, 63, 400])
def test_a_killed_process_has_written_all_that_an_epoch_or_a_state_was_built_on_and_nothing_twice(tmp_path, steps):
    command = [sys.executable, "-m", "tests.killed_trainer", str(tmp_path), "10", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONG * 4, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    saved = [int(line) for line in done.stdout.split()]
    (path,) = tmp_path.rglob("journal.jsonl")
    found = [record.step for record in read_journal(path)[0] if record.kind == "interval"]
    assert found == list(range(len(found)))
    assert max(saved, default=0) <= len(found) <= steps
