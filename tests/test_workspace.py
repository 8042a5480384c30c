"""`gwa-logging workspace`: real wandb-workspaces and wandb-core, which save to a stand-in of W&B's server."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop
from gwa_logging.cli import main
from tests.trackers import folder_of, read_back, run_of
from tests.wandb_graphql import ENTITY, PROJECT, RUN, GraphQLServer

wandb = pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")

WHERE = f"{ENTITY}/{PROJECT}"
KEY = "a" * 40


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()  # W&B reads its settings once
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphQLServer]:
    with GraphQLServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        yield server
        assert server.unknown == []


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, what was printed to stdout, and what this library printed to stderr."""
    code = main(["workspace", *arguments])
    out, err = capsys.readouterr()
    return code, out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith("wandb:"))


def panels_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a workspace or of a report."""
    spec = view["spec"]
    if "section" in spec:
        parts = spec["section"]["panelBankConfig"]["sections"]
    else:
        grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
        parts = [grid["metadata"]["panelBankSectionConfig"] for grid in grids]
    return [panel for part in parts for panel in part["panels"]]


def keys_of(panel: dict[str, Any]) -> list[str]:
    config = panel["config"]
    if "panel2Config" in config:
        return [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]]
    return [*config.get("mediaKeys", []), *config.get("metrics", [])]


def test_a_workspace_has_the_sections_of_the_first_screen(server, capsys):
    code, out, err = run(capsys, WHERE)
    (view,) = server.views
    assert (code, err) == (0, "")
    assert out == f"{server.address}/{WHERE}?nw={view['name'].removeprefix('nw-').removesuffix('-v')}\n"
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, PROJECT, "GWA")
    assert view["type"] == "project-view"
    first, suspects, diagnostics = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert (first["isOpen"], first["pinned"]) == (True, True)
    assert [key for panel in first["panels"] for key in keys_of(panel)] == [
        *("gwa/picture", "gwa/separation", "gwa/gwa", "gwa/stable", "gwa/negative_fraction", "gwa/stop"),
        *(f"summary_metrics.gwa/{key}" for key in ("best_epoch", "best_value", "stop_epoch")),
    ]
    assert [keys_of(panel) for panel in suspects["panels"]] == [["gwa/suspects"]]
    assert diagnostics["isOpen"] is False


def log_a_run(tmp_path: Path, name: str) -> Any:
    """Logs a run with an alert and suspects to W&B on disk, and reads it back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    rule, ids = EarlyStop(warmup=0, patience=1), torch.arange(2000)
    monitor = gwa_logging.watch(
        model, backend="wandb", early_stop=rule, num_samples=2000, name=name, directory=tmp_path / "runs"
    )
    rng = np.random.default_rng(0)
    for distance in (4, 1):
        groups = rng.standard_normal(2000) + distance * (rng.random(2000) < 0.7)
        monitor.update(torch.tensor(0.05 * groups), ids)
        monitor.end_epoch()
    assert monitor.alert is not None
    folder = folder_of(run_of(monitor, "wandb"))
    monitor.close()
    return read_back(folder)


