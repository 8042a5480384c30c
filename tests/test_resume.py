"""A run that is interrupted in mid-epoch and resumed equals one that is not, in every number, in PyTorch and JAX."""

import io
import json
from collections.abc import Callable, Iterator
from itertools import product
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wandb
from flax import linen
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.checkpoint import HeadShape
from gwa_logging.journal import read_journal
from tests.trackers import OnMlflow, OnTensorBoard, OnTrackio, OnWandb, Tracker, Training

N, BATCH, EPOCHS = 40, 8, 5
STEPS = N // BATCH
OPTIONS: dict[str, Any] = {
    "num_samples": N,
    "log_every_n_steps": 3,
    # Nothing is better by so much than the first value, that of epoch 2, so the alert comes in epoch 3.
    "early_stop": EarlyStop(statistic="agreement", patience=1, min_delta=1e9, drop=0),
}
CUT = 7
"""The step before which the run is interrupted: in the second epoch, and in the middle of an interval."""


class Torch:
    """A training whose every step is determined by its number, and can resume at any of them."""

    def __init__(self, classes: int = 5) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes))
        self.x, self.y = torch.randn(N, 6), torch.randint(0, classes, (N,))

    def step(self, monitor: Monitor, number: int) -> None:
        order = np.random.default_rng(number // STEPS).permutation(N)
        ids = torch.from_numpy(order[number % STEPS * BATCH :][:BATCH].copy())
        monitor.tag(ids)
        loss = F.cross_entropy(self.model(self.x[ids]), self.y[ids])
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient


class Net(linen.Module):
    classes: int = 5

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.classes, name="head")(jnp.tanh(linen.Dense(12)(x)))


