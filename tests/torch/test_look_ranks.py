"""The look of two ranks: both have the consensus of the whole model, training does not change, and no rank blocks another."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gwa_logging
from gwa_logging import with_ids
from gwa_logging.integrations.torch.find_head import unwrapped
from gwa_logging.integrations.torch.look_inputs import spread
from tests.core.test_consensus import expected, expected_from_votes
from tests.torch.ranks import World
from tests.torch.test_distributed import Net, batches, by_classes, compiled, ddp, fsdp, fsdp_1, fsdp_by_parts, rank
from tests.torch.test_distributed import world_size as size
from tests.torch.test_weights_ranks import full, mean_until

EPOCHS = 3
WRAPS: dict[str, Callable[[Net], Any]] = {
    "DDP": ddp,
    "DDP, compiled": compiled(ddp),
    "FSDP2": fsdp,
    "FSDP2, the head by itself": fsdp_by_parts,
    "FSDP": fsdp_1,
    "split by classes": by_classes,
}
AUTO = ("DDP", "FSDP2", "FSDP", "split by classes")
AVERAGED = ("DDP", "DDP, compiled", "FSDP2", "FSDP2, the head by itself", "split by classes")
"""Where the average of the weights can be kept."""


class Outcome(NamedTuple):
    """What one rank has seen."""

    consensus: list[float | None]
    outputs: list[list[list[float]]]
    """Of a model without a look, in evaluation mode, after each epoch; of its average in float64 where that is kept."""
    is_unchanged: bool
    """True if both models have the same parameters after each epoch, to the last bit."""
    faults: dict[str, int]


def inputs(n: int = 30) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(5))


def own_parameters(model: nn.Module) -> list[Tensor]:
    """This rank's parts of the parameters."""
    parts: list[Any] = list(model.parameters())
    return [(part.to_local() if hasattr(part, "to_local") else part).detach().clone() for part in parts]


