"""keep_best in PyTorch: the weights of the best epoch, and their running average, against copies and a loop in float64."""

import copy
import gc
import shutil
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError
from gwa_logging.integrations.torch.weights import TorchWeights

STEPS, BATCH = 4, 12


class Net(nn.Module):
    """With batch normalisation, a tied pair of weights, a frozen layer and a mask of infinities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.frozen(self.again(F.relu(self.first(x)))))))


def batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 8, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator)


def train_epoch(model, epoch: int, optimizer=None, after_step=lambda: None, steps: int = STEPS) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(steps):
        x, y = batch(100 * epoch + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after_step()


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_weights_are_those_of_the_best_epoch_and_restoring_loads_them():
    model = Net()
    states = {}
    with gwa_logging.watch(model, keep_best=True) as monitor:
        for epoch in range(6):
            train_epoch(model, epoch)
            monitor.end_epoch()
            states[epoch] = copy.deepcopy(model.state_dict())
    best = [report.epoch for report in monitor.history if report.is_best][-1]
    assert best < 5, "the last epoch must not be the best for this test to tell them apart"
    assert_equal(monitor.best_weights(), states[best])
    assert monitor.restore_best() == best
    assert_equal(model.state_dict(), states[best])
    assert model.again.weight is model.first.weight
    files = sorted(path.name for path in monitor.journal.parent.glob("best_weights*"))
    assert files == [f"best_weights_epoch_{best}.pt"]
    assert not monitor.faults


class Expected:
    """The average in float64: a plain mean in the first epoch, then steps of 1/N, where N is the length of the epoch before."""

    def __init__(self, model) -> None:
        self.model, self.values, self.step, self.last = model, {}, 0, 0

    def after_step(self) -> None:
        self.step += 1
        for name, tensor in self.model.state_dict().items():
            now = tensor.double()
            old = self.values.get(name, now)
            self.values[name] = old + (now - old) / (self.last or self.step)

    def end_epoch(self) -> None:
        self.last, self.step = self.step, 0


AVERAGED = (
    "first.weight",
    "first.bias",
    "again.weight",
    "norm.weight",
    "norm.running_mean",
    "norm.running_var",
    "head.bias",
)
AS_THEY_ARE = ("frozen.weight", "norm.num_batches_tracked", "mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_average_equals_a_loop_in_float64(dtype):
    model = Net().to(dtype)
    expected = Expected(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every = EarlyStop(warmup=0, statistic="mean")
    with gwa_logging.watch(model, keep_best="averaged", early_stop=every) as monitor:
        kept = {}
        for epoch, steps in enumerate((4, 3, 5, 5)):
            for step in range(steps):
                x, y = batch(100 * epoch + step)
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(dtype)), y).backward()
                optimizer.step()
                expected.after_step()
            report = monitor.end_epoch()
            expected.end_epoch()
            kept[epoch] = {**expected.values}, copy.deepcopy(model.state_dict())
        best = monitor.restore_best()
    assert best == [r.epoch for r in monitor.history if r.is_best][-1], report
    average, present = kept[best]
    found = model.state_dict()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
    for name in AVERAGED:
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), average[name], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found["head.bias"].double(), present["head.bias"].double(), rtol=10 * tolerance)
    for name in AS_THEY_ARE:
        assert torch.equal(found[name], present[name])
    assert not monitor.faults


@pytest.mark.parametrize("keep_best", [True, "averaged"])
def test_keeping_the_weights_changes_nothing_in_training(keep_best):
    states = []
    for kept in (False, keep_best):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(1)
        with gwa_logging.watch(model, keep_best=kept) as monitor:
            for epoch in range(3):
                train_epoch(model, epoch, optimizer)
                monitor.end_epoch()
        states.append((model.state_dict(), torch.get_rng_state()))
    assert_equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_gradient_accumulation_updates_the_average_once_per_optimizer_step():
    model = nn.Linear(8, 5)
    weights = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=0)) as monitor:
        for step in range(6):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
                weights.append(model.weight.detach().double())
        monitor.end_epoch()
    torch.testing.assert_close(
        monitor.best_weights()["weight"].double(), torch.stack(weights).mean(0), rtol=1e-6, atol=1e-6
    )


def test_a_compiled_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    compiled = torch.compile(model, backend="eager")
    with gwa_logging.watch(compiled, keep_best="averaged", early_stop=EarlyStop(warmup=0)) as monitor:
        train_epoch(compiled, 0)
        monitor.end_epoch()
    assert monitor.best_weights().keys() == model.state_dict().keys()
    assert monitor.restore_best() == 0


def test_the_alert_says_where_the_weights_are():
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    alerts = []
    rule = EarlyStop(statistic="mean", warmup=0, patience=1, drop=0)
    with gwa_logging.watch(model, keep_best=True, early_stop=rule, on_alert=alerts.append) as monitor:
        epoch = 0
        while not alerts and epoch < 40:
            train_epoch(model, epoch)
            monitor.end_epoch()
            epoch += 1
    path = monitor.journal.parent / f"best_weights_epoch_{alerts[0].best_epoch}.pt"
    assert alerts[0].message.endswith(f" Its weights: {path}.")


def test_a_resumed_run_restores_the_weights_of_the_run_before_it(tmp_path):
    rule = EarlyStop(warmup=0)
    model = Net()
    with gwa_logging.watch(model, keep_best=True, early_stop=rule, directory=tmp_path / "first") as monitor:
        train_epoch(model, 0)
        monitor.end_epoch()
        expected = copy.deepcopy(model.state_dict())
        torch.save(monitor.state_dict(), "state.pt")
    saved = torch.load("state.pt")
    assert Path(saved["best_weights"]["path"]).exists()
    del monitor
    again = Net()
    with gwa_logging.watch(again, keep_best=True, early_stop=rule, directory=tmp_path / "second") as resumed:
        resumed.load_state_dict(saved)
        train_epoch(again, 1)
        assert resumed.restore_best() == 0
        assert_equal(again.state_dict(), expected)
    assert Path(saved["best_weights"]["path"]).exists()


def test_a_write_that_fails_is_counted_and_the_earlier_file_stays(monkeypatch, caplog):
    model = Net()
    rule = EarlyStop(warmup=0)
    monitor = gwa_logging.watch(model, keep_best=True, early_stop=rule)
    train_epoch(model, 0)
    monitor.end_epoch()
    expected = monitor.best_weights()

    def write(self, snapshot, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TorchWeights, "write", write)
    epoch = 1
    while monitor.faults.get("best weights", 0) == 0 and epoch < 30:
        train_epoch(model, epoch)
        monitor.end_epoch()
        monitor.state_dict()  # waits for the file
        epoch += 1
    assert monitor.faults == {"best weights": 1}
    assert "No space left on device" in caplog.text
    assert [path.name for path in monitor.journal.parent.glob("best_weights*")] == ["best_weights_epoch_0.pt"]
    assert_equal(monitor.best_weights(), expected)
    assert monitor.restore_best() == 0
    monitor.close()


def test_training_continues_while_the_file_is_written(monkeypatch):
    model = Net()
    original, may_write = TorchWeights.write, Event()

    def write(self, snapshot, file):
        assert may_write.wait(60)
        original(self, snapshot, file)

    monkeypatch.setattr(TorchWeights, "write", write)
    monitor = gwa_logging.watch(model, keep_best=True, early_stop=EarlyStop(warmup=0))
    train_epoch(model, 0)
    monitor.end_epoch()
    expected = copy.deepcopy(model.state_dict())
    train_epoch(model, 1)  # changes the weights while the file is not written yet
    assert not list(monitor.journal.parent.glob("*.pt"))
    may_write.set()
    assert_equal(monitor.best_weights(), expected)
    monitor.close()


def test_an_average_whose_weights_move_is_counted_and_starts_again(caplog):
    model = nn.Linear(8, 5)
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=0)) as monitor:
        train_epoch(model, 0, steps=2)
        with torch.no_grad():
            model.weight.set_(torch.randn(7, 8))
            model.bias.set_(torch.randn(7))
        train_epoch(model, 1, steps=1)
        train_epoch(model, 2, steps=1)
        monitor.end_epoch()
        assert monitor.faults == {"best weights": 1}
        assert "their average starts again" in caplog.text
        assert torch.equal(monitor.best_weights()["weight"], model.weight)


def test_a_replaced_head_is_averaged_from_its_first_epoch_on():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=1)) as monitor:
        train_epoch(model, 0)
        monitor.end_epoch()
        model[2] = nn.Linear(8, 5)
        train_epoch(model, 1, steps=6)
        monitor.end_epoch()
        found = monitor.best_weights()
        assert monitor.history[-1].is_best
        assert torch.equal(found["2.weight"], model[2].weight)
        assert not torch.equal(found["0.weight"], model[0].weight)
    assert "best weights" not in monitor.faults


@pytest.mark.parametrize(
    ("arguments", "call", "message"),
    [
        (
            {},
            lambda m: m.best_weights(),
            r"best_weights\(\): the weights are not kept; use watch\(model, keep_best=True\)",
        ),
        ({}, lambda m: m.restore_best(), r"restore_best\(\): the weights are not kept"),
        ({}, lambda m: m.end_epoch(params={}), r"end_epoch\(params=\): the weights are not kept"),
        ({"keep_best": True}, lambda m: m.best_weights(), "there are no weights yet: no epoch was the best so far"),
        ({"keep_best": True}, lambda m: m.end_epoch(params={}), "params= is for JAX"),
        ({"keep_best": True}, lambda m: m.update(torch.ones(3), params={}), "params= is for JAX"),
    ],
)
def test_calls_that_do_not_fit_are_refused(arguments, call, message):
    monitor = gwa_logging.watch(nn.Linear(8, 5), **arguments)
    with pytest.raises(InvalidInputError, match=message):
        call(monitor)
    monitor.close()


@pytest.mark.parametrize("value", [1, "average", None, 0.9])
def test_another_value_of_keep_best_is_refused(value):
    with pytest.raises(InvalidInputError, match=r"keep_best=.*: expected False, True or 'averaged'"):
        gwa_logging.watch(nn.Linear(8, 5), keep_best=value)


def test_weights_that_are_gone_or_do_not_fit_are_refused():
    model = Net()
    monitor = gwa_logging.watch(model, keep_best=True, early_stop=EarlyStop(warmup=0))
    train_epoch(model, 0)
    monitor.end_epoch()
    monitor.best_weights()
    (path,) = monitor.journal.parent.glob("best_weights*")
    model.head = nn.Linear(8, 7)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.norm.weight.add_(1)
    changed = model.norm.weight.detach().clone()
    with pytest.raises(
        InvalidInputError, match=r"as it is now: 'head.weight' has the shape \(7, 8\), in the file \(5, 8\)"
    ):
        monitor.restore_best()
    assert torch.equal(model.norm.weight, changed), "nothing is loaded if not everything fits"
    assert_equal(model.first.state_dict(), {"weight": before["first.weight"], "bias": before["first.bias"]})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match=r"best_weights_epoch_0\.pt cannot be read"):
        monitor.best_weights()
    path.unlink()
    with pytest.raises(InvalidInputError, match=r"best_weights_epoch_0\.pt cannot be read: FileNotFoundError"):
        monitor.best_weights()
    monitor.close()


def test_the_weights_of_a_deleted_model_can_be_read_but_not_restored():
    model = Net()
    monitor = gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=0))
    train_epoch(model, 0)
    monitor.end_epoch()
    names = model.state_dict().keys()
    del model
    gc.collect()
    assert monitor.best_weights().keys() == names
    with pytest.raises(InvalidInputError, match=r"the model was deleted; monitor.best_weights\(\) still has"):
        monitor.restore_best()
    monitor.close()


def test_the_journal_records_the_setting():
    monitor = gwa_logging.watch(nn.Linear(8, 5), keep_best="averaged")
    assert '"keep_best":"averaged"' in monitor.journal.read_text().replace(" ", "")
    monitor.close()
    assert np.all([not path.name.endswith(".new") for path in monitor.journal.parent.parent.rglob("*")])


def test_without_a_step_of_an_optimizer_there_is_no_average_and_this_is_counted(caplog):
    model = Net()
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=0)) as monitor:
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        monitor.end_epoch()
        assert monitor.faults == {"best weights": 1}
        assert "no step of a torch.optim optimizer has followed" in caplog.text


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_flattened_parameters_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(InvalidInputError, match="FullyShardedDataParallel is not supported; use fully_shard"):
            gwa_logging.watch(model, keep_best=True)
    finally:
        torch.distributed.destroy_process_group()


def test_an_epoch_without_an_optimizer_step_does_not_keep_the_average_of_another():
    model = Net()
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=1)) as monitor:
        train_epoch(model, 0)
        monitor.end_epoch()
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        monitor.end_epoch()
        assert monitor.history[-1].is_best
        assert monitor.faults == {"best weights": 1}


def test_windows_keep_the_weights_at_their_end():
    model, states = Net(), []
    every = EarlyStop(warmup=0, statistic="mean")
    with gwa_logging.watch(
        model, keep_best=True, early_stop=every, samples_per_epoch=2 * BATCH, log_every_n_steps=1
    ) as monitor:
        model.head.register_full_backward_hook(lambda *_: states.append(copy.deepcopy(model.state_dict())))
        train_epoch(model, 0, steps=4)
        assert len(monitor.history) == 2
        best = [report.epoch for report in monitor.history if report.is_best][-1]
        assert_equal(monitor.best_weights(), states[2 * best + 1])


def test_a_write_that_hangs_does_not_block_training_and_is_counted(monkeypatch):
    model, may_write, original = Net(), Event(), TorchWeights.write
    every = EarlyStop(warmup=0, statistic="mean")

    def write(self, snapshot, file):
        assert may_write.wait(60)
        original(self, snapshot, file)

    monkeypatch.setattr(TorchWeights, "write", write)
    monkeypatch.setattr("gwa_logging.best_weights.WRITE_WITHIN", 0.01)
    with gwa_logging.watch(model, keep_best=True, early_stop=every) as monitor:
        epoch = 0
        while not monitor.faults and epoch < 30:
            train_epoch(model, epoch)
            monitor.end_epoch()
            epoch += 1
        assert monitor.faults == {"best weights": 1}
        may_write.set()
        assert monitor.restore_best() == 0


def test_a_folder_that_was_deleted_is_made_again():
    model = Net()
    with gwa_logging.watch(model, keep_best=True, early_stop=EarlyStop(warmup=0)) as monitor:
        train_epoch(model, 0)
        shutil.rmtree(monitor.journal.parent)
        monitor.end_epoch()
        assert_equal(monitor.best_weights(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": np.array(3), "averaged": np.bool_(True)}, None),
        ({"epoch": torch.tensor(3), "averaged": False}, None),
        ({"epoch": -1}, r"best_weights\.epoch: expected a number of at least 0"),
        ({"epoch": 1.5}, r"best_weights\.epoch: expected"),
        ({"path": 3}, r"best_weights\.path: expected text"),
        ({"averaged": "no"}, r"best_weights\.averaged: expected True or False, found 'no'"),
        ({"more": 1}, r"best_weights\.more: it is unknown"),
    ],
)
def test_a_state_says_which_file_and_a_damaged_one_is_refused(change, message):
    with gwa_logging.watch(nn.Linear(8, 5), keep_best=True) as monitor:
        state = monitor.state_dict()
        assert state["best_weights"] is None
        state["best_weights"] = {"epoch": 0, "path": "/nowhere/best_weights_epoch_0.pt", "averaged": False} | change
        if message is None:
            monitor.load_state_dict(state)
            assert monitor.state_dict()["best_weights"]["epoch"] == 3
            with pytest.raises(
                InvalidInputError, match=r"/nowhere/best_weights_epoch_0\.pt cannot be read: FileNotFoundError"
            ):
                monitor.restore_best()
        else:
            with pytest.raises(InvalidInputError, match=message):
                monitor.load_state_dict(state)


def test_an_average_recovers_after_a_divergence():
    model = nn.Linear(8, 5)
    with gwa_logging.watch(model, keep_best="averaged", early_stop=EarlyStop(warmup=1)) as monitor:
        before = copy.deepcopy(model.state_dict())
        train_epoch(model, 0)
        with torch.no_grad():
            model.weight[0, 0] = torch.nan
        train_epoch(model, 1)
        model.load_state_dict(before)
        monitor.end_epoch()
        train_epoch(model, 2)
        monitor.end_epoch()
        assert monitor.history[-1].is_best
        assert monitor.best_weights()["weight"].isfinite().all()