class Jax:
    """The same in JAX."""

    def __init__(self, classes: int = 5) -> None:
        self.model: Any = Net(classes)
        rng = np.random.default_rng(0)
        self.x, self.y = rng.normal(size=(N, 6)).astype(np.float32), rng.integers(0, classes, N)
        self.params = self.model.init(jax.random.key(0), self.x[:1])
        self.of: Monitor | None = None

    def step(self, monitor: Monitor, number: int) -> None:
        if monitor is not self.of:
            self.of = monitor

            def loss(params, x, y):
                z = self.model.apply(params, x)
                return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean(), z.argmax(1)

            self.grad = jax.jit(monitor.value_and_grad(loss, has_aux=True))
        order = np.random.default_rng(number // STEPS).permutation(N)
        ids = order[number % STEPS * BATCH :][:BATCH]
        ((_, predicted), scores), grads = self.grad(self.params, self.x[ids], self.y[ids])
        self.params = jax.tree.map(lambda p, g: p - 0.1 * g, self.params, grads)
        monitor.update(scores, ids, predicted=predicted)


FRAMEWORKS = {"PyTorch": Torch, "JAX": Jax}


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    """Into a checkpoint as PyTorch's users write it, and back with the safe reader, which is the default."""
    file = io.BytesIO()
    torch.save({"gwa": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["gwa"]


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """Arrays into an .npz, the rest into strict JSON."""
    ledger = state["ledger"]
    arrays = {k: np.asarray(v) for k, v in ledger.items() if hasattr(v, "shape")}
    rest = {k: v for k, v in ledger.items() if k not in arrays}
    np.savez("state.npz", **arrays)
    text = json.dumps({**state, "ledger": rest}, allow_nan=False)
    with np.load("state.npz", allow_pickle=False) as file:
        back = json.loads(text)
        return {**back, "ledger": {**back["ledger"], **dict(file)}}


class Outcome(NamedTuple):
    """All numbers of a run."""

    history: list[Any]
    alert: Any
    suspects: list[Any]
    suspects_of_all_epochs: list[Any]
    records: list[Any]

    @classmethod
    def of(cls, *monitors: Monitor) -> "Outcome":
        """Of a run whose records are in the journals of several monitors."""
        last = monitors[-1]
        found = [record for monitor in monitors for record in read_journal(monitor.journal)[0]]
        records = [
            r.model_copy(update={"time": 0.0}) for r in found if r.kind in ("interval", "epoch", "alert", "suspects")
        ]
        return cls(last.history, last.alert, last.suspects(N), last.suspects(N, whole_run=True), records)


def run(make: Callable[[], Any], save_at: int | None = CUT, carry: Callable[[Any], Any] | None = None) -> Outcome:
    """Trains, and saves the state before a step; with `carry`, resumes from it in a new monitor, as a new process would."""
    training = make()
    monitors = [gwa_logging.watch(training.model, **OPTIONS)]
    for number in range(STEPS * EPOCHS):
        if number == save_at:
            state = monitors[-1].state_dict()
            if carry is not None:
                old = training
                training = make()
                if isinstance(old, Torch):
                    training.model.load_state_dict(old.model.state_dict())
                else:
                    training.params = old.params
                monitors.append(gwa_logging.watch(training.model, **OPTIONS))
                monitors[-1].load_state_dict(carry(state))
        training.step(monitors[-1], number)
        if number % STEPS == STEPS - 1:
            monitors[-1].end_epoch()
    outcome = Outcome.of(*monitors)
    for monitor in monitors:
        monitor.close()
    return outcome


CARRIES = {
    "as is": ("PyTorch", lambda state: state),
    "torch.save": ("PyTorch", through_torch),
    "npz + JSON": ("PyTorch", through_files),
    "as is, in JAX": ("JAX", lambda state: state),
    "npz + JSON, in JAX": ("JAX", through_files),
}
MOMENTS = {"mid-interval": CUT, "between epochs": STEPS, "after the alert": 4 * STEPS + 1}


FAST_IN_JAX = {("as is, in JAX", "mid-interval"), ("npz + JSON, in JAX", "after the alert")}


def combinations() -> Iterator[Any]:
    """Every way at every moment; most of JAX's, which compiles each time, are in the slow tier."""
    for way, moment in product(CARRIES, MOMENTS):
        is_slow = CARRIES[way][0] == "JAX" and (way, moment) not in FAST_IN_JAX
        yield pytest.param(way, moment, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("way", "moment"), combinations())
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(way, moment):
    (framework, carry), save_at = CARRIES[way], MOMENTS[moment]
    whole = run(FRAMEWORKS[framework], save_at)
    resumed = run(FRAMEWORKS[framework], save_at, carry)
    assert resumed.history == whole.history
    assert resumed.alert == whole.alert
    assert whole.alert is not None
    assert resumed.suspects == whole.suspects
    assert resumed.suspects_of_all_epochs == whole.suspects_of_all_epochs
    until_alert = whole.alert.epoch + 1
    assert {(s.times_seen, s.predicted is None) for s in whole.suspects} == {(until_alert, False)}
    assert {(s.times_seen, s.predicted is None) for s in whole.suspects_of_all_epochs} == {(EPOCHS, False)}
    assert until_alert < EPOCHS
    assert None not in [report.agreement for report in whole.history[1:]]
    assert resumed.records == whole.records


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_saving_a_state_changes_no_record_except_by_rounding(framework):
    saved, plain = run(FRAMEWORKS[framework]), run(FRAMEWORKS[framework], None)
    assert saved.suspects == plain.suspects
    rounding = 1e-9 if framework == "PyTorch" else 1e-4  # the device of JAX adds up in float32
    for a, b in zip(saved.records, plain.records, strict=True):
        a, b = a.model_dump(mode="json"), b.model_dump(mode="json")
        assert a.keys() == b.keys()
        for key in b.keys() - {"message", "quantiles"}:
            close = pytest.approx(b[key], rel=rounding, abs=1e-7) if isinstance(b[key], float) else b[key]
            assert a[key] == close, key


def test_the_planned_epochs_are_remembered_for_the_warm_up():
    training = Torch()
    monitor = gwa_logging.watch(training.model, **OPTIONS)
    for epoch in monitor.epochs(10):
        training.step(monitor, epoch)
        if epoch == 1:
            break
    monitor.end_epoch()
    state = monitor.state_dict()
    assert state["planned"] == 10
    again = gwa_logging.watch(training.model, **OPTIONS)
    again.load_state_dict(state)
    assert again.state_dict()["planned"] == 10


def test_windows_by_samples_close_where_they_would_have():
    def ends(save: bool) -> list[int]:
        training = Torch()
        monitor = gwa_logging.watch(training.model, **OPTIONS, samples_per_epoch=30)
        for number in range(20):
            if save:
                monitor.state_dict()
            training.step(monitor, number)
        return [report.step for report in monitor.history]

    assert ends(True) == ends(False) != []


# --- states that do not fit --------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **changes}


WRONG = {
    "version": (changed(version=2), "state: expected version 5, found 2"),
    "no state": (lambda state: {}, "not a state_dict"),
    "nothing": (lambda state: None, "not a state_dict"),
    "history": (changed(history="x"), "not a state_dict"),
    "stop rule": (changed(stop={"unknown": 1}), "not a state_dict"),
    "an old stop rule": (changed(stop=[0, 1]), "not a state_dict"),
    "world size": (changed(processes=8), "saved by 8 processes, this run has 1"),
    "further heads": (
        changed(heads={"head_dist": {}}),
        r"further heads \['head_dist'\], but the watched ones are \[\]",
    ),
    "no ledger": (changed(ledger=None), "it has no ledger, but num_samples=40"),
    "a small ledger": (
        lambda state: {
            **state,
            "ledger": {**state["ledger"], **dict.fromkeys(("sums", "seen", "predicted"), np.zeros(3))},
        },
        "its ledger has size 3, but num_samples=40",
    ),
    "a torn ledger": (
        lambda state: {**state, "ledger": {**state["ledger"], "seen": np.zeros(3)}},
        "expected arrays of one length",
    ),
    "a short summary": (lambda state: {**state, "epoch": [1]}, r"epoch: expected 522 numbers, found \[1\]"),
}


@pytest.mark.parametrize(
    ("framework", "wrong"),
    [
        pytest.param(framework, wrong, marks=pytest.mark.slow if is_slow else ())
        for framework, wrong in product(FRAMEWORKS, WRONG)
        for is_slow in [framework == "JAX" and wrong not in ("version", "a small ledger")]
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(framework, wrong):
    change, said = WRONG[wrong]
    training = FRAMEWORKS[framework]()
    monitor = gwa_logging.watch(training.model, **OPTIONS)
    for number in range(CUT):
        training.step(monitor, number)
    other = FRAMEWORKS[framework]()
    fresh = gwa_logging.watch(other.model, **OPTIONS)
    other.step(fresh, 0)
    state, before = monitor.state_dict(), fresh.state_dict()
    with pytest.raises(InvalidInputError, match=said):
        fresh.load_state_dict(change(state))
    after = fresh.state_dict()
    for part in ("sums", "seen", "predicted"):
        np.testing.assert_array_equal(after["ledger"].pop(part), before["ledger"].pop(part))
    assert after == before


def test_a_state_of_another_model_is_refused_in_pytorch():
    training = Torch()
    monitor = gwa_logging.watch(training.model, **OPTIONS)
    training.step(monitor, 0)
    monitor.end_epoch()
    other = gwa_logging.watch(Torch(classes=7).model, **OPTIONS)
    with pytest.raises(
        InvalidInputError, match=r"head '2' \(12 features, 5 classes\), this model's is '2' .*7 classes"
    ):
        other.load_state_dict(monitor.state_dict())
    assert other.history == []


def test_a_state_of_another_model_is_a_fault_in_jax_as_soon_as_the_head_is_known(caplog):
    training, other = Jax(), Jax(classes=7)
    monitor = gwa_logging.watch(training.model, **OPTIONS)
    training.step(monitor, 0)
    state = monitor.state_dict()
    fresh = gwa_logging.watch(other.model, **OPTIONS)
    fresh.load_state_dict(state)
    other.step(fresh, 1)
    assert fresh.faults == {"state": 1}
    assert "'head' (12 features, 5 classes), this model's is 'head' (12 features, 7 classes)" in caplog.text
    again = gwa_logging.watch(other.model, **OPTIONS)
    other.step(again, 0)
    with pytest.raises(InvalidInputError, match="this model's is"):
        again.load_state_dict(state)


def test_further_heads_are_resumed_and_one_that_does_not_fit_loads_none():
    def two_heads() -> Monitor:
        model = Torch().model
        monitor = gwa_logging.watch(model, head=["2", "0"], **OPTIONS)
        monitor.tag(torch.arange(N))
        F.cross_entropy(model(torch.eye(N)[:, :6]), torch.arange(N) % 5).backward()
        monitor.end_epoch()
        return monitor

    monitor = two_heads()
    state = monitor.state_dict()
    fresh = gwa_logging.watch(Torch().model, head=["2", "0"], **OPTIONS)
    with pytest.raises(InvalidInputError, match="expected version"):
        fresh.load_state_dict({**state, "heads": {"0": {**state["heads"]["0"], "version": 0}}})
    assert fresh.history == fresh.heads["0"].history == []
    fresh.load_state_dict(through_torch(state))
    assert fresh.history == monitor.history
    assert fresh.heads["0"].history == monitor.heads["0"].history


# --- trackers -----------------------------------------------------------------------------------------------------------

TRACKERS = {"MLflow": OnMlflow, "W&B": OnWandb, "TensorBoard": OnTensorBoard, "Trackio": OnTrackio}


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()


def steps_of(tracker: Tracker, run: str, key: str) -> list[int]:
    if isinstance(tracker, OnMlflow):
        return sorted(metric.step for metric in tracker.client.get_metric_history(run, f"gwa/{key}"))
    return [step for step, _ in tracker.read_again(run).numbers.get(key, [])]


SLOW_ENDS = {("MLflow", "closed"), ("W&B", "killed")}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        pytest.param(name, end, marks=pytest.mark.slow if (name, end) in SLOW_ENDS else ())
        for name, end in product(TRACKERS, ["killed", "closed"])
    ],
)
def test_a_resumed_run_of_a_tracker_gets_no_step_twice_and_misses_none(
    name: str, end: str, tmp_path, monkeypatch
) -> None:
    """The first run continues after its state was saved, into the third epoch; the second one resumes from the state."""
    tracker = TRACKERS[name]()
    tracker.set_up(tmp_path, monkeypatch)
    training = Training(lr=0.0)  # so that the steps in between have the same scores
    monitor = training.watch(tmp_path, backend=tracker.backend, log_every_n_steps=1)
    run = monitor._deliveries[0].backend.run_ref.run
    training.epoch(monitor)
    for index in range(3):
        training.step(index)
    state = monitor.state_dict()
    for index in range(3, 7):
        training.step(index)
    monitor.end_epoch()
    for index in range(2):
        training.step(index)
    assert monitor.flush(30)
    if end == "closed":
        monitor.close()
    else:  # the tracker's own part of what a process leaves behind; the monitor does not report its epoch in progress
        for delivery in monitor._deliveries:
            assert delivery.close(monotonic() + 60)
        monitor._recording.deliveries.clear()

    training = Training(lr=0.0)
    resumed = training.watch(tmp_path, backend=tracker.backend, run=run, log_every_n_steps=1)
    resumed.load_state_dict(state)
    for index in range(3, 7):
        training.step(index)
    resumed.end_epoch()
    for index in range(7):
        training.step(index)
    resumed.end_epoch()
    assert resumed.flush(30)
    resumed.close()
    assert resumed.faults == {}
    assert steps_of(tracker, run, "steps/mean") == list(range(21))
    # An epoch that was closed in its middle is known better now, and follows itself.
    assert steps_of(tracker, run, "stats/mean") == ([0, 1, 2, 2] if end == "closed" else [0, 1, 2])


@pytest.mark.parametrize(
    ("path", "other", "same"),
    [
        ("head", "head", True),
        ("head", "head_1", False),
        ("sequential/head", "sequential_8/head", True),  # Keras counts models and layers without a name
        ("model_1/dense_3", "model/dense", True),
        ("sequential/head", "sequential/other", False),
    ],
)
def test_a_keras_head_is_recognised_whatever_number_it_has(path, other, same):
    assert HeadShape(path, 16, 4).matches(HeadShape(other, 16, 4)) == same
    assert not HeadShape(path, 16, 4).matches(HeadShape(other, 16, 5))
