"""The benchmarks still run: everything in them, for a moment, each in a process of its own. Their figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    """Standard output of a benchmark; fails with what it said if it does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    docs = tmp_path_factory.mktemp("docs")
    run("-m", "benchmarks", "--tiny", "--docs", str(docs))
    return docs / "performance.md"


def test_the_page_has_a_row_for_every_way_and_a_picture(page):
    text = page.read_text()
    for row in (
        *("gwa_logging, ledger", "gwa_logging, MLflow", "gwa_logging, Trackio", "published form"),
        *("wandb.watch, log_freq=100", "torch.func", "BackPACK", "bare against bare"),
        *("JAX MLP", "PyTorch MLP, compiled", "PyTorch 21,843 classes", "8 x 16 x 4", "1,024 ranks"),
    ):
        assert row in text, row
    assert "nan" not in text
    assert (page.parent / "images" / "performance.png").stat().st_size > 10_000


def test_the_cost_model_says_what_two_ranks_send_and_write(page):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    points = [row for row in rows if len(row) == 4 and row[0] in ("1", "2")]
    assert len(points) == 10
    for ranks, what, measured, model in points:
        if what != "bytes of intervals in the journal":  # numbers differ in length
            assert measured == model, (ranks, what)


def test_the_gpu_benchmark_runs_on_a_cpu_in_small(tmp_path):
    # One part of each kind: by the logits, by the input, compiled; and the scoring.
    parts = ["resnet50", "vit-compiled", "tokens", "scoring"]
    numbers = tmp_path / "gpu.json"
    run(str(ROOT / "benchmarks/gpu.py"), "--tiny", "--seconds", "0.1", "--json", str(numbers), "--parts", *parts)
    results = json.loads(numbers.read_text())
    assert {*parts, "machine"} == set(results)
    for part in parts[:-1]:
        assert results[part]["faults"] == {"watched": {}, "ledger": {}}
        launches = results[part]["launches"]
        assert launches["watched"]["launches"] > launches["bare"]["launches"] > 0


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--parts", "scoring"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "no GPU was found" in done.stderr


def test_the_ledgers_benchmark_runs_in_small():
    said = run("-m", "benchmarks.ledger", "--samples", "1000")
    assert "adding 50 batches at once" in said
    assert "JAX, 1000 samples: end_epoch()" in said
