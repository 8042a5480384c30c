"""The look at the model after each epoch: what it sees, and that it leaves no trace."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.records import EpochReport
from tests.core.test_consensus import expected

N, CLASSES = 24, 5


class Net(nn.Module):
    """Dropout, batch normalisation, a buffer that every pass changes, one that it replaces, and three kinds of noise."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3))
        self.frozen = nn.BatchNorm1d(16).eval()
        self.head = nn.Linear(16, CLASSES)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            self.passes += 1
            self.steps = self.steps + 1
            x = x + 1e-3 * (torch.rand(()) + random.random() + float(np.random.rand()))
        return self.head(self.frozen(self.body(x)))


def data(seed: int = 1, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    with ExitStack() as monitors:
        yield lambda *args, **options: monitors.enter_context(gwa_logging.watch(*args, directory=tmp_path, **options))


def train(run: nn.Module, monitor: Monitor, optimizer: torch.optim.Optimizer, steps: int = 2) -> EpochReport:
    for step in range(steps):
        x, y = data(step)
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor.end_epoch()


def randomness() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def trained(look: Any, directory: Path, *, how: str, noise: bool, keep_best: Any = False) -> dict[str, Any]:
    """Three epochs; the state of everything after each of them, the gradients of a further step, and the kept weights."""
    random.seed(0)
    np.random.seed(0)
    model = Net(noise)
    torch.manual_seed(7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rule = EarlyStop(patience=4)  # the same with and without a look
    monitor = gwa_logging.watch(model, directory=directory, look=look, keep_best=keep_best, early_stop=rule)
    run: nn.Module = model
    if how == "compiled":
        run = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    elif how == "compiled in place":
        model.compile(backend="aot_eager")
    states = []
    for _ in range(3):
        train(run, monitor, optimizer)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        states.append((state, modes, randomness(), torch.is_grad_enabled()))
    x, y = data(9)
    F.cross_entropy(run(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    history = [report.model_copy(update={"time": 0.0, "consensus": None}) for report in monitor.history]
    consensus = [report.consensus for report in monitor.history]
    best = monitor.best_weights() if keep_best else None
    monitor.close()
    assert monitor.faults == {}
    return {"states": states, "gradients": gradients, "history": history, "consensus": consensus, "best": best}


@pytest.mark.parametrize(  # the compiler does not trace Python's random numbers
    ("how", "noise"), [("eager", False), ("eager", True), ("compiled", False), ("compiled in place", False)]
)
def test_training_is_bit_identical_with_and_without_a_look(how, noise, tmp_path):
    alone = trained(None, tmp_path / "a", how=how, noise=noise)
    torch._dynamo.reset()
    looked = trained(data(3, 40)[0], tmp_path / "b", how=how, noise=noise)
    for (a, *rest_a), (b, *rest_b) in zip(alone["states"], looked["states"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert rest_a == rest_b
    assert alone["gradients"].keys() == looked["gradients"].keys()
    assert all(torch.equal(alone["gradients"][name], looked["gradients"][name]) for name in alone["gradients"])
    assert alone["history"] == looked["history"]
    assert alone["consensus"] == [None] * 3
    assert looked["consensus"][0] is None
    assert all(0 <= value <= 1 for value in looked["consensus"][1:])


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part of it"])
def test_a_look_compiles_nothing(how, watch):
    def graphs(look: Tensor | None) -> int:
        torch._dynamo.reset()
        compiled = 0

        def counting(graph: Any, inputs: Any) -> Any:
            nonlocal compiled
            compiled += 1
            return graph.forward

        model: Any = Net()
        run = model
        if how == "a part of it":
            model.body = torch.compile(model.body, backend=counting)
        monitor = watch(model, look=look)
        if how == "wrapped":
            run = torch.compile(model, backend=counting)
        elif how == "in place":
            model.compile(backend=counting)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            train(run, monitor, optimizer)
        assert monitor.faults == {}
        return compiled

    assert graphs(data(3, 7)[0]) == graphs(None) > 0


def test_the_consensus_is_that_of_the_models_outputs_in_evaluation_mode(watch):
    model, (x, _) = Net(), data(3, 40)
    monitor = watch(model, look=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    looks = []
    for _ in range(7):
        report = train(model, monitor, optimizer)
        with torch.no_grad():
            outputs = copy.deepcopy(model).eval()(x).double()
        looks.append(dict(enumerate(outputs.tolist())))
        want = expected(looks)
        assert report.consensus == (None if want is None else pytest.approx(want, abs=1e-12))


class Keywords(Net):
    """Called with keywords, and returns an object with `logits`, as transformers' models do."""

    def forward(self, pixels: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(pixels * scale))


class Tuples(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * scale), x


class Dicts(Tuples):
    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return {"features": x, "logits": super().forward(x, scale)[0]}


ONE = torch.ones(1)
CASES = {
    "a batch": (Net, lambda x: x),
    "an array": (Net, lambda x: x.numpy()),
    "a list": (Net, lambda x: [x[:10], x[10:]]),
    "a function": (Net, lambda x: lambda: [x[:10], x[10:]]),
    "numbers of another precision": (Net, lambda x: x.double()),
    "keywords": (Keywords, lambda x: {"pixels": x, "scale": ONE}),
    "arguments": (Tuples, lambda x: (x, ONE)),
    "a list of arguments": (Dicts, lambda x: [(x[:10], ONE), (x[10:], ONE)]),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_passed_as_the_model_is_called_with_them(case, watch):
    make, look_of = CASES[case]
    model, (x, y) = make(), data(3, 40)
    model.body[1].eval()
    monitor = watch(model, look=look_of(x), head="head")
    arguments = {Keywords: {"pixels": x, "scale": ONE}}.get(make)
    for _ in range(2):
        output = model(**arguments) if arguments else model(x) if make is Net else model(x, ONE)
        output = getattr(output, "logits", output)
        output = output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
        F.cross_entropy(output, y).backward()
        report = monitor.end_epoch()
    assert monitor.faults == {}
    assert report.consensus == 1  # the weights have not changed


def test_floating_point_inputs_get_the_models_dtype(watch):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES)).bfloat16()
    x, y = data()
    monitor = watch(model, look=x)
    for _ in range(2):
        F.cross_entropy(model(x.bfloat16()), y).backward()
        report = monitor.end_epoch()
    assert (report.consensus, monitor.faults) == (1, {})


def test_autocast_around_the_end_of_the_epoch_is_off_in_the_look_and_on_afterwards(watch):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    x, y = data()
    monitor = watch(model, look=x)
    F.cross_entropy(model(x), y).backward()
    dtypes = []
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monitor.end_epoch()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert dtypes == [torch.float32, torch.bfloat16]
    assert all(p.grad is not None for p in model.parameters())


# --- faults -------------------------------------------------------------------------------------------------------------


def raises() -> Any:
    raise RuntimeError("no data today")


class GrowingLook:
    """One more input in each epoch."""

    def __init__(self) -> None:
        self.size = 10

    def __call__(self) -> Tensor:
        self.size += 1
        return data(3, self.size)[0]


FAULTS = {
    "a function that raises": (raises, "RuntimeError: no data today"),
    "inputs that the model rejects": (torch.zeros(4, 9), "mat1 and mat2 shapes"),
    "another number of inputs": (GrowingLook(), "expected 11 inputs, as in the first look, found 12"),
    "no batch": (list, "the function has returned no batch"),
    "too many arguments": ((torch.zeros(4, 8), torch.zeros(1)), "TypeError"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_look_that_fails_is_counted_and_training_continues(case, watch, caplog):
    look, message = FAULTS[case]
    model = Net()
    modes = [module.training for module in model.modules()]
    monitor = watch(model, look=look, early_stop=EarlyStop(statistic="consensus", patience=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        report = train(model, monitor, optimizer)
    assert report.consensus is None
    assert [module.training for module in model.modules()] == modes
    assert monitor.faults == {"look": 5 if case == "another number of inputs" else 6}
    assert message in caplog.text
    assert caplog.text.count("gwa_logging: look: ") == 1
    assert monitor.alert is None


class Other(Net):
    """Returns its embeddings first."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        embeddings = self.body(x)
        return embeddings, self.head(embeddings)


def test_an_output_that_is_not_the_heads_logits_is_a_fault(watch, caplog):
    model, (x, y) = Other(), data()
    monitor = watch(model, look=x, head="head")
    F.cross_entropy(model(x)[1], y).backward()
    assert monitor.end_epoch().consensus is None
    assert "expected logits [inputs, 5], as the head has them, found (24, 16)" in caplog.text


def test_an_output_with_positions_is_a_fault(watch, caplog):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    x = torch.randn(6, 3, 8)
    monitor = watch(model, look=x)
    F.cross_entropy(model(x).flatten(0, 1), torch.zeros(18, dtype=torch.long)).backward()
    monitor.end_epoch()
    assert "expected the model to return logits [inputs, classes]" in caplog.text
    assert "found a tensor of shape (6, 3, 5)" in caplog.text


def test_a_rule_that_needs_a_look_is_refused_without_one(watch):
    with pytest.raises(InvalidInputError, match=r"there is no look; add look=<a few hundred training inputs>"):
        watch(Net(), early_stop=EarlyStop(statistic="consensus"))


# --- logits from users --------------------------------------------------------------------------------------------------


def test_logits_from_users_give_the_same_as_the_monitors_own_look(watch):
    (x, _), values = data(3, 40), []
    for look in (x, None):
        torch.manual_seed(0)
        model = Net()
        torch.manual_seed(1)
        monitor = watch(model, look=look)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        found = []
        for _ in range(4):
            if look is None:
                for step in range(2):
                    a, b = data(step)
                    F.cross_entropy(model(a), b).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                model.eval()
                order = torch.randperm(40, generator=torch.Generator().manual_seed(len(found)))
                for part in order.split(15):
                    with torch.no_grad():
                        monitor.look(model(x[part]), part)
                model.train()
                model.frozen.eval()
                found.append(monitor.end_epoch().consensus)
            else:
                found.append(train(model, monitor, optimizer).consensus)
        values.append(found)
    assert values[0] == values[1]
    assert values[0][1] is not None


BAD_LOGITS = {
    "text": (("x",), "logits: expected float"),
    "integers": ((np.zeros((2, 3), int),), "logits: expected float .* found int64"),
    "positions": ((np.zeros((2, 3, 4)),), "logits: expected float .*found float64 of shape .2, 3, 4."),
    "nothing": ((np.zeros((0, 3)),), "logits: expected float"),
    "too few ids": ((np.zeros((2, 3)), [1]), r"ids: expected int \[2\]"),
    "negative ids": ((np.zeros((2, 3)), [1, -1]), r"ids: expected numbers from 0 to 2\*\*31 - 1, found \[-1\]"),
    "too large ids": (
        (np.zeros((2, 3)), [1, 2**31]),
        r"ids: expected numbers from 0 to 2\*\*31 - 1, found \[2147483648\]",
    ),
    "ids that are no integers": (
        (np.zeros((2, 3)), [1.0, 2.0]),
        r"ids: expected int \[2\], as many as logits, found float64",
    ),
    "an id twice": ((np.zeros((2, 3)), [1, 1]), "ids: expected different ids"),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_wrong_logits_and_ids_are_refused(case, watch):
    arguments, message = BAD_LOGITS[case]
    monitor = watch(Net())
    with pytest.raises(InvalidInputError, match=message):
        monitor.look(*arguments)


@pytest.mark.parametrize("ids", [[0, 8], torch.tensor([8, 0]), [-1, 0]])
def test_ids_outside_the_ledger_are_refused(ids, watch):
    monitor = watch(Net(), num_samples=8)
    with pytest.raises(
        InvalidInputError, match=r"ids: expected numbers from 0 to 7, as num_samples=8, found \[-?[81]\]"
    ):
        monitor.look(torch.zeros(2, CLASSES), ids)
    monitor.look(torch.zeros(2, CLASSES), [0, 7])


def test_ids_that_training_and_the_earlier_looks_have_never_seen_have_no_consensus(watch):
    model = Net()
    monitor = watch(model, num_samples=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids in (torch.arange(40, 46), torch.arange(50, 56), torch.arange(60, 66)):
        monitor.look(torch.eye(6, CLASSES), ids)
        monitor.tag(torch.arange(N))
        train(model, monitor, optimizer, steps=1)
    assert [report.consensus for report in monitor.history] == [None] * 3
    assert "look" not in monitor.faults


def test_calls_that_contradict_each_other_are_refused(watch):
    monitor = watch(Net())
    monitor.look(torch.zeros(2, CLASSES))
    with pytest.raises(InvalidInputError, match="pass ids with all logits of an epoch, or with none"):
        monitor.look(torch.zeros(2, CLASSES), torch.arange(2))
    with pytest.raises(InvalidInputError, match="this monitor evaluates the model itself"):
        watch(Net(), look=data()[0]).look(torch.zeros(2, CLASSES))
    monitor.close()
    with pytest.raises(InvalidInputError, match="this monitor is closed"):
        monitor.look(torch.zeros(2, CLASSES))


def test_ids_in_some_epochs_only_are_a_fault(watch, caplog):
    model = Net()
    monitor = watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids in (torch.arange(6), None, torch.arange(6), torch.tensor([9, 5])):
        monitor.look(torch.eye(6 if ids is None else len(ids), CLASSES), ids)
        train(model, monitor, optimizer)
    assert [r.consensus for r in monitor.history] == [None, None, 1, 0]  # of input 5, the only one that was seen before
    assert monitor.faults == {"look": 1}
    assert "ids: pass them in every epoch or in none" in caplog.text


# --- resuming -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_consensus_and_alert(watch, tmp_path):
    rule = EarlyStop(statistic="consensus", warmup=0, patience=2)

    def start() -> tuple[nn.Module, Monitor, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, CLASSES))
        return model, watch(model, look=data(3, 40)[0], early_stop=rule), torch.optim.SGD(model.parameters(), lr=0.5)

    torch.manual_seed(0)
    model, monitor, optimizer = start()
    whole = []
    for epoch in range(10):
        whole.append(train(model, monitor, optimizer))
        if epoch == 4:
            torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, tmp_path / "state.pt")
    alert = monitor.alert
    model, monitor, optimizer = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    monitor.load_state_dict(state["monitor"])
    assert [r.consensus for r in monitor.history] == [r.consensus for r in whole[:5]]
    for _ in range(5):
        train(model, monitor, optimizer)
    assert [r.consensus for r in monitor.history] == [r.consensus for r in whole]
    assert not any(map(math.isnan, (r.consensus for r in whole[1:])))
    assert alert is not None
    assert monitor.alert is not None
    assert monitor.alert.message == alert.message


def test_a_state_of_version_4_has_no_look(watch):
    monitor = watch(Net())
    state = monitor.state_dict()
    del state["look"]
    model = Net()
    other = watch(model, look=data()[0])
    other.load_state_dict({**state, "version": 4})
    assert train(model, other, torch.optim.SGD(model.parameters(), lr=0.1)).consensus is None  # the first look


def test_a_damaged_look_is_refused(watch):
    model = Net()
    monitor = watch(model, look=data()[0])
    train(model, monitor, torch.optim.SGD(model.parameters(), lr=0.1))
    state = monitor.state_dict()
    with pytest.raises(InvalidInputError, match=r"state: .* damaged one: look: expected arrays of length"):
        monitor.load_state_dict({**state, "look": {**state["look"], "lengths": [1]}})
