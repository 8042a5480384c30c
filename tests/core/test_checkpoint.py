"""load_state_dict of damaged checkpoints: refused whole, with the field that is wrong, or taken and training goes on."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.checkpoint import MonitorState

SAMPLES = 12
SCORES = np.random.default_rng(0).uniform(-0.5, 0.5, (4, SAMPLES)).astype(np.float32)


MODEL = nn.Linear(4, 3)  # a monitor does not keep its model


def watched() -> Monitor:
    rule = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    return gwa_logging.watch(MODEL, num_samples=SAMPLES, log_every_n_steps=2, early_stop=rule)


def step(monitor: Monitor, number: int) -> None:
    monitor.update(torch.from_numpy(SCORES[number].copy()), torch.arange(SAMPLES))


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, Any]:
    """Of a run with an alert, in the middle of its third epoch and of an interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("valid"))
        with watched() as monitor:
            for epoch in range(2):
                step(monitor, epoch)
                monitor.end_epoch()
            step(monitor, 2)
            step(monitor, 3)
            state = monitor.state_dict()
    assert state["alert"] is not None
    assert state["interval"]["count"] > 0
    return state


@pytest.fixture(scope="module")
def monitor(tmp_path_factory) -> Iterator[Monitor]:
    """One that is asked to load everything: what it refuses must leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("monitor"))
        with watched() as monitor:
            yield monitor


def at(state: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A copy of a state with one value changed."""
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def bins(count: int) -> list[int]:
    return [*[0] * 300, count, *[0] * 211]


