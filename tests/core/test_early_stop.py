"""The stop rule as a table of sequences, and the text of its alert."""

import math
import re

import numpy as np
import pytest

from gwa_logging import AlignmentSummary, EarlyStop, StopReason
from gwa_logging.early_stop import TYPICAL_LOSS, Decision, StopRule, StopState, step, warmup_epochs
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
        pytest.param({"patience": 2}, [1, 3, 2, 1, 0], [I, I, N, S, N], 1, id="fires once, after patience"),
        pytest.param({"patience": 2}, [3, 2, 4, 3, 3], [I, N, I, N, S], 2, id="a new best resets patience"),
        pytest.param({"warmup": 2, "patience": 1}, [9, 9, 1, 0], [W, W, I, S], 2, id="the warm-up is ignored"),
        pytest.param({"patience": 3}, [3, nan, nan, 2, 1, 1], [I, U, U, N, N, S], 0, id="a few NaN cost no patience"),
        pytest.param({"patience": 2}, [3, nan, nan, nan], [I, U, S, U], 0, id="as many NaN as patience fire"),
        pytest.param({"patience": 2}, [nan, nan, 1], [U, S, I], 2, id="a statistic that was never defined fires too"),
        pytest.param({"patience": 2}, [1, math.inf, 0, 0], [I, U, N, S], 0, id="infinity is never the best"),
        pytest.param({"patience": 1}, [-3, -2, -2.5], [I, I, S], 1, id="negative values"),
        pytest.param({"patience": 1, "drop": 0.1}, [-2, -2.1, -2.3], [I, N, S], 0, id="drop of a negative best"),
        pytest.param({"patience": 2, "drop": 0.1}, [1, 0.95, 0.92, 0.95], [I, N, N, N], 0, id="a plateau never stops"),
        pytest.param(
            {"patience": 2, "drop": 0.1},
            [1, 0.8, 0.95, 0.8, 0.8],
            [I, N, N, N, S],
            0,
            id="patience counts epochs in a row that are clearly below",
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
            {"patience": 1}, [1, 0, 2, 1, 0], [I, S, I, S, N], 2, id="a clearly better epoch withdraws the alert"
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
        pytest.param(
            {"patience": 1}, [1, 0, 1.4, 0], [I, S, I, N], id="a slightly better epoch does not withdraw the alert"
        ),
        pytest.param({"patience": 1}, [1, 0, 1.5, 0], [I, S, I, S], id="a clearly better epoch withdraws the alert"),
        pytest.param(
            {"regime": "finetune", "min_delta": 2},
            [5, 3, 3.1, 3.3],
            [F, F, F, I],
            id="a rise within the error is ignored",
        ),
    ],
)
def test_min_delta_is_measured_in_standard_errors(rule, values, decisions):
    state, seen = StopState(), []
    for value in values:
        state, decision = step(EarlyStop(**{"warmup": 0, "drop": 0} | rule), state, value, error=0.1)
        seen.append(decision)
    assert seen == decisions


def reports_of(*epochs):
    """Returns a report per epoch, from the scores of each."""
    return [AlignmentSummary.from_scores(scores).report(epoch=i) for i, scores in enumerate(epochs)]


def alerts_of(rule, reports):
    """Applies a rule to the reports in order, and returns its alerts."""
    judge, seen, alerts = StopRule(rule), [], []
    for report in reports:
        report, alert, _ = judge.judge(report, seen)
        seen.append(report)
        alerts += [alert] if alert else []
    return alerts


def two_groups(distance, n=4000, seed=0):
    """Scores in two groups of 70 % and 30 %, `distance` standard deviations apart."""
    rng = np.random.default_rng(seed)
    return 0.05 * (rng.standard_normal(n) + distance * (rng.random(n) < 0.7))


def test_an_alert_states_its_certainty_and_the_equally_good_epochs():
    reports = reports_of(*(two_groups(d, seed=i) for i, d in enumerate([1, 2, 6, 6, 4, 2, 1, 1])))
    (alert,) = alerts_of(EarlyStop(warmup=0, patience=2), reports)
    assert alert.reason is StopReason.DECLINE
    assert (alert.epoch, alert.statistic) == (5, "separation")
    assert alert.best_epoch in (2, 3)
    assert alert.best_value == reports[alert.best_epoch].separation
    assert alert.value == reports[5].separation
    assert "Equally good within the error: epochs 2 to 3." in alert.message
    distance = float(re.search(r"lower by ([\d.]+) standard errors", alert.message)[1])
    errors = [estimate("separation", reports[i].histogram).standard_error for i in (alert.best_epoch, 5)]
    assert distance == pytest.approx((alert.best_value - alert.value) / math.hypot(*errors), rel=1e-2)


def test_an_alert_lists_reasons_to_doubt_it():
    few = reports_of(*(two_groups(d, n=150, seed=i) for i, d in enumerate([8, 1, 1])))
    (alert,) = alerts_of(EarlyStop(warmup=0, patience=2), few)
    assert any("only 150 samples" in caveat for caveat in alert.caveats)
    assert any("first after the warm-up" in caveat for caveat in alert.caveats)


@pytest.mark.parametrize(
    ("rule", "is_studied"),
    [(EarlyStop(warmup=0.1), True), (EarlyStop(action="stop"), True), (EarlyStop(drop=0.1), False)],
)
def test_an_alert_of_a_rule_that_was_studied_says_what_it_loses(rule, is_studied):
    (alert,) = alerts_of(rule, reports_of(*[two_groups(d) for d in (1, 1, 9, 0, 0, 0, 0, 0)]))
    assert (TYPICAL_LOSS["separation"] in alert.caveats) == is_studied


def test_undefined_values_fire_with_their_own_reason():
    reports = reports_of(two_groups(6), *([[math.inf] * 300] * 3))
    (alert,) = alerts_of(EarlyStop(warmup=0, patience=3), reports)
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
def test_a_warmup_below_one_is_a_share_of_the_planned_epochs(warmup, planned, epochs):
    assert warmup_epochs(EarlyStop(warmup=warmup), planned) == epochs


def test_step_does_not_change_the_old_state():
    before = StopState()
    step(EarlyStop(warmup=0), before, 1.0)
    assert before == StopState()


@pytest.mark.parametrize(("patience", "duration"), [(1, "for 1 epoch."), (2, "for 2 epochs.")])
def test_the_message_states_the_patience_in_the_right_number(patience, duration):
    reports = reports_of(*(two_groups(d, seed=i) for i, d in enumerate([6, 1, 1])))
    (alert,) = alerts_of(EarlyStop(warmup=0, patience=patience), reports)
    assert duration in alert.message
