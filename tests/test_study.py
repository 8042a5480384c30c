"""The study of stop criteria and suspect scores runs, and its criteria behave as their papers define them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.study import archive, page, series, tables
from benchmarks.study import grid as study
from benchmarks.study.cases import Case, false_alarms, judge, load_cases
from benchmarks.study.comparisons import epochs_of_one_run, recipes
from benchmarks.study.criteria import (
    AVERAGED,
    CRITERIA,
    DEFAULT,
    OURS,
    best_with_patience,
    by_look,
    by_rule,
    decline,
    grad_stop,
    gradient_disparity,
    label_wave,
)
from benchmarks.study.grid import GROUPS, Data, Run, grid
from benchmarks.study.series import auroc, precision, reduced
from benchmarks.study.shares import Cell, left_out_errors, measure, verdict
from benchmarks.study.train import train
from gwa_logging.early_stop import TYPICAL_LOSS


def test_halves_of_the_first_group_are_balanced_and_keep_seeds_together():
    runs = [run for run in grid() if run.part == "full" and run.group == "first"]
    choosing = [run for run in runs if run.for_choosing]
    assert len(runs) == len(set(runs)) == 2 * len(choosing)
    for field in ("noise", "net", "recipe"):
        for value in {getattr(run, field) for run in runs}:
            of_both = [sum(getattr(run, field) == value for run in half) for half in (runs, choosing)]
            assert of_both[0] == 2 * of_both[1]
    assert {run._replace(seed=0) for run in choosing}.isdisjoint(
        {run._replace(seed=0) for run in runs if not run.for_choosing}
    )


def test_of_the_other_groups_seed_0_is_for_choosing_but_tables_and_further_clean_runs_are_not():
    others = [run for run in grid() if run.group != "first"]
    assert {(run.group in ("table", "clean"), run.seed == 0, run.for_choosing) for run in others} == {
        *((False, is_first, is_first) for is_first in (False, True)),
        *((True, is_first, False) for is_first in (False, True)),
    }
    assert len({run.name for run in grid()}) == len(grid())
    assert {run.group for run in grid()} == {*GROUPS, "clean"}


# --- criteria ---------------------------------------------------------------------------------------------------------


def test_label_wave_takes_the_first_local_minimum_of_the_mean_of_three():
    changed = np.array([1.0, 0.9, 0.6, 0.3, 0.3, 0.3, 0.9, 0.1, 0.1, 0.1])
    # The means up to epochs 3 to 9 are 0.6, 0.4, 0.3, 0.5, ...: the minimum is at epoch 5, and epoch 6 reveals it.
    assert label_wave({"changed": changed})[:2] == (5, 6)
    assert label_wave({"changed": np.linspace(1, 0, 8)}) == (7, 7, False)


def test_gradient_disparity_stops_at_its_fifth_increase():
    rises = np.array([0, 1, 0, 1, 2, 1, 2, 3, 2, 9.0])  # the fifth is from epoch 6 to 7
    assert gradient_disparity({"disparity": rises})[:2] == (7, 7)
    assert gradient_disparity({"disparity": np.arange(5)[::-1].astype(float)}) == (4, 4, False)


def test_grad_stop_stops_at_the_first_epoch_below_the_median_of_a_posterior_draw():
    draws = np.random.default_rng(0).normal(size=(100_000, 32))
    median = float(np.median((draws**2).sum(1)))
    assert grad_stop({"grad_stop": np.array([900.0, median + 1, median - 1, 5, 90])}) == (2, 2, True)
    assert grad_stop({"grad_stop": np.array([900.0, median + 1])}) == (1, 1, False)


def test_patience_keeps_the_best_epoch_before_it_ran_out():
    values = np.array([9, 1, 2, 1, 1, 8.0])
    assert best_with_patience(values, skipped=0.1, patience=2) == (2, 4, True)
    assert best_with_patience(values, skipped=0.1, patience=None) == (5, 5, False)


def test_the_look_waits_for_the_separation():
    fallen = np.array([0.7, 0.8, 0.8, *[0.8] * 6, *[0.7] * 7])  # clearly below from epoch 9, so declined from epoch 13
    run = {
        "separation_value": fallen,
        "separation_error": np.zeros(16),
        "consensus": np.array([np.nan, 0.99, 0.8, 0.9, *[0.85] * 12]),
    }
    assert decline(run).tolist() == [epoch >= 13 for epoch in range(16)]
    assert by_look(run) == (3, 13, True)
    assert by_look(run, waits=False) == (3, 8, True)
    assert by_look({**run, "separation_value": np.full(16, 0.8)}) == (3, 15, False)
    late = {
        **run,
        "consensus": run["consensus"] + 0.06 * (np.arange(16) > 9),
    }  # grows by less than the separation falls
    assert by_look(late, weight=0).epoch == 10
    assert by_look(late).epoch == 3


# --- what is recorded ----------------------------------------------------------------------------------------------------


def test_auroc_and_precision_agree_with_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 9, 300).astype(np.float64), rng.random(300) < 0.3
    assert auroc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))
    distinct = rng.permutation(300).astype(np.float64)
    top = np.argsort(-distinct)[: wrong.sum()]
    assert precision(distinct, wrong) == pytest.approx(wrong[top].mean())


def test_rounding_for_the_archive_keeps_four_digits():
    values = np.array([0.123456, -98.7654, 1e-5, 0.0, np.inf, np.nan])
    rounded = series._rounded(values)
    np.testing.assert_allclose(rounded, values, rtol=1e-4)
    assert series._rounded(np.array(0.5)).shape == ()


def test_a_calibration_is_tested_on_the_data_set_that_it_was_not_fitted_on():
    def cells(data: str, offset: float) -> list[Cell]:
        run = Run("first", data, "clean", "mlp", "adam", 0)
        return [Cell(run, wrong, wrong + offset, separation) for wrong in (0.1, 0.2, 0.4) for separation in (0.6, 0.8)]

    easy, as_easy, hard = cells("digits", 0.02), cells("fashion-6k", 0.02), cells("fashion-24k", 0.12)
    np.testing.assert_allclose(left_out_errors(easy + as_easy), 0, atol=1e-9)
    np.testing.assert_allclose(left_out_errors(easy + hard), [-0.1] * 6 + [0.1] * 6, atol=1e-9)
    assert len(left_out_errors(easy)) == 0


# --- comparing ------------------------------------------------------------------------------------------------------------


def made_up(run: Run, accuracy: list[float], held_out: list[float], separation: list[float]) -> Case:
    full: dict[str, Any] = {"test_accuracy": np.array(accuracy), "separation_value": np.array(separation)}
    full |= {"separation_error": np.zeros(len(accuracy)), "averaged_test_accuracy": np.array(accuracy) + 0.01}
    full |= {"stable_value": full["separation_value"], "mean": -full["separation_value"]}
    full |= {"excess_kurtosis": np.zeros(len(accuracy))}
    rival = {"test_accuracy": np.array(accuracy), "held_out_accuracy": np.array(held_out)}
    return Case(run, {"full": full, "held-out": rival})


def test_regret_and_gain_are_points_below_the_best_epoch_and_above_the_competitor():
    run = Run("grid", "digits", "clean", "mlp", "adam", 0)
    case = made_up(run, [0.5, 0.6, 0.8, 0.7, 0.9], [0.1, 0.2, 0.3, 0.4, 0.1], [0.1, 0.2, 0.9, 0.2, 0.2])
    ours = judge(CRITERIA[DEFAULT], [case])
    assert (ours.regret[0], ours.gain[0], ours.share[0]) == pytest.approx((10, 10, 1))  # epoch 2 against 4 and 3
    averaged = judge(CRITERIA[DEFAULT + AVERAGED], [case])
    assert (averaged.regret[0], averaged.gain[0]) == pytest.approx((9, 11))
    assert judge(CRITERIA[OURS], [case]).cases == []  # it has no look
    assert judge(CRITERIA[DEFAULT], [Case(run, {"full": case.full})]).cases == []  # no competitor


def test_a_false_alarm_is_a_stop_before_four_fifths_of_a_clean_run_that_improves():
    rises = [0.1 * i for i in range(10)]
    early = [0.0, 0.9, *[0.1] * 8]
    case = made_up(Run("clean", "digits", "clean", "mlp", "adam", 1), rises, rises, early)
    assert false_alarms(CRITERIA[DEFAULT], [case]) == (1, 1)
    assert false_alarms(CRITERIA["last epoch"], [case]) == (0, 1)
    noisy = Case(case.run._replace(noise="20 %"), case.parts)
    assert false_alarms(CRITERIA[DEFAULT], [noisy]) == (0, 0)


def test_epochs_of_a_run_and_recipes_are_compared_by_pairs_that_differ():
    run = Run("first", "digits", "20 %", "mlp", "adam", 0)
    rises = made_up(run, [0.1, 0.2, 0.3, 0.301], [0.1] * 4, [0.1, 0.2, 0.1, 0.4])
    assert epochs_of_one_run(rises) == [[False, False, True], [True, True, False]]  # epochs 1 and 2, 1 and 3
    falls = made_up(run._replace(recipe="sgd"), [0.1, 0.9, 0.3, 0.3], [0.1] * 4, [0.1, 0.2, 0.1, 0.1])
    assert recipes([rises, falls]) == [[False, False, True]]  # epochs 3 and 1 are kept
    assert recipes([rises, Case(run._replace(noise="40 %"), falls.parts)]) == []


# --- the whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "recipe"), [("clean", "adam"), ("40 %", "sgd-cosine-augment")])
def test_a_run_is_recorded_and_reduced(noise, recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(study.DATA, "digits", Data(600, 4, 100, 10, "digits"))
    run = Run("grid", "digits", noise, "cnn", recipe, 0)
    raw = train(run, Path("unused"), torch.device("cpu"))
    assert raw["bins"].sum(1).tolist() == raw["count"].tolist() == [600] * 4
    assert raw["look"].shape == raw["averaged_look"].shape == raw["trained_outputs"].shape == (4, 512, 10)
    assert (raw["flipped"].any()) == (noise != "clean")
    small = reduced(run, raw)
    for name in ("separation_value", "consensus", "averaged_consensus", "softmax", "grad_stop", "changed"):
        assert small[name].shape == (4,)
        assert np.isfinite(small[name]).all()
    assert 0 <= small["changed"][1] <= 1 == small["changed"][0]
    assert by_rule(small, warmup=0).epoch == int(np.argmax(small["separation_value"]))
    if noise != "clean":
        assert small["auroc"].shape == small["precision"].shape == (4, len(series.SUSPECT_SCORES))
    held_out = reduced(run._replace(part="held-out"), train(run._replace(part="held-out"), Path(), torch.device("cpu")))
    assert held_out["averaged_held_out_accuracy"].shape == (4,)


@pytest.mark.slow
def test_the_pages_figures_are_those_of_the_archive():
    cases = load_cases(archive.load())
    text = (Path(page.__file__).parents[2] / "docs" / "study.md").read_text()
    for name, value in page.fill(cases).items():
        assert value in text or name == "first choosing", name
    shares = [measure(case.run, case.full) for case in cases if case.run.group in ("first", "grid")]
    assert verdict(shares) in text


@pytest.mark.parametrize(("statistic", "criterion"), [("consensus", OURS), ("separation", DEFAULT)])
def test_an_alert_states_what_its_rule_lost_in_the_archive(statistic, criterion):
    half, most = tables.typical_loss(load_cases(archive.load()), criterion)
    found = re.findall(r"within (\d+\.\d) points", TYPICAL_LOSS[statistic])
    assert found == [f"{half:.1f}", f"{most:.1f}"]


def test_the_archive_is_small_and_has_runs_of_the_grid_only():
    assert archive.ARCHIVE.stat().st_size < 1.5e6
    loaded = archive.load()
    assert set(loaded) <= {run.name for run in grid()}
    assert {case.run.group for case in load_cases(loaded)} == {*GROUPS, "clean"}
    assert tables.false_alarm_table(load_cases(loaded)).count("\n") > 10


def test_runs_in_a_folder_are_added_to_an_archive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run("grid", "digits", "clean", "mlp", "adam", 0, "held-out")
    raw = {"test_accuracy": np.array([0.5, 0.6]), "held_out_accuracy": np.array([0.4, 0.5]), "unknown": np.zeros(3)}
    np.savez(tmp_path / f"{run.name}.npz", **raw)
    assert [archive.add(tmp_path, tmp_path / "a.tar.xz") for _ in range(2)] == [1, 0]
    found = archive.load(tmp_path / "a.tar.xz")
    assert set(found[run.name]) == {"test_accuracy", "held_out_accuracy"}
    np.testing.assert_allclose(found[run.name]["test_accuracy"], [0.5, 0.6], rtol=1e-4)
