"""The layers of the package, its public names, how light it is to import, and that the wheel contains all of it."""

import ast
import inspect
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gwa_logging

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "jax",
    "flax",
    "wandb",
    "mlflow",
    "tensorboard",
    "trackio",
    "matplotlib",
    "plotly",
    "pandas",
    "scipy",
    "tqdm",
    "lightning",
    "transformers",
    "accelerate",
    "keras",
    "ray",
    "apprise",
    "fastai",
    "ignite",
    "ultralytics",
    "grain",
    "datasets",
)
ADAPTERS, BACKENDS = ("torch", "jax"), ("wandb", "mlflow", "tensorboard", "trackio")
TRAINERS = ("lightning", "transformers", "accelerate", "keras", "fastai", "ignite", "ultralytics", "ray")


def loaded_by(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def modules_in(folder: str) -> list[Path]:
    """The modules of a folder. Those in gwa_logging/integrations, a link, belong to integrations/."""
    link = ROOT / "gwa_logging" / "integrations"
    return sorted(path for path in (ROOT / folder).rglob("*.py") if link not in path.parents)


LAYERS = (
    "errors redact faults dataset dataset_streams sample_ids forks alignment histogram score_bins settings statistic consensus "
    "document_details ledger agreement thumbnail "
    "report report.notebook _closer _run_folder "
    "best_weights state_values",
    "_record_base _suspects_record epoch_backup",
    "records",
    "summary _epoch_bar _announce",
    "_journal_file journal journal_writer ranks early_stop",
    "protocols class_pairs exports",
    "backend_defaults ledger_state saved_run",
    "registry interval_recorder delivery checkpoint _continued_journal suspects "
    " report.heatmap report.run_history report.figures report.tables "
    "report.page replay",
    "_closing_report look",
    "recording",
    "_recording_state _continued_run",
    "_all_heads _gradient_calls _look_calls _weights_calls",
    "monitor",
    "_watch",
    "trainer_session",
    "__init__",
    "cli",
)
"""The modules of the core from the bottom up. A module imports its own layer and the layers below."""

LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer.split()}


def core_name(path: Path) -> str:
    """`report.page` for gwa_logging/report/page.py."""
    parts = path.relative_to(ROOT / "gwa_logging").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


CORE = {core_name(path): path for path in modules_in("gwa_logging")}


def core_imports(path: Path) -> set[str]:
    """The modules of the core that a module imports when it runs, wherever in it."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gwa_logging":
            package = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{package}.{alias.name}" if package else alias.name
                found.add(inner if inner in CORE else package or "__init__")
    return {name for name in found if not name.startswith("integrations")}


@pytest.mark.parametrize("module", CORE)
def test_a_module_of_the_core_imports_its_own_layer_and_those_below_it(module):
    assert module in LAYER_OF, "give it a layer"
    above = [name for name in core_imports(CORE[module]) if LAYER_OF[name] > LAYER_OF[module]]
    assert not above


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle; empty if there is none."""
    rest = dict(graph)
    while free := [name for name, imports in rest.items() if not imports & rest.keys()]:
        for name in free:
            del rest[name]
    return sorted(rest)


def test_no_imports_form_a_cycle():
    core = {name: core_imports(path) - {name} for name, path in CORE.items()}
    paths = {path: path.relative_to(ROOT / "integrations").with_suffix("").parts for path in modules_in("integrations")}
    integrations = {f"gwa_logging.integrations.{'.'.join(parts)}": imports_of(path) for path, parts in paths.items()}
    assert cycle_in(core) == []
    assert cycle_in(integrations) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


LIBRARY = [path for folder in ("gwa_logging", "integrations", "benchmarks") for path in modules_in(folder)]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_public_module_of_the_core_is_described_in_the_layout():
    page = (ROOT / "docs" / "contributing-layout.md").read_text()
    public = [name for name in CORE if not name.rpartition(".")[2].startswith("_")]
    assert not [name for name in public if f"{name.rpartition('.')[2]}.py" not in page and f"{name}/" not in page]


def test_importing_the_package_loads_no_framework_and_no_tracker():
    assert loaded_by("import gwa_logging") == set()


def test_the_test_above_can_fail():
    assert "tqdm" in loaded_by("import gwa_logging, tqdm")


@pytest.mark.parametrize("path", modules_in("gwa_logging"), ids=core_name)
def test_the_core_imports_no_integration(path):
    assert not [name for name in imports_of(path) if name.startswith("gwa_logging.integrations")]


