"""Pipeline parallelism over gloo: the head is on the last stage only, and all ranks report the same as one process."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining import schedules as torch_schedules

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, HeadNotFoundError, InvalidInputError, Monitor, NoObservationsError
from gwa_logging import ranks as gwa_ranks
from gwa_logging.integrations.torch import HeadOnRanks
from gwa_logging.journal import read_journal
from tests.torch.ranks import Failure, World
from tests.torch.test_distributed import assert_equal, assert_the_same, rank

pytestmark = pytest.mark.slow

EPOCHS, BATCHES, BATCH, MICROBATCHES = 3, 4, 24, 4
LAST = 1
ZERO_BUBBLE = torch_schedules.ScheduleInterleavedZeroBubble
IDS = 2 * BATCH


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh()),
        *(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)),
    )


def wide() -> nn.Sequential:
    """More classes than features, so the numerator is that by the gradient of the embeddings."""
    net = layers()
    return nn.Sequential(*net[:-1], nn.Linear(12, 15))


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, classes and ids."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        x, y = torch.randn(BATCH, 8, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator)
        yield x, y, torch.randperm(IDS, generator=generator)[:BATCH]


def alone(make: Callable[[], nn.Module] = layers, **arguments: Any) -> Monitor:
    """Trains the whole model in one process."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with gwa_logging.watch(model, **arguments) as monitor:
        for epoch in monitor.epochs(EPOCHS):
            for x, y, ids in batches(epoch):
                if "num_samples" in arguments:
                    monitor.tag(ids)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        monitor.suspects_of_test = monitor.suspects(IDS) if "num_samples" in arguments else []  # type: ignore[attr-defined]
    return monitor


class Pipeline:
    """Two or more stages of the model on the ranks of a group.

    Attributes:
        stages: those of this rank.
        watched: the last stage where it is, else the first of this rank's.
    """

    def __init__(
        self,
        schedule: Callable[..., Any] = Schedule1F1B,
        make: Callable[[], nn.Sequential] = layers,
        group: Any = None,
        cuts: tuple[int, ...] = (4,),
    ) -> None:
        net, bounds = make(), [0, *cuts, 9]
        place, size = distributed.get_rank(group), distributed.get_world_size(group)
        count = len(bounds) - 1
        parts = {i: net[bounds[i] : bounds[i + 1]] for i in range(count) if i % size == place}
        self.stages = [PipelineStage(part, i, count, torch.device("cpu"), group=group) for i, part in parts.items()]
        several = issubclass(schedule, torch_schedules.PipelineScheduleMulti)  # type: ignore[arg-type]
        self.schedule = schedule(self.stages if several else self.stages[0], MICROBATCHES, loss_fn=F.cross_entropy)
        self.watched = next((stage for stage in self.stages if stage.is_last), self.stages[0])
        self.optimizer = torch.optim.SGD([p for part in parts.values() for p in part.parameters()], lr=0.3)

    def step(self, x: Tensor, y: Tensor) -> None:
        first = any(stage.is_first for stage in self.stages)
        self.schedule.step(*([x] if first else []), **({"target": y, "losses": []} if self.watched.is_last else {}))
        self.optimizer.step()
        self.optimizer.zero_grad()


class Outcome(NamedTuple):
    """What a rank reports about a run.

    Attributes:
        steps: the step of the last report.
    """

    history: list[EpochReport]
    faults: dict[str, int]
    journal: Path | None
    steps: int
    suspects: list[Any]

    @classmethod
    def of(cls, monitor: Monitor, suspects: Any = ()) -> "Outcome":
        return cls(monitor.history, monitor.faults, monitor.journal, monitor.history[-1].step, list(suspects))


def train(pipeline: Pipeline, monitor: Monitor, *, share: int = 0, shares: int = 1, n: int = EPOCHS) -> None:
    for epoch in monitor.epochs(n):
        for x, y, _ in batches(epoch):
            pipeline.step(x[share::shares], y[share::shares])


def case(*arguments: Any, **named: Any) -> Callable[[], Outcome]:
    def run() -> Outcome:
        pipeline = Pipeline(*arguments, **named)
        with gwa_logging.watch(pipeline.watched) as monitor:
            train(pipeline, monitor)
        return Outcome.of(monitor)

    return run


