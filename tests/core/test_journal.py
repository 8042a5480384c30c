"""The journal: append-only, and robust against torn lines, damage by other processes, and a full disk."""

import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time

import pandas
import pytest

from gwa_logging import AlignmentSummary, BackendError
from gwa_logging import journal as journal_module
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, JournalFeed, JournalReader, read_journal
from gwa_logging.records import RunRecord
from tests.records import interval_record


def test_written_records_are_read_back(tmp_path):
    journal = Journal(tmp_path / "run" / "journal.jsonl", Faults())
    report = AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report(epoch=3, step=40)
    written, before = [interval_record(0), report, interval_record(1)], time()
    for record in written:
        journal.append(record)
    records, skipped = read_journal(journal.path)
    assert [record.model_copy(update={"time": 0.0}) for record in records] == written
    times = [record.time for record in records]
    assert before <= times[0] <= times[1] <= times[2] <= time()
    assert skipped == 0


def test_undefined_numbers_are_null_in_the_file_and_nan_in_python(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    journal.append(AlignmentSummary.from_scores([0.1, 0.1]).report())
    assert '"gwa":null' in journal.path.read_text()
    (record,), _ = read_journal(journal.path)
    assert math.isnan(record.gwa)


def test_it_is_readable_with_pandas(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    for step in range(5):
        journal.append(interval_record(step))
    frame = pandas.read_json(journal.path, lines=True)
    assert list(frame["step"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("garbage", [b'{"kind":"interval","st\n', b"not json\n", b'{"kind":"other"}\n', b"\xff\xfe\n"])
def test_torn_and_invalid_lines_are_skipped_and_counted(tmp_path, garbage):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    journal.append(interval_record(0))
    with journal.path.open("ab") as file:
        file.write(garbage)
    journal.append(interval_record(1))
    records, skipped = read_journal(journal.path)
    assert [r.step for r in records] == [0, 1]
    assert skipped == 1


def test_an_unfinished_last_line_is_read_once_it_is_complete(tmp_path):
    path = tmp_path / "journal.jsonl"
    line = interval_record(7).model_dump_json().encode()
    path.write_bytes(line[:40])
    reader = JournalReader(path)
    assert reader.take() == []
    path.write_bytes(line + b"\n")
    assert [record.step for record in reader.take()] == [7]


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_an_invalid_line_is_skipped_and_counted_once_however_many_lines_are_read_at_a_time(tmp_path, limit):
    lines = [interval_record(step).model_dump_json() for step in range(4)]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(["stranger", lines[0], lines[1], "", "{}", lines[2], "torn {", lines[3]]) + "\n")
    reader, steps = JournalReader(path), []
    while records := reader.take(limit):
        steps += [record.step for record in records]
    assert steps == [0, 1, 2, 3]
    assert reader.skipped == 3


@contextmanager
def full_disk(path: Path, capacity: int) -> Iterator[None]:
    """As under a quota: the file cannot grow by more than `capacity` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + capacity, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("capacity", [0, 1, 100, 900])
def test_a_full_disk_is_counted_as_a_fault_and_the_records_are_written_later_without_a_torn_line(tmp_path, capacity):
    faults = Faults()
    journal = Journal(tmp_path / "journal.jsonl", faults)
    journal.append(interval_record(0))
    with full_disk(journal.path, capacity):
        journal.append(interval_record(1))
        journal.append(interval_record(2))
    assert faults.counts == {"journal": 2}
    assert not journal.is_complete
    journal.append(interval_record(3))
    records, skipped = read_journal(journal.path)
    assert [r.step for r in records] == [0, 1, 2, 3]
    assert skipped == 0
    assert journal.is_complete


def test_a_line_that_a_full_disk_tore_is_written_again_if_another_process_appended_to_the_file(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    journal.append(interval_record(0))
    with full_disk(journal.path, 100):
        journal.append(interval_record(1))
    with journal.path.open("ab") as file:
        file.write(b"garbage")
    journal.append(interval_record(2))
    records, skipped = read_journal(journal.path)
    assert [r.step for r in records] == [0, 1, 2]
    assert skipped == 1


# --- a journal that another process damages -----------------------------------------------------------------------------


def delete(path: Path) -> None:
    path.unlink()


def delete_the_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def rename(path: Path) -> None:
    path.rename(path.with_name("moved.jsonl"))


def replace_by_a_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def replace_by_something_else(path: Path) -> None:
    path.unlink()
    path.write_text("something else")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def cut_off_a_piece(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


DAMAGES = [
    delete,
    delete_the_folder,
    rename,
    replace_by_a_copy,
    replace_by_something_else,
    empty,
    cut_off_a_piece,
]


def begun(path: Path, faults: Faults, intervals: int = 5) -> Journal:
    journal = Journal(path, faults)
    journal.append(RunRecord(name="gwa", head="h", created="now", settings={}))
    for step in range(intervals):
        journal.append(interval_record(step))
    return journal


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_complete_again_after_the_next_line(tmp_path, damage):
    faults = Faults()
    journal = begun(tmp_path / "run" / "journal.jsonl", faults)
    damage(journal.path)
    journal.append(interval_record(5))
    journal.append(interval_record(6))
    records, _ = read_journal(journal.path)
    assert [record.kind for record in records] == ["run"] + 7 * ["interval"]
    assert [record.step for record in records[1:]] == list(range(7))
    assert journal.is_complete
    assert faults.counts == ({} if damage is replace_by_a_copy else {"journal": 1})


@pytest.mark.parametrize("damage", [delete, rename, empty])
def test_lines_that_are_no_longer_in_memory_are_counted_as_lost(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_IN_MEMORY", 3000)  # two or three intervals
    faults = Faults()
    journal = begun(tmp_path / "journal.jsonl", faults, intervals=10)
    damage(journal.path)
    journal.append(interval_record(10))
    records, skipped = read_journal(journal.path)
    assert records[0].kind == "run"
    kept = [record.step for record in records[1:]]
    assert 1 < len(kept) < 5
    assert kept == list(range(11 - len(kept), 11))
    assert faults.counts == {"journal": 1, "records lost": 12 - len(kept)}  # the old line of the run was one of them
    assert not journal.is_complete
    assert skipped == 0


@pytest.mark.parametrize("damage", [delete, rename, replace_by_something_else])
def test_a_backend_that_is_behind_continues_in_the_file_that_was_removed(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_IN_MEMORY", 3000)
    journal = begun(tmp_path / "journal.jsonl", Faults(), intervals=10)
    feed = JournalFeed(journal)
    damage(journal.path)
    for step in range(10, 20):
        journal.append(interval_record(step))
    steps = []
    while (found := feed.peek(3))[0]:
        steps += [record.step for record in found[0] if record.kind == "interval"]
        feed.advance(found[1])
    assert steps == list(range(20))
    assert feed.lost == 0
    assert not feed.behind()


def test_a_backend_that_is_behind_counts_the_lines_that_were_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_IN_MEMORY", 3000)
    journal = begun(tmp_path / "journal.jsonl", Faults(), intervals=10)
    feed = JournalFeed(journal)
    third = read_journal(journal.path)[0][:4]
    os.truncate(journal.path, sum(len(record.model_dump_json()) + 1 for record in third))
    for step in range(10, 20):
        journal.append(interval_record(step))
    steps = []
    while (found := feed.peek())[0]:
        steps += [record.step for record in found[0] if record.kind == "interval"]
        feed.advance(found[1])
    assert steps[:3] == [0, 1, 2]
    assert steps[3:] == list(range(20 - len(steps[3:]), 20))
    assert feed.lost == 20 - len(steps) == journal.lost
    assert [r.step for r in read_journal(journal.path)[0] if r.kind == "interval"] == steps


def test_a_folder_that_cannot_be_created_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"directory=.*cannot be written"):
        Journal(tmp_path / "file" / "run" / "journal.jsonl", Faults())
