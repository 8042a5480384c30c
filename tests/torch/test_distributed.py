"""Several processes over gloo: all report the same, and the same as one process that sees all samples."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError, Monitor, NoObservationsError, Suspect
from gwa_logging import ranks as gwa_ranks
from gwa_logging.integrations.torch import distributed as distributed_module
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.distributed import forget_finished, gather_vectors
from gwa_logging.journal import read_journal
from tests.torch.ranks import Failure, World, meet

EPOCHS, BATCHES, BATCH = 2, 4, 24


class Net(nn.Module):
    """Five classes, so that a head split over two ranks has unequal parts, and over four an empty one."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def wide() -> Net:
    """More classes than features, so the numerator is that by the gradient of the embeddings."""
    return Net(classes=15)


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.isfinite().all() else x


class Sequences(Net):
    """Every sample is a sequence of four, of which each rank passes its own part to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)  # its gradients would have to be summed over the ranks

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.stack([x, -x, x.flip(-1), x.roll(1, -1)], dim=1)
        return super().forward(whole.chunk(world_size(), dim=1)[rank()])


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        yield torch.randn(BATCH, 8, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.repeat_interleave(z[0].numel() // z.shape[-1]))


def doubled(z: Tensor, y: Tensor) -> Tensor:
    """A loss that changes the logits in place, DTensors too."""
    z = z.mul_(2)
    return F.cross_entropy(z.full_tensor() if hasattr(z, "full_tensor") else z, y)


def cross_entropy_of_parts(z: Tensor, y: Tensor) -> Tensor:
    """For logits of which every rank has those of its classes."""
    widths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    distributed.all_gather(widths, torch.tensor([z.shape[-1]]))
    own = y - int(sum(widths[: rank()]))
    here = (own >= 0) & (own < z.shape[-1])
    picked = torch.where(here, z.gather(-1, own.clamp(0, z.shape[-1] - 1)[:, None])[:, 0], 0.0)
    losses = all_reduce(z.exp().sum(-1)).log() - all_reduce(picked)
    return losses.mean() / world_size()  # all_reduce sums the gradients, and every rank has the whole loss


Loss = Callable[[Tensor, Tensor], Tensor]


def train(model: Any, monitor: Monitor, loss: Loss, share: int = 0, shares: int = 1, n: int = EPOCHS) -> None:
    """Trains on one of the shares of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for epoch in monitor.epochs(n):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            loss(model(x[share::shares]), y[share::shares]).backward()
            optimizer.step()


@cache
def in_one_process(make: Callable[[], nn.Module], loss: Loss) -> list[EpochReport]:
    model = make()
    with gwa_logging.watch(model) as monitor:
        train(model, monitor, loss)
    return monitor.history


class Case(NamedTuple):
    """A training run of several ranks that must equal one of a single process.

    Attributes:
        wrap: returns what is trained, from the model.
        make: returns the model.
        loss, loss_of_one: the loss, and that of the single process if it differs.
        watch_first: True to watch the model before it is wrapped, False to watch the wrapped model.
        shares: number of shares that each batch is cut into for the ranks; None for one per rank.
        inside: the context of the training.
    """

    wrap: Callable[[Any], Any]
    make: Callable[[], Net] = Net
    loss: Loss = cross_entropy
    loss_of_one: Loss | None = None
    watch_first: bool = False
    shares: int | None = None
    inside: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self) -> list[EpochReport]:
        """On a rank."""
        model = self.make()
        monitor = gwa_logging.watch(model) if self.watch_first else None
        model = self.wrap(model)
        monitor = monitor or gwa_logging.watch(model)
        shares = self.shares or world_size()
        with self.inside(), monitor:
            train(model, monitor, self.loss, share=rank() * shares // world_size(), shares=shares)
        assert monitor.faults == {}
        return monitor.history

    def alone(self) -> list[EpochReport]:
        """In one process."""
        return in_one_process(self.make, self.loss_of_one or self.loss)


def ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Net) -> nn.Module:
    """Sharded as a whole: the head's weight is gathered and freed with the root's."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)), reshard_after_forward=True)


def fsdp_by_parts(model: Net) -> nn.Module:
    """The head is sharded separately: its weight is freed right after its call."""
    mesh = init_device_mesh("cpu", (world_size(),))
    for part in (model.body, model.head):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def fsdp_1(model: Net) -> nn.Module:
    """Every layer separately, each in a wrapper."""
    every_layer, device = ModuleWrapPolicy({nn.Linear}), torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=every_layer, device_id=device, use_orig_params=True)


def split(style: Any) -> Callable[[Net], nn.Module]:
    """Tensor parallelism for the head."""
    return lambda model: parallelize_module(model, init_device_mesh("cpu", (world_size(),)), {"head": style})


def split_and_sharded(model: Net) -> nn.Module:
    """Two ranks share the head, and two such pairs share the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"head": ColwiseParallel(output_layouts=Replicate())})
    for part in (model.body, model.head, model):
        fully_shard(part, mesh=mesh["data"], reshard_after_forward=True)
    return model