SEVERAL_STAGES = {"cuts": (2, 4, 6)}
CASES: dict[str, Callable[[], Outcome]] = {
    "GPipe": case(ScheduleGPipe),
    "1F1B": case(Schedule1F1B),
    "1F1B, a wide head": case(Schedule1F1B, wide),
    "interleaved 1F1B, two stages per rank": case(ScheduleInterleaved1F1B, **SEVERAL_STAGES),
    "zero bubble": case(ZERO_BUBBLE, **SEVERAL_STAGES),
}


def by_hand() -> Outcome:
    """A pipeline without an engine: one microbatch after the other, sent by the user."""
    net = layers()
    part = net[4:] if rank() else net[:4]
    optimizer = torch.optim.SGD(part.parameters(), lr=0.3)
    with gwa_logging.watch(part, head=HeadOnRanks(LAST)) as monitor:
        for epoch in monitor.epochs(EPOCHS):
            for x, y, _ in batches(epoch):
                for inputs, targets in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
                    if rank():
                        received = torch.empty(len(inputs), 12)
                        distributed.recv(received, 0)
                        received.requires_grad_()
                        (F.cross_entropy(part(received), targets) / MICROBATCHES).backward()
                        distributed.send(received.grad, 0)
                    else:
                        sent = part(inputs)
                        distributed.send(sent.detach(), 1)
                        gradient = torch.empty_like(sent)
                        distributed.recv(gradient, 1)
                        sent.backward(gradient)
                optimizer.step()
                optimizer.zero_grad()
    return Outcome.of(monitor)


def with_ids(*arguments: Any, **named: Any) -> Outcome:
    """Saved in the middle of the second epoch, resumed in a new monitor; every rank with its own state."""
    pipeline = Pipeline(*arguments, **named)
    monitor = gwa_logging.watch(pipeline.watched, num_samples=IDS)
    for epoch in range(EPOCHS):
        for i, (x, y, ids) in enumerate(batches(epoch)):
            if (epoch, i) == (1, 2):
                state = monitor.state_dict()
                monitor.close()
                monitor = gwa_logging.watch(pipeline.watched, num_samples=IDS)
                monitor.load_state_dict(state)
            monitor.tag(ids)
            pipeline.step(x, y)
        monitor.end_epoch()
    suspects = monitor.suspects(IDS)
    monitor.log_suspects(3)
    monitor.close()
    return Outcome.of(monitor, suspects)


def stopping() -> Outcome:
    """Ends by the stop rule: both ranks leave the loop in the same epoch, or the pipeline would block."""
    pipeline = Pipeline()
    rule = EarlyStop(statistic="stable", patience=1, warmup=0, drop=0, action="stop")
    with gwa_logging.watch(pipeline.watched, early_stop=rule) as monitor:
        train(pipeline, monitor, n=30)
    return Outcome.of(monitor)


