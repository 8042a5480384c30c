"""Steps without an observation are reported after a few of them."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

import gwa_logging
from gwa_logging import NoObservationsError
from gwa_logging.integrations.torch import step_watchdog


class Sideways(nn.Module):
    """Its head is used only through its weight, so that its hooks do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x), self.head.weight, self.head.bias)


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        F.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 5, (4,))).backward()
        optimizer.step()


def test_steps_without_an_observation_are_reported_once_and_are_an_error_at_the_epochs_end(caplog):
    model = Sideways()
    monitor = gwa_logging.watch(model, head="head")
    train(model, 4)
    assert monitor.faults == {}
    train(model, 20)
    assert monitor.faults == {"silence": 1}
    assert sum("no observation" in message and "F.linear" in message for message in caplog.messages) == 1
    with pytest.raises(NoObservationsError, match=r"F\.linear"):
        monitor.end_epoch()


def test_steps_of_another_model_are_not_reported():
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model)
    train(nn.Linear(8, 5), 20)
    assert monitor.faults == {}


def test_an_observed_model_is_not_reported():
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model)
    train(model, 20)
    assert monitor.faults == {}


def test_only_the_model_whose_steps_are_not_observed_is_reported():
    model, other = Sideways(), Sideways()
    monitors = [gwa_logging.watch(each, head="head") for each in (model, other)]
    train(model, 20)
    assert [monitor.faults for monitor in monitors] == [{"silence": 1}, {}]


def test_closing_cancels_the_watchdog_and_all_watchdogs_share_one_hook_of_the_optimizers():
    with gwa_logging.watch(nn.Linear(8, 5)):
        pass
    hooks, earlier = set(_global_optimizer_post_hooks), list(step_watchdog._watchdogs)
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model)
    (watchdog,) = (each for each in step_watchdog._watchdogs if each not in earlier)
    monitor.close()
    assert watchdog not in step_watchdog._watchdogs
    assert set(_global_optimizer_post_hooks) == hooks


@pytest.mark.usefixtures("small_heap")
def test_a_watched_model_may_be_garbage_collected_in_the_middle_of_another_models_optimizer_step():
    models = [nn.Linear(8, 5)]
    handle = register_optimizer_step_post_hook(lambda *_: models.clear() or gc.collect())
    try:
        monitor = gwa_logging.watch(models[0])
        train(nn.Linear(8, 5), 2)
    finally:
        handle.remove()
    assert monitor._adapter.is_detached


@pytest.mark.parametrize("seen_before", [False, True])
def test_steps_inside_paused_are_not_reported(seen_before):
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model)
    if seen_before:
        train(model, 3)
    with monitor.paused():
        train(model, 100)
    assert monitor.faults == {}
    train(model, 3)
    assert monitor.end_epoch().count == 12 * (1 + seen_before)
