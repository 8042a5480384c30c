"""Two processes with jax.distributed: a global report, one writer, the same decision."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gwa_logging import AlignmentSummary, alignment_scores
from tests.agreement import by_loop, random_epochs

HERE = Path(__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    _run(folder)
    return [json.loads((folder / f"result{i}.json").read_text()) for i in range(2)]


def _run(folder: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, HERE.with_name("processes.py")]
    running = [
        subprocess.Popen(
            [*command, str(i), str(port), *arguments],
            cwd=folder,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors


@pytest.mark.parametrize("kind", ["global", "own"])
def test_both_processes_report_on_all_samples(results, kind):
    x, y = np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32), np.arange(32) % 5
    kernel = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)
    p = np.exp(x @ kernel)
    delta = p / p.sum(-1, keepdims=True) - np.eye(5)[y]
    want = AlignmentSummary.from_scores(alignment_scores(delta, x, kernel.T)).report()
    first, second = (result[kind] for result in results)
    assert first["report"] == second["report"]
    for name, value in first["report"].items():
        assert value == pytest.approx(getattr(want, name), rel=1e-4, abs=1e-6), name
    assert sum(first["bins"]) == 32


@pytest.mark.parametrize("kind", ["global", "own"])
def test_one_process_writes_and_both_stop_in_the_same_epoch(results, kind):
    first, second = (result[kind] for result in results)
    assert first["journal"] is not None
    assert second["journal"] is None
    assert first["epochs"] == second["epochs"] == 3
    assert first["faults"] == second["faults"] == {}


def test_only_the_first_head_is_reported_if_processes_have_different_heads(results):
    first, second = (result["heads"] for result in results)
    assert first == second
    assert first["count"] == 16
    assert first["faults"] == {"ranks with different heads": 1}
    assert "rank 0 watches '' (8 features, 5 classes), rank 1 watches" in "".join(first["notes"])


def test_the_agreement_is_that_of_all_processes_and_the_alert_freezes_their_suspects(results):
    epochs = random_epochs(0)
    for found in (result["alert"] for result in results):
        assert found["agreement"] == pytest.approx(by_loop(epochs))
        assert found["alert"] == 3
        assert found["times_seen"] == [4 * 50, 6 * 50]  # each epoch has 50 scores
        assert found["faults"] == {}


def test_one_process_may_flush_while_the_scores_are_global_arrays(results):
    """Nothing that waits to be added up may need the other process."""
    assert [result["flush"] for result in results] == [{"count": 9 * 32, "faults": {}}] * 2


def test_documents_of_one_process_and_predictions_of_another_are_merged(results):
    first, second = (result["documents"] for result in results)
    assert first == second
    assert first["faults"] == {}
    found = {s["id"]: s for s in first["suspects"]}
    assert {i: (s["times_seen"], s["predicted"], s["tokens"]) for i, s in found.items()} == {
        2: (1, None, 2),
        3: (2, 1, 3),
        7: (1, 2, None),
    }
    assert {i: s["mean_score"] for i, s in found.items()} == pytest.approx(
        {2: 0.625, 3: (0.25 + 0.5 / 3) / 2, 7: -0.5}, abs=1e-6
    )
    assert found[3]["negative_share"] == pytest.approx(1 / 3, abs=0.005)
    assert found[3]["lowest_tenth"] == pytest.approx(-0.25, rel=0.04)


def test_a_process_that_never_called_watch_is_named_and_does_not_block_the_other(results):
    first, _ = (result["first"] for result in results)
    assert first["count"] == first["suspects"] == 32
    assert first["faults"] == {"ranks without watch()": 1}
    assert "ranks [1] have not called watch()" in "".join(first["notes"])


@pytest.mark.parametrize("number", [0, 1])
def test_windows_of_samples_are_refused_because_the_processes_would_close_them_at_different_steps(results, number):
    assert re.search(r"samples_per_epoch=8: the 2 processes .* monitor\.end_epoch\(\)", results[number]["windows"])


@pytest.mark.slow
def test_a_process_reports_its_own_samples_after_the_other_one_has_died(tmp_path):
    _run(tmp_path, "dies")
    result = json.loads((tmp_path / "result0.json").read_text())
    assert result["counts"] == [32, 16, 16]
    assert result["suspects"] == 16
    assert result["faults"] == {"lost processes": 1}
    for notes in result["notes"][1:]:
        assert "from now on each process reports its own samples only" in "".join(notes)