def trained(wrap: Callable[[Net], Any], look: Any, keep_best: Any = False) -> Outcome:
    """Trains two models alike; the monitor looks at one of them, and the scenario at the other."""
    shares = 1 if wrap is by_classes else size()
    models = [wrap(Net()) for _ in range(2)]
    dataset = ReadOn(wrap) if isinstance(look, str) else None
    monitors = [
        gwa_logging.watch(models[0], look=look, dataset=dataset, keep_best=keep_best),
        gwa_logging.watch(models[1], name="other"),
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    outputs, is_unchanged, steps = [], True, []
    for epoch in range(EPOCHS):
        for x, y in batches(epoch):
            share = slice(rank() if shares > 1 else 0, None, shares)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x[share]), y[share]).backward()
                optimizer.step()
            steps.append(full(unwrapped(models[1])))
        for monitor in monitors:
            monitor.end_epoch()
        is_unchanged &= all(map(torch.equal, *map(own_parameters, models)))
        if keep_best == "averaged":
            average = mean_until(epoch, steps, per_epoch=len(steps) // (epoch + 1))
            outputs.append(functional_call(Net().double(), average, inputs().double()).tolist())
            continue
        models[1].eval()
        with torch.no_grad():
            outputs.append(models[1](inputs()).double().tolist())
        models[1].train()
    for monitor in monitors:
        monitor.close()
    return Outcome([r.consensus for r in monitors[0].history], outputs, is_unchanged, monitors[0].faults)


class ReadOn:
    """The inputs as a data set, which only rank 0 may read if every rank has the whole model."""

    def __init__(self, wrap: Callable[[Net], Any]) -> None:
        self.reads = rank() == 0 or wrap is not ddp

    def __len__(self) -> int:
        return len(inputs())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.reads
        return inputs()[index], 0


IDS = 70_000
"""Size of the ledger, above 2**16."""


class Numbered:
    """A data set of this size, which only rank 0 may read if every rank has the whole model."""

    def __init__(self, wrap: Callable[[Net], Any]) -> None:
        self.reads = rank() == 0 or wrap is not ddp

    def __len__(self) -> int:
        return IDS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.reads
        return torch.randn(8, generator=torch.Generator().manual_seed(index)), 0


def voted(wrap: Callable[[Net], Any]) -> Outcome:
    """Training votes for the consensus: each rank sees half of the look's inputs. `outputs`: the statistic expected."""
    model = wrap(Net())
    monitor = gwa_logging.watch(model, look="auto", dataset=with_ids(Numbered(wrap)), num_samples=IDS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor(spread(IDS)[::8])
    x = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    votes: list[dict[int, int]] = []
    want: list[float | None] = []
    for _ in range(EPOCHS):
        share = slice(rank(), None, size())
        monitor.tag(ids[share])
        optimizer.zero_grad()
        logits = model(x[share])
        F.cross_entropy(logits, ids[share] // 7 % 5).backward()
        optimizer.step()
        own = dict(zip(ids[share].tolist(), logits.argmax(1).tolist(), strict=True))
        of_all: list[Any] = [None] * size()
        torch.distributed.all_gather_object(of_all, own)
        votes.append({number: predicted for part in of_all for number, predicted in part.items()})
        model.eval()
        with torch.no_grad():
            looked = dict(zip(ids.tolist(), model(x).argmax(1).tolist(), strict=True))
        model.train()
        want.append(expected_from_votes(votes, looked))
        monitor.end_epoch()
    monitor.close()
    return Outcome([r.consensus for r in monitor.history], [[[value or 0.0 for value in want]]], True, monitor.faults)


def no_data() -> Tensor:
    raise RuntimeError("no data on this rank")


def fails_on(failing: int, wrap: Callable[[Net], Any]) -> Outcome:
    return trained(wrap, no_data if rank() == failing else inputs())


def other_shapes() -> Outcome:
    return trained(fsdp, inputs(30 + rank()))


def rejected(wrap: Callable[[Net], Any], keep_best: Any = False) -> Outcome:
    return trained(wrap, torch.zeros(3, 9), keep_best)


SCENARIOS: dict[str, Callable[[], Outcome]] = {
    **{f"look, {name}": partial(trained, wrap, inputs()) for name, wrap in WRAPS.items()},
    **{f"auto, {name}": partial(trained, WRAPS[name], "auto") for name in AUTO},
    **{f"votes, {name}": partial(voted, WRAPS[name]) for name in ("DDP", "FSDP2")},
    "a look fails on rank 0, DDP": partial(fails_on, 0, ddp),
    "a look fails on rank 1, DDP": partial(fails_on, 1, ddp),
    "a look fails on rank 0, FSDP2": partial(fails_on, 0, fsdp),
    "a look fails on rank 1, FSDP2": partial(fails_on, 1, fsdp),
    "looks of other shapes": other_shapes,
    "a rejected look, DDP": partial(rejected, ddp),
    "a rejected look, FSDP2": partial(rejected, fsdp),
    **{f"averaged, {name}": partial(trained, WRAPS[name], inputs(), "averaged") for name in AVERAGED},
    "averaged, rejected, FSDP2": partial(rejected, fsdp, "averaged"),
}
FAST = ("look, DDP", "look, FSDP2", "a look fails on rank 0, DDP", "a look fails on rank 1, FSDP2")
WORLD = {name: SCENARIOS[name] for name in FAST}
MORE = {name: scenario for name, scenario in SCENARIOS.items() if name not in FAST}


@pytest.fixture
def ranks_of(request: pytest.FixtureRequest) -> Callable[[str], list[Outcome]]:
    """What both ranks return in a scenario."""

    def found(name: str) -> list[Outcome]:
        if name in FAST:
            return request.getfixturevalue("two_ranks")[name]
        shared_world: Callable[..., World] = request.getfixturevalue("shared_world")
        return shared_world("more looks of two ranks", 2, "tests.torch.test_look_ranks:MORE")[name]

    return found


def tiered(*names: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name",
    tiered(
        *(f"look, {name}" for name in WRAPS),
        *(f"averaged, {name}" for name in AVERAGED),
        *(f"auto, {name}" for name in AUTO),
    ),
)
def test_all_ranks_have_the_consensus_of_the_whole_model_and_training_does_not_change(name, ranks_of):
    ranks = ranks_of(name)
    looks = [dict(enumerate(epoch)) for epoch in ranks[0].outputs]
    want = [expected(looks[: number + 1]) for number in range(EPOCHS)]
    for found in ranks:
        assert found.is_unchanged
        assert found.faults == {}
        assert found.consensus == ranks[0].consensus
        assert found.consensus[0] is None
        assert found.consensus[1:] == pytest.approx(want[1:], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["votes, DDP", "votes, FSDP2"])
def test_the_predictions_of_all_ranks_vote(name, ranks_of):
    ranks = ranks_of(name)
    for found in ranks:
        assert found.faults == {}
        assert found.consensus == pytest.approx(found.outputs[0][0], abs=1e-12)
    assert len({*ranks[0].consensus}) > 1


@pytest.mark.parametrize(
    "name",
    tiered(
        *("a look fails on rank 0, DDP", "a look fails on rank 0, FSDP2", "a look fails on rank 1, FSDP2"),
        *("looks of other shapes", "a rejected look, DDP", "a rejected look, FSDP2", "averaged, rejected, FSDP2"),
    ),
)
def test_a_look_that_fails_on_one_rank_blocks_none(name, ranks_of):
    first, second = ranks_of(name)
    for found in (first, second):
        assert found.is_unchanged
        assert found.consensus == [None] * EPOCHS
    assert first.faults == {"look": EPOCHS}
    assert second.faults == ({} if "DDP" in name else {"look": EPOCHS})


@pytest.mark.slow
def test_where_every_rank_has_the_whole_model_only_rank_0_looks(ranks_of):
    for found in ranks_of("a look fails on rank 1, DDP"):
        assert found.faults == {}
        assert None not in found.consensus[1:]
