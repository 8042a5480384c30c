"""Keras's callback on both of its backends, each of which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_case_holds_on_this_backend(backend, tmp_path):
    cases = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/cases"]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [*cases, str(ROOT / "tests/trainers/keras_cases.py")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout
