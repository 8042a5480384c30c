"""A head that is replaced, moved, switched or copied while its model is watched."""

import copy
import gc
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import NoObservationsError
from tests.torch.peft_model import PeftModel


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.body(x)))

    def reset_classifier(self, classes: int) -> None:
        """Like timm's."""
        self.fc = nn.Linear(8, classes) if classes else nn.Identity()


class Adapted(nn.Module):
    """Like PEFT's lora.Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Saved(nn.Module):
    """Like PEFT's ModulesToSaveWrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(module) for name in ("default", "other")})
        self.active_adapters, self.disable_adapters = ["default"], False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapters[0]]
        return active(x)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int = 8) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(batch, 8)), torch.randint(0, 3, (batch,))).backward()
    optimizer.step()


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)


def without_an_optimizer(model: nn.Module, batch: int = 8) -> None:
    F.cross_entropy(model(torch.randn(batch, 8)), torch.randint(0, 3, (batch,))).backward()


def hooks_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if module._forward_hooks or "forward" in module.__dict__]


def test_a_replaced_head_is_noticed_within_five_steps_and_the_new_one_is_observed(caplog):
    model = Net()
    monitor = gwa_logging.watch(model)
    old = model.fc
    train(model, 3)
    model.reset_classifier(3)
    train(model, 7)
    assert monitor.faults == {"head": 1}
    assert any(
        "the head 'fc' (Linear 8 -> 5) was replaced by another module (Linear 8 -> 3)" in message
        and "observed from now on" in message
        and "5 optimizer steps before this were not observed" in message
        for message in caplog.messages
    )
    assert monitor.end_epoch().count == 3 * 8 + 2 * 8
    assert monitor._adapter.shape == (8, 3)
    assert not hooks_of(old)
    monitor.close()
    assert not hooks_of(model)


def test_the_new_heads_scores_are_right():
    model = Net()
    monitor = gwa_logging.watch(model)
    model.fc = nn.Linear(8, 4)
    train(model, 5)
    x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
    oracle, wants = copy.deepcopy(model), []
    for i in range(6):
        (gradient,) = torch.autograd.grad(F.cross_entropy(oracle(x[i : i + 1]), y[i : i + 1]), oracle.fc.weight)
        wants.append(-(gradient * oracle.fc.weight).sum() / gradient.norm() / oracle.fc.weight.norm())
    F.cross_entropy(model(x), y).backward()
    report = monitor.end_epoch()
    assert report.count == 6
    assert report.mean == pytest.approx(float(torch.stack(wants).mean().detach()), abs=1e-6)


def test_a_replaced_head_is_noticed_also_with_windows_of_samples():
    model = Net()
    monitor = gwa_logging.watch(model, samples_per_epoch=80, log_every_n_steps=1)
    train(model, 3)
    model.reset_classifier(5)
    train(model, 12)
    assert monitor.faults == {"head": 1}
    assert [report.count for report in monitor.history] == [80]


def test_without_an_optimizer_a_replaced_head_is_noticed_by_the_next_tag_or_the_epochs_end():
    model = Net()
    monitor = gwa_logging.watch(model, num_samples=8)
    model.reset_classifier(5)
    monitor.tag(torch.arange(8))
    without_an_optimizer(model)
    assert monitor.end_epoch().count == 8
    assert len(monitor.suspects(20)) == 8
    model.reset_classifier(4)
    without_an_optimizer(model)
    with pytest.raises(NoObservationsError, match=r"was replaced by another module \(Linear 8 -> 4\) after watch"):
        monitor.end_epoch()
    without_an_optimizer(model)
    assert monitor.end_epoch().count == 8
    assert monitor.faults == {"head": 2}


def test_a_head_that_is_replaced_by_another_kind_of_layer_is_reported_and_the_next_linear_one_is_observed(caplog):
    model = Net()
    monitor = gwa_logging.watch(model)
    train(model, 1)
    model.reset_classifier(0)
    train(model, 5)
    assert any(
        "Nothing is observed until a linear layer" in message and "Identity" in message for message in caplog.messages
    )
    model.reset_classifier(5)
    train(model, 20)
    assert monitor.faults == {"head": 2}
    assert monitor.end_epoch().count > 8


def test_a_new_head_that_is_not_linear_is_not_observed():
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = Net()
    monitor = gwa_logging.watch(model)
    train(model, 1)
    model.fc = Doubled(8, 5)
    train(model, 10)
    assert monitor.faults == {"head": 1}
    assert monitor.end_epoch().count == 8


def test_a_head_that_is_wrapped_or_taken_out_of_its_wrapper_is_observed_as_before():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 5)))
    monitor = gwa_logging.watch(model)
    train(model, 6)
    model[1] = model[1][0]
    train(model, 6)
    model[1] = nn.Sequential(nn.Dropout(0.0), model[1])
    train(model, 6)
    assert monitor.end_epoch().count == 18 * 8
    assert monitor.faults == {}
    model[1][1] = nn.Linear(8, 5)  # its new path is the one that is followed
    train(model, 6)
    assert monitor.faults == {"head": 1}