BODY = {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()}


def replicated(model: Net) -> nn.Module:
    """Tensor parallelism for the body; every rank has the whole head."""
    return parallelize_module(model, init_device_mesh("cpu", (world_size(),)), BODY)


def replicated_dtensor(model: Net) -> nn.Module:
    """The same, with a head whose weight and logits are DTensors."""
    mesh, whole = init_device_mesh("cpu", (world_size(),)), Replicate()
    distribute_module(model.head, mesh)
    as_dtensor = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
    as_tensor = PrepareModuleOutput(output_layouts=whole, desired_output_layouts=whole)
    for style in (as_dtensor, as_tensor):
        parallelize_module(model, mesh, {"head": style})
    return parallelize_module(model, mesh, BODY)


def replicated_and_sharded(model: Net) -> nn.Module:
    """Two ranks share the body, each with the whole head, and two such pairs share the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], BODY)
    for part in (model.body, model.head, model):
        fully_shard(part, mesh=mesh["data"], reshard_after_forward=True)
    return model


def sharded_and_copied(model: Net) -> nn.Module:
    """Two pairs of ranks shard the model, each pair a whole copy. All ranks have different samples."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def compiled(wrap: Callable[[Net], nn.Module]) -> Callable[[Net], Any]:
    return lambda model: torch.compile(wrap(model), backend="aot_eager")


by_classes, by_features = (
    split(ColwiseParallel(output_layouts=Replicate())),
    split(RowwiseParallel(input_layouts=Replicate())),
)
as_parts, as_dtensor = split(ColwiseParallel()), split(ColwiseParallel(use_local_output=False))
of_sequence = split(ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()))

OF_TWO = {
    "DDP": Case(ddp),
    "DDP, compiled": Case(compiled(ddp)),
    "FSDP2, the head by itself, watched before": Case(fsdp_by_parts, watch_first=True),
    "FSDP2, logits changed in place": Case(fsdp_by_parts, Net, doubled),
    "FSDP2, a wide head": Case(fsdp_by_parts, wide),
    "FSDP2, the head found in the first pass": Case(fsdp_by_parts, Untraceable),
    "FSDP": Case(fsdp_1),
    "split by classes, watched before": Case(by_classes, watch_first=True, shares=1),
    "split by classes, DTensor logits": Case(as_dtensor, Net, F.cross_entropy, shares=1, inside=loss_parallel),
    "split by classes, a wide head": Case(by_classes, wide, shares=1),
    "split by features": Case(by_features, shares=1),
    "a split body, the head on every rank": Case(replicated, shares=1),
}
MORE_OF_TWO = {
    "DDP, watched before": Case(ddp, watch_first=True),
    "DDP, the head found in the first pass": Case(ddp, Untraceable),
    "FSDP2": Case(fsdp),
    "FSDP2, watched before": Case(fsdp, watch_first=True),
    "FSDP2, the head by itself": Case(fsdp_by_parts),
    "FSDP2, compiled": Case(compiled(fsdp_by_parts)),
    "FSDP, watched before": Case(fsdp_1, watch_first=True),
    "split by classes": Case(by_classes, shares=1),
    "split by classes, local logits": Case(as_parts, Net, cross_entropy_of_parts, cross_entropy, shares=1),
    "split by classes, DTensor logits changed in place": Case(as_dtensor, Net, doubled, shares=1),
    "split by classes, a wide head, watched before": Case(by_classes, wide, watch_first=True, shares=1),
    "split by classes, input split by position": Case(of_sequence, Sequences, shares=1),
    "split by classes, compiled": Case(compiled(by_classes), shares=1),
    "split by classes, a wide head, compiled": Case(compiled(by_classes), wide, shares=1),
    "split by classes, the head found in the first pass": Case(by_classes, Untraceable, shares=1),
    "a split body, the head on every rank, watched before": Case(replicated, watch_first=True, shares=1),
    "a split body, the head on every rank as a DTensor": Case(replicated_dtensor, shares=1),
}
OF_FOUR = {
    "DDP": Case(ddp),
    "FSDP2, the head by itself": Case(fsdp_by_parts),
    "split by classes, one rank has none": Case(by_classes, shares=1),
    "split by classes in pairs, which are sharded": Case(split_and_sharded, shares=2),
    "a split body in pairs, which are sharded, the head on every rank": Case(replicated_and_sharded, shares=2),
    "HSDP": Case(sharded_and_copied),
}


