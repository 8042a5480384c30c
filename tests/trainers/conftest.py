"""Fixtures: two processes started by torchrun, and an MLflow database."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and other tests may run at the same time


@pytest.fixture(scope="module", autouse=True)
def _freeze_heap() -> Iterator[None]:
    """Trainers collect garbage at each start, which takes a second with the objects of all imported frameworks."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _reset_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps the settings of the first Accelerator or Trainer for the rest of the process and its children."""
    if "accelerate" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="session")
def _empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()  # creating the tables takes seconds
    return path


@pytest.fixture
def mlflow_uri(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """Returns a function that makes a database and returns its address, which the test may set as MLflow's tracking URI."""

    def make() -> str:
        copied = shutil.copy(request.getfixturevalue("_empty_database"), tmp_path / "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copied}")
        return os.environ["MLFLOW_TRACKING_URI"]

    yield make
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)


@pytest.fixture
def two_processes() -> Callable[[str, str, Path], None]:
    """Returns a function that calls `module.function(folder)` in two processes, and fails if one of them fails."""

    def run(module: str, function: str, folder: Path) -> None:
        script = folder / "script.py"
        script.write_text(f"from {module} import {function}; {function}({str(folder)!r})")
        search = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *torchrun, str(script)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]

    return run
