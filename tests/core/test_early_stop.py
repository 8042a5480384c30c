"""The stop rule as a table of sequences, and what its alert says."""

import math
import re

import numpy as np
import pytest

from gwa_logging import AlignmentSummary, EarlyStop, StopReason
from gwa_logging.early_stop import Decision, StopRule, StopState, step, warmup_epochs
from gwa_logging.statistic import estimate

W, F, U, I, N, S = (  # noqa: E741 - one letter per decision keeps the table readable
    Decision.WARMING_UP,
    Decision.FALLING,
    Decision.UNDEFINED,
    Decision.IMPROVED,
    Decision.WAITING,
    Decision.STOP,
)
nan = math.nan


@pytest.mark.parametrize(
    ("rule", "values", "decisions", "best_epoch"),
    [
        pytest.param({}, [1, 2, 3], [I, I, I], 2, id="rising never stops"),
        pytest.param({"patience": 2}, [1, 3, 2, 1, 0], [I, I, N, S, N], 1, id="told once, after patience"),
        pytest.param({"patience": 2}, [3, 2, 4, 3, 3], [I, N, I, N, S], 2, id="a new best resets patience"),
        pytest.param({"warmup": 2, "patience": 1}, [9, 9, 1, 0], [W, W, I, S], 2, id="the warm-up is not looked at"),
        pytest.param({"patience": 3}, [3, nan, nan, 2, 1, 1], [I, U, U, N, N, S], 0, id="a few NaN cost no patience"),
        pytest.param({"patience": 2}, [3, nan, nan, nan], [I, U, S, U], 0, id="as many NaN as patience are a reason"),
        pytest.param({"patience": 2}, [nan, nan, 1], [U, S, I], 2, id="a head that has never had a value stops too"),
        pytest.param({"patience": 2}, [1, math.inf, 0, 0], [I, U, N, S], 0, id="infinity is no best"),
        pytest.param({"patience": 1}, [-3, -2, -2.5], [I, I, S], 1, id="negative values"),
        pytest.param({"patience": 1, "drop": 0.1}, [-2, -2.1, -2.3], [I, N, S], 0, id="drop of a negative best"),
        pytest.param({"patience": 2, "drop": 0.1}, [1, 0.95, 0.92, 0.95], [I, N, N, N], 0, id="a plateau never stops"),
        pytest.param(
            {"patience": 2, "drop": 0.1},
            [1, 0.8, 0.95, 0.8, 0.8],
            [I, N, N, N, S],
            0,
            id="patience is for epochs in a row that are clearly below",
        ),
        pytest.param(
            {"patience": 2, "regime": "finetune"},
            [5, 3, 2, 4, 6, 5, 5],
            [F, F, F, I, I, N, S],
            4,
            id="finetune: the maximum after the first minimum",
        ),
        pytest.param({"regime": "finetune"}, [5, 4, 3], [F, F, F], -1, id="finetune: still falling"),
        pytest.param(
            {"patience": 1}, [1, 0, 2, 1, 0], [I, S, I, S, N], 2, id="a clearly better best takes the alert back"
        ),
    ],
)
def test_rule(rule, values, decisions, best_epoch):
    state, seen = StopState(), []
    for value in values:
        state, decision = step(EarlyStop(**{"warmup": 0, "drop": 0} | rule), state, value)
        seen.append(decision)
    assert seen == decisions
    assert state.best_epoch == best_epoch


@pytest.mark.parametrize(
    ("rule", "values", "decisions"),
    [
        pytest.param({"min_delta": 2}, [1, 1.25, 1.3], [I, N, I], id="progress beyond the error of both values"),
        pytest.param({}, [1, 1.01], [I, I], id="any progress at min_delta 0"),
        pytest.param({"patience": 1}, [1, 0, 1.4, 0], [I, S, I, N], id="a slightly better best lets the alert stand"),
        pytest.param({"patience": 1}, [1, 0, 1.5, 0], [I, S, I, S], id="a clearly better one takes it back"),
        pytest.param(
            {"regime": "finetune", "min_delta": 2}, [5, 3, 3.1, 3.3], [F, F, F, I], id="a rise within the error is none"
        ),
    ],
)
def test_what_counts_as_progress_is_measured_in_standard_errors(rule, values, decisions):
    state, seen = StopState(), []
    for value in values:
        state, decision = step(EarlyStop(**{"warmup": 0, "drop": 0} | rule), state, value, error=0.1)
        seen.append(decision)
    assert seen == decisions


