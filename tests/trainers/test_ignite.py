"""The handler for Ignite: the results of the plain loop, and the engine's own stopping, resuming and logging."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from gwa_logging import EarlyStop, EpochReport, InvalidInputError
from gwa_logging.journal import read_journal
from tests.trainers.tasks import (
    BATCH,
    EPOCHS,
    RATE,
    SAMPLES,
    Samples,
    assert_closed,
    assert_equal,
    loader,
    net,
    plain,
    weights,
)

ignite = pytest.importorskip("ignite.engine", reason="pytorch-ignite is not installed")
from ignite.engine import Engine, Events  # noqa: E402
from ignite.engine.deterministic import DeterministicEngine  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver  # noqa: E402

from gwa_logging.integrations.ignite import GWAHandler  # noqa: E402


def engine(model: nn.Module, kind: type = Engine) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(trainer: Engine, batch: Any) -> float:
        x, y, _ = batch
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return kind(step)


def train(handler: GWAHandler, model: nn.Module, epochs: int = EPOCHS) -> Engine:
    trainer = engine(model)
    handler.attach(trainer)
    trainer.run(loader(), max_epochs=epochs)
    return trainer


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    model, bare = net(), net()
    handler = GWAHandler(model)
    trainer = train(handler, model)
    assert_equal(handler.monitor.history, plain(bare)[0])
    assert torch.equal(weights(model), weights(bare))
    assert handler.monitor.faults == {}
    assert trainer.state.metrics["gwa/separation"] == handler.monitor.history[-1].separation
    assert_closed(handler.monitor)
    assert not model[2]._forward_hooks


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


@pytest.mark.slow
def test_the_alert_terminates_the_engine_only_with_action_stop():
    models = net(), net(), net()
    alerted = GWAHandler(models[0], early_stop=EarlyStop(**RULE))
    stopped = GWAHandler(models[1], early_stop=EarlyStop(action="stop", **RULE))
    window = GWAHandler(
        models[2], early_stop=EarlyStop(action="stop", **RULE), samples_per_epoch=BATCH, log_every_n_steps=1
    )
    engines = [train(handler, model) for handler, model in zip((alerted, stopped, window), models, strict=True)]
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == engines[1].state.epoch == alerted.monitor.alert.epoch + 1 < EPOCHS
    assert engines[2].state.iteration < EPOCHS * SAMPLES // BATCH
    assert_closed(window.monitor)


@pytest.mark.slow
@pytest.mark.parametrize("attached", ["before the checkpoint", "after the checkpoint"])
@pytest.mark.parametrize("event", ["epoch", "step"])
def test_a_resumed_run_equals_an_uninterrupted_one(event, attached, tmp_path):
    arguments = {"num_samples": SAMPLES, "sample_ids": 2, "log_every_n_steps": 3}

    def run(folder: Path | None, resume: Path | None = None) -> GWAHandler:
        model = net()
        trainer, handler = engine(model, DeterministicEngine), GWAHandler(model, **arguments)
        parts = {"trainer": trainer, "model": model, "gwa": handler}
        if attached.startswith("before"):
            handler.attach(trainer)
        if folder is not None:
            when = Events.EPOCH_COMPLETED if event == "epoch" else Events.ITERATION_COMPLETED(every=2)
            trainer.add_event_handler(when, Checkpoint(parts, DiskSaver(folder, require_empty=False), n_saved=None))
        if attached.startswith("after"):
            handler.attach(trainer)
        if resume is not None:
            Checkpoint.load_objects(parts, torch.load(resume, weights_only=False))  # Ignite's random states
        trainer.run(loader(), max_epochs=EPOCHS)
        return handler

    whole = run(tmp_path)
    step = 4 if event == "epoch" else 6
    (path,) = tmp_path.glob(f"checkpoint_{step}.pt")
    json.dumps(torch.load(path, weights_only=False)["gwa"])
    resumed = run(None, path)
    assert_equal(whole.monitor.history, plain(net())[0])
    assert_equal(resumed.monitor.history, whole.monitor.history)
    assert resumed.monitor.suspects(SAMPLES) == whole.monitor.suspects(SAMPLES)


@pytest.mark.slow
def test_a_further_run_with_more_epochs_resumes_and_a_new_run_starts_from_zero():
    model = net()
    handler = GWAHandler(model)
    trainer = train(handler, model, 2)
    trainer.run(loader(), max_epochs=EPOCHS)
    assert_equal(handler.monitor.history, plain(net())[0])
    trainer.state.max_epochs = None
    trainer.run(loader(), max_epochs=2)
    assert [report.epoch for report in handler.monitor.history] == [0, 1]


@pytest.mark.slow
def test_an_epoch_that_terminate_cuts_short_is_completed_by_the_resumed_run():
    model = net()
    trainer, handler = engine(model, DeterministicEngine), GWAHandler(model)
    handler.attach(trainer)
    with trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda _: trainer.terminate()):
        trainer.run(loader(), max_epochs=EPOCHS)
    assert [report.count for report in handler.monitor.history] == [SAMPLES, 2 * BATCH]
    states = [part.state_dict() for part in (trainer, model, handler)]

    model = net()
    parts = trainer, _, handler = engine(model, DeterministicEngine), model, GWAHandler(model)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    handler.attach(trainer)
    trainer.run(loader(), max_epochs=EPOCHS)
    assert_equal(handler.monitor.history, plain(net())[0])


@pytest.mark.slow
def test_the_look_chooses_inputs_from_the_engines_loader_and_a_stream_is_a_fault():
    model, bare = net(), net()
    handler = GWAHandler(model, look="auto")
    train(handler, model)
    x = torch.stack([row[0] for row in Samples()])
    assert_equal(handler.monitor.history, plain(bare, look=list(x.split(BATCH)))[0])

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(Samples())

    model = net()
    handler = GWAHandler(model, look="auto")
    trainer = engine(model)
    handler.attach(trainer)
    trainer.run(DataLoader(Stream(), BATCH), max_epochs=2)
    assert handler.monitor.faults == {"look": 2}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_in_training_closes_the_monitor_and_is_raised_unless_the_user_handles_it():
    def failing(model: nn.Module) -> tuple[Engine, GWAHandler]:
        trainer, handler = engine(model), GWAHandler(model)
        handler.attach(trainer)

        @trainer.on(Events.ITERATION_COMPLETED(once=5))
        def fail() -> None:
            raise RuntimeError("on purpose")

        return trainer, handler

    trainer, handler = failing(net())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.run(loader(), max_epochs=EPOCHS)
    assert read_journal(handler.monitor.journal)[0][-1].kind == "close"

    trainer, handler = failing(net())
    handled = []
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: handled.append(error))
    trainer.run(loader(), max_epochs=EPOCHS)
    assert len(handled) == 1
    assert_closed(handler.monitor)


def test_wrong_arguments_are_refused():
    model = net()
    trainer, handler = engine(model), GWAHandler(model)
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWAHandler(model, log_every_n_step=3)
    with pytest.raises(InvalidInputError, match=r"GWAHandler\(model\)\.attach\(engine\)"):
        GWAHandler(trainer)
    with pytest.raises(InvalidInputError, match=r"expected an ignite\.engine\.Engine, found Sequential"):
        handler.attach(model)
    handler.attach(trainer)
    with pytest.raises(InvalidInputError, match="attached to it already"):
        handler.attach(trainer)


@pytest.mark.slow
def test_two_handlers_and_missing_ids_are_refused_when_the_run_starts():
    model = net()
    trainer = engine(model)
    for _ in range(2):
        GWAHandler(model).attach(trainer)
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        trainer.run(loader(), max_epochs=1)
    with pytest.raises(InvalidInputError, match="sample_ids='id': not found in the batch"):
        train(GWAHandler(model, num_samples=SAMPLES, sample_ids="id"), model)


# --- several processes ------------------------------------------------------------------------------------------------


def train_ddp(folder: str) -> None:
    """Runs in each of two processes, on half of every batch."""
    torch.set_num_threads(1)
    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(net())
    handler = GWAHandler(model, num_samples=SAMPLES, sample_ids=2)
    trainer = engine(model)
    handler.attach(trainer)
    sampler = DistributedSampler(loader().dataset, 2, rank, shuffle=False)
    trainer.run(DataLoader(loader().dataset, BATCH // 2, sampler=sampler), max_epochs=EPOCHS)
    result = [report.model_dump(mode="json") for report in handler.monitor.history]
    Path(f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(tmp_path, two_processes):
    two_processes("tests.trainers.test_ignite", "train_ddp", tmp_path)
    assert len(list(tmp_path.glob("gwa_runs/*/journal.jsonl"))) == 1
    expected = plain(net())[0]
    for rank in (0, 1):
        reports = [EpochReport.model_validate(r) for r in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert_equal(reports, expected)
