"""Agreement: the share of samples whose scores keep their sign, against a loop over samples in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor, StopReason
from gwa_logging.agreement import PastScores, agreement
from gwa_logging.early_stop import Decision, StopState, step
from gwa_logging.journal import read_journal
from tests.agreement import Batch, N, by_loop, random_epochs
from tests.core.test_early_stop import two_groups

MODEL = nn.Linear(4, 3)  # kept here, because a monitor is closed with its model
RULE = EarlyStop(statistic="agreement")


def watch(folder: Path, rule: EarlyStop = RULE, **options: Any) -> Monitor:
    return gwa_logging.watch(MODEL, early_stop=rule, directory=folder, **({"num_samples": N} | options))


def train(monitor: Monitor, epochs: list[list[Batch]]) -> None:
    for batches in epochs:
        for scores, ids in batches:
            monitor.update(torch.from_numpy(scores), torch.from_numpy(ids))
        monitor.end_epoch()


@pytest.mark.parametrize(("seed", "rows"), [(0, 0), (1, 0), (2, 4)])
def test_the_agreement_of_each_epoch_equals_a_loop_over_the_samples(tmp_path, seed, rows):
    epochs = random_epochs(seed, rows=rows)
    monitor = watch(tmp_path)
    train(monitor, epochs)
    expected = by_loop(epochs)
    assert expected[0] is None
    assert len({*expected}) > 3
    assert [report.agreement for report in monitor.history] == expected
    assert [r.agreement for r in read_journal(monitor.journal)[0] if r.kind == "epoch"] == expected
    assert monitor.faults == {}


def test_zero_agrees_with_zero_only_and_samples_of_one_side_do_not_count():
    past = PastScores(*np.array([[0, 0, 1, -1, 5, 0], [1, 1, 1, 1, 1, 0]], np.float32))
    now = PastScores(*np.array([[0, 1, 1, -2, 5, 3], [2, 2, 2, 2, 1, 1]], np.float32))
    found = agreement(past, now)
    assert found.value == 2 / 4  # samples 0 and 3 agree, 1 and 2 do not, 4 was not seen again, 5 not before
    assert found.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 4))
    assert math.isnan(agreement(past, past).value)


def test_the_rule_follows_the_mean_of_agreement_and_separation_over_two_epochs(tmp_path):
    """The values and decisions, computed from the reports by `step` alone."""
    rule = EarlyStop(statistic="agreement", patience=2)
    rng = np.random.default_rng(0)
    sign = np.where(rng.random(400) < 0.3, -1, 1)
    levels = [0.5, 1.5, 3, 4, 4, 1, 0.3, 0.3, 0.3, 0.3]
    scores = [(0.02 * (level * sign + rng.standard_normal(400))).astype(np.float32) for level in levels]
    monitor = watch(tmp_path, rule, num_samples=400)
    train(monitor, [[(row, np.arange(400))] for row in scores])

    reports = monitor.history
    state, best, fired = StopState(), [], []
    for epoch in range(len(reports)):
        pair = reports[max(0, epoch - 1) : epoch + 1]
        value = sum(r.agreement + r.separation for r in pair) / 2 if epoch >= 2 else math.nan
        state, decision = step(rule, state, value)
        best += [epoch] if decision is Decision.IMPROVED else []
        fired += [(epoch, value)] if decision is Decision.STOP else []
    assert [report.epoch for report in reports if report.is_best] == best
    assert len(best) > 1
    assert monitor.alert is not None
    assert (monitor.alert.epoch, monitor.alert.value) == pytest.approx(fired[0])
    assert (monitor.alert.best_epoch, monitor.alert.best_value) == pytest.approx((state.best_epoch, state.best))
    assert monitor.alert.reason is StopReason.DECLINE
    assert "the agreement + separation statistic has been clearly below its best for 2 epochs" in monitor.alert.message


def test_the_rule_waits_two_epochs_unless_the_user_says_otherwise():
    assert (RULE.warmup, RULE.drop, RULE.patience) == (2, 0.05, 5)
    assert EarlyStop(statistic="agreement", warmup=7, drop=0).warmup == 7


def test_epochs_without_any_score_raise_the_alert_as_undefined(tmp_path):
    monitor = watch(tmp_path, EarlyStop(statistic="agreement", patience=3))
    ids = np.arange(N)
    good = [[(np.linspace(-0.3, 0.5, N, dtype=np.float32), ids)] for _ in range(3)]
    train(monitor, good + [[(np.full(N, np.nan, np.float32), ids)] for _ in range(3)])
    assert [report.agreement for report in monitor.history] == [None, 1, 1, None, None, None]
    assert monitor.alert is not None
    assert monitor.alert.reason is StopReason.UNDEFINED
    assert monitor.alert.epoch == 5


def test_samples_that_never_return_are_a_fault_and_no_reason_to_stop(tmp_path):
    monitor = watch(tmp_path, EarlyStop(statistic="agreement", patience=1), num_samples=6 * N)
    scores = two_groups(3, n=N).astype(np.float32)
    train(monitor, [[(scores, np.arange(N) + epoch * N)] for epoch in range(6)])
    assert monitor.alert is None
    assert [report.agreement for report in monitor.history] == [None] * 6
    assert monitor.faults == {"agreement": 5}


def test_scores_without_ids_are_a_fault_and_no_reason_to_stop(tmp_path):
    monitor = watch(tmp_path, EarlyStop(statistic="agreement", patience=1))
    for _ in range(4):
        monitor.update(torch.from_numpy(two_groups(3, n=N)))
        monitor.end_epoch()
    assert monitor.alert is None
    assert monitor.faults["agreement"] == 3


def test_a_ledger_that_cannot_be_read_is_a_fault_and_the_epoch_is_ignored(tmp_path, monkeypatch):
    monitor = watch(tmp_path)
    scores, ids = two_groups(3, n=N).astype(np.float32), np.arange(N)
    train(monitor, [[(scores, ids)]] * 3)

    def fails() -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(monitor._adapter, "ledger", fails)
        train(monitor, [[(scores, ids)]])
    train(monitor, [[(scores, ids)]] * 2)
    assert [report.agreement for report in monitor.history] == [None, 1, 1, None, 1, 1]
    assert monitor.faults == {"agreement": 1}


def test_a_rule_that_watches_something_else_keeps_and_reports_nothing(tmp_path):
    monitor = watch(tmp_path, EarlyStop())
    train(monitor, random_epochs(0, count=2))
    assert [report.agreement for report in monitor.history] == [None, None]
    assert monitor._recording.agreement.past is None
    assert not [key for key in monitor.state_dict()["ledger"] if key.startswith("past")]


def test_without_ids_the_rule_is_refused(tmp_path):
    message = r"early_stop=EarlyStop\(statistic='agreement'\): .* add num_samples=<size of the training set>"
    with pytest.raises(InvalidInputError, match=message):
        watch(tmp_path, num_samples=None)
    monitor = watch(tmp_path, num_samples=None, labels=[0, 1, 2])  # as many samples as labels
    monitor.close()
