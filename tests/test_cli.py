"""The command line, called as people call it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gwa_logging
from gwa_logging import AlignmentSummary
from gwa_logging.cli import main
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.records import RunRecord


def make_run(folder: Path, written: int = 0) -> Path:
    """A run of one epoch whose journal was written to at a given time, in seconds."""
    journal = Journal(folder / FILE_NAME, Faults())
    journal.append(RunRecord(name="gwa", head="fc", created="2026-01-31T12:00:00+00:00", settings={}))
    journal.append(AlignmentSummary.from_scores(np.linspace(-0.1, 0.3, 300)).report())
    journal.close()
    os.utime(folder / FILE_NAME, (written, written))
    return folder


def test_report_of_a_run_prints_the_path_of_the_page_and_nothing_else(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run / 'report.html'}\n"
    assert err == ""
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_a_folder_of_runs_takes_the_newest_and_says_which(tmp_path, capsys):
    make_run(tmp_path / "z-old", 1000)
    newest = make_run(tmp_path / "a-new", 3000)
    make_run(tmp_path / "m-middle", 2000)
    (tmp_path / "not-a-run").mkdir()
    assert main(["report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{newest / 'report.html'}\n"
    assert err == "newest of 3 runs: a-new\n"
    assert [path.parent.name for path in tmp_path.glob("*/report.html")] == ["a-new"]


def test_only_run_in_a_folder_is_named_too(tmp_path, capsys):
    make_run(tmp_path / "only")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "run: only\n"


@pytest.mark.parametrize(("folder", "said"), [("", "holds no run"), ("missing", "is not a folder")])
def test_folder_without_a_run_is_an_error_in_one_line(tmp_path, capsys, folder, said):
    assert main(["report", str(tmp_path / folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gwa-logging: '{tmp_path / folder}' {said}")
    assert err.count("\n") == 1


def test_empty_journal_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / FILE_NAME).touch()
    assert main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "holds no record" in err
    assert err.count("\n") == 1


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"gwa-logging {gwa_logging.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["report"], ["rapport", "."]])
def test_wrong_arguments_are_told_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: gwa-logging" in capsys.readouterr().err


def test_module_runs_as_a_program_and_its_exit_code_is_mains(tmp_path):
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "gwa_logging.cli", "report"]
    good = subprocess.run([*command, "run"], cwd=tmp_path, capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, f"{Path('run') / 'report.html'}\n")
    bad = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("gwa-logging: 'nowhere' is not a folder")


MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc, self.aux = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x).relu())

def make():
    return Net()

ready = Net()
"""


@pytest.mark.parametrize("where", ["models:make", "models:Net", "models:ready"])
def test_heads_shows_the_candidates_and_what_was_chosen(where, tmp_path, capsys):
    (tmp_path / "models.py").write_text(MODELS)
    assert main(["heads", where]) == 0
    shown = capsys.readouterr().out
    for part in ("body", "fc", "aux", "8 -> 5", "traced"):
        assert part in shown


def test_heads_follows_a_named_head(tmp_path, capsys):
    (tmp_path / "models.py").write_text(MODELS)
    assert main(["heads", "models:make", "--head", "aux"]) == 0
    assert "named by head=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "said"),
    [("models", "expected package.module:name"), ("models:nope", "nope"), ("absent_module:x", "absent_module")],
)
def test_heads_says_what_is_wrong_with_the_place(where, said, tmp_path, capsys):
    (tmp_path / "models.py").write_text(MODELS)
    assert main(["heads", where]) == 2
    assert said in capsys.readouterr().err
