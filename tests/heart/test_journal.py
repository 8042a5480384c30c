"""The journal: append-only, survives torn and foreign lines, and a disk that takes no more."""

import math
from pathlib import Path
from time import time

import pandas
import pytest

from gwa_logging import AlignmentSummary, BackendError
from gwa_logging.faults import Faults
from gwa_logging.journal import Journal, JournalReader, read_journal
from gwa_logging.types import IntervalRecord


def interval(step: int, scores=(0.1, 0.2, -0.1)) -> IntervalRecord:
    summary = AlignmentSummary.from_scores(scores)
    return IntervalRecord(
        step=step,
        epoch=0,
        steps=1,
        count=summary.count,
        excluded=summary.excluded,
        mean=summary.mean,
        minimum=summary.minimum,
        maximum=summary.maximum,
        histogram=summary.histogram,
        display_limit=0.2,
    )


def test_what_was_written_is_read_back(tmp_path):
    journal = Journal(tmp_path / "run" / "journal.jsonl", Faults())
    report = AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report(epoch=3, step=40)
    written, before = [interval(0), report, interval(1)], time()
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
        journal.append(interval(step))
    frame = pandas.read_json(journal.path, lines=True)
    assert list(frame["step"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("garbage", [b'{"kind":"interval","st\n', b"not json\n", b'{"kind":"other"}\n', b"\xff\xfe\n"])
def test_torn_and_foreign_lines_are_skipped_and_counted(tmp_path, garbage):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    journal.append(interval(0))
    with journal.path.open("ab") as file:
        file.write(garbage)
    journal.append(interval(1))
    records, skipped = read_journal(journal.path)
    assert [r.step for r in records] == [0, 1]
    assert skipped == 1


def test_a_torn_last_line_is_left_alone_until_it_is_whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    line = interval(7).model_dump_json().encode()
    path.write_bytes(line[:40])
    reader = JournalReader(path)
    assert reader.peek() == ([], 0)
    path.write_bytes(line + b"\n")
    assert [record.step for record in reader.take()] == [7]


def test_a_reader_stays_at_a_record_until_it_is_told_to_go_on(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", Faults())
    journal.append(interval(0))
    journal.append(interval(1))
    reader = JournalReader(journal.path)
    first, position = reader.peek()
    assert reader.peek()[0] == first
    reader.advance(position)
    assert [record.step for record in reader.peek(9)[0]] == [1]
    assert reader.behind()
    assert reader.count() == 1


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_a_line_is_skipped_and_counted_once_however_often_one_looks(tmp_path, limit):
    lines = [interval(step).model_dump_json() for step in range(4)]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(["stranger", lines[0], lines[1], "", "{}", lines[2], "torn {", lines[3]]) + "\n")
    reader, steps = JournalReader(path), []
    while records := reader.peek(limit)[0]:
        assert reader.peek(limit)[0] == records
        steps += [record.step for record in reader.take(limit)]
    assert steps == [0, 1, 2, 3]
    assert reader.skipped == 3


def test_a_full_disk_is_counted_and_what_it_did_not_take_follows_later(tmp_path):
    faults = Faults()
    journal = Journal(tmp_path / "journal.jsonl", faults)
    journal.append(interval(0))
    real = journal._file
    with Path("/dev/full").open("ab", buffering=0) as journal._file:
        journal.append(interval(1))
        journal.append(interval(2))
    assert faults.counts == {"journal": 2}
    journal._file = real
    journal.append(interval(3))
    assert [r.step for r in read_journal(journal.path)[0]] == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"directory=.*cannot be written"):
        Journal(tmp_path / "file" / "run" / "journal.jsonl", Faults())
