"""`linear_cross_entropy` in several processes over gloo: with sharded parameters, and with a sharded vocabulary."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gwa_logging
from gwa_logging import EpochReport, InvalidInputError, Suspect
from gwa_logging.integrations.torch import linear_cross_entropy
from tests.torch.ranks import World

pytestmark = pytest.mark.slow

ROWS, WIDTH = 8, 6


class Decoder(nn.Module):
    """Computes its own loss, with the hidden states that `place` returns."""

    def __init__(self, classes: int = 11, place: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, WIDTH)
        self.lm_head = nn.Linear(WIDTH, classes)
        self.place = place

    def forward(self, x: Tensor, target: Tensor, **options) -> Tensor:
        hidden = self.place(torch.tanh(self.body(x)))
        head = self.lm_head
        return linear_cross_entropy(hidden, head.weight, target, head.bias, chunk=3, label_smoothing=0.1, **options)


def batch(classes: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    target[2] = -100
    return torch.randn(ROWS, 3, generator=generator), target


class Outcome(NamedTuple):
    """What a run gave: the loss, the whole gradients by name, the report, and the suspects."""

    loss: float
    gradients: dict[str, Tensor]
    report: EpochReport
    suspects: list[Suspect]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(model: nn.Module, part: slice, classes: int = 11, **options) -> Outcome:
    """One step of a watched model on a part of the batch."""
    x, target = batch(classes)
    with gwa_logging.watch(model, head=model.get_submodule("lm_head"), num_samples=ROWS) as monitor:
        monitor.tag(torch.arange(ROWS)[part])
        loss = model(x[part], target[part], **options)
        loss.sum().backward()
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        report = monitor.end_epoch()
        suspects = monitor.suspects(ROWS)
        assert monitor.faults == {}
    return Outcome(float(loss.sum().detach()), gradients, report, suspects)


def own_rows() -> slice:
    """Every rank has an equal number of rows."""
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def sharded(*, by_parts: bool) -> Outcome:
    """fully_shard, with the sum over the rows so that the numbers of rows do not matter."""
    model, mesh = Decoder(), init_device_mesh("cpu", (distributed.get_world_size(),))
    if by_parts:
        fully_shard(model.body, mesh=mesh)
    return outcome(fully_shard(model, mesh=mesh), own_rows(), reduction="sum")


def sharded_by_wrapper() -> EpochReport:
    """FullyShardedDataParallel, whose gradients are parts of flat parameters."""
    model = FullyShardedDataParallel(Decoder(), device_id=torch.device("cpu"), use_orig_params=True)
    (x, target), part = batch(), own_rows()
    with gwa_logging.watch(model, head="lm_head") as monitor:
        model(x[part], target[part]).backward()
        report = monitor.end_epoch()
        assert monitor.faults == {}
    return report


def head_sharded_alone() -> str:
    model, mesh = Decoder(), init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model.lm_head, mesh=mesh)
    with pytest.raises(InvalidInputError) as error:
        fully_shard(model, mesh=mesh)(*batch())
    return str(error.value)


def split(classes: int, reduction: str, to: Shard | Replicate) -> Outcome:
    """A head whose vocabulary the ranks share, with hidden states that every rank has."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))

    def place(hidden: Tensor) -> Tensor:
        placed = DTensor.from_local(hidden, mesh, [Replicate()])
        return placed.redistribute(mesh, [Shard(0)]) if reduction == "sum" else placed

    model = Decoder(classes, place)
    for name, parameter in (*model.lm_head.named_parameters(),):
        setattr(model.lm_head, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [to])))
    return outcome(model, slice(None), classes, reduction=reduction)


def features_split() -> str:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    weight = distribute_tensor(torch.zeros(5, WIDTH), mesh, [Shard(1)])
    hidden = DTensor.from_local(torch.zeros(2, WIDTH), mesh, [Replicate()])
    with pytest.raises(InvalidInputError) as error:
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    return str(error.value)


