"""The examples run and print their summary."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gwa_logging.journal import read_journal

EXAMPLES = Path(__file__).parents[1] / "examples"


FAST = {"pytorch_digits.py"}
PACKAGES = {"ignite_digits.py": "ignite", "fastai_digits.py": "fastai", "ultralytics_digits.py": "ultralytics"}
"""Examples with packages that are missing where `pip install` cannot reach them."""

LAUNCHER = """
import runpy, sys
from tests.trainers.torchvision_operators import define_operators
define_operators()
sys.argv.pop(0)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAMES = sorted(path.name for path in EXAMPLES.glob("*_digits.py"))


@pytest.mark.parametrize("example", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NAMES])
def test_example(example, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small models, possibly on a busy machine
    command = [sys.executable, str(EXAMPLES / example), "--epochs", "12", "--noise", "0.3"]
    if example in PACKAGES:
        pytest.importorskip(PACKAGES[example])
        environment["PYTHONPATH"] = os.pathsep.join((str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")))
        environment |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(tmp_path)}
        command[1:1] = ["-c", LAUNCHER]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    if example != "ultralytics_digits.py":  # whose progress bar takes no further metrics
        assert re.search(r"gwa[=:]|: GWA -?\d", run.stderr + run.stdout), "the progress bar shows GWA"
    for row in ("stop alert", "best epoch by GWA", "last epoch", "best epoch by test accuracy"):
        assert re.search(rf"{row}.*\s(none|\d+ +\d+\.\d%)", run.stdout), run.stdout
    found = re.search(r"(\d+)% do have a flipped label", run.stdout)
    if example == "keras_fit_digits.py":
        assert not found, "fit passes no sample ids"
    else:
        assert int(found[1]) > 85
    records, skipped = read_journal(tmp_path / re.search(r"Journal: (\S+)", run.stdout)[1])
    epochs = [r for r in records if r.kind == "epoch"]
    assert len(epochs) == 12
    assert sum(r.count + r.excluded for r in records if r.kind == "interval") == 12 * 1078
    assert skipped == 0
