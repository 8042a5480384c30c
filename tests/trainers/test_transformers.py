"""The Trainer's callback: the numbers of the plain loop, the trainer's own ways of stopping, resuming and logging."""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import wandb
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError
from gwa_logging.integrations.transformers import GWACallback
from gwa_logging.journal import read_journal
from tests.trainers.tasks import BATCH, EPOCHS, RATE, SAMPLES, Samples, assert_equal, loader, net, plain, weights

STEPS = SAMPLES // BATCH


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


class InOrder(Trainer):
    """Takes the samples in their order, as the plain loop does."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


NAMES = ("x", "labels", "id")


def trainer(*callbacks: Any, model: Any = None, names: Any = NAMES, epochs: int = EPOCHS, **arguments: Any) -> Trainer:
    settings = {
        "output_dir": "out",
        "num_train_epochs": epochs,
        "per_device_train_batch_size": BATCH,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    training = TrainingArguments(**settings | arguments)
    data = {"train_dataset": Samples(names), "eval_dataset": Samples(names)}
    return InOrder(model or Classifier(), training, callbacks=[*callbacks], **data)


def test_statistics_and_weights_are_those_of_the_plain_loop():
    callback, bare, training = GWACallback(), net(), trainer()
    training.add_callback(callback)
    training.train()
    assert_equal(callback.monitor.history, plain(bare)[0])
    assert torch.equal(weights(training.model.model), weights(bare))
    assert callback.monitor.faults == {}


def test_accumulated_and_mixed_precision_steps_count_each_sample_once():
    callback = GWACallback()
    trainer(callback, gradient_accumulation_steps=2, bf16=True).train()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with gwa_logging.watch(model) as monitor:
        for _ in range(EPOCHS):
            for index, (x, y, _) in enumerate(loader()):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x), y) / 2
                loss.backward()
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            monitor.end_epoch()
    assert_equal(callback.monitor.history, monitor.history)
    assert [report.count + report.excluded for report in monitor.history] == [SAMPLES] * EPOCHS


def test_nothing_that_the_trainer_logs_is_changed():
    def run(*callbacks: Any) -> tuple[list[dict[str, float]], Tensor]:
        training = trainer(*callbacks, eval_strategy="epoch")
        training.train()
        timed = ("runtime", "per_second")
        rows = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in training.state.log_history]
        return rows, weights(training.model)

    (rows, end), (bare_rows, bare_end) = run(GWACallback(log_every_n_steps=1)), run()
    assert rows == bare_rows
    assert torch.equal(end, bare_end)


def test_a_line_for_each_epoch_shows_beside_the_progress_bar(capsys):
    callback = GWACallback()
    trainer(callback, disable_tqdm=False).train()
    shown = capsys.readouterr().out
    assert all(str(report) in shown for report in callback.monitor.history)
    trainer(GWACallback(), disable_tqdm=True).train()
    assert "GWA" not in capsys.readouterr().out


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


def test_the_alert_stops_the_trainer_only_if_it_is_told_to():
    told, stopped = GWACallback(early_stop=EarlyStop(**RULE)), GWACallback(early_stop=EarlyStop(action="stop", **RULE))
    trainer(told).train()
    trainer(stopped).train()
    assert told.monitor.alert is not None
    assert len(told.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == told.monitor.alert.epoch + 1 < EPOCHS


def test_a_window_of_samples_can_stop_the_trainer_within_an_epoch():
    callback = GWACallback(early_stop=EarlyStop(action="stop", **RULE), samples_per_epoch=BATCH, log_every_n_steps=1)
    training = trainer(callback)
    training.train()
    assert callback.monitor.alert.epoch == 1
    assert training.state.global_step < EPOCHS * STEPS


LEDGER = {"num_samples": SAMPLES, "sample_ids": "id", "log_every_n_steps": 3}


@pytest.mark.parametrize(
    ("saves", "step"),
    [
        ({"save_strategy": "epoch"}, STEPS),
        ({"save_strategy": "epoch", "restore_callback_states_from_checkpoint": True}, STEPS),
        ({"save_strategy": "steps", "save_steps": STEPS}, STEPS),  # before the epoch is closed
        ({"save_strategy": "steps", "save_steps": 3}, 6),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}, 2),
    ],
    ids=["epoch", "callbacks restored", "end of an epoch", "middle of an epoch", "best"],
)
def test_a_training_that_is_resumed_from_a_checkpoint_equals_one_that_was_not_interrupted(saves, step):
    def run(callback: GWACallback, resume: str | None = None) -> None:
        training = trainer(callback, remove_unused_columns=False, **saves)
        training.train(resume_from_checkpoint=resume)

    whole, resumed = GWACallback(**LEDGER), GWACallback(**LEDGER)
    run(whole)
    run(resumed, f"out/checkpoint-{step}")
    assert_equal(resumed.monitor.history, whole.monitor.history)
    assert_equal(whole.monitor.history, plain(net())[0])
    assert resumed.monitor.suspects(SAMPLES) == whole.monitor.suspects(SAMPLES)
    assert [suspect.times_seen for suspect in whole.monitor.suspects(SAMPLES)] == [EPOCHS] * SAMPLES


def test_a_data_set_with_ids_needs_no_column_of_its_own():
    callback, own = GWACallback(**LEDGER | {"sample_ids": "sample_id"}), GWACallback(**LEDGER)
    rows = [{"x": row["x"], "labels": row["labels"]} for row in Samples(NAMES)]
    training = trainer(callback, remove_unused_columns=False)
    training.train_dataset = gwa_logging.with_ids(rows)
    training.train()
    trainer(own, remove_unused_columns=False).train()
    assert callback.monitor.suspects(SAMPLES) == own.monitor.suspects(SAMPLES)
    assert callback.monitor.faults == {}


def test_a_checkpoint_that_is_asked_for_too_late_begins_anew_and_says_so(caplog):
    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step in (2, 6)

    first, callback = GWACallback(), GWACallback()
    trainer(Late(), first).train()
    trainer(callback).train(resume_from_checkpoint="out/checkpoint-6")
    assert_equal(callback.monitor.history, first.monitor.history)
    assert not caplog.text
    trainer(first, Late()).train()
    trainer(callback).train(resume_from_checkpoint="out/checkpoint-6")
    assert [report.count for report in callback.monitor.history] == [2 * BATCH, SAMPLES]
    assert "Put GWACallback last" in caplog.text


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "tensorboard"])
def test_results_go_into_the_run_that_the_trainer_reports_to(kind, monkeypatch, mlflow_uri):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if kind == "mlflow":
        mlflow.set_tracking_uri(mlflow_uri())
    callback = GWACallback()
    trainer(callback, report_to=[kind]).train()
    place = read_journal(callback.monitor.journal)[0][0].places[kind].run
    assert callback.monitor.faults == {}
    if kind == "wandb":
        assert place == wandb.run.path
        wandb.finish()
    if kind == "mlflow":
        found = mlflow.MlflowClient().get_run(place).data.metrics
        assert found["gwa/mean"] == pytest.approx(callback.monitor.history[-1].mean)
        assert "loss" in found
        mlflow.end_run()
    if kind == "tensorboard":
        assert Path(place).parent == Path("out/runs").absolute()
        assert list(Path(place).glob("events.out.*"))
        assert list(Path(place, "gwa").glob("events.out.*"))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_wrong_argument_is_an_error_before_the_trainer_is_built():
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)


def test_the_callback_added_twice_is_refused_and_can_be_mended():
    training = trainer(GWACallback(), GWACallback())
    with pytest.raises(InvalidInputError, match="this trainer has it twice"):
        training.train()
    training.remove_callback(GWACallback)
    training.train()


def test_ids_that_the_trainer_would_drop_are_refused():
    with pytest.raises(InvalidInputError, match="remove_unused_columns=False"):
        trainer(GWACallback(**LEDGER)).train()


def test_ids_that_are_not_there_are_refused_at_the_first_batch():
    with pytest.raises(InvalidInputError, match="sample_ids='idx': not in the batch"):
        trainer(GWACallback(num_samples=SAMPLES, sample_ids="idx"), remove_unused_columns=False).train()


def test_labels_that_are_dropped_are_refused_by_the_trainer_itself():
    callback = GWACallback()
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer(callback, names=("x", "target", "id")).train()
    assert callback.monitor.history == []


def test_a_trainer_without_training_steps_leaves_nothing_open():
    callback = GWACallback()
    trainer(callback, epochs=0).train()
    assert [record.kind for record in read_journal(callback.monitor.journal)[0]] == ["run", "close"]


def test_another_model_is_watched_anew():
    callback, first, second = GWACallback(), Classifier(), Classifier()
    trainer(callback, model=first).train()
    trainer(callback, model=second, epochs=2).train()
    assert_equal(callback.monitor.history, plain(net(), 2)[0])
    assert not first.model[2]._forward_hooks


def test_training_goes_on_after_one_that_raised():
    class Fails(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            if x.isnan().any():
                raise RuntimeError("on purpose")
            return super().forward(x, labels)

    callback, model = GWACallback(), Fails()
    training = trainer(callback, model=model)
    row = training.train_dataset._columns[0][50]
    good = row.clone()
    row.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="on purpose"):
        training.train()
    row.copy_(good)
    model.load_state_dict(Fails().state_dict())
    training.train()
    assert_equal(callback.monitor.history, plain(net())[0])


# --- several processes ------------------------------------------------------------------------------------------------


def ddp(folder: str) -> None:
    """What each of two processes does, with half of every batch."""
    torch.set_num_threads(1)
    os.chdir(folder)
    callback = GWACallback(**LEDGER)
    halves = {"per_device_train_batch_size": BATCH // 2, "remove_unused_columns": False}
    training = trainer(callback, save_strategy="epoch", ddp_backend="gloo", **halves)
    training.train()
    result = [report.model_dump(mode="json") for report in callback.monitor.history]
    Path(folder, f"{training.args.process_index}.json").write_text(json.dumps(result))


def test_two_processes_report_what_one_would(tmp_path, two_processes):
    two_processes("tests.trainers.test_transformers", "ddp", tmp_path)
    assert len(list(tmp_path.glob("gwa_runs/*/journal.jsonl"))) == 1
    expected = plain(net())[0]
    for rank in (0, 1):
        reports = [EpochReport.model_validate(r) for r in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert_equal(reports, expected)
