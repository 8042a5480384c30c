"""Every benchmark runs, briefly and in its own process. The figures mean nothing here."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    """Runs a benchmark and returns its standard output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    docs = tmp_path_factory.mktemp("docs")
    run("-m", "benchmarks", "--tiny", "--docs", str(docs))
    return docs / "performance.md"


@pytest.mark.slow
def test_the_page_has_a_row_for_every_alternative_and_a_picture(page):
    text = page.read_text()
    for row in (
        *("gwa_logging, ledger", "gwa_logging, MLflow", "gwa_logging, Trackio", "published form"),
        *("wandb.watch, log_freq=100", "torch.func", "BackPACK", "bare against bare"),
        *("JAX MLP", "PyTorch MLP, compiled", "PyTorch 21,843 classes", "8 x 16 x 4", "1,024 ranks"),
    ):
        assert row in text, row
    assert "nan" not in text
    assert (page.parent / "images" / "performance.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_cost_model_predicts_what_two_ranks_send_and_write(page):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    points = [row for row in rows if len(row) == 4 and row[0] in ("1", "2")]
    assert len(points) == 10
    for ranks, what, measured, model in points:
        if what != "bytes of intervals in the journal":  # numbers have different lengths
            assert measured == model, (ranks, what)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_small_shapes(tmp_path):
    # One part of each kind: scored from the logits, from the embeddings, compiled; and the scoring alone.
    parts = ["resnet50", "vit-compiled", "tokens", "scoring"]
    numbers = tmp_path / "gpu.json"
    run("-m", "benchmarks.gpu", "--tiny", "--seconds", "0.1", "--json", str(numbers), "--parts", *parts)
    results = json.loads(numbers.read_text())
    assert {*parts, "machine"} == set(results)
    for part in parts[:-1]:
        assert results[part]["faults"] == {"watched": {}, "ledger": {}}
        launches = results[part]["launches"]
        assert launches["watched"]["launches"] > launches["bare"]["launches"] > 0


@pytest.mark.slow
def test_the_gpu_benchmark_without_a_gpu_ends_with_a_clear_error(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--parts", "scoring"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "no GPU was found" in done.stderr


@pytest.mark.slow
def test_the_ledger_benchmark_runs_with_few_samples():
    output = run("-m", "benchmarks.ledger", "--samples", "1000")
    assert "adding 50 batches at once" in output
    assert "JAX, 1000 samples: end_epoch()" in output


@pytest.mark.slow
def test_the_benchmark_of_looks_runs_with_few_inputs():
    output = run("-m", "benchmarks.look", "--inputs", "16", "--batch", "8", "--repeats", "1")
    assert [line.split("|")[1].strip() for line in output.splitlines()[-2:]] == ["batches of 8", "one batch"]


@pytest.mark.slow
def test_the_benchmark_of_language_models_shows_that_the_fused_loss_needs_a_fraction_of_the_memory():
    size = ("--vocabulary", "20000", "--rows", "4096", "--width", "16", "--seconds", "0.1")
    lines = run("-m", "benchmarks.language_models", *size).splitlines()
    figures = {way: json.loads("{" + rest) for way, _, rest in (line.partition(" {") for line in lines)}
    assert {"20000 full logits", "20000 bare", "20000 watched", "20000 again"} <= figures.keys()
    for way in ("bare", "watched"):
        assert 2.5 * figures[f"20000 {way}"]["peak_mb"] < figures["20000 full logits"]["peak_mb"]


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_benchmarks_and_examples_import_no_tests(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in ("tests", "pytest")]
    assert found == []


@pytest.mark.slow
def test_the_benchmark_of_language_models_in_jax_runs_with_small_shapes():
    sizes = ["--vocabulary", "300", "--rows", "64", "--width", "16", "--seconds", "0.1"]
    lines = run("-m", "benchmarks.language_models_jax", *sizes).splitlines()
    assert [line.split(" {")[0] for line in lines] == [
        *("300 all logits", "300 all logits, watched by tap", "300 bare", "300 again", "300 watched"),
        *("300 losses by row", "300 losses by row, watched"),
    ]
    assert all('"peak_mb"' in line for line in lines)


@pytest.mark.slow
def test_the_benchmark_of_the_weights_has_a_row_for_each_model():
    printed = run("-m", "benchmarks.weights", "--tiny", "--batch", "2", "--repeats", "1")
    for row in ("| MLP |", "| ResNet-50 |", "| ViT-S/16 |"):
        assert row in printed
    assert "nan" not in printed
