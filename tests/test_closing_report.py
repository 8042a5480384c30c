"""The report that closing a run writes: for every backend, next to the journal, within a limited time."""

import subprocess
import sys
from pathlib import Path
from threading import Event, Thread, current_thread
from time import monotonic
from typing import Any

import pytest

import gwa_logging
from gwa_logging import _all_heads, _closing_report, delivery
from gwa_logging.errors import MissingDependencyError
from gwa_logging.records import AnyRecord
from gwa_logging.replay import replay
from gwa_logging.report.page import REPORT_NAME

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.report
GENEROUS = 60.0  # seconds that a loaded machine may need


class Recorder:
    """A backend that looks for the report when it is closed."""

    threaded = True

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.folder = Path("unknown")
        self.saw_report: bool | None = None

    def write(self, record: AnyRecord) -> None:
        pass

    def close(self) -> None:
        self.saw_report = (self.folder / REPORT_NAME).exists()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits as long as a loaded machine may need."""
    monkeypatch.setattr(_all_heads, "CLOSE_WITHIN", GENEROUS)


def watch(directory: Path, **options: Any) -> tuple[Any, gwa_logging.Monitor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    return model, gwa_logging.watch(model, directory=directory, **options)


def train(model: Any, steps: int = 3) -> None:
    for _ in range(steps):
        torch.nn.functional.cross_entropy(model(torch.randn(12, 8)), torch.arange(12) % 3).backward()


def close(monitor: gwa_logging.Monitor) -> Path:
    """Closes a monitor and returns where its report should be."""
    assert monitor.journal is not None
    monitor.close()
    return monitor.journal.parent / REPORT_NAME


@pytest.mark.usefixtures("patient")
def test_the_report_is_there_after_close_and_before_the_trackers_are_closed(tmp_path, capsys):
    trackers = [Recorder("a"), Recorder("b")]
    model, monitor = watch(tmp_path, backend=trackers)
    assert monitor.journal is not None
    for tracker in trackers:
        tracker.folder = monitor.journal.parent
    train(model)
    monitor.end_epoch()
    train(model)  # an epoch in progress, which closing reports
    page = close(monitor)
    text = page.read_text(encoding="utf-8")
    assert "2 epochs, 6 steps" in text
    assert "was not closed" not in text
    assert [tracker.saw_report for tracker in trackers] == [True, True]
    assert capsys.readouterr().err.endswith(f"gwa_logging: report: {page}\n")
    assert monitor.faults == {}


@pytest.mark.usefixtures("patient")
def test_every_head_has_its_report(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            return self.a(self.body(x)) + self.b(self.body(x))

    model = Two()
    monitor = gwa_logging.watch(model, head=["a", "b"], directory=tmp_path)
    train(model)
    page = close(monitor)
    assert sorted(path.relative_to(page.parent) for path in page.parent.rglob(REPORT_NAME)) == [
        Path("b", REPORT_NAME),
        Path(REPORT_NAME),
    ]


@pytest.mark.usefixtures("patient")
def test_a_run_without_a_step_leaves_neither_report_nor_folder(tmp_path, capsys):
    _, monitor = watch(tmp_path)
    page = close(monitor)
    assert not page.parent.exists()
    assert "report" not in capsys.readouterr().err


@pytest.mark.usefixtures("patient")
def test_without_plotly_one_line_says_how_to_make_the_report(tmp_path, capsys, monkeypatch):
    def write_report(folder: Path) -> Path:
        raise MissingDependencyError("plotly", "report")

    monkeypatch.setattr(_closing_report, "write_report", write_report)
    model, monitor = watch(tmp_path)
    train(model)
    page = close(monitor)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "report" in line and "journal:" not in line)
    assert line == (
        "gwa_logging: no report.html: plotly is not installed. Install it with: pip install 'gwa-logging[report]', then "
        f"gwa-logging report {page.parent}"
    )
    assert monitor.faults == {}


@pytest.mark.usefixtures("patient")
def test_a_report_that_cannot_be_written_is_a_fault(tmp_path, caplog):
    model, monitor = watch(tmp_path)
    assert monitor.journal is not None
    train(model)
    (monitor.journal.parent / REPORT_NAME).mkdir()
    close(monitor)
    assert monitor.faults == {"report": 1}
    assert "cannot write report.html" in caplog.text


def test_a_report_that_takes_too_long_delays_neither_close_nor_the_trackers_further(tmp_path, caplog, monkeypatch):
    released, finished = Event(), Event()
    write = _closing_report.write_report

    def write_slowly(folder: Path) -> Path:
        assert current_thread().name == "gwa_logging report"
        released.wait(GENEROUS)
        try:
            return write(folder)
        finally:
            finished.set()

    monkeypatch.setattr(_closing_report, "write_report", write_slowly)
    monkeypatch.setattr(_all_heads, "CLOSE_WITHIN", 2.0)
    monkeypatch.setattr(delivery, "CLOSING_TAKES", 1.5)
    tracker = Recorder()
    model, monitor = watch(tmp_path, backend=tracker)
    train(model)
    begin = monotonic()
    page = close(monitor)
    assert 2.0 <= monotonic() - begin < GENEROUS / 2
    assert tracker.saw_report is False, "the tracker is closed without the report"
    assert monitor.faults == {"report": 1}
    assert f"not written in time; to write it: gwa-logging report {page.parent}" in caplog.text
    assert not page.exists()
    released.set()
    assert finished.wait(GENEROUS)
    assert page.exists(), "it is written later if the program is still running"


@pytest.mark.usefixtures("patient")
def test_an_interpreter_that_starts_no_more_threads_writes_the_report_in_the_same_thread(tmp_path, monkeypatch):
    class Refused(Thread):
        def start(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    model, monitor = watch(tmp_path)
    train(model)
    monkeypatch.setattr(_closing_report, "Thread", Refused)
    assert close(monitor).exists()
    assert monitor.faults == {}


PROGRAM = """
import sys, torch, gwa_logging
sys.modules.update(dict.fromkeys(sys.argv[2:]))
model = torch.nn.Linear(8, 3)
monitor = gwa_logging.watch(model, directory=sys.argv[1])
torch.nn.functional.cross_entropy(model(torch.randn(12, 8)), torch.arange(12) % 3).backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("plotly",)])
def test_a_program_that_ends_without_close_leaves_the_report(tmp_path, missing):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, *missing], capture_output=True, text=True, check=True
    )
    pages = list(tmp_path.rglob(REPORT_NAME))
    assert len(pages) == (0 if missing else 1)
    expected = "pip install 'gwa-logging[report]'" if missing else f"report: {pages[0]}"
    assert expected in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob(".report*"))


@pytest.mark.usefixtures("patient")
def test_a_replay_renews_the_report_before_the_tracker_is_closed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    model, monitor = watch(tmp_path)
    train(model)
    page = close(monitor)
    assert monitor.journal is not None
    page.write_text("old")
    replay(monitor.journal, "tensorboard", str(tmp_path / "events"))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_replay_sends_everything_where_no_report_can_be_written(tmp_path):
    pytest.importorskip("tensorboard")
    model, monitor = watch(tmp_path)
    train(model)
    page = close(monitor)
    page.unlink()
    page.mkdir()
    assert replay(page.parent / "journal.jsonl", "tensorboard", str(tmp_path / "events")).sent > 0