@pytest.mark.parametrize("path", modules_in("integrations"), ids=lambda p: str(p.relative_to(ROOT)))
def test_adapters_backends_and_trainers_do_not_import_each_other_except_trainers_their_adapter(path):
    own = path.relative_to(ROOT / "integrations").parts[0].removesuffix(".py")
    others = {n.split(".")[2] for n in imports_of(path) if n.startswith("gwa_logging.integrations.")} - {own}
    beneath = ADAPTERS if own in TRAINERS else ()
    assert not others & set(ADAPTERS + BACKENDS + TRAINERS) - set(beneath)
    assert "integrations" not in {name.split(".")[0] for name in imports_of(path)}


def test_every_folder_with_code_is_in_the_package_list():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    modules = [*(ROOT / "integrations").rglob("*.py"), *(ROOT / "gwa_logging").rglob("*.py")]
    folders = {p.parent.relative_to(ROOT) for p in modules}
    found = {
        ".".join(("gwa_logging", *f.parts)) if f.parts[0] == "integrations" else ".".join(f.parts) for f in folders
    }
    assert set(listed) == found


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_works_from_elsewhere(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        contents = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in modules_in("gwa_logging"):
        assert f"gwa_logging/{path.relative_to(ROOT / 'gwa_logging')}" in contents
    for path in modules_in("integrations"):
        assert f"gwa_logging/integrations/{path.relative_to(ROOT / 'integrations')}" in contents
    assert "gwa_logging/py.typed" in contents
    code = "import gwa_logging, gwa_logging.integrations.torch as t; print(gwa_logging.__file__, t.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(str(tmp_path / "site")) == 2


# --- the public API ---------------------------------------------------------------------------------------------------

WATCH = (
    "model backend='local' run=None head=None early_stop=EarlyStop() on_alert=None log_every_n_steps=50 samples_per_epoch=None "
    "num_samples=None labels=None unit=None look=None look_ids=None dataset=None keep_best=False notify=None "
    "directory='gwa_runs' name='gwa'"
)
MONITOR = {
    "update": "scores sample_ids=None weights=None predicted=None params=None",
    "tag": "sample_ids weights=None",
    "paused": "",
    "value_and_grad": "fun argnums=0 has_aux=False options",
    "grad": "fun argnums=0 has_aux=False options",
    "end_epoch": "params=None",
    "look": "logits ids=None",
    "plan": "n",
    "epochs": "n",
    "suspects": "k=100 whole_run=False",
    "suspects_table": "whole_run=False",
    "label_quality": "whole_run=False",
    "log_suspects": "k=100 images=None",
    "best_weights": "",
    "restore_best": "",
    "state_dict": "whole_ledger=True",
    "load_state_dict": "state",
    "flush": "timeout=10.0",
    "close": "resumable=False",
}
MONITOR_ATTRIBUTES = {"journal", "history", "alert", "heads", "faults", "should_stop", "is_copy"}
FIELDS = {
    gwa_logging.EarlyStop: "statistic regime warmup patience drop min_delta action",
    gwa_logging.EpochReport: "time kind epoch step count excluded mean std skewness excess_kurtosis gwa stable_gwa separation "
    "negative_fraction quantiles histogram gwa_defined consensus agreement is_best stop notes",
    gwa_logging.StopAlert: "time kind epoch best_epoch statistic value best_value reason message caveats",
    gwa_logging.Suspect: "id mean_score times_seen label predicted thumbnail tokens negative_share lowest_tenth",
}


def parameters_of(function: Callable[..., Any]) -> str:
    """Names and defaults, without `self`."""
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return " ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found)


def test_the_public_names_are_these():
    assert gwa_logging.__all__ == [
        *("GWA_BETA", "STABLE_BETA", "AlignmentSummary", "BackendError", "EarlyStop", "EpochReport", "GwaError"),
        *("HeadNotFoundError", "InvalidInputError", "MissingDependencyError", "Monitor", "NoObservationsError"),
        *("StopAlert", "StopReason", "Suspect", "alignment_scores", "gwa", "watch", "with_ids"),
    ]


def test_watch_and_monitor_have_these_parameters():
    assert parameters_of(gwa_logging.watch) == WATCH
    kinds = [p.kind.name for p in inspect.signature(gwa_logging.watch).parameters.values()]
    assert kinds == ["POSITIONAL_OR_KEYWORD"] * 2 + ["KEYWORD_ONLY"] * 16
    public = {name for name in dir(gwa_logging.Monitor) if not name.startswith("_")}
    assert public | {"heads", "is_copy"} == MONITOR.keys() | MONITOR_ATTRIBUTES
    assert {name: parameters_of(getattr(gwa_logging.Monitor, name)) for name in MONITOR} == MONITOR


@pytest.mark.parametrize("model", FIELDS, ids=lambda model: model.__name__)
def test_the_public_data_have_these_fields(model):
    assert " ".join(model.model_fields) == FIELDS[model]
