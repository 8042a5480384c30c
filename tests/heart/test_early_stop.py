"""The stop rule as a table of sequences."""

import math

import pytest

from gwa_logging import EarlyStop
from gwa_logging.early_stop import Decision, StopState, step, warmup_epochs

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
        pytest.param({"warmup": 0}, [1, 2, 3], [I, I, I], 2, id="rising never stops"),
        pytest.param({"warmup": 0, "patience": 2}, [1, 3, 2, 1, 0], [I, I, N, S, N], 1, id="told once, after patience"),
        pytest.param(
            {"warmup": 0, "patience": 2}, [3, 2, 4, 3, 3], [I, N, I, N, S], 2, id="a new best resets patience"
        ),
        pytest.param({"warmup": 2, "patience": 1}, [9, 9, 1, 0], [W, W, I, S], 2, id="the warm-up is not looked at"),
        pytest.param({"warmup": 0, "patience": 2}, [3, nan, nan, 2, 1], [I, U, U, N, S], 0, id="NaN costs no patience"),
        pytest.param({"warmup": 0, "patience": 1}, [1, math.inf, 0], [I, U, S], 0, id="infinity is no best"),
        pytest.param({"warmup": 0, "patience": 2, "min_delta": 0.5}, [1, 1.4, 1.5], [I, N, S], 0, id="min_delta"),
        pytest.param({"warmup": 0, "patience": 1}, [-3, -2, -2.5], [I, I, S], 1, id="negative values"),
        pytest.param(
            {"warmup": 0, "patience": 2, "regime": "finetune"},
            [5, 3, 2, 4, 6, 5, 5],
            [F, F, F, I, I, N, S],
            4,
            id="finetune: the maximum after the first minimum",
        ),
        pytest.param({"warmup": 0, "regime": "finetune"}, [5, 4, 3], [F, F, F], -1, id="finetune: still falling"),
    ],
)
def test_rule(rule, values, decisions, best_epoch):
    state, seen = StopState(), []
    for value in values:
        state, decision = step(EarlyStop(**rule), state, value)
        seen.append(decision)
    assert seen == decisions
    assert state.best_epoch == best_epoch


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