# --- other scenarios --------------------------------------------------------------------------------------------------


class Epochs(NamedTuple):
    """The reports of a run, and the error of an epoch in which no rank took a step."""

    history: list[EpochReport]
    error: str


def unequal_steps() -> Epochs:
    """Epochs in which the ranks take 3 and 1, 0 and 4, 4 and 0 of the batches; then an epoch without steps."""
    model = DistributedDataParallel(Net())
    with gwa_logging.watch(model) as monitor:
        for epoch, first in enumerate((3, 0, 4)):
            with Join([model]):
                for x, y in list(batches(epoch))[slice(first, None) if rank() else slice(first)]:
                    F.cross_entropy(model(x), y).backward()
            monitor.end_epoch()
        with pytest.raises(NoObservationsError) as error:
            monitor.end_epoch()
    return Epochs(monitor.history, str(error.value))


def train_and_stop(share: int, shares: int) -> list[EpochReport]:
    model = Net()
    with gwa_logging.watch(
        model, early_stop=EarlyStop(statistic="stable", patience=1, warmup=0, drop=0, action="stop")
    ) as monitor:
        train(model, monitor, F.cross_entropy, share, shares, n=30)
    return monitor.history


def stopping() -> list[EpochReport]:
    """Every rank trains its own model, and alone would stop in another epoch."""
    return train_and_stop(rank(), world_size())


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder.absolute() / 'mlflow.db'}")