def reports_of(*epochs):
    """Reports of scores that are given epoch by epoch."""
    return [AlignmentSummary.from_scores(scores).report(epoch=i) for i, scores in enumerate(epochs)]


def told(rule, reports):
    """The alerts of a rule that is shown one report after the other."""
    judge, seen, alerts = StopRule(rule), [], []
    for report in reports:
        report, alert, _ = judge.judge(report, seen)
        seen.append(report)
        alerts += [alert] if alert else []
    return alerts


def two_groups(distance, n=4000, seed=0):
    """Scores in two groups of 70 and 30 %, some standard deviations apart."""
    rng = np.random.default_rng(seed)
    return 0.05 * (rng.standard_normal(n) + distance * (rng.random(n) < 0.7))


def test_an_alert_says_how_sure_it_is_and_which_epochs_are_as_good():
    reports = reports_of(*(two_groups(d, seed=i) for i, d in enumerate([1, 2, 6, 6, 4, 2, 1, 1])))
    (alert,) = told(EarlyStop(warmup=0, patience=2), reports)
    assert alert.reason is StopReason.DECLINE
    assert (alert.epoch, alert.statistic) == (5, "separation")
    assert alert.best_epoch in (2, 3)
    assert alert.best_value == reports[alert.best_epoch].separation
    assert alert.value == reports[5].separation
    assert "As good within its error: epochs 2 to 3." in alert.message
    distance = float(re.search(r"lower by ([\d.]+) standard errors", alert.message)[1])
    errors = [estimate("separation", reports[i].histogram).standard_error for i in (alert.best_epoch, 5)]
    assert distance == pytest.approx((alert.best_value - alert.value) / math.hypot(*errors), rel=1e-2)


def test_what_speaks_against_an_alert_comes_with_it():
    few = reports_of(*(two_groups(d, n=150, seed=i) for i, d in enumerate([8, 1, 1])))
    (alert,) = told(EarlyStop(warmup=0, patience=2), few)
    assert any("only 150 samples" in caveat for caveat in alert.caveats)
    assert any("first after the warm-up" in caveat for caveat in alert.caveats)


def test_losses_that_are_not_numbers_are_a_reason_of_their_own():
    reports = reports_of(two_groups(6), *([[math.inf] * 300] * 3))
    (alert,) = told(EarlyStop(warmup=0, patience=3), reports)
    assert alert.reason is StopReason.UNDEFINED
    assert alert.best_epoch == 0
    assert any("NaN or infinite" in caveat for caveat in alert.caveats)


@pytest.mark.parametrize("statistic", ["separation", "stable", "gwa", "mean"])
def test_any_statistic_can_be_watched(statistic):
    names = {"separation": "separation", "stable": "stable_gwa", "gwa": "gwa", "mean": "mean"}
    reports = reports_of(*(two_groups(d, seed=i) for i, d in enumerate([1, 3, 2, 0])))
    rule = StopRule(EarlyStop(statistic=statistic, warmup=0))
    for report in reports:
        rule.judge(report)
    assert rule.state.best == max(getattr(report, names[statistic]) for report in reports)


@pytest.mark.parametrize(
    ("warmup", "planned", "epochs"),
    [(0.1, 100, 10), (0.1, 5, 1), (0, 100, 0), (3, 100, 3), (0.1, None, 1), (0.25, 10, 3)],
)
def test_a_warmup_below_one_is_a_share_of_the_plan(warmup, planned, epochs):
    assert warmup_epochs(EarlyStop(warmup=warmup), planned) == epochs


def test_a_step_leaves_the_old_state_as_it_was():
    before = StopState()
    step(EarlyStop(warmup=0), before, 1.0)
    assert before == StopState()
