"""Two processes, as torchrun starts them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def two_processes() -> Callable[[str, str, Path], None]:
    """Runs a function of a module, with a folder as its argument, in two processes; the test fails if one of them does."""

    def run(module: str, function: str, folder: Path) -> None:
        script = folder / "script.py"
        script.write_text(f"from {module} import {function}; {function}({str(folder)!r})")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *torchrun, str(script)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-4000:]

    return run