def tracked() -> Path | None:
    """Every rank passes backend="mlflow"."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('mlflow.db').absolute()}"
    if rank() == 0:
        client_of(Path.cwd()).search_experiments()  # makes the database
    distributed.barrier()
    model = DistributedDataParallel(Net())
    with gwa_logging.watch(model, backend="mlflow") as monitor:
        train(model, monitor, F.cross_entropy, rank(), world_size())
    return monitor.journal


class Ledger(NamedTuple):
    """The suspects of a run, and of a run that resumes from its state."""

    suspects: list[Suspect]
    resumed: list[Suspect]


def training_set() -> tuple[Tensor, Tensor]:
    """25 samples, of which DistributedSampler gives one to both of two ranks."""
    x, y = next(batches(0))
    return torch.cat([x, x[:1] / 2]), torch.cat([y, y[:1]])


def ledger() -> Ledger:
    """Two epochs of the training set."""
    model = DistributedDataParallel(Net())
    x, y = training_set()
    with gwa_logging.watch(model, num_samples=len(x)) as monitor:
        for _ in range(2):
            ids = torch.tensor(list(DistributedSampler(x, shuffle=False)))
            monitor.tag(ids)
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            monitor.end_epoch()
        suspects, state = monitor.suspects(len(x)), monitor.state_dict()
    with gwa_logging.watch(model, num_samples=len(x)) as monitor:
        monitor.load_state_dict(state)
        return Ledger(suspects, monitor.suspects(len(x)))


def windows() -> str:
    with pytest.raises(InvalidInputError) as error:
        gwa_logging.watch(Net(), samples_per_epoch=100)
    return str(error.value)


def flat_parameters() -> str:
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=False)
    with pytest.raises(InvalidInputError) as error:
        gwa_logging.watch(model)
    return str(error.value)


def kept_collectives() -> tuple[int, int]:
    """The number of collectives that are kept after one has finished, and once training goes on."""
    forget_finished()
    gather_vectors(np.ones(3))
    kept = len(distributed_module._finished)
    Accumulator(None).snapshot()
    return kept, len(distributed_module._finished)


class Outcome(NamedTuple):
    """What a rank reports about a run in which something is wrong.

    Attributes:
        counts: samples in each report.
        notes: of the last report.
        faults: of the monitor.
        seconds: how long the run took.
    """

    counts: list[int]
    notes: str
    faults: dict[str, int]
    seconds: float = 0.0

    @classmethod
    def by(cls, monitor: Monitor) -> "Outcome":
        return cls([r.count for r in monitor.history], "; ".join(monitor.history[-1].notes), monitor.faults)


def stages() -> Outcome:
    """Two stages of a pipeline, each watched by its own rank: the first one's hidden layer, and the classifier."""
    net = Net()
    hidden, classifier = net.body, nn.Sequential(nn.Linear(8, 12), nn.Tanh(), net.head)
    model, size = (classifier, 16) if rank() else (hidden, 20)
    x, y = next(batches(0))
    with gwa_logging.watch(model, num_samples=BATCH, head="2") as monitor:
        for _ in monitor.epochs(EPOCHS):
            monitor.tag(torch.arange(size))
            F.cross_entropy(model(x[:size]), y[:size]).backward()
        assert all(suspect.times_seen <= EPOCHS for suspect in monitor.suspects())
    return Outcome.by(monitor)


def same_samples() -> Outcome:
    """Data-parallel training without a DistributedSampler."""
    model = DistributedDataParallel(Net())
    with gwa_logging.watch(model) as monitor:
        train(model, monitor, F.cross_entropy)
    return Outcome.by(monitor)


class Replicated(NamedTuple):
    """The suspects of a tensor-parallel run whose head every rank has, at its end and in a run that resumes it."""

    before: list[Suspect]
    after: list[Suspect]
    counts: list[int]
    faults: dict[str, int]


def replicated_ledger() -> Replicated:
    """Saved in the middle of an epoch."""
    model = replicated(Net())
    options: dict[str, Any] = {"num_samples": BATCH, "log_every_n_steps": 3}
    x, y = next(batches(0))

    def step(monitor: Monitor) -> None:
        monitor.tag(torch.arange(BATCH))
        F.cross_entropy(model(x), y).backward()

    with gwa_logging.watch(model, **options) as monitor:
        step(monitor)
        before, state = monitor.suspects(BATCH), monitor.state_dict()
    with gwa_logging.watch(model, **options) as monitor:
        monitor.load_state_dict(state)
        for _ in range(3):
            step(monitor)
        monitor.end_epoch()
        step(monitor)
        monitor.end_epoch()
        return Replicated(before, monitor.suspects(BATCH), [r.count for r in monitor.history], monitor.faults)


def samples_in(saved: Any) -> int:
    """The number of samples of a saved summary: a dict, or in newer states a vector."""
    return int(saved["count"] if isinstance(saved, dict) else saved[0])


def split_state() -> list[list[int]]:
    """Only the first rank of a split head counts: saved in the middle of an epoch, loaded, and saved again at once."""
    model = by_classes(Net())
    states = []
    with gwa_logging.watch(model) as monitor:
        for x, y in batches(0):
            F.cross_entropy(model(x), y).backward()
        states.append(monitor.state_dict())
    with gwa_logging.watch(model) as monitor:
        monitor.load_state_dict(states[-1])
        states.append(monitor.state_dict())
        for x, y in batches(1):
            F.cross_entropy(model(x), y).backward()
        monitor.end_epoch()
        states.append(monitor.state_dict())
    return [[samples_in(state["epoch"]), *(report["count"] for report in state["history"])] for state in states]


