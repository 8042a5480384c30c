"""The progress bar of `Monitor.epochs`, as a terminal or a notebook shows what was written to stderr."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop
from gwa_logging._announce import announce

logger = logging.getLogger("gwa_logging")


def screen(written: str) -> list[str]:
    """The lines on the screen: a carriage return moves to the start of the line, and later characters replace earlier ones."""
    lines = []
    for line in written.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


@pytest.fixture
def _messages_on_stderr() -> Iterator[None]:
    """Messages appear as in a program that has not set up logging; pytest's own handler would prevent it."""
    logger.addHandler(logging.lastResort)
    yield
    logger.removeHandler(logging.lastResort)


def train(directory: Path, epochs: int = 4) -> gwa_logging.Monitor:
    """Trains with messages in the middle of an epoch, and an alert in epoch 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    rule = EarlyStop(patience=1, warmup=0, min_delta=1e9, drop=0)
    monitor = gwa_logging.watch(model, directory=directory, early_stop=rule)
    for epoch in monitor.epochs(epochs):
        nn.functional.cross_entropy(model(torch.randn(20, 8)), torch.arange(20) % 5).backward()
        if epoch == 2:
            logger.warning("a fault")
            announce("a remark")
    monitor.close()
    return monitor


@pytest.mark.usefixtures("_messages_on_stderr")
def test_there_is_one_bar_below_all_messages(tmp_path, capsys):
    pytest.importorskip("tqdm")
    train(tmp_path)
    lines = screen(capsys.readouterr().err)
    bars = [line for line in lines if "epoch/s" in line or "s/epoch" in line]
    assert len(bars) == 1
    assert bars[0].startswith("GWA: 100%")
    assert "4/4" in bars[0]
    assert "separation=" in bars[0]
    messages = lines[: lines.index(bars[0])]
    assert [line.partition(":")[0] for line in messages] == ["gwa_logging", "gwa_logging", "a fault", "gwa_logging"]
    assert "recommends stopping" in messages[1]
    assert messages[3] == "gwa_logging: a remark"


def test_the_screen_of_the_test_above_shows_a_bar_that_is_not_removed():
    assert screen("\rGWA: 50% 1/2\ra message\n\rGWA: 100% 2/2\n") == ["a message1/2", "GWA: 100% 2/2"]


@pytest.mark.usefixtures("_messages_on_stderr")
def test_without_tqdm_there_are_messages_and_no_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monitor = train(tmp_path)
    assert len(monitor.history) == 4
    lines = screen(capsys.readouterr().err)
    assert len(lines) == 4
    assert not [line for line in lines if line.startswith("GWA:")]


def test_the_logger_is_as_before_when_the_loop_is_left(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model, directory=tmp_path)
    filters = list(logger.filters)
    for _ in monitor.epochs(3):
        nn.functional.cross_entropy(model(torch.randn(20, 8)), torch.arange(20) % 5).backward()
        assert logger.filters != filters
        break
    assert logger.filters == filters
    monitor.close()
