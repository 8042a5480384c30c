"""The study of stop criteria and suspect scores runs, and its criteria behave as their papers define them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.study import grid as study
from benchmarks.study import page
from benchmarks.study.archive import unpack
from benchmarks.study.criteria import best_with_patience, by_rule, gradient_disparity, label_wave
from benchmarks.study.grid import Data, Run, grid
from benchmarks.study.shares import Cell, left_out_errors, measure, share_rows, verdict
from benchmarks.study.train import auroc, precision, train
from gwa_logging.histogram import Histogram
from gwa_logging.statistic import estimate


def test_halves_of_the_grid_are_balanced_and_keep_seeds_together():
    runs = [run for run in grid() if run.part == "full"]
    choosing = [run for run in runs if run.for_choosing]
    assert len(runs) == len(set(runs)) == 2 * len(choosing)
    for field in ("data", "noise", "net", "recipe"):
        for value in {getattr(run, field) for run in runs}:
            of_both = [sum(getattr(run, field) == value for run in half) for half in (runs, choosing)]
            assert of_both[0] == 2 * of_both[1]
    assert {run._replace(seed=0) for run in choosing}.isdisjoint(
        {run._replace(seed=0) for run in runs if not run.for_choosing}
    )


def test_label_wave_takes_the_first_local_minimum_of_the_mean_of_three():
    changed = np.array([1.0, 0.9, 0.6, 0.3, 0.3, 0.3, 0.9, 0.1, 0.1, 0.1])
    # The means up to epochs 3 to 9 are 0.6, 0.4, 0.3, 0.5, ...: the minimum is at epoch 5, and epoch 6 reveals it.
    assert label_wave({"changed": changed})[:2] == (5, 6)
    assert label_wave({"changed": np.linspace(1, 0, 8)}) == (7, 7, False)


def test_gradient_disparity_stops_at_its_fifth_increase():
    rises = np.array([0, 1, 0, 1, 2, 1, 2, 3, 2, 9.0])  # the fifth is from epoch 6 to 7
    assert gradient_disparity({"disparity": rises})[:2] == (7, 7)
    assert gradient_disparity({"disparity": np.arange(5)[::-1].astype(float)}) == (4, 4, False)


def test_patience_keeps_the_best_epoch_before_it_ran_out():
    values = np.array([9, 1, 2, 1, 1, 8.0])
    assert best_with_patience(values, skipped=0.1, patience=2) == (2, 4, True)
    assert best_with_patience(values, skipped=0.1, patience=None) == (5, 5, False)


def test_auroc_and_precision_agree_with_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 9, 300).astype(np.float32), rng.random(300) < 0.3
    assert auroc(torch.from_numpy(scores), torch.from_numpy(wrong)) == pytest.approx(roc_auc_score(wrong, scores))
    distinct = rng.permutation(300).astype(np.float32)
    top = np.argsort(-distinct)[: wrong.sum()]
    assert precision(torch.from_numpy(distinct), torch.from_numpy(wrong)) == pytest.approx(wrong[top].mean())


def test_a_calibration_is_tested_on_the_data_set_that_it_was_not_fitted_on():
    def cells(data: str, offset: float) -> list[Cell]:
        run = Run(data, "clean", "mlp", "adam", 0)
        return [Cell(run, wrong, wrong + offset, separation) for wrong in (0.1, 0.2, 0.4) for separation in (0.6, 0.8)]

    easy, as_easy, hard = cells("digits", 0.02), cells("fashion-6k", 0.02), cells("fashion-24k", 0.12)
    np.testing.assert_allclose(left_out_errors(easy + as_easy), 0, atol=1e-9)
    np.testing.assert_allclose(left_out_errors(easy + hard), [-0.1] * 6 + [0.1] * 6, atol=1e-9)
    assert len(left_out_errors(easy)) == 0


def test_runs_of_all_kinds_make_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(study.DATA, "digits", Data(120, 4, 40))
    monkeypatch.setattr(page, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    cells = [Run("digits", noise, "mlp", recipe, 0) for noise in ("clean", "40 %") for recipe in ("adam", "sgd")]
    assert {cell.for_choosing for cell in cells} == {True, False}
    for cell in cells:
        for run in (cell, cell._replace(part="held-out")):
            np.savez(tmp_path / f"{run.name}.npz", **train(run, Path("unused"), torch.device("cpu")))
    noisy = dict(np.load(tmp_path / f"{cells[2].name}.npz"))
    assert noisy["bins"].sum(1).tolist() == noisy["count"].tolist() == [120] * 4
    assert noisy["auroc"].shape == (4, 6)
    assert 0 <= noisy["changed"][1] <= 1 == noisy["changed"][0]
    separation = [estimate("separation", Histogram.from_dense(bins)).value for bins in noisy["bins"]]
    assert by_rule(noisy, warmup=0).epoch == int(np.argmax(separation))
    text = page.write_page(tmp_path).read_text()
    assert "{{" not in text
    assert text.count("**separation (the default rule)**") == 3
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"study-regret.png", "study-suspects.png"}


def test_the_runs_in_the_repository_are_those_of_the_page(tmp_path: Path):
    unpack(tmp_path / "runs")
    names = {run.name for run in grid()}
    assert {path.stem for path in (tmp_path / "runs").iterdir()} <= names
    cases = page.load_cases(tmp_path / "runs")
    reporting = [case for case in cases if not case.run.for_choosing]
    text = (Path(page.__file__).parents[2] / "docs" / "study.md").read_text()
    assert f"{len(cases)} of the" in text
    assert page.suspect_table(reporting) in text
    shares = [measure(case.run, case.full) for case in cases]
    assert verdict(shares) in text
    assert all(f"| {' | '.join(row)} |" in text for row in share_rows(shares))
