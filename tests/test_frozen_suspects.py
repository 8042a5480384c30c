"""While a stop alert stands, the list of suspects is the one of the alert: in the calls, the files and the report."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, Monitor, Suspect
from gwa_logging.journal import read_journal
from gwa_logging.records import RECORDS, EpochReport, SuspectsRecord
from gwa_logging.report.page import write_report

N, CLASSES = 6, 3
LABELS = np.arange(N) % CLASSES
FIRST = np.array([-0.3, -0.2, 0.1, 0.2, 0.3, 0.4], np.float32)
"""Scores until the alert; those after it have the opposite order."""

MODEL = nn.Linear(4, CLASSES)  # kept here, because a monitor is closed with its model
AT_ONCE = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
"""Fires in epoch 1."""


def watch(folder: Path, rule: EarlyStop | None = AT_ONCE, **options: Any) -> Monitor:
    return gwa_logging.watch(MODEL, labels=LABELS, early_stop=rule, directory=folder, **options)


def train(monitor: Monitor, *scores: np.ndarray) -> EpochReport:
    for row in scores:
        monitor.update(torch.from_numpy(row), torch.arange(N), predicted=torch.arange(N) % 2)
        report = monitor.end_epoch()
    return report


def ids_of(suspects: list[Suspect]) -> list[int]:
    return [suspect.id for suspect in suspects]


def lists(monitor: Monitor) -> list[SuspectsRecord]:
    return [record for record in read_journal(monitor.journal)[0] if record.kind == "suspects"]


@pytest.fixture
def after_alert(tmp_path: Path) -> Monitor:
    """Two epochs until the alert, and four after it, in which the scores have the opposite order."""
    monitor = watch(tmp_path)
    train(monitor, *[FIRST] * 2)
    assert monitor.alert is not None
    train(monitor, *[-FIRST] * 4)
    return monitor


def test_scores_after_the_alert_do_not_change_the_ranking_unless_the_whole_run_is_asked_for(after_alert):
    assert ids_of(after_alert.suspects(3)) == [0, 1, 2]
    assert after_alert.suspects(1)[0].mean_score == pytest.approx(FIRST[0])
    assert after_alert.suspects(1)[0].times_seen == 2
    assert ids_of(after_alert.suspects(3, whole_run=True)) == [5, 4, 3]
    whole = (2 * FIRST - 4 * FIRST) / 6
    assert [s.mean_score for s in after_alert.suspects(N, whole_run=True)] == pytest.approx(sorted(whole))
    np.testing.assert_allclose(after_alert.label_quality(), (FIRST + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(after_alert.label_quality(whole_run=True), (whole + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(after_alert.suspects_table().mean_score, FIRST, rtol=1e-6)
    np.testing.assert_allclose(after_alert.suspects_table(whole_run=True).mean_score, whole, rtol=1e-6)


def test_the_journal_the_csv_and_the_report_say_until_when_scores_count(after_alert):
    after_alert.close()
    (record,) = lists(after_alert)  # the list has not changed since the alert, so it is written once
    assert record.until_epoch == 1
    assert record.step == 1
    assert ids_of(record.suspects)[:3] == [0, 1, 2]
    folder = after_alert.journal.parent
    with (folder / "suspects.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "mean_score", "times_seen", "label", "predicted", "until_epoch"]
    assert [row[0] for row in rows] == list("012345")
    assert {row[-1] for row in rows} == {"1"}
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Only the scores up to the stop alert of epoch 1 count" in page
    assert RECORDS.validate_json(record.model_dump_json()) == record


def test_the_list_that_users_log_after_the_alert_is_the_frozen_one(after_alert):
    assert ids_of(after_alert.log_suspects(2)) == [0, 1]
    assert [record.until_epoch for record in lists(after_alert)] == [1, 1]


def test_a_withdrawal_drops_the_frozen_list_and_the_next_alert_freezes_again(tmp_path):
    monitor = watch(tmp_path, EarlyStop(statistic="mean", warmup=0, patience=1, drop=0))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1e-4, N).astype(np.float32)
    low, high = FIRST / 10 + noise, 0.9 - FIRST / 10
    train(monitor, low, low - 0.01)
    assert monitor.alert.epoch == 1
    assert ids_of(monitor.suspects(1)) == [0]
    assert not train(monitor, high).stop
    assert monitor.alert is None
    assert ids_of(monitor.suspects(1)) == ids_of(monitor.suspects(1, whole_run=True))
    assert monitor.suspects(1)[0].times_seen == 3
    train(monitor, high - 0.1)
    assert monitor.alert.epoch == 3
    train(monitor, high - 0.1)
    assert {s.times_seen for s in monitor.suspects()} == {4}
    monitor.close()
    assert [record.until_epoch for record in lists(monitor)] == [1, 3]


def test_after_a_withdrawal_closing_writes_the_list_of_the_whole_run(tmp_path):
    monitor = watch(tmp_path, EarlyStop(statistic="mean", warmup=0, patience=1, drop=0))
    train(monitor, FIRST / 10, FIRST / 10 - 0.01, 0.9 - FIRST / 10)
    monitor.close()
    assert [record.until_epoch for record in lists(monitor)] == [1, None]
    assert "until_epoch" not in (monitor.journal.parent / "suspects.csv").read_text()


def test_without_an_alert_nothing_is_frozen(tmp_path):
    monitor = watch(tmp_path, None)
    train(monitor, *[FIRST] * 2, *[-FIRST] * 4)
    assert ids_of(monitor.suspects(3)) == ids_of(monitor.suspects(3, whole_run=True)) == [5, 4, 3]
    monitor.close()
    assert [record.until_epoch for record in lists(monitor)] == [None]


def test_a_ledger_that_cannot_be_read_at_the_alert_is_a_fault_and_the_alert_is_raised(tmp_path, monkeypatch):
    monitor = watch(tmp_path)
    train(monitor, FIRST)

    def fails() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(monitor._adapter, "ledger", fails)
    train(monitor, FIRST)
    assert monitor.alert is not None
    assert monitor.faults["suspects"] >= 1
    monkeypatch.undo()
    assert ids_of(monitor.suspects(1)) == [0]


def test_the_caveat_names_the_class_pairs_of_the_samples_with_a_negative_mean(tmp_path):
    n, classes = 400, 10
    labels = np.arange(n) % classes
    wrong = labels == 3
    monitor = gwa_logging.watch(MODEL, labels=labels, early_stop=AT_ONCE, directory=tmp_path)
    scores = torch.from_numpy(np.where(wrong, -0.2, 0.2).astype(np.float32))
    predicted = torch.from_numpy(np.where(wrong, 5, labels))
    for _ in range(2):
        monitor.update(scores + torch.linspace(0, 0.01, n), torch.arange(n), predicted=predicted)
        monitor.end_epoch()
    (caveat,) = [c for c in monitor.alert.caveats if "class pairs" in c]
    assert "of the 40 samples" in caveat
    assert "40 belong to few class pairs (3 predicted as 5)" in caveat