def tracked() -> Outcome:
    """Both ranks pass backend="mlflow"."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('mlflow.db').absolute()}"
    pipeline = Pipeline()
    with gwa_logging.watch(pipeline.watched, backend="mlflow", log_every_n_steps=8) as monitor:
        train(pipeline, monitor)
    return Outcome.of(monitor)


def messages() -> dict[str, str]:
    """What wrong calls raise. None of them waits for the other rank."""
    pipeline = Pipeline()
    stage = pipeline.watched
    calls: dict[str, Callable[[], Any]] = {
        "look": lambda: gwa_logging.watch(stage, look=torch.zeros(2, 8)),
        "keep_best": lambda: gwa_logging.watch(stage, keep_best=True),
        "both": lambda: gwa_logging.watch(stage, head=HeadOnRanks(LAST)),
        "unknown rank": lambda: gwa_logging.watch(stage.submod, head=HeadOnRanks(2)),
        "not a rank": lambda: HeadOnRanks("last"),  # type: ignore[arg-type]
        "no rank": lambda: HeadOnRanks([]),
        "not a path": lambda: HeadOnRanks(1, head=3),  # type: ignore[arg-type]
        "windows": lambda: gwa_logging.watch(stage, samples_per_epoch=10),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(InvalidInputError) as error:
            call()
        found[name] = str(error.value)
    with pytest.raises(HeadNotFoundError) as not_found:
        gwa_logging.watch(nn.Sequential(nn.Tanh()))
    found["no head"] = "".join(not_found.value.__notes__)
    return found


def wrong_stage() -> str:
    """Every rank has two stages and passes the first one, also where the last one is."""
    pipeline = Pipeline(ScheduleInterleaved1F1B, cuts=(2, 4, 6))
    try:
        gwa_logging.watch(pipeline.stages[0]).close()
    except InvalidInputError as error:
        return str(error)
    return ""


def disagreeing() -> list[str]:
    """Rank 1 calls watch() later, with other settings, one after the other."""
    own: list[dict[str, Any]] = [
        {"num_samples": 10 + rank()},
        {"early_stop": None if rank() else EarlyStop(action="stop")},
        {"unit": "position" if rank() else "sample"},
    ]
    found = []
    for arguments in own:
        if rank():
            distributed.barrier()
        try:
            gwa_logging.watch(layers(), **arguments).close()
            found.append("")
        except InvalidInputError as error:
            found.append(str(error))
        if not rank():
            distributed.barrier()
    return found


def watched_by_the_first_alone() -> tuple[str, dict[str, int]]:
    """The rank with the head never calls watch()."""
    gwa_ranks.WATCHED_WITHIN = 0.5
    pipeline = Pipeline()
    monitor = None if rank() else gwa_logging.watch(pipeline.watched)
    for x, y, _ in batches(0):
        pipeline.step(x, y)
    if monitor is None:
        return "", {}
    with monitor, pytest.raises(NoObservationsError) as error:
        monitor.end_epoch()
    return str(error.value), monitor.faults


def without_telling() -> Outcome:
    """Each rank watches its part as if it were a whole model."""
    pipeline = Pipeline(cuts=(3,))  # the first part ends with a linear layer
    with gwa_logging.watch(pipeline.watched.submod) as monitor:
        for x, y, _ in batches(0):
            pipeline.step(x, y)
        monitor.end_epoch()
    return Outcome.of(monitor)


def last_dies() -> str:
    """The rank with the head dies; the other one gets the error of torch at once or after its timeout."""
    pipeline = Pipeline()
    with gwa_logging.watch(pipeline.watched) as monitor:
        for x, y, _ in batches(0):
            pipeline.step(x, y)
        if rank():
            os._exit(1)
        with pytest.raises(RuntimeError) as error:
            monitor.end_epoch()
    return str(error.value)


def copies() -> Outcome:
    """Two copies of the pipeline, each with half of every batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    pipeline = Pipeline(group=mesh.get_group("stage"))
    data = mesh.get_group("data")

    def average(optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            distributed.all_reduce(parameter.grad, group=data)
            parameter.grad /= 2

    pipeline.optimizer.register_step_pre_hook(average)
    with gwa_logging.watch(pipeline.watched) as monitor:
        train(pipeline, monitor, share=distributed.get_rank(data), shares=2)
    return Outcome.of(monitor)


WITH_IDS: dict[str, Callable[[], Outcome]] = {
    "ids, GPipe": partial(with_ids, ScheduleGPipe),
    "ids, 1F1B": partial(with_ids, Schedule1F1B),
    "ids, zero bubble": partial(with_ids, ZERO_BUBBLE, **SEVERAL_STAGES),
}
OTHERS = (by_hand, stopping, tracked, messages, wrong_stage, disagreeing)
OTHERS += (watched_by_the_first_alone, without_telling, last_dies)  # the last one ends a rank
WORLD = CASES | WITH_IDS | {function.__name__: function for function in OTHERS}
WORLD_OF_FOUR = {"copies": copies}


@pytest.fixture(scope="session")
def stages(shared_world: Callable[..., World]) -> World:
    return shared_world("two stages", 2, "tests.torch.test_pipeline:WORLD")


@pytest.fixture(scope="session")
def four_stages(shared_world: Callable[..., World]) -> World:
    return shared_world("two stages twice", 4, "tests.torch.test_pipeline:WORLD_OF_FOUR")


@pytest.mark.parametrize("name", CASES)
def test_both_stages_report_the_same_as_one_process_and_the_last_one_writes(stages: World, name: str) -> None:
    first, last = stages[name]
    assert_the_same([first.history, last.history])
    assert_equal(last.history, alone(wide if "wide" in name else layers).history)
    assert (first.faults, last.faults) == ({}, {})
    assert first.journal is None
    assert last.journal is not None


def test_a_pipeline_by_hand_reports_the_same_with_the_rank_of_the_head(stages: World) -> None:
    first, last = stages["by_hand"]
    assert_the_same([first.history, last.history])
    assert_equal(last.history, alone().history)
    assert (first.faults, last.faults, first.journal) == ({}, {}, None)


@pytest.mark.parametrize("name", WITH_IDS)
def test_every_microbatch_takes_its_ids_and_a_resumed_pipeline_counts_everything_once(stages: World, name: str) -> None:
    first, last = stages[name]
    want = alone(num_samples=IDS)
    assert_the_same([first.history, last.history])
    assert_equal(last.history, want.history)
    assert first.suspects == last.suspects
    expected = {s.id: (s.times_seen, s.mean_score) for s in want.suspects_of_test}  # type: ignore[attr-defined]
    assert {s.id: s.times_seen for s in last.suspects} == {i: seen for i, (seen, _) in expected.items()}
    scores = {s.id: s.mean_score for s in last.suspects}
    assert scores == pytest.approx({i: score for i, (_, score) in expected.items()}, rel=0, abs=1e-6)
    assert first.steps == last.steps == EPOCHS * BATCHES * MICROBATCHES - 1


def test_the_stages_end_in_the_same_epoch(stages: World) -> None:
    first, last = stages["stopping"]
    assert_the_same([first.history, last.history])
    assert len(last.history) < 30


def test_the_journal_and_the_tracker_have_every_interval_of_the_last_stage_once(stages: World) -> None:
    from mlflow import MlflowClient

    _, last = stages["tracked"]
    folder = stages.folder / "tracked"
    records, _ = read_journal(folder / last.journal)
    intervals = [record for record in records if record.kind == "interval"]
    steps = BATCHES * MICROBATCHES * EPOCHS
    assert sum(record.count for record in intervals) == EPOCHS * BATCHES * BATCH
    assert sum(record.steps for record in intervals) == steps
    assert len({record.step for record in intervals}) == len(intervals)
    client = MlflowClient(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    counts = [metric.value for metric in client.get_metric_history(run.info.run_id, "gwa/stats/count")]
    assert counts == [BATCHES * BATCH] * EPOCHS
    assert len(client.get_metric_history(run.info.run_id, "gwa/negative_fraction")) == len(intervals)


def test_wrong_calls_say_what_to_do(stages: World) -> None:
    for found in stages["messages"]:
        assert "a stage of a pipeline cannot be evaluated alone" in found["look"]
        assert "save a checkpoint on every rank" in found["keep_best"]
        assert "the PipelineStage knows which rank has the head" in found["both"]
        assert "this run has 2 ranks, from 0 to 1" in found["unknown rank"]
        assert "HeadOnRanks(ranks='last')" in found["not a rank"]
        assert "HeadOnRanks(ranks=[])" in found["no rank"]
        assert "expected a dotted path" in found["not a path"]
        assert "samples_per_epoch" in found["windows"]
        assert "pass the PipelineStage to watch()" in found["no head"]


def test_a_rank_that_passes_another_stage_than_its_last_is_refused(stages: World) -> None:
    first, last = stages["wrong_stage"]
    assert first == ""
    assert "this is stage 1 of 4, and rank 1 has the last one" in last
    assert "Create the schedule before watch()" in last


def test_ranks_that_disagree_on_settings_are_refused_when_the_second_one_calls_watch(stages: World) -> None:
    first, second = stages["disagreeing"]
    assert first == ["", "", ""]
    assert "num_samples: this process passes 11 to watch(), another one 10. Pass the same value" in second[0]
    assert "early_stop: this process passes None to watch(), another one EarlyStop(action='stop')" in second[1]
    assert "unit: this process passes 'position' to watch(), another one 'sample'" in second[2]


def test_a_rank_with_the_head_that_never_called_watch_is_named(stages: World) -> None:
    (message, faults), _ = stages["watched_by_the_first_alone"]
    assert faults == {"ranks without watch()": 1}
    assert "This rank has no head (head: on rank 1). ranks [1] have not called watch()" in message


def test_stages_watched_as_whole_models_are_reported_with_the_remedy(stages: World) -> None:
    for outcome in stages["without_telling"]:
        assert outcome.faults == {"ranks with different heads": 1}
        assert any("pass the PipelineStage to watch()" in note for note in outcome.history[-1].notes)


def test_when_the_rank_with_the_head_dies_the_other_one_gets_an_error_from_torch(stages: World) -> None:
    assert isinstance(stages.of_rank("last_dies", 1), Failure)
    assert "gloo" in stages.of_rank("last_dies", 0).lower()


def test_of_two_copies_of_a_pipeline_both_count_and_one_writes(four_stages: World) -> None:
    found = four_stages["copies"]
    assert_the_same([outcome.history for outcome in found])
    assert_equal(found[0].history, alone().history)
    assert [outcome.journal is not None for outcome in found] == [False, True, False, False]
    assert all(outcome.faults == {} for outcome in found)
