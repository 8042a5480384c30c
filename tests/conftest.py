"""Fixtures for all tests: the published code's numbers, and a separate working directory for each test."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from gwa_logging._closing_report import ClosingReport

DATA = Path(__file__).parent / "data" / "reference_alignment.npz"
CASES = ("hard10", "smooth10", "mixup100", "hard1000", "confident")
EPOCHS = ("unimodal", "heavy", "bimodal60_40", "uniform", "tiny")


# Examples have no deadline, because the machine may be busy. CI always runs the same examples; a developer's machine new ones.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")


class Published:
    """Inputs and outputs of the paper's published functions."""

    def __init__(self) -> None:
        with np.load(DATA) as file:
            self._arrays = dict(file)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def logit_grads(self, case: str) -> np.ndarray:
        """softmax - labels in float32, like the published code: for saturated samples the rounding matters."""
        z = self[f"{case}/logits"]
        p = np.exp(z - z.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True) - self[f"{case}/labels"]


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()


@pytest.fixture(autouse=True)
def _no_report_on_close(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests do not read the report that closing writes, so only the tests marked `report` have it written."""
    if not request.node.get_closest_marker("report"):
        monkeypatch.setattr(ClosingReport, "write", lambda report: report.done.set())


@pytest.fixture(autouse=True)
def _separate_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