def classes_out_of_range() -> bool:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    weight = distribute_tensor(torch.zeros(5, WIDTH), mesh, [Shard(0)])
    hidden = DTensor.from_local(torch.zeros(2, WIDTH), mesh, [Replicate()])
    with pytest.raises(InvalidInputError, match="target: expected classes in 0 to 4"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 5]))
    return True


SPLIT = {
    f"{classes} classes, {reduction}, {to}": partial(split, classes, reduction, to)
    for classes, to in ((11, Shard(0)), (5, Shard(0)), (11, Replicate()))
    for reduction in ("mean", "sum", "none")
}
SHARDED = {"FSDP2": partial(sharded, by_parts=False), "FSDP2, the body by itself": partial(sharded, by_parts=True)}
REFUSED = {"the head sharded alone": head_sharded_alone, "split by features": features_split}
WORLD = {**SPLIT, **SHARDED, **REFUSED, "FSDP": sharded_by_wrapper, "a class that no rank has": classes_out_of_range}


@pytest.fixture(scope="module", params=[2, 4])
def world(request, shared_world) -> World:
    """Four ranks share five classes so that the last one has none."""
    name = f"fused losses of {request.param} ranks"
    return shared_world(name, request.param, "tests.torch.test_linear_cross_entropy_ranks:WORLD")


def alone(classes: int, reduction: str, folder) -> Outcome:
    """The same step in one process, with the loss of PyTorch for the gradients."""
    model, (x, target) = Decoder(classes), batch(classes)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    loss = F.cross_entropy(model.lm_head(torch.tanh(model.body(x))), target, **options).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    watched = Decoder(classes)
    with gwa_logging.watch(watched, head="lm_head", num_samples=ROWS, directory=folder) as monitor:
        monitor.tag(torch.arange(ROWS))
        F.cross_entropy(watched.lm_head(torch.tanh(watched.body(x))), target, **options).sum().backward()
        return Outcome(float(loss.detach()), gradients, monitor.end_epoch(), monitor.suspects(ROWS))


def assert_same(found: Outcome, expected: Outcome, gradient_factor: float = 1.0) -> None:
    for name, gradient in expected.gradients.items():
        assert torch.allclose(found.gradients[name] * gradient_factor, gradient, atol=1e-6), name
    assert found.report.count == expected.report.count
    assert found.report.mean == pytest.approx(expected.report.mean, abs=1e-6)
    assert found.report.std == pytest.approx(expected.report.std, abs=1e-6)
    assert [each.id for each in found.suspects] == [each.id for each in expected.suspects]
    assert [each.mean_score for each in found.suspects] == pytest.approx(
        [each.mean_score for each in expected.suspects], abs=1e-6
    )


@pytest.mark.parametrize("name", SPLIT)
def test_a_vocabulary_that_ranks_share_gives_the_loss_gradients_and_scores_of_one_process(world, name, tmp_path):
    classes, reduction, _ = SPLIT[name].args
    expected = alone(classes, reduction, tmp_path)
    results = world[name]
    for found in results:
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert_same(found, expected)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_parameters_give_the_gradients_and_scores_of_one_process(world, name, tmp_path):
    expected = alone(11, "sum", tmp_path)
    results = world[name]
    assert sum(found.loss for found in results) == pytest.approx(expected.loss, abs=1e-5)
    for found in results:  # fully_shard averages the gradients over the ranks
        assert_same(found, expected, gradient_factor=world.ranks)


def test_parameters_that_a_wrapper_shards_give_the_scores_of_one_process(world, tmp_path):
    expected = alone(11, "sum", tmp_path).report
    for found in world["FSDP"]:
        assert (found.count, found.mean) == (expected.count, pytest.approx(expected.mean, abs=1e-6))


def test_what_is_not_supported_is_refused_with_the_remedy(world):
    for message in world["the head sharded alone"]:
        assert message.startswith("weight: is a DTensor, but hidden is not. With fully_shard, compute the loss inside")
    for message in world["split by features"]:
        assert "Supported are Shard(0) on a mesh of one dimension" in message
    assert all(world["a class that no rank has"])