def watched_by_one(wrap: Callable[[Net], nn.Module] = ddp) -> Outcome:
    """Rank 1 never calls watch(), and trains to the end."""
    gwa_ranks.WATCHED_WITHIN = 0.5
    model, begun = wrap(Net()), monotonic()
    if rank():
        for epoch in range(EPOCHS):
            for x, y in batches(epoch):
                F.cross_entropy(model(x), y).backward()
        return Outcome([], "", {})
    monitor = gwa_logging.watch(model, num_samples=BATCH)
    for epoch in range(EPOCHS):
        for x, y in batches(epoch):
            monitor.tag(torch.arange(BATCH))
            F.cross_entropy(model(x), y).backward()
        monitor.end_epoch()
    assert {suspect.times_seen for suspect in monitor.suspects()} == {EPOCHS * BATCHES}
    monitor.state_dict()
    monitor.close()
    return Outcome.by(monitor)._replace(seconds=monotonic() - begun)


def split_and_watched_by_one() -> dict[str, int]:
    """Every step of the probe needs both ranks, and rank 1 does not watch."""
    gwa_ranks.WATCHED_WITHIN = 0.5
    model = by_classes(Net())
    monitor = None if rank() else gwa_logging.watch(model)
    for x, y in batches(0):
        F.cross_entropy(model(x), y).backward()
    if monitor is None:
        return {}
    with monitor, pytest.raises(NoObservationsError):
        monitor.end_epoch()
    return monitor.faults


def watched_late() -> list[Outcome]:
    """Rank 1 calls watch() after rank 0 has stopped waiting; then both watch again, and rank 1 ends its epoch late."""
    gwa_ranks.WATCHED_WITHIN = 0.5
    outcomes: list[Outcome] = []
    for _ in range(2):
        model = Net()
        if rank() and not outcomes:
            distributed.barrier()
        with gwa_logging.watch(model) as monitor:
            if outcomes:
                distributed.barrier()
            for x, y in batches(rank()):
                F.cross_entropy(model(x), y).backward()
            if outcomes and rank():
                Event().wait(1.5)
            monitor.end_epoch()
        if not rank() and not outcomes:
            distributed.barrier()
        outcomes.append(Outcome.by(monitor))
    return outcomes


class Survivor(NamedTuple):
    """What a rank reports after another one has died.

    Attributes:
        error: what `end_epoch` raised.
        seconds: how long that took.
        journal: of this rank, after `close`.
    """

    error: str
    seconds: float
    journal: Path | None


def rank_dies() -> Survivor:
    """The last rank dies before the first epoch ends. Collectives time out after five seconds."""
    me, size = rank(), world_size()
    distributed.barrier()
    distributed.destroy_process_group()
    meet(me, size, timedelta(seconds=5), at="second meeting")
    model = Net()
    with gwa_logging.watch(model) as monitor:
        for x, y in batches(0):
            F.cross_entropy(model(x), y).backward()
        if me == size - 1:
            os._exit(1)
        begun = monotonic()
        with pytest.raises(RuntimeError) as error:
            monitor.end_epoch()
        seconds = monotonic() - begun
    return Survivor(str(error.value), seconds, monitor.journal)