def test_an_adapter_on_a_watched_head_ends_the_observation_until_it_is_removed(caplog):
    model = Net()
    monitor = gwa_logging.watch(model)
    train(model, 1)
    model.fc = Adapted(model.fc)
    train(model, 10)
    (message,) = [message for message in caplog.messages if "was given an adapter after watch()" in message]
    assert "modules_to_save" in message
    seen = monitor._adapter.passes
    model.fc = model.fc.base_layer
    train(model, 25)
    assert monitor._adapter.passes > seen
    assert monitor.faults == {"head": 2}


def test_the_active_copy_of_modules_to_save_is_observed():
    model = Net()
    monitor = gwa_logging.watch(model)
    model.fc = wrapper = Saved(model.fc)
    for change in ("added", "switched", "disabled"):
        if change == "switched":
            wrapper.active_adapters = ["other"]
        if change == "disabled":
            wrapper.disable_adapters = True
        train(model, 5)
        seen = monitor._adapter.passes
        train(model, 5)
        assert monitor._adapter.passes == seen + 5, change
    assert monitor.faults == {"head": 3}
    model.fc = wrapper.original_module  # as unload() does
    train(model, 10)
    assert monitor.faults == {"head": 3}


def test_a_head_watched_by_the_path_of_its_active_copy_is_followed_when_another_one_becomes_active():
    model = Net()
    model.fc = Saved(model.fc)
    monitor = gwa_logging.watch(model, head="fc.modules_to_save.default")
    train(model, 5)
    assert monitor.faults == {}
    model.fc.active_adapters = ["other"]
    train(model, 10)
    assert monitor.faults == {"head": 1}
    assert monitor.end_epoch().count == 80


def test_a_peft_model_that_is_merged_and_dropped_does_not_end_the_observation():
    inside = Net()
    inside.fc = Saved(inside.fc)
    model = PeftModel(inside)
    monitor = gwa_logging.watch(model)
    train(model, 5)
    del model
    gc.collect()
    inside.fc = inside.fc.modules_to_save["default"]
    train(inside, 5)
    assert monitor.faults == {}
    assert monitor._adapter.passes == 10
    inside.fc = nn.Linear(8, 5)
    train(inside, 10)
    assert monitor.faults == {"head": 1}


def test_each_of_several_heads_is_followed_separately():
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.body(x))
            return self.fc(h) + self.other(h)

    model = Two()
    monitor = gwa_logging.watch(model, head=["fc", "other"])
    model.other = nn.Linear(8, 5)
    train(model, 10)
    monitor.end_epoch()
    assert [monitor.history[0].count, monitor.heads["other"].history[0].count] == [80, 40]
    assert [monitor.faults, monitor.heads["other"].faults] == [{}, {"head": 1}]


def test_a_head_that_is_replaced_after_the_first_compiled_step_is_observed():
    model = Net()
    monitor = gwa_logging.watch(model)
    run = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(run, optimizer)
    model.fc = nn.Linear(8, 5)
    for _ in range(10):
        step(run, optimizer)
    assert monitor.faults == {"head": 1}
    assert monitor.end_epoch().count == 8 + 5 * 8


def test_copies_and_files_contain_nothing_about_the_head():
    model = Net()
    gwa_logging.watch(model)
    model.fc = nn.Linear(8, 5)
    train(model, 10)
    assert hooks_of(model)
    assert not hooks_of(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert not hooks_of(torch.load(file, weights_only=False))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observed_before", [False, True])
def test_a_trained_copy_is_reported_within_five_steps(observed_before, caplog):
    model = Net()
    monitor = gwa_logging.watch(model)
    if observed_before:
        train(model, 2)
    copied = copy.deepcopy(model)
    train(copied, 5)
    assert monitor.faults == {"copy": 1}
    assert sum("call watch(copy) after copy.deepcopy(model)" in message for message in caplog.messages) == 1
    train(copied, 40)
    assert monitor.faults == {"copy": 1}


def test_a_trained_copy_of_a_model_whose_head_is_not_known_yet_is_reported():
    class Untraceable(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() < 1e9 else x

    model = Untraceable()
    monitor = gwa_logging.watch(model)
    train(copy.deepcopy(model), 5)
    assert monitor.faults == {"copy": 1}


def test_a_copy_that_is_averaged_or_trained_beside_the_model_is_not_reported():
    model = Net()
    monitor = gwa_logging.watch(model)
    average, beside = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, beside)]
    for _ in range(20):
        step(model, optimizers[0])
        average.update_parameters(model)
        step(beside, optimizers[1])
    assert monitor.faults == {}
    assert monitor.end_epoch().count == 160


# --- silence after an observation --------------------------------------------------------------------------------------


def test_silence_after_an_observation_is_reported_later(caplog):
    caplog.set_level(logging.WARNING, "gwa_logging")
    model = Net()
    monitor = gwa_logging.watch(model)
    train(model, 2)
    model.forward = lambda x: F.linear(torch.tanh(model.body(x)), model.fc.weight, model.fc.bias)
    train(model, 39)
    assert monitor.faults == {}
    train(model, 40)
    assert monitor.faults == {"silence": 1}


def test_an_optimizer_per_parameter_is_not_reported_as_silence():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)), nn.Linear(8, 5))
    monitor = gwa_logging.watch(model)
    optimizers = [torch.optim.SGD([parameter], lr=0.01) for parameter in model.parameters()]
    for _ in range(3):
        without_an_optimizer(model)
        for optimizer in optimizers:
            optimizer.step()
    assert monitor.faults == {}