DAMAGED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "a planned number that is text": (("planned",), "x", "planned: expected an integer, found 'x'"),
    "no epochs planned": (("planned",), 0, "planned: .*greater than or equal to 1, found 0"),
    "an infinite step": (("step",), math.inf, "step: expected an integer, found inf"),
    "a negative step": (("step",), -1, "step: "),
    "a step beyond counting": (("step",), 10**30, "step: "),
    "more steps in the journal than there were": (("taken",), 10**6, "taken=1000000: expected at most step=4"),
    "no processes": (("processes",), 0, "processes: "),
    "a display limit that is NaN": (("display_limit",), "nan", "display_limit: "),
    "a display limit of zero": (("display_limit",), 0.0, "display_limit: "),
    "None in the stop rule": (("stop", "best"), None, r"stop\.best: expected a number, found None"),
    "a flag that is a number": (("stop", "fired"), 1, r"stop\.fired: expected True or False, found 1"),
    "a best epoch that was not": (("stop", "best_epoch"), 7, "stop: .*best_epoch=7"),
    "a best value without its epoch": (("stop", "best_epoch"), -1, "stop: best=.* does not go with best_epoch=-1"),
    "a best value that is NaN": (("stop", "best"), "nan", "stop: best=nan"),
    "an error that is infinite": (("stop", "best_error"), "inf", r"stop\.best_error: "),
    "more epochs judged than reported": (("stop", "epochs"), 9, r"stop\.epochs=9: there are 2 reports"),
    "a stop rule without a field": (("stop",), {"epochs": 0}, r"stop\.lowest: Field required"),
    "negative bins": (("epoch", "bins"), bins(-3), r"epoch\.bins: expected counts from 0 to 2\*\*53, found -3"),
    "bins of other scores": (("epoch", "bins"), bins(3), "epoch: bins: they hold 3 scores, count=24"),
    "bins that are not whole": (("epoch", "bins"), [0.5] * 512, r"epoch\.bins: expected a one-dimensional array"),
    "too few bins": (("epoch", "bins"), [1], r"epoch\.bins: expected 512 counts, found 1"),
    "a mean that is NaN": (("epoch", "mean"), "nan", r"epoch\.mean: "),
    "a mean beyond the scores": (("epoch", "mean"), 3.0, "epoch: mean=3.0"),
    "a moment that is infinite": (("interval", "m4"), "inf", r"interval\.m4: "),
    "a negative sum of squares": (("epoch", "m2"), -1.0, r"epoch\.m2: "),
    "a minimum above the maximum": (("epoch", "minimum"), 0.9, "epoch: minimum=0.9 and maximum="),
    "a negative count": (("epoch", "count"), -24, r"epoch\.count: "),
    "a summary of nothing": (("epoch",), None, "epoch: "),
    "an unknown number in a summary": (("epoch", "m5"), 0.0, r"epoch\.m5: "),
    "a report of another epoch": (("history", 1, "epoch"), 5, "history.1: epoch=5"),
    "a report without its histogram": (("history", 1, "histogram"), {}, "history.1: count=12, its histogram has 0"),
    "a report with text for a mean": (("history", 0, "mean"), "x", r"history\.0\.mean: "),
    "a history that is text": (("history",), "x", "history: "),
    "an alert of a kind that is not": (("alert", "reason"), "boredom", r"alert\.reason: "),
    "a head without classes": (("head",), {"path": "", "features": 4}, r"head\.classes: Field required"),
    "a head of text": (("head", "features"), "4", r"head\.features: expected an integer, found '4'"),
    "further heads that are a list": (("heads",), [], "heads: "),
    "sums that are NaN": (
        ("ledger", "sums"),
        torch.full((SAMPLES,), math.nan),
        r"ledger\.sums: .*found 12 that are not",
    ),
    "sums that are text": (("ledger", "sums"), ["x"] * SAMPLES, r"ledger\.sums: expected a one-dimensional array"),
    "samples seen less than never": (("ledger", "seen"), torch.full((SAMPLES,), -1.0), "ledger: seen or predicted"),
    "a class below unknown": (("ledger", "predicted"), torch.full((SAMPLES,), -7), "ledger: seen or predicted"),
    "a ledger in two dimensions": (("ledger", "seen"), torch.zeros(SAMPLES, 1), r"ledger\.seen: .*shape \(12, 1\)"),
    "invalid_ids that are text": (("ledger", "invalid_ids"), "many", r"ledger\.invalid_ids: expected an integer"),
    "a ledger without predictions": (("ledger", "predicted"), None, r"ledger\.predicted: "),
    "a version that is text": (("version",), "2", "expected version 2, found '2'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused_by_the_name_of_its_field_and_nothing_is_changed(damage, valid, monitor):
    path, value, said = DAMAGED[damage]
    before = monitor.state_dict()
    with pytest.raises(InvalidInputError, match=f"state: .*{said}"):
        monitor.load_state_dict(at(valid, *path, value=value))
    assert is_same(monitor.state_dict(), before)


JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, "", "x", "inf", "nan", -1, 0, 1, 2**63, 10**30, -(10**30), math.inf, -math.inf, math.nan]
    ),
    st.sampled_from(
        [0.5, b"x", [], {}, [None], [[1], [2, 3]], {"x": 1}, np.float32(2), np.int64(3), np.zeros(0), object()]
    ),
    st.lists(st.integers(-3, 3), max_size=13),
    st.text(max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested plain data."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from places(value[key], (*path, key))


def without(state: dict[str, Any], *path: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return state


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_damaged_the_state_is_refused_whole_or_training_goes_on_from_it(data, valid, monitor):
    path = data.draw(st.sampled_from(list(places(valid))))
    change: Callable[[], dict[str, Any]] = data.draw(
        st.one_of(JUNK.map(lambda junk: lambda: at(valid, *path, value=junk)), st.just(lambda: without(valid, *path)))
    )
    before = monitor.state_dict()
    try:
        monitor.load_state_dict(change())
    except InvalidInputError:
        assert is_same(monitor.state_dict(), before)
    else:
        step(monitor, 0)
        assert monitor.end_epoch().count >= SAMPLES
        monitor.suspects()
        MonitorState.from_plain(monitor.state_dict())


def test_numbers_that_a_checkpoint_has_turned_into_arrays_are_read(valid, monitor):
    def as_arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_arrays(inner) for key, inner in value.items()}
        return np.asarray(value) if isinstance(value, int | float) else value

    changed = {**as_arrays(valid), "history": valid["history"], "alert": valid["alert"]}
    monitor.load_state_dict(changed)
    assert is_same(monitor.state_dict(), valid)


@pytest.mark.parametrize("state", [None, [], "x", {}, {"a": 1}, 7])
def test_what_is_no_state_at_all_is_refused_by_what_was_found(state, monitor):
    with pytest.raises(InvalidInputError, match=r"state: not a state_dict\(\) of a monitor: found"):
        monitor.load_state_dict(state)
