"""The command line: output, exit codes and errors of one line."""

import os
import re
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import gwa_logging
from gwa_logging.cli import main
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from tests.records import epoch_report, run_record


def make_run(folder: Path, written: int = 0) -> Path:
    """Makes a run of one epoch whose journal was last written at a given time, in seconds."""
    journal = Journal(folder / FILE_NAME, Faults())
    journal.append(run_record())
    journal.append(epoch_report())
    journal.close()
    os.utime(folder / FILE_NAME, (written, written))
    return folder


def test_report_prints_only_the_path_of_the_page(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run / 'report.html'}\n"
    assert err == ""
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_a_folder_of_runs_takes_the_newest_and_names_it(tmp_path, capsys):
    make_run(tmp_path / "z-old", 1000)
    newest = make_run(tmp_path / "a-new", 3000)
    make_run(tmp_path / "m-middle", 2000)
    (tmp_path / "not-a-run").mkdir()
    assert main(["report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{newest / 'report.html'}\n"
    assert err == "newest of 3 runs: a-new\n"
    assert [path.parent.name for path in tmp_path.glob("*/report.html")] == ["a-new"]


def test_report_names_the_only_run_in_a_folder(tmp_path, capsys):
    make_run(tmp_path / "only")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "run: only\n"


@pytest.mark.parametrize(("folder", "problem"), [("", "contains no run"), ("missing", "is not a folder")])
def test_folder_without_a_run_is_an_error_in_one_line(tmp_path, capsys, folder, problem):
    assert main(["report", str(tmp_path / folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gwa-logging: '{tmp_path / folder}' {problem}")
    assert err.count("\n") == 1


def test_report_without_a_directory_takes_the_newest_run_of_gwa_runs(tmp_path, capsys):
    make_run(tmp_path / "gwa_runs" / "old", 1000)
    make_run(tmp_path / "gwa_runs" / "new", 2000)
    assert main(["report"]) == 0
    assert capsys.readouterr() == (f"{Path('gwa_runs') / 'new' / 'report.html'}\n", "newest of 2 runs: new\n")


def test_report_without_a_directory_and_without_gwa_runs_is_an_error(capsys):
    assert main(["report"]) == 2
    assert capsys.readouterr().err.startswith("gwa-logging: 'gwa_runs' is not a folder; pass the directory= of watch()")


def test_empty_journal_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / FILE_NAME).touch()
    assert main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "contains no record" in err
    assert err.count("\n") == 1


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"gwa-logging {gwa_logging.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["replay"], ["rapport", "."]])
def test_wrong_arguments_are_reported_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: gwa-logging" in capsys.readouterr().err


def test_module_is_a_program_with_the_exit_code_of_main_and_opens_the_page_in_a_browser(tmp_path):
    make_run(tmp_path / "run")
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "gwa_logging.cli", "report"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    good = run([*command, "run", "--open"], env={**os.environ, "BROWSER": f"{browser} %s"})
    assert (good.returncode, good.stdout) == (0, f"{Path('run') / 'report.html'}\n")
    assert opened.read_text() == (tmp_path / "run" / "report.html").as_uri()
    bad = run([*command, "nowhere"])
    assert bad.returncode == 2
    assert bad.stderr.startswith("gwa-logging: 'nowhere' is not a folder")


def test_report_without_a_browser_still_prints_the_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    assert main(["report", str(make_run(tmp_path / "run")), "--open"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("report.html\n")
    assert "found no browser; open" in err


@pytest.mark.parametrize("backend", ["wanb", "WandB"])
@pytest.mark.parametrize("folder", ["run", "."])
def test_replay_to_an_unknown_backend_names_the_right_one(backend, folder, tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["replay", folder, "--backend", backend]) == 2
    err = capsys.readouterr().err
    assert f"unknown backend {backend!r}; did you mean 'wandb'?" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("folder", ["run", "."])
def test_replay_to_local_is_an_error(folder, tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["replay", folder, "--backend", "local"]) == 2
    assert "is the journal itself" in capsys.readouterr().err


MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc, self.aux = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x).relu())

def make():
    import helper
    return helper.Net()

def needs_arguments(width, depth=2):
    return Net()

def fails():
    raise RuntimeError("no weights")

ready = Net()
"""

JAX_MODELS = """
import jax, jax.numpy as jnp
from flax import nnx

def make():
    return nnx.Linear(8, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
"""


@pytest.fixture(autouse=True, scope="module")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the models, which are imported once."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "models.py").write_text(MODELS)
    (folder / "helper.py").write_text("from models import Net")
    (folder / "jax_models.py").write_text(JAX_MODELS)
    (folder / "broken.py").write_text("def make(:\n")
    (folder / "unset.py").write_text("import os\n\nmodel = os.environ['THIS_IS_NOT_SET']\n")
    yield folder
    for name in ("models", "helper", "jax_models"):
        sys.modules.pop(name, None)


@pytest.fixture
def in_models(_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_models)


@pytest.mark.usefixtures("in_models")
@pytest.mark.parametrize("where", ["models:make", "models:Net", "models:ready"])
def test_heads_shows_the_candidates_and_the_choice(where, capsys):
    assert main(["heads", where]) == 0
    out = capsys.readouterr().out
    for part in ("body", "fc", "aux", "8 -> 5", "traced"):
        assert part in out


@pytest.mark.usefixtures("in_models")
def test_heads_takes_a_named_head(capsys):
    assert main(["heads", "models:make", "--head", "aux"]) == 0
    assert "named by head=" in capsys.readouterr().out


@pytest.mark.usefixtures("in_models")
@pytest.mark.parametrize("where", ["models:make", "jax_models:make"])
def test_heads_without_a_head_prints_the_candidates_and_exits_with_2(where, capsys):
    assert main(["heads", where, "--head", "1"]) == 2
    out = capsys.readouterr().out
    assert "8 -> 5" in out
    assert out.splitlines()[-1].startswith("no head:")


@pytest.mark.usefixtures("in_models")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("models", "expected package.module:name"),
        ("models:nope", "nope"),
        ("absent_module:x", "absent_module"),
        ("models:needs_arguments", "needs_arguments(width, depth=2) cannot be called without arguments"),
        ("models:fails", r"fails\(\) raised RuntimeError: no weights \(\S+models.py, line 20\)"),
        ("broken:make", r"importing broken raised SyntaxError: .*broken.py, line 1"),
        ("unset:model", r"importing unset raised KeyError: 'THIS_IS_NOT_SET' \(\S+unset.py, line 3\)"),
    ],
)
def test_heads_explains_in_one_line_why_there_is_no_model(where, message, capsys):
    assert main(["heads", where]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gwa-logging: {where!r}: ")
    assert message in err or re.search(message, err)
    assert err.count("\n") == 1