def _by_name(*functions: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    return {function.__name__: function for function in functions}


WORLD_OF_TWO = OF_TWO | _by_name(
    *(unequal_steps, stopping, tracked, ledger, windows, flat_parameters, kept_collectives),
    *(stages, same_samples, replicated_ledger, split_state, watched_by_one, split_and_watched_by_one, watched_late),
)
WORLD_OF_FOUR = OF_FOUR | _by_name(rank_dies)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def more_of_two(shared_world: Callable[..., World]) -> World:
    return shared_world("more of two ranks", 2, "tests.torch.test_distributed:MORE_OF_TWO")


@pytest.fixture(scope="session")
def four_ranks(shared_world: Callable[..., World]) -> World:
    return shared_world("four ranks", 4, "tests.torch.test_distributed:WORLD_OF_FOUR")


def assert_the_same(histories: list[list[EpochReport]]) -> None:
    """To the last bit, except that every rank counts its own steps."""
    first, *others = [[r.model_copy(update={"step": 0}).model_dump_json() for r in history] for history in histories]
    assert all(other == first for other in others)


def assert_equal(history: list[EpochReport], alone: list[EpochReport]) -> None:
    """Counts exactly, everything else to 1e-6."""
    for report, want in zip(history, alone, strict=True):
        assert (report.count, report.excluded, report.histogram) == (want.count, want.excluded, want.histogram)
        for name in ("mean", "std", "skewness", "excess_kurtosis", "gwa", "stable_gwa"):
            assert getattr(report, name) == pytest.approx(getattr(want, name), rel=0, abs=1e-6), name


@pytest.mark.parametrize("name", OF_TWO)
def test_two_ranks_report_the_same_as_one_process(two_ranks: World, name: str) -> None:
    assert_the_same(two_ranks[name])
    assert_equal(two_ranks[name][0], OF_TWO[name].alone())


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_OF_TWO)
def test_two_ranks_report_the_same_as_one_process_in_more_cases(more_of_two: World, name: str) -> None:
    assert_the_same(more_of_two[name])
    assert_equal(more_of_two[name][0], MORE_OF_TWO[name].alone())


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_report_the_same_as_one_process(four_ranks: World, name: str) -> None:
    assert_the_same(four_ranks[name])
    assert_equal(four_ranks[name][0], OF_FOUR[name].alone())


def test_ranks_may_have_different_numbers_of_steps_or_none_and_every_sample_counts(two_ranks: World) -> None:
    found = two_ranks["unequal_steps"]
    assert_the_same([epochs.history for epochs in found])
    model = Net()
    with gwa_logging.watch(model) as monitor:
        for epoch in range(3):
            for x, y in batches(epoch):
                F.cross_entropy(model(x), y).backward()
            monitor.end_epoch()
    assert_equal(found[0].history, monitor.history)


def test_an_epoch_in_which_no_rank_takes_a_step_is_an_error_on_every_rank(two_ranks: World) -> None:
    assert all("epoch 3 has ended, but no training step" in epochs.error for epochs in two_ranks["unequal_steps"])


def test_all_ranks_stop_in_the_same_epoch_although_alone_they_would_stop_in_different_ones(two_ranks: World) -> None:
    alone = [len(train_and_stop(share, 2)) for share in range(2)]
    together = [len(history) for history in two_ranks["stopping"]]
    assert alone[0] != alone[1]
    assert together[0] == together[1] < 30
    assert_the_same(two_ranks["stopping"])


def test_rank_0_alone_writes_one_journal_and_one_run(two_ranks: World) -> None:
    (folder,) = (two_ranks.folder / "tracked" / "gwa_runs").iterdir()
    assert two_ranks["tracked"] == [folder / "journal.jsonl", None]
    client = client_of(two_ranks.folder / "tracked")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    counts = [metric.value for metric in client.get_metric_history(run.info.run_id, "gwa/stats/count")]
    assert counts == [BATCHES * BATCH] * EPOCHS


def test_the_ledger_covers_all_ranks_and_a_sample_given_to_both_is_seen_twice(two_ranks: World) -> None:
    found = two_ranks["ledger"]
    x, y = training_set()
    assert found[0] == found[1]
    assert sorted((s.id, s.times_seen) for s in found[0].suspects) == [(0, 4), *((i, 2) for i in range(1, len(x)))]
    model = Net()
    with gwa_logging.watch(model, num_samples=len(x)) as monitor:
        monitor.tag(torch.arange(len(x)))
        F.cross_entropy(model(x), y).backward()
        want = {s.id: s.mean_score for s in monitor.suspects(len(x))}
    assert {s.id: s.mean_score for s in found[0].suspects} == pytest.approx(want, rel=0, abs=1e-6)


def test_a_state_that_every_rank_loads_counts_once(two_ranks: World) -> None:
    assert all(found.resumed == found.suspects for found in two_ranks["ledger"])


def test_windows_by_samples_are_refused(two_ranks: World) -> None:
    assert all("samples_per_epoch" in message for message in two_ranks["windows"])


def test_a_head_whose_weight_is_part_of_a_flat_parameter_is_refused_with_the_remedy(two_ranks: World) -> None:
    assert all("use_orig_params=True" in message for message in two_ranks["flat_parameters"])