def test_every_panel_shows_a_key_that_a_run_logs_and_every_metric_has_a_panel(server, capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        offline.setenv("WANDB_SILENT", "true")
        logged = log_a_run(tmp_path, "net")
    assert run(capsys, WHERE, "--name", "net")[0] == 0
    (view,) = server.views
    assert view["displayName"] == "GWA net"
    history = {key for row in logged.history for key in row}
    shown = set()
    for panel in panels_of(view):
        for key in keys_of(panel):
            name = key.removeprefix("summary_metrics.")
            assert name in logged.summary if name != key else f"{name}._type" in history or name in history
            if "xAxis" in panel["config"]:
                assert logged.metrics[name]["step_metric"] == panel["config"]["xAxis"]
            shown.add(name)
    own = {key for key in history if key.startswith("net/")}
    parts = ("net/scores", "net/picture", "net/suspects", "net/step", "net/epoch")  # histograms cannot be shown
    assert {key for key in own if not key.startswith(parts)} <= shown


def test_a_report_states_the_best_epoch_and_shows_one_run(server, capsys):
    server.summary = {"gwa/best_epoch": 3, "gwa/best_value": 0.75, "gwa/stop_epochs": [7], "gwa/stop": 1}
    code, out, err = run(capsys, WHERE, "--report", RUN)
    (view,) = server.views
    assert (code, err) == (0, "")
    assert out == f"{server.address}/{WHERE}/reports/GWA-of-a-run--Vmlldzox\n"
    assert (view["displayName"], view["type"]) == ("GWA of a-run", "runs")
    blocks = view["spec"]["blocks"]
    (text,) = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert text.split("\n\n") == [
        "Best epoch: **3**, with the value 0.75.",
        "Stop alert after epoch 7. It stands.",
        "Epochs count from 0.",
    ]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == 2
    for grid in grids:
        ((condition,),) = [runs["filters"]["filters"] for runs in grid["runSets"]]
        assert (condition["key"]["name"], condition["op"], condition["value"]) == (
            "name",
            "=",
            RUN,
        )  # W&B's name of the id
    assert len({grid["runSets"][0]["id"] for grid in grids}) == len(grids)
    panels = panels_of(view)
    assert "gwa/suspects" not in [key for panel in panels for key in keys_of(panel)]


def test_a_report_of_a_run_with_suspects_has_their_table_and_no_two_panels_overlap(server, capsys):
    server.summary = {"gwa/suspects": {"_type": "table-file"}, "gwa/stop_epochs": [7], "gwa/stop": 0}
    assert run(capsys, WHERE, "--report", f"{WHERE}/{RUN}")[0] == 0
    (view,) = server.views
    assert "A better epoch has withdrawn it." in str(view["spec"])
    assert "gwa/suspects" in [key for panel in panels_of(view) for key in keys_of(panel)]
    for block in view["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            boxes = [panel["layout"] for panel in block["metadata"]["panelBankSectionConfig"]["panels"]]
            cells = [
                (x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])
            ]
            assert len(cells) == len(set(cells))
            assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["team"], "'team': expected ENTITY/PROJECT"),
        (["https://wandb.ai/team/digits"], "expected ENTITY/PROJECT"),
        ([WHERE, "--name", "a b"], "--name 'a b': expected the name= of watch()"),
        ([WHERE, "--report", "a b"], f"--report 'a b': expected a run's id, or {WHERE}/ID"),
        ([f"other/{PROJECT}"], f"cannot find the project other/{PROJECT}"),
        ([WHERE, "--report", "run2"], "cannot read the run 'run2' of team/digits"),
        (
            [WHERE, "--report", RUN, "--name", "net"],
            "the run 'run1' has no metric named net/...; pass the name= of watch()",
        ),
    ],
)
def test_a_wrong_argument_is_an_error_in_one_line_and_saves_nothing(server, capsys, arguments, problem):
    server.summary = {"gwa/gwa": 1.0}
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gwa-logging: ")
    assert problem in err
    assert err.count("\n") == 1
    assert server.views == []


def test_a_refusal_of_the_server_is_an_error_in_one_line(server, capsys):
    server.errors["UpsertView2"] = "permission denied"
    code, out, err = run(capsys, WHERE)
    assert (code, out) == (2, "")
    assert err.startswith(f"gwa-logging: W&B did not save the workspace in {WHERE} (")
    assert "permission denied" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", [None, KEY], ids=["without a key", "with a key that is refused"])
def test_a_missing_or_refused_key_names_the_remedy(server, capsys, monkeypatch, key):
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY")
    server.status["Viewer"] = 401
    code, out, err = run(capsys, WHERE)
    assert (code, out) == (2, "")
    assert "Run `wandb login` or set WANDB_API_KEY" in err
    assert KEY not in err
    assert err.count("\n") == 1


def test_a_user_who_gives_no_key_when_asked_sees_the_same_error(server, capsys, monkeypatch):
    def ask(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # Ctrl-C, or the end of the input

    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr(wandb.sdk.lib.wbauth.authenticate, "_use_prompted_auth", ask)
    assert run(capsys, WHERE)[0] == 2
    assert server.views == []


def test_without_a_network_the_error_comes_within_seconds(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, out, err = run(capsys, WHERE)
    assert (code, out) == (2, "")
    assert err.startswith("gwa-logging: workspace: nothing answers at http://127.0.0.1:9 (")
    assert "Check the network and WANDB_BASE_URL" in err


@pytest.mark.parametrize("package", ["wandb_workspaces", "wandb"])
def test_without_the_package_the_error_has_the_pip_line(capsys, monkeypatch, package):
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "gwa_logging.integrations.wandb_workspace", raising=False)
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            without.setitem(sys.modules, module, None)
        without.setitem(sys.modules, package, None)
        assert main(["workspace", WHERE]) == 2
    err = capsys.readouterr().err
    assert f"{package} is not installed. Install it with: pip install 'gwa-logging[workspace]'" in err


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["GetProject", "UpsertView2"])
def test_a_server_that_keeps_failing_is_given_up(server, capsys, operation):
    server.status[operation] = 500  # W&B's own client tries again for about 20 seconds
    code, out, err = run(capsys, WHERE)
    assert (code, out) == (2, "")
    assert WHERE in err
    assert err.count("\n") == 1
    assert server.views == []
