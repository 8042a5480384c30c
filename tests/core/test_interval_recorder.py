"""The length of intervals: they grow in very long runs, and no step is lost where they do."""

import numpy as np
import pytest

from gwa_logging import interval_recorder
from gwa_logging.faults import Faults
from gwa_logging.interval_recorder import STEADY, IntervalRecorder, interval_at
from gwa_logging.summary import AlignmentSummary

FEW = 500
"""Number of intervals before they grow, in the tests that run whole trainings."""


@pytest.fixture
def _few(monkeypatch):
    monkeypatch.setattr(interval_recorder, "STEADY", FEW)


class OneScorePerStep:
    """An adapter whose steps have one sample each, and whose snapshots have always arrived."""

    def __init__(self):
        self.steps = self.taken = 0

    def snapshot(self):
        fresh, self.taken = self.steps - self.taken, self.steps
        return Arrived(AlignmentSummary.from_scores(np.full(fresh, 0.1, np.float32)))


class Arrived:
    def __init__(self, summary):
        self.summary = summary

    def ready(self):
        return True

    def result(self):
        return self.summary


def written(steps, every=1, start=0, **options):
    """The records of a run with this many steps."""
    records, adapter = [], OneScorePerStep()
    intervals = IntervalRecorder(adapter, every, records.append, Faults(), **options)
    intervals.restore(
        steps=start,
        epoch=0,
        summary=AlignmentSummary(),
        display_limit=0.001,
        recorded_steps=0,
        partial=AlignmentSummary(),
        in_epoch=False,
    )
    for _ in range(start, steps):
        adapter.steps += 1
        intervals.step()
    intervals.flush()
    return records


@pytest.mark.parametrize("every", [1, 7, 50])
def test_the_first_ten_thousand_intervals_are_as_long_as_asked_for_and_then_they_double_with_the_run(every):
    begin = every * STEADY
    assert {interval_at(step, every) for step in (0, 1, begin // 2, begin - 1)} == {every}
    for doublings in range(8):
        assert {interval_at(s, every) for s in (begin << doublings, (begin << doublings + 1) - 1)} == {
            every << doublings + 1
        }


@pytest.mark.usefixtures("_few")
def test_each_doubling_of_a_run_writes_half_as_many_intervals_as_its_steady_part():
    steps = [record.step for record in written(4 * FEW + 1)]
    assert [np.count_nonzero((np.array(steps) // FEW).astype(int) == k) for k in range(4)] == [
        FEW,
        FEW // 2,
        FEW // 4,
        FEW // 4,
    ]
    assert np.all(np.diff(steps)[FEW : FEW + FEW // 2 - 1] == 2)


@pytest.mark.usefixtures("_few")
def test_no_step_and_no_sample_is_lost_where_intervals_grow():
    records = written(3 * FEW)
    assert sum(record.steps for record in records) == sum(record.count for record in records) == 3 * FEW
    assert all(record.steps == record.count for record in records)


@pytest.mark.usefixtures("_few")
def test_a_resumed_run_takes_its_intervals_where_the_whole_one_does():
    whole = [record.step for record in written(2 * FEW + 101)]
    resumed = [record.step for record in written(2 * FEW + 101, start=FEW + 1)]
    assert resumed == [step for step in whole if step > FEW]


@pytest.mark.usefixtures("_few")
def test_intervals_that_windows_end_at_do_not_grow():
    assert len(written(2 * FEW, grow=False)) == 2 * FEW
