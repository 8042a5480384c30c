"""The look where the average of the weights is kept: it evaluates the average, and training does not change by a bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gwa_logging
from gwa_logging import EarlyStop
from tests.core.test_consensus import expected
from tests.torch.test_look import Net as NoisyNet
from tests.torch.test_look import data, raises, trained
from tests.torch.test_weights import Expected, Net, batch


def inputs() -> Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(3))


def outputs_of(model: nn.Module, state: dict[str, Tensor]) -> list[list[float]]:
    """Of a copy of the model with other weights, in float64 and evaluation mode."""
    other = copy.deepcopy(model).double().eval()
    other.load_state_dict({name: value.double() for name, value in state.items()})
    with torch.no_grad():
        return other(inputs().double()).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_look_evaluates_the_averaged_weights(dtype, tmp_path):
    model = Net().to(dtype)
    average, raw = Expected(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    looks: list[dict[int, list[float]]] = []
    with gwa_logging.watch(model, look=inputs(), keep_best="averaged", directory=tmp_path) as monitor:
        for epoch in range(8):
            for step in range(3):
                x, y = batch(100 * epoch + step)
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(dtype)), y).backward()
                optimizer.step()
                average.after_step()
            report = monitor.end_epoch()
            average.end_epoch()
            state = model.state_dict()
            for name in ("frozen.weight", "frozen.bias", "norm.num_batches_tracked", "mask"):
                average.values[name] = state[name].double()
            looks.append(dict(enumerate(outputs_of(model, average.values))))
            raw.append(dict(enumerate(outputs_of(model, state))))
            if dtype == torch.float32:
                want = expected(looks)
                assert report.consensus == (None if want is None else pytest.approx(want, abs=1e-12))
        if dtype == torch.bfloat16:  # rounding may decide between two classes
            found = [r.consensus for r in monitor.history[1:]]
            assert found == pytest.approx([expected(looks[: n + 2]) for n in range(7)], abs=0.15)
    assert looks != raw
    assert [expected(looks[: n + 1]) for n in range(8)] != [expected(raw[: n + 1]) for n in range(8)]
    assert monitor.faults == {}


@pytest.mark.parametrize(("how", "noise"), [("eager", True), pytest.param("compiled", False, marks=pytest.mark.slow)])
def test_training_is_bit_identical_with_and_without_a_look_at_the_average(how, noise, tmp_path):
    alone = trained(None, tmp_path / "a", how=how, noise=noise, keep_best="averaged")
    torch._dynamo.reset()
    looked = trained(data(3, 40)[0], tmp_path / "b", how=how, noise=noise, keep_best="averaged")
    for (a, *rest_a), (b, *rest_b) in zip(alone["states"], looked["states"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert rest_a == rest_b
    assert all(torch.equal(alone["gradients"][name], looked["gradients"][name]) for name in alone["gradients"])
    assert alone["best"].keys() == looked["best"].keys()
    assert all(torch.equal(alone["best"][name], looked["best"][name]) for name in alone["best"])
    assert looked["consensus"][1:] != [None, None]


def one_step(look: Any, between: str, directory: Path) -> dict[str, Any]:
    """Ends an epoch between the forward and the backward pass of a step."""
    torch.manual_seed(0)
    model = NoisyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gwa_logging.watch(model, look=look, keep_best="averaged", directory=directory) as monitor:
        for step in range(3):
            x, y = data(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        storages = [parameter.data_ptr() for parameter in model.parameters()]
        x, y = data(5)
        loss = F.cross_entropy(model(x), y)
        monitor.end_epoch()
        if between == "backward":
            loss.backward()
        assert [parameter.data_ptr() for parameter in model.parameters()] == storages
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {"gradients": gradients, "state": copy.deepcopy(model.state_dict()), "faults": monitor.faults}


def test_a_graph_that_is_alive_at_the_look_has_the_same_gradients(tmp_path):
    alone = one_step(None, "backward", tmp_path / "a")
    looked = one_step(inputs(), "backward", tmp_path / "b")
    assert alone["faults"] == looked["faults"] == {}
    assert all(torch.equal(alone["gradients"][name], looked["gradients"][name]) for name in alone["gradients"])


@pytest.mark.parametrize("look", [torch.zeros(4, 9), raises], ids=["rejected", "raises"])
def test_the_weights_are_back_after_a_look_that_fails(look, tmp_path):
    alone = one_step(None, "", tmp_path / "a")
    failed = one_step(look, "", tmp_path / "b")
    assert failed["faults"] == {"look": 1}
    assert all(torch.equal(alone["state"][name], failed["state"][name]) for name in alone["state"])


def test_before_the_first_step_of_an_optimizer_the_present_weights_are_evaluated(tmp_path):
    model, looks = Net(), []
    with gwa_logging.watch(model, look=inputs(), keep_best="averaged", early_stop=None, directory=tmp_path) as monitor:
        for epoch in range(3):
            x, y = batch(epoch)
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(epoch)))
            report = monitor.end_epoch()
            looks.append(dict(enumerate(outputs_of(model, model.state_dict()))))
    assert "look" not in monitor.faults  # but no average could be kept
    assert report.consensus == pytest.approx(expected(looks), abs=1e-12)
    assert report.consensus < 1


def test_an_average_that_is_not_finite_is_repaired_as_for_the_kept_weights(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor] = []
    rule = EarlyStop(warmup=0, statistic="mean")
    with gwa_logging.watch(model, look=x, keep_best="averaged", early_stop=rule, directory=tmp_path) as monitor:
        model.register_forward_hook(lambda *_: None if model.training else seen.append(model[0].weight.clone()))
        for poison in (True, False):
            a, b = batch(0)
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
            optimizer.zero_grad()
            if poison:
                average = monitor._recording.adapter._weights._average
                average._averages[id(model[0].weight)][1][0, 0] = float("nan")
        monitor.end_epoch()
        assert torch.equal(monitor.best_weights()["0.weight"], seen[0])
    assert torch.isfinite(seen[0]).all()


@pytest.mark.parametrize("with_look", [False, True])
def test_a_sharded_model_is_averaged_and_evaluated_after_a_validation_pass_that_leaves_it_gathered(with_look, tmp_path):
    """In one process: what is gathered and not freed, or freed and read, shows in the weights or crashes."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        states, best = [], []
        for wrap, look in ((lambda model: model, None), (fully_shard, inputs() if with_look else None)):
            torch.manual_seed(0)
            model = wrap(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            rule = EarlyStop(warmup=0, statistic="mean")
            with gwa_logging.watch(
                model, look=look, keep_best="averaged", early_stop=rule, directory=tmp_path
            ) as monitor:
                for epoch in range(3):
                    for step in range(2):
                        x, y = batch(10 * epoch + step)
                        F.cross_entropy(model(x), y).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                    with torch.no_grad():
                        model(x)
                    monitor.end_epoch()
                assert monitor.faults == {}
                best.append(monitor.best_weights())
            states.append([getattr(value, "full_tensor", lambda v=value: v)() for value in model.state_dict().values()])
        assert all(map(torch.equal, *states))
        assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
        assert (monitor.history[-1].consensus is not None) == with_look
    finally:
        torch.distributed.destroy_process_group()
