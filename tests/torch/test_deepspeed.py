"""DeepSpeed's engine with ZeRO on two CPU ranks over gloo: the same reports as one process without it.

Needs deepspeed (tested with 0.19.8), installed with DS_BUILD_OPS=0. Without it these tests are skipped.
"""

import importlib.util
import os
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import EpochReport, InvalidInputError, Monitor
from gwa_logging.integrations.torch import HeadOnRanks
from tests.torch import test_pipeline
from tests.torch.ranks import World
from tests.torch.test_distributed import (
    BATCH,
    Net,
    Untraceable,
    assert_equal,
    assert_the_same,
    batches,
    cross_entropy,
    in_one_process,
    rank,
    wide,
    world_size,
)
from tests.torch.test_pipeline import MICROBATCHES, layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

EPOCHS = 2


class Outcome(NamedTuple):
    """What a rank reports about a run."""

    history: list[EpochReport]
    faults: dict[str, int]
    writes: bool
    resumed: list[int]

    @classmethod
    def of(cls, monitor: Monitor, resumed: Any = ()) -> "Outcome":
        return cls(monitor.history, monitor.faults, monitor.journal is not None, list(resumed))


def engine_of(model: nn.Module, stage: int, **settings: Any) -> Any:
    os.environ.update({"DS_ACCELERATOR": "cpu", "RANK": str(rank()), "WORLD_SIZE": str(world_size())})
    os.environ["LOCAL_RANK"] = str(rank())
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def train(engine: Any, monitor: Monitor) -> None:
    for epoch in monitor.epochs(EPOCHS):
        for x, y in batches(epoch):
            engine.backward(cross_entropy(engine(x[rank() :: world_size()]), y[rank() :: world_size()]))
            engine.step()


class Case(NamedTuple):
    """A run of two ranks that must equal one of a single process.

    Attributes:
        stage: of ZeRO.
        make: returns the model.
        watch_first: True to watch the model before `deepspeed.initialize`, False to watch the engine.
    """

    stage: int
    make: Callable[[], Net] = Net
    watch_first: bool = False

    def __call__(self) -> Outcome:
        model = self.make()
        monitor = gwa_logging.watch(model) if self.watch_first else None
        engine = engine_of(model, self.stage)
        with monitor or gwa_logging.watch(engine) as monitor:
            train(engine, monitor)
        return Outcome.of(monitor)


CASES = {f"ZeRO-{stage}": Case(stage) for stage in range(4)} | {
    "ZeRO-1, watched before": Case(1, watch_first=True),
    "ZeRO-2, a wide head": Case(2, wide),
    "ZeRO-2, the head found in the first pass": Case(2, Untraceable),
    "ZeRO-3, watched before": Case(3, watch_first=True),
    "ZeRO-3, a wide head": Case(3, wide),
    "ZeRO-3, a wide head, watched before": Case(3, wide, watch_first=True),
    "ZeRO-3, the head found in the first pass": Case(3, Untraceable),
}


def bfloat16() -> Outcome:
    """Mixed precision, two microbatches per optimizer step."""
    engine = engine_of(Net(), 3, bf16={"enabled": True}, gradient_accumulation_steps=2)
    with gwa_logging.watch(engine) as monitor:
        for epoch in monitor.epochs(EPOCHS):
            for x, y in batches(epoch):
                engine.backward(
                    F.cross_entropy(engine(x[rank() :: world_size()].bfloat16()), y[rank() :: world_size()])
                )
                engine.step()
    return Outcome.of(monitor)


def looked() -> Outcome:
    """A look at the end of each epoch, with ids and a resume in the middle of the second one."""
    engine, inputs = engine_of(Net(), 3), next(batches(9))[0]
    x, y = next(batches(0))
    ids = torch.arange(BATCH)[rank() :: world_size()]

    def step(monitor: Monitor) -> None:
        monitor.tag(ids)
        engine.backward(F.cross_entropy(engine(x[ids]), y[ids]))
        engine.step()

    with gwa_logging.watch(engine, look=inputs, num_samples=BATCH) as monitor:
        for _ in range(3):
            step(monitor)
            monitor.end_epoch()
        step(monitor)
        state = monitor.state_dict()
    with gwa_logging.watch(engine, look=inputs, num_samples=BATCH) as monitor:
        monitor.load_state_dict(state)
        step(monitor)
        monitor.end_epoch()
        seen = [int(suspect.times_seen) for suspect in monitor.suspects(BATCH)]
    return Outcome.of(monitor, seen)


