"""What may import what, how light the package is to import, and that the wheel holds all of it."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
)
ADAPTERS, BACKENDS = ("torch", "jax"), ("wandb", "mlflow", "tensorboard", "trackio")
TRAINERS = ("lightning", "transformers", "accelerate", "keras")


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


def rooms(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if folder != "gwa_logging" or p.parent.name == folder)


def test_importing_the_package_loads_no_framework_and_no_tracker():
    assert loaded_by("import gwa_logging") == set()


def test_the_test_above_can_fail():
    assert "tqdm" in loaded_by("import gwa_logging, tqdm")


@pytest.mark.parametrize("path", rooms("gwa_logging"), ids=lambda p: p.name)
def test_the_heart_imports_no_integration(path):
    assert not [name for name in imports_of(path) if name.startswith("gwa_logging.integrations")]


@pytest.mark.parametrize("path", rooms("integrations"), ids=lambda p: str(p.relative_to(ROOT)))
def test_adapters_backends_and_trainers_do_not_import_each_other_but_trainers_stand_on_adapters(path):
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


def test_the_wheel_holds_every_module_and_works_from_elsewhere(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in rooms("gwa_logging"):
        assert f"gwa_logging/{path.name}" in held
    for path in rooms("integrations"):
        assert f"gwa_logging/integrations/{path.relative_to(ROOT / 'integrations')}" in held
    assert "gwa_logging/py.typed" in held
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