def test_a_finished_collective_is_kept_until_training_goes_on(two_ranks: World) -> None:
    """Else a thread of gloo frees it, which deadlocks with a process that is ending."""
    assert two_ranks["kept_collectives"] == [(1, 0)] * 2


def test_if_ranks_have_different_heads_only_the_head_named_in_the_journal_is_reported(two_ranks: World) -> None:
    first, second = two_ranks["stages"]
    assert first == second
    assert first.counts == [20] * EPOCHS
    assert first.faults == {"ranks with different heads": 1}
    assert "rank 0 watches '2' (12 features, 12 classes), rank 1 watches '2' (12 features, 5 classes)" in first.notes


def test_ranks_that_train_on_the_same_samples_are_reported(two_ranks: World) -> None:
    for outcome in two_ranks["same_samples"]:
        assert outcome.counts == [2 * BATCHES * BATCH] * EPOCHS
        assert outcome.faults == {"ranks with the same samples": 1}
        assert "ranks 0 and 1 have trained on the same samples" in outcome.notes


def test_a_head_that_every_rank_has_counts_each_sample_once_also_after_a_resume(two_ranks: World) -> None:
    for found in two_ranks["replicated_ledger"]:
        assert {s.times_seen for s in found.before} == {1}
        assert {s.times_seen for s in found.after} == {5}
        assert {s.id: s.mean_score for s in found.after} == pytest.approx({s.id: s.mean_score for s in found.before})
        assert found.counts == [4 * BATCH, BATCH]
        assert found.faults == {}


def test_a_state_of_a_split_head_covers_all_ranks_also_in_the_middle_of_an_epoch(two_ranks: World) -> None:
    samples = BATCHES * BATCH
    assert two_ranks["split_state"] == [[[samples], [samples], [0, 2 * samples]]] * 2


def test_a_rank_that_never_called_watch_is_named_and_does_not_block_the_others(two_ranks: World) -> None:
    outcome, _ = two_ranks["watched_by_one"]
    assert outcome.counts == [BATCHES * BATCH] * EPOCHS
    assert outcome.faults == {"ranks without watch()": 1}
    assert "ranks [1] have not called watch()" in outcome.notes
    assert outcome.seconds < 30


def test_a_split_head_that_one_rank_does_not_watch_does_not_stop_training(two_ranks: World) -> None:
    assert two_ranks["split_and_watched_by_one"] == [{"ranks without watch()": 1}, {}]


def test_a_rank_that_watches_too_late_agrees_with_the_others_and_a_late_epoch_is_awaited(
    two_ranks: World,
) -> None:
    for apart, together in two_ranks["watched_late"]:
        assert (apart.counts, apart.faults) == ([BATCHES * BATCH], {"ranks without watch()": 1})
        assert (together.counts, together.faults) == ([2 * BATCHES * BATCH], {})


@pytest.mark.slow
def test_when_a_rank_dies_the_others_get_an_error_from_torch_and_rank_0_closes_its_journal(four_ranks: World) -> None:
    *found, dead = [four_ranks.of_rank("rank_dies", number) for number in range(4)]
    assert isinstance(dead, Failure)
    assert all(isinstance(survivor, Survivor) for survivor in found), found
    assert all("gloo" in survivor.error.lower() for survivor in found)
    assert all(survivor.seconds < 30 for survivor in found)
    assert [survivor.journal is None for survivor in found] == [False, True, True]
    records, _ = read_journal(four_ranks.folder / "rank_dies" / found[0].journal)
    *_, epoch, last = records
    assert (epoch.kind, last.kind) == ("epoch", "close")
    assert epoch.count == BATCHES * BATCH
    assert "closed before the end of the epoch" in epoch.notes


def test_before_init_process_group_the_rank_comes_from_the_variables_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with gwa_logging.watch(Net()) as monitor:
        assert monitor.journal is None
    with pytest.raises(InvalidInputError, match="samples_per_epoch"):
        gwa_logging.watch(Net(), samples_per_epoch=100)
    monkeypatch.setenv("RANK", "0")
    with gwa_logging.watch(Net()) as monitor:
        assert monitor.journal is not None
