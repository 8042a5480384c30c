"""The callback for Keras. Its backend is fixed at import, so each backend is tested in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("backend", "tier"), [("torch", ""), ("jax", "not slow"), pytest.param("jax", "slow", marks=pytest.mark.slow)]
)
def test_keras_cases_pass_with_this_backend(backend, tier, tmp_path):
    cases = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, f"--basetemp={tmp_path}/cases"]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    if tier == "not slow":
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # it compiles faster
    command = [*cases, str(ROOT / "tests/trainers/keras_cases.py")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout
