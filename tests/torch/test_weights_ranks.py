"""keep_best over two ranks: DDP and sharded models keep what a single process keeps, and every rank restores it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError
from tests.torch.ranks import World
from tests.torch.test_distributed import Net, batches, rank, world_size

EPOCHS = 3


def with_bn() -> nn.Module:
    net = Net()
    net.body.append(nn.BatchNorm1d(12))
    net.head.bias.requires_grad_(False)
    return net


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.body)
    return fully_shard(model)


def run(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], keep_best: Any) -> dict[str, Any]:
    """Trains, and returns what each rank has: the kept weights, the restored ones, and the state at each epoch."""
    model = make()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)
    states, steps = {}, []
    with gwa_logging.watch(wrapped, keep_best=keep_best, early_stop=EarlyStop(warmup=0)) as monitor:
        for epoch in range(EPOCHS):
            for x, y in batches(epoch):
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x[rank() :: world_size()]), y[rank() :: world_size()]).backward()
                optimizer.step()
                steps.append(full(model))
            monitor.end_epoch()
            states[epoch] = steps[-1]
        kept = monitor.best_weights()
        epoch = monitor.restore_best()
        best = [report.epoch for report in monitor.history if report.is_best][-1]
        return {
            "kept": kept,
            "restored": full(model),
            "epochs": (epoch, best),
            "at best": states[best],
            "mean": mean_until(best, steps),
            "faults": monitor.faults,
            "has file": monitor.journal is not None and bool(list(monitor.journal.parent.glob("best_weights*.pt"))),
        }


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    state = copy.deepcopy(model.state_dict())
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def mean_until(best: int, steps: list[dict[str, torch.Tensor]], per_epoch: int = 0) -> dict[str, torch.Tensor]:
    """The average of each tensor in float64 at the end of an epoch; `steps` has those of all epochs unless told otherwise."""
    per_epoch = per_epoch or len(steps) // EPOCHS
    found: dict[str, torch.Tensor] = {}
    for name in steps[0]:
        average = steps[0][name].double()
        for number, state in enumerate(steps[1 : per_epoch * (best + 1)], start=2):
            average = average + (state[name].double() - average) / min(number, per_epoch)
        found[name] = average
    return found


def refused_alone() -> str:
    """Every rank gets the same error if there are no weights yet, and none waits for another."""
    monitor = gwa_logging.watch(ddp(Net()), keep_best=True)
    try:
        monitor.best_weights()
    except InvalidInputError as error:
        return str(error)
    finally:
        monitor.close()
    return ""


CASES = {
    f"{name}, {keep_best}": (make, wrap, keep_best)
    for name, make, wrap in (("ddp", with_bn, ddp), ("fully_shard", Net, sharded))
    for keep_best in (True, "averaged")
}
WORLD = {name: (lambda case=case: run(*case)) for name, case in CASES.items()} | {"no weights yet": refused_alone}


@pytest.fixture(scope="module")
def world(shared_world: Callable[..., World]) -> World:
    return shared_world("weights of two ranks", 2, "tests.torch.test_weights_ranks:WORLD")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_the_weights_of_the_best_epoch(world, name):
    results = world[name]
    assert [found["has file"] for found in results] == [True, False]
    expected = results[0]["at best"]
    if "averaged" in name:
        not_averaged = {key for key in expected if "num_batches" in key or (key == "head.bias" and "ddp" in name)}
        expected = {key: expected[key] if key in not_averaged else results[0]["mean"][key] for key in expected}
    for found in results:
        assert not found["faults"]
        assert found["epochs"][0] == found["epochs"][1]
        assert found["kept"].keys() == found["restored"].keys() == expected.keys()
        for key, value in found["kept"].items():
            torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)
            assert torch.equal(found["restored"][key], results[0]["kept"][key])


@pytest.mark.slow
def test_without_weights_every_rank_gets_the_same_error(world):
    first, second = world["no weights yet"]
    assert first == second
    assert "there are no weights yet" in first
