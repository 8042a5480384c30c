"""TrackerContents: which records a tracker has, as single ones."""

import math

import numpy as np
import pytest

from gwa_logging import AlignmentSummary
from gwa_logging.protocols import TrackerContents, samples_by_epoch
from gwa_logging.records import (
    EpochReport,
    RunRecord,
    SuspectsRecord,
)
from tests.records import close_record, epoch_report, interval_record, stop_alert


def report(epoch: int, samples: int, step: int = 9) -> EpochReport:
    return epoch_report(epoch, np.linspace(-0.5, 0.5, samples), step=step)


def test_a_gap_is_not_held_though_later_records_are():
    held = TrackerContents(intervals={5, 15}, epochs={0: 10, 2: 10}, alerts={1, 9}, suspects={4, 40}, closes={3})
    assert [step for step in (5, 10, 15, 20) if held.has(interval_record(step))] == [5, 15]
    assert [epoch for epoch in range(4) if held.has(report(epoch, 10))] == [0, 2]
    assert [epoch for epoch in range(10) if held.has(stop_alert(epoch))] == [1, 9]
    lists = [SuspectsRecord(step=step, epoch=0, samples=0, suspects=()) for step in (4, 20, 40)]
    assert [record.step for record in lists if held.has(record)] == [4, 40]
    assert [epochs for epochs in range(5) if held.has(close_record(epochs))] == [3]


def test_an_epoch_is_held_whether_or_not_its_last_steps_had_scores():
    assert TrackerContents(intervals={5}, epochs={0: 10}).has(report(0, 10, step=9))


def test_the_report_of_a_run_that_was_closed_in_mid_epoch_does_not_stand_for_the_whole_epoch():
    assert not TrackerContents(intervals={9}, epochs={0: 6}).has(report(0, 10))
    assert TrackerContents(epochs={0: 10}).has(report(0, 6))


def test_samples_count_with_and_without_a_score():
    excluded = AlignmentSummary.from_scores([0.1, -0.2, math.nan]).report(epoch=0, step=0)
    assert (excluded.count, excluded.excluded) == (2, 1)
    assert not TrackerContents(epochs={0: 2}).has(excluded)
    assert TrackerContents(epochs={0: 3}).has(excluded)


@pytest.mark.parametrize("samples", [2**24 + 1, 10**9 + 7])
def test_a_tracker_that_keeps_float32_holds_what_it_was_sent(samples):
    whole = report(0, 10).model_copy(update={"count": samples - 10, "excluded": 10})
    assert TrackerContents(epochs={0: float(np.float32(samples - 10)) + 10.0}).has(whole)


def test_of_several_reports_on_an_epoch_the_fullest_counts():
    assert samples_by_epoch([(0, 10.0), (1, 4.0), (1, 10.0), (1, 3.0)]) == {0: 10.0, 1: 10.0}


def test_an_empty_run_holds_nothing_and_the_head_is_said_every_time():
    first = RunRecord(name="gwa", head="h", created="now", settings={})
    for record in (first, interval_record(0), report(0, 10), stop_alert(0), close_record(0)):
        assert not TrackerContents().has(record)
    assert not TrackerContents(intervals=range(99), epochs={0: 99}, alerts=range(9), closes=range(9)).has(first)