def keep_best() -> str:
    with pytest.raises(InvalidInputError) as error:
        gwa_logging.watch(engine_of(Net(), 3), keep_best=True)
    return str(error.value)


def pipeline() -> Outcome:
    """Two stages of DeepSpeed's own pipeline engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo", dist_init_required=False)
    model = PipelineModule(list(layers()), num_stages=2, loss_fn=F.cross_entropy, partition_method="uniform")
    accumulated = {"gradient_accumulation_steps": MICROBATCHES, "train_micro_batch_size_per_gpu": BATCH // MICROBATCHES}
    engine = engine_of(model, 0, **accumulated)
    with gwa_logging.watch(engine, head=HeadOnRanks(1)) as monitor:
        for epoch in monitor.epochs(test_pipeline.EPOCHS):
            batches_of_epoch = list(test_pipeline.batches(epoch))
            parts = [zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True) for x, y, _ in batches_of_epoch]
            feed = chain(*parts)
            for _ in batches_of_epoch:
                engine.train_batch(feed)
    return Outcome.of(monitor)


OTHERS = (bfloat16, looked, keep_best, pipeline)
SCENARIOS: dict[str, Callable[[], Any]] = CASES | {function.__name__: function for function in OTHERS}


def everything() -> dict[str, Any]:
    """All scenarios in one process group, because DeepSpeed keeps references to the first one."""
    return {name: scenario() for name, scenario in SCENARIOS.items()}


WORLD = {"everything": everything}


@pytest.fixture(scope="session")
def engines(shared_world: Callable[..., World]) -> dict[str, list[Any]]:
    """What each rank returned, by scenario."""
    first, second = shared_world("two ranks of deepspeed", 2, "tests.torch.test_deepspeed:WORLD")["everything"]
    return {name: [first[name], second[name]] for name in SCENARIOS}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_of_deepspeed_report_the_same_as_one_process(engines: dict[str, list[Any]], name: str) -> None:
    first, second = engines[name]
    assert_the_same([first.history, second.history])
    assert_equal(first.history, in_one_process(CASES[name].make, cross_entropy))
    assert (first.faults, second.faults) == ({}, {})
    assert (first.writes, second.writes) == (True, False)


def test_mixed_precision_and_accumulated_gradients_count_every_sample(engines: dict[str, list[Any]]) -> None:
    first, second = engines["bfloat16"]
    assert_the_same([first.history, second.history])
    want = in_one_process(Net, cross_entropy)
    for report, exact in zip(first.history, want, strict=True):
        assert (report.count, report.excluded) == (exact.count, 0)
        assert report.std == pytest.approx(exact.std, rel=0.1)
    assert first.faults == second.faults == {}


def test_a_look_and_a_resume_work_under_zero_3(engines: dict[str, list[Any]]) -> None:
    for outcome in engines["looked"]:
        assert [report.count for report in outcome.history] == [BATCH, BATCH, BATCH, 2 * BATCH]
        assert outcome.history[-1].consensus is not None
        assert outcome.resumed == [5] * BATCH
        assert outcome.faults == {}


def test_deepspeeds_pipeline_reports_the_same_as_one_process_and_the_last_stage_writes(
    engines: dict[str, list[Any]],
) -> None:
    first, last = engines["pipeline"]
    assert_the_same([first.history, last.history])
    assert_equal(last.history, test_pipeline.alone().history)
    assert (first.faults, last.faults) == ({}, {})
    assert (first.writes, last.writes) == (False, True)


def test_keeping_the_best_weights_is_refused_under_zero_3(engines: dict[str, list[Any]]) -> None:
    for message in engines["keep_best"]:
        assert "ZeRO-3" in message
        assert "save_checkpoint" in message
