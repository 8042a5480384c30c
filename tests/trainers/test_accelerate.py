"""watch() for Accelerate: the results of the plain loop, its trackers and its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch import nn
from torch.utils.data import DataLoader

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError, Monitor
from gwa_logging.integrations.accelerate import watch
from gwa_logging.journal import read_journal
from tests.trainers.tasks import BATCH, EPOCHS, RATE, SAMPLES, assert_equal, loader, net, plain, weights


def train(
    accelerator: Accelerator,
    watching: Any = watch,
    model: nn.Module | None = None,
    batch: int = BATCH,
    save: int = -1,
    resume: int | None = None,
    **arguments: Any,
) -> tuple[Monitor, nn.Module]:
    """A loop like those of Accelerate's examples; it saves its state after step `save`, or resumes at step `resume`."""
    model = model or net()
    prepared, optimizer, data = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=RATE), DataLoader(loader().dataset, batch)
    )
    monitor, step = watching(accelerator, prepared, **arguments), 0
    if resume is not None:
        accelerator.load_state("state")
        step = resume
    for _ in monitor.epochs(EPOCHS):
        for x, y, ids in skip_first_batches(data, step % len(data)):
            with accelerator.accumulate(prepared):
                if "num_samples" in arguments:
                    monitor.tag(ids)
                with accelerator.autocast():
                    loss = nn.functional.cross_entropy(prepared(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.log({"loss": loss.item()}, step=step)
            step += 1
            if step == save:
                if step % len(data) == 0:
                    monitor.end_epoch()
                accelerator.save_state("state")
    monitor.close()
    return monitor, model


def bare_watch(accelerator: Accelerator, model: nn.Module, **arguments: Any) -> Monitor:
    return gwa_logging.watch(model, **arguments)


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    monitor, model = train(Accelerator(cpu=True))
    bare = net()
    assert_equal(monitor.history, plain(bare)[0])
    assert torch.equal(weights(model), weights(bare))
    assert monitor.faults == {}


def test_accumulated_and_mixed_precision_steps_count_each_sample_once():
    monitor, _ = train(Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with gwa_logging.watch(model) as expected:
        for _ in range(EPOCHS):
            for index, (x, y, _) in enumerate(loader()):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(x)
                (nn.functional.cross_entropy(logits.float(), y) / 2).backward()
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            expected.end_epoch()
    assert_equal(monitor.history, expected.history)
    assert [report.count + report.excluded for report in monitor.history] == [SAMPLES] * EPOCHS


def test_the_alert_ends_the_loop_only_with_action_stop():
    rule = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1
    assert len(train(Accelerator(cpu=True), early_stop=EarlyStop(**rule))[0].history) == EPOCHS
    assert len(train(Accelerator(cpu=True), early_stop=EarlyStop(action="stop", **rule))[0].history) == 2


@pytest.mark.parametrize("step", [4, 6], ids=["end of an epoch", "middle of an epoch"])
def test_a_resumed_loop_equals_an_uninterrupted_one(step):
    arguments = {"num_samples": SAMPLES, "log_every_n_steps": 3}
    whole, _ = train(Accelerator(cpu=True), save=step, **arguments)
    kept = torch.load("state/custom_checkpoint_0.pkl", weights_only=True)
    json.dumps(kept)
    resumed, _ = train(Accelerator(cpu=True), resume=step, **arguments)
    assert_equal(resumed.history, whole.history)
    assert_equal(whole.history, plain(net())[0])
    assert resumed.suspects(SAMPLES) == whole.suspects(SAMPLES)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("wandb", "mlflow")), "tensorboard"]
)
def test_results_go_into_the_run_of_the_accelerators_tracker(kind, tmp_path, monkeypatch, mlflow_uri):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if kind == "mlflow":
        import mlflow

        mlflow.set_tracking_uri(mlflow_uri())
    accelerator = Accelerator(cpu=True, log_with=kind, project_dir=tmp_path)
    accelerator.init_trackers("project")
    tracker = accelerator.get_tracker(kind, unwrap=True)
    monitor, _ = train(accelerator)
    place = read_journal(monitor.journal)[0][0].places[kind].run
    assert monitor.faults == {}
    if kind == "wandb":
        assert place == tracker.path
    if kind == "tensorboard":
        assert place == tracker.log_dir
        assert list(Path(place, "gwa").glob("events.out.*"))
    accelerator.end_training()
    if kind == "mlflow":
        found = mlflow.MlflowClient().get_run(place).data.metrics
        assert found["gwa/stats/mean"] == pytest.approx(monitor.history[-1].mean)
        assert "loss" in found
        assert place == tracker.info.run_id


def test_what_the_accelerator_logs_does_not_change(tmp_path):
    def run(watching: Any) -> list[tuple[int, float]]:
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / watching.__name__)
        accelerator.init_trackers("project")
        train(accelerator, watching)
        accelerator.end_training()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / watching.__name__ / "project")).Reload()
        assert events.Tags()["scalars"] == ["loss"]
        return [(event.step, event.value) for event in events.Scalars("loss")]

    assert run(watch) == run(bare_watch)


def test_watching_again_replaces_the_first_watch_and_its_state():
    accelerator, model = Accelerator(cpu=True), net()
    first, _ = train(accelerator, model=model)
    second, _ = train(accelerator, model=model, save=4)
    assert first is not second
    assert [path.name for path in Path("state").glob("custom*")] == ["custom_checkpoint_0.pkl"]
    third, _ = train(accelerator, model=net())  # another model has its own state
    accelerator.save_state("both")
    assert len(list(Path("both").glob("custom*"))) == 2
    assert len(third.history) == EPOCHS


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInputError, match="watch\\(accelerator, model\\)"):
        watch(net(), Accelerator(cpu=True))
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        watch(Accelerator(cpu=True), net(), log_every_n_step=3)


def train_ddp(folder: str) -> None:
    """Runs in each of two processes, on half of every batch."""
    torch.set_num_threads(1)
    os.chdir(folder)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    monitor, _ = train(accelerator, batch=BATCH // 2, save=2, num_samples=SAMPLES)
    result = [report.model_dump(mode="json") for report in monitor.history]
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(tmp_path, two_processes):
    two_processes("tests.trainers.test_accelerate", "train_ddp", tmp_path)
    assert len(list(tmp_path.glob("gwa_runs/*/journal.jsonl"))) == 1
    expected = plain(net())[0]
    for rank in (0, 1):
        reports = [EpochReport.model_validate(r) for r in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert_equal(reports, expected)
