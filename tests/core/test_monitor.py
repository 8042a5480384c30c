"""The Monitor: steps, intervals, epochs, the alert, closing. On a real PyTorch model."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, NoObservationsError, StopReason
from gwa_logging.journal import read_journal
from gwa_logging.records import TrackerRunRef


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def train(model: nn.Module, steps: int, batch: int = 10, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(batch, 8, generator=generator)
        F.cross_entropy(model(x), torch.randint(0, 5, (batch,), generator=generator)).backward()


def records(monitor: gwa_logging.Monitor, kind: str) -> list:
    return [record for record in read_journal(monitor.journal)[0] if record.kind == kind]


def test_the_first_step_is_an_interval_and_then_every_nth(model):
    monitor = gwa_logging.watch(model, log_every_n_steps=4)
    train(model, 10)
    monitor.end_epoch()
    assert [(r.step, r.steps, r.count) for r in records(monitor, "interval")] == [
        (0, 1, 10),
        (4, 4, 40),
        (8, 4, 40),
        (9, 1, 10),
    ]


def test_intervals_add_up_to_the_epoch(model):
    monitor = gwa_logging.watch(model, log_every_n_steps=3)
    for epoch in range(3):
        train(model, 7, seed=epoch)
        report = monitor.end_epoch()
        mine = [r for r in records(monitor, "interval") if r.epoch == epoch]
        assert sum(r.count for r in mine) == report.count == 70
        assert np.array_equal(sum(r.histogram.dense() for r in mine), report.histogram.dense())
        assert report.step == 7 * (epoch + 1) - 1


def test_an_epoch_without_a_training_step_raises_what_to_check(model):
    monitor = gwa_logging.watch(model)
    with pytest.raises(NoObservationsError, match=r"epoch 0 has ended.*head '2'.*loss.backward\(\)"):
        monitor.end_epoch()
    train(model, 1)
    monitor.end_epoch()
    with pytest.raises(NoObservationsError, match="epoch 1 has ended"):
        monitor.end_epoch()


def test_epochs_closes_each_epoch_and_counts_from_zero(model):
    monitor = gwa_logging.watch(model)
    seen = []
    for epoch in monitor.epochs(3):
        seen.append(epoch)
        train(model, 2)
    assert seen == [0, 1, 2]
    assert [report.epoch for report in monitor.history] == [0, 1, 2]


def test_an_epoch_closed_by_the_loop_body_is_not_closed_twice(model):
    monitor = gwa_logging.watch(model)
    for _ in monitor.epochs(2):
        train(model, 2)
        monitor.end_epoch()
    assert len(monitor.history) == 2


def patient(action: str) -> EarlyStop:
    return EarlyStop(patience=2, warmup=0, min_delta=1e9, drop=0, action=action)  # no epoch ever improves by this much


def test_the_alert_fires_once_and_training_continues(model):
    alerts = []
    monitor = gwa_logging.watch(model, early_stop=patient("alert"), on_alert=alerts.append)
    for _ in monitor.epochs(6):
        train(model, 2)
    assert len(monitor.history) == 6
    assert alerts == [monitor.alert]
    assert [alert.model_copy(update={"time": 0.0}) for alert in records(monitor, "alert")] == alerts
    assert (monitor.alert.epoch, monitor.alert.best_epoch, monitor.alert.statistic) == (2, 0, "separation")
    assert monitor.alert.reason is StopReason.NO_IMPROVEMENT
    assert monitor.alert.best_value == monitor.history[0].separation
    assert monitor.alert.value == monitor.history[2].separation
    assert monitor.should_stop


def test_the_action_stop_ends_the_epochs(model):
    monitor = gwa_logging.watch(model, early_stop=patient("stop"))
    for _ in monitor.epochs(6):
        train(model, 2)
    assert len(monitor.history) == 3


def test_a_clearly_better_epoch_withdraws_the_alert(model, caplog):
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    alerts = []
    rule = EarlyStop(warmup=0, patience=1)
    monitor = gwa_logging.watch(model, early_stop=rule, on_alert=alerts.append)
    standing = []
    for distance in (4, 1, 1, 8, 1):
        groups = rng.standard_normal(2000) + distance * (rng.random(2000) < 0.7)
        monitor.update(torch.tensor(0.05 * groups))
        monitor.end_epoch()
        standing.append(monitor.should_stop)
    assert standing == [False, True, True, False, True]
    assert [(alert.epoch, alert.best_epoch) for alert in alerts] == [(1, 0), (4, 3)]
    assert [(r.epoch, r.best_epoch) for r in records(monitor, "alert")] == [(1, 0), (4, 3)]
    assert monitor.alert == alerts[1]
    assert "epoch 3 is clearly better" in caplog.text
    (withdrawal,) = records(monitor, "withdrawal")
    assert (withdrawal.epoch, withdrawal.alert_epoch) == (3, 1)
    assert withdrawal.message == (
        "GWA: epoch 3 is clearly better than epoch 0: the stop alert of epoch 1 is withdrawn."
    )


def test_no_stop_rule_no_alert_but_still_a_best_epoch(model):
    monitor = gwa_logging.watch(model, early_stop=None)
    for _ in monitor.epochs(12):
        train(model, 1)
    assert monitor.alert is None
    assert any(report.is_best for report in monitor.history)


def test_an_alert_callback_that_raises_is_counted_and_training_continues(model, caplog):
    def broken(alert):
        raise OSError("no mail today")

    monitor = gwa_logging.watch(model, early_stop=patient("alert"), on_alert=broken)
    for _ in monitor.epochs(4):
        train(model, 1)
    assert monitor.faults == {"on_alert": 1}
    assert "no mail today" in caplog.text


def test_samples_per_epoch_closes_windows_automatically(model):
    monitor = gwa_logging.watch(model, samples_per_epoch=100, log_every_n_steps=5)
    train(model, 31)
    assert [report.count for report in monitor.history] == [110, 100, 100]


def test_closing_reports_an_epoch_in_progress_but_does_not_judge_it(model):
    monitor = gwa_logging.watch(model, early_stop=EarlyStop(warmup=0))
    train(model, 3)
    monitor.close()
    monitor.close()
    (report,) = monitor.history
    assert report.count == 30
    assert not report.is_best
    assert "closed before the end of the epoch" in report.notes
    assert [r.kind for r in read_journal(monitor.journal)[0]][-1] == "close"


def test_a_closed_monitor_refuses_to_end_an_epoch(model):
    monitor = gwa_logging.watch(model)
    monitor.close()
    with pytest.raises(InvalidInputError, match="closed"):
        monitor.end_epoch()


def test_an_exception_in_the_with_block_propagates_and_the_journal_is_complete(model):
    monitor = gwa_logging.watch(model)

    def run():
        with monitor:
            train(model, 2)
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        run()
    assert records(monitor, "close")[0].steps == 2


def test_scores_passed_to_update_are_counted(model):
    monitor = gwa_logging.watch(model)
    monitor.update(torch.tensor([0.1, 0.2, torch.nan]))
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (2, 1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, 0.2], "found list"),
        (np.zeros(3), "found ndarray"),
        (torch.zeros(3, dtype=torch.int64), "torch.int64"),
        (torch.tensor(0.5), "shape \\(\\)"),
    ],
)
def test_scores_of_a_wrong_type_shape_or_dtype_are_refused(model, scores, message):
    monitor = gwa_logging.watch(model)
    with pytest.raises(InvalidInputError, match=f"scores: expected a floating-point tensor.*{message}"):
        monitor.update(scores)


def test_a_value_that_cannot_be_a_score_is_excluded(model):
    monitor = gwa_logging.watch(model)
    monitor.update(torch.tensor([0.5, 12.0]))  # as if logits had been passed by mistake
    assert monitor.end_epoch().excluded == 1


def test_suspects_are_the_samples_with_the_lowest_mean_score(model):
    monitor = gwa_logging.watch(model, num_samples=5)
    monitor.update(torch.tensor([0.5, -0.2, 0.1]), torch.tensor([4, 0, 2]))
    monitor.update(torch.tensor([0.3, -0.4]), torch.tensor([4, 0]))
    found = monitor.suspects(2)
    assert [(s.id, s.times_seen) for s in found] == [(0, 2), (2, 1)]
    assert found[0].mean_score == pytest.approx(-0.3)


def test_tagged_batches_enter_the_ledger(model):
    monitor = gwa_logging.watch(model, num_samples=30)
    for epoch in range(2):
        for ids in torch.randperm(30, generator=torch.Generator().manual_seed(epoch)).split(7):
            monitor.tag(ids)
            F.cross_entropy(model(torch.randn(len(ids), 8)), torch.randint(0, 5, (len(ids),))).backward()
        monitor.end_epoch()
    assert {s.times_seen for s in monitor.suspects(30)} == {2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.tag(torch.arange(3)), "no ledger"),
        (lambda m: m.suspects(), "no ledger"),
        (lambda m: m.epochs(0), "expected at least 1"),
        (lambda m: m.value_and_grad(lambda p: p), "for JAX models"),
    ],
)
def test_calls_that_do_not_fit_the_model_or_the_settings_are_refused(model, call, message):
    monitor = gwa_logging.watch(model)
    with pytest.raises(InvalidInputError, match=message):
        call(monitor)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.arange(2), r"expected \[3\], one for each score"),
        (torch.zeros(3), "expected an integer array"),
        ([0, 1, 2], "expected an integer array"),
        (torch.zeros(2, 2, dtype=torch.int64), r"expected \[3\], .* found \[2, 2\]"),
    ],
)
def test_wrong_sample_ids_are_refused(model, ids, message):
    monitor = gwa_logging.watch(model, num_samples=10)
    with pytest.raises(InvalidInputError, match=message):
        monitor.update(torch.zeros(3), ids)


def test_a_report_reads_as_one_line(model):
    monitor = gwa_logging.watch(model)
    train(model, 3)
    line = str(monitor.end_epoch())
    assert line.startswith("epoch 0: GWA ")
    assert "\n" not in line
    assert line in repr(monitor)


def test_an_undefined_epoch_is_neither_best_nor_a_reason_to_stop(model):
    monitor = gwa_logging.watch(model, early_stop=EarlyStop(warmup=0, patience=2, drop=0))
    for value in ([0.1, 0.2, 0.4], [0.3, 0.3, 0.3], [0.1, 0.2, 0.4], [0.1, 0.2, 0.4]):
        monitor.update(torch.tensor(value))
        monitor.end_epoch()
    assert math.isnan(monitor.history[1].gwa)
    assert monitor.alert.epoch == 3


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 0)], ids=["deleted", "truncated"])
def test_a_journal_that_is_damaged_during_the_run_loses_no_record_and_neither_does_the_backend(model, damage):
    class Tracker:
        name, run, threaded, run_ref = "tracker", None, True, TrackerRunRef()

        def __init__(self) -> None:
            self.taken = []

        def write(self, record) -> None:
            self.taken.append(record)

        def close(self) -> None:
            pass

    tracker = Tracker()
    monitor = gwa_logging.watch(model, backend=tracker, log_every_n_steps=1)
    train(model, 5)
    assert monitor.flush(30)  # not in the middle of a write
    damage(monitor.journal)
    train(model, 5)
    monitor.end_epoch()
    assert monitor.flush(30)
    monitor.close()
    assert [r.step for r in tracker.taken if r.kind == "interval"] == list(range(10))
    assert read_journal(monitor.journal) == (tracker.taken, 0)
    assert monitor.faults == {"journal": 1}
