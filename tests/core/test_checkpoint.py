"""load_state_dict of damaged checkpoints: refused as a whole, naming the wrong field, or accepted and training continues."""

import copy
import json
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
from gwa_logging.summary import SUMMARY_NUMBERS, AlignmentSummary

SAMPLES = 12
SCORES = np.random.default_rng(0).uniform(-0.5, 0.5, (4, SAMPLES)).astype(np.float32)


MODEL = nn.Linear(4, 3)  # kept here, because a monitor is closed with its model


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
    assert state["interval"][SUMMARY_NUMBERS.index("count")] > 0
    return state


@pytest.fixture(scope="module")
def monitor(tmp_path_factory) -> Iterator[Monitor]:
    """Loads everything; what it refuses must not change it."""
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


def number(name: str) -> int:
    """The index of a number in a saved summary."""
    return SUMMARY_NUMBERS.index(name)


BIN = len(SUMMARY_NUMBERS) + 300
"""The index of a bin in a saved summary."""

DAMAGED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "a planned number that is text": (("planned",), "x", "planned: expected an integer, found 'x'"),
    "no epochs planned": (("planned",), 0, "planned: expected a number of at least 1, found 0"),
    "an infinite step": (("step",), math.inf, "step: expected an integer, found inf"),
    "a negative step": (("step",), -1, "step: "),
    "a step beyond counting": (("step",), 10**30, "step: "),
    "more steps in the journal than in the run": (
        ("recorded_steps",),
        10**6,
        "recorded_steps=1000000: expected at most step=4",
    ),
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
    "a stop rule without a field": (("stop",), {"epochs": 0}, r"stop\.lowest: it is missing"),
    "negative bins": (("epoch", BIN), -3, r"epoch: expected counts from 0 to 2\*\*53"),
    "bins of other scores": (("epoch", BIN), 10**6, r"epoch: bins: they hold \d+ scores, count=24"),
    "bins that are not whole": (("epoch", BIN), 0.5, r"epoch: expected counts from 0 to 2\*\*53"),
    "too few numbers": (("epoch",), [1], r"epoch: expected 522 numbers, found \[1\]"),
    "a number that is text": (("epoch", BIN), "x", "epoch: expected a number, found 'x'"),
    "a mean that is NaN": (("epoch", number("mean")), "nan", "epoch: mean=nan"),
    "a mean beyond the scores": (("epoch", number("mean")), 3.0, "epoch: mean=3.0"),
    "a moment that is infinite": (("interval", number("m4")), "inf", "interval: m4=inf"),
    "a negative sum of squares": (("epoch", number("m2")), -1.0, "epoch: m2=-1.0"),
    "a minimum above the maximum": (("epoch", number("minimum")), 0.9, "epoch: minimum=0.9 and maximum="),
    "a negative count": (("epoch", number("count")), -24, r"epoch: expected counts from 0 to 2\*\*53"),
    "an infinite count": (("epoch", number("dead")), "inf", r"epoch: expected counts from 0 to 2\*\*53"),
    "a summary of nothing": (("epoch",), None, "epoch: expected 522 numbers, found None"),
    "a report of another epoch": (("history", 1, "epoch"), 5, "history.1: epoch=5"),
    "a report without its histogram": (("history", 1, "histogram"), {}, "history.1: count=12, its histogram has 0"),
    "a report with text for a mean": (("history", 0, "mean"), "x", r"history\.0\.mean: "),
    "a history that is text": (("history",), "x", "history: expected a list, found 'x'"),
    "an alert of a kind that is not": (("alert", "reason"), "boredom", r"alert\.reason: "),
    "a head without classes": (("head",), {"path": "", "features": 4}, r"head\.classes: it is missing"),
    "a head with another field": (
        ("head",),
        {"path": "", "features": 4, "classes": 3, "depth": 1},
        r"head\.depth: it is unknown",
    ),
    "a head of text": (("head", "features"), "4", r"head\.features: expected an integer, found '4'"),
    "further heads that are a list": (("heads",), [], r"heads: expected a dictionary, found \[\]"),
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
    "a ledger without sums": (("ledger", "sums"), None, r"ledger\.sums: "),
    "predictions that are text": (("ledger", "predicted"), "x", r"ledger\.predicted: "),
    "details of other samples": (("ledger", "details"), torch.zeros(3), "expected arrays of one length"),
    "a frozen ledger without an alert": (("alert",), None, r"ledger\.frozen_sums: there is no alert"),
    "a frozen ledger of other samples": (("ledger", "frozen_seen"), torch.zeros(3), "expected arrays of one length"),
    "a frozen ledger without sums": (
        ("ledger", "frozen_sums"),
        None,
        "ledger: sums or seen: one of the two is missing",
    ),
    "earlier scores that are NaN": (("ledger", "past_sums"), torch.full((SAMPLES,), math.nan), r"ledger\.past_sums: "),
    "a version that is text": (("version",), "5", "expected version 5, found '5'"),
    "a version that is too old": (("version",), 2, "expected version 5, found 2"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused_by_the_name_of_its_field_and_nothing_is_changed(damage, valid, monitor):
    path, value, message = DAMAGED[damage]
    before = monitor.state_dict()
    with pytest.raises(InvalidInputError, match=f"state: .*{message}"):
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
def test_whatever_is_damaged_the_state_is_refused_as_a_whole_or_training_continues_from_it(data, valid, monitor):
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
        MonitorState.from_dict(monitor.state_dict())


def test_numbers_that_a_checkpoint_has_turned_into_arrays_are_read(valid, monitor):
    def as_arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_arrays(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [as_arrays(inner) for inner in value]
        return np.asarray(value) if isinstance(value, int | float) else value

    changed = {**as_arrays(valid), "history": valid["history"], "alert": valid["alert"]}
    monitor.load_state_dict(changed)
    assert is_same(monitor.state_dict() | {"run": valid["run"]}, valid)  # the journal is another one


@pytest.mark.parametrize("state", [None, [], "x", {}, {"a": 1}, 7])
def test_what_is_no_state_at_all_is_refused_by_what_was_found(state, monitor):
    with pytest.raises(InvalidInputError, match=r"state: not a state_dict\(\) of a monitor: found"):
        monitor.load_state_dict(state)


def test_a_state_is_json_without_infinities_also_before_the_first_step(valid):
    model = nn.Linear(4, 3)
    with gwa_logging.watch(model) as fresh:
        state = fresh.state_dict()
    for each in (state, valid):
        rest = {key: value for key, value in each.items() if key != "ledger"}
        assert json.loads(json.dumps(rest, allow_nan=False)) == rest
    summary = AlignmentSummary.from_vector(np.array([float(value) for value in state["epoch"]]))
    assert (summary.minimum, summary.maximum, summary.seen) == (math.inf, -math.inf, 0)


class OnAnotherDevice:
    """An array that NumPy cannot read before it is copied to the host, like a tensor on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def detach(self) -> "OnAnotherDevice":
        return self

    def cpu(self) -> torch.Tensor:
        return self._tensor

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert device type tensor to numpy. Use Tensor.cpu() first")


def test_a_ledger_that_was_loaded_to_another_device_is_read(valid, monitor):
    ledger = {k: OnAnotherDevice(v) if isinstance(v, torch.Tensor) else v for k, v in valid["ledger"].items()}
    monitor.load_state_dict({**valid, "ledger": ledger})
    assert is_same(monitor.state_dict() | {"run": valid["run"]}, valid)  # the journal is another one
