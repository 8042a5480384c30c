"""The callback for Transformers: the results of the plain loop, and the trainer's own stopping, resuming and logging."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError
from gwa_logging.integrations.transformers import GWACallback, _runs
from gwa_logging.journal import read_journal
from tests.trainers.tasks import (
    BATCH,
    EPOCHS,
    RATE,
    SAMPLES,
    Samples,
    assert_adds_only_its_session,
    assert_closed,
    assert_equal,
    loader,
    net,
    plain,
    samples,
    weights,
)

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
    """Does not shuffle, as the plain loop."""

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


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    callback, bare, training = GWACallback(), net(), trainer()
    training.add_callback(callback)
    training.train()
    assert_equal(callback.monitor.history, plain(bare)[0])
    assert torch.equal(weights(training.model.model), weights(bare))
    assert callback.monitor.faults == {}


def test_the_consensus_equals_that_of_the_plain_loop():
    look, bare = next(iter(loader()))[0], net()
    callback = GWACallback(look={"x": look})
    training = trainer(callback)
    training.train()
    assert_equal(callback.monitor.history, plain(bare, look=look)[0])
    assert torch.equal(weights(training.model.model), weights(bare))
    assert callback.monitor.history[1].consensus is not None
    assert callback.monitor.faults == {}


@pytest.mark.parametrize("given", [False, True])
def test_the_inputs_of_a_look_are_chosen_from_the_trainers_data_set(given):
    """All of them, since there are fewer than 512; in batches of the training's size, or of 64."""
    arguments = {"dataset": Samples(NAMES)} if given else {}
    callback, bare = GWACallback(look="auto", **arguments), net()
    trainer(callback).train()
    x = torch.from_numpy(samples()[0])
    assert_equal(callback.monitor.history, plain(bare, look=list(x.split(64 if given else BATCH)))[0])
    assert callback.monitor.history[-1].consensus is not None
    assert callback.monitor.faults == {}


def test_the_inputs_of_a_look_are_chosen_also_with_ids_and_a_column_that_the_trainer_keeps():
    callback, bare = GWACallback(look="auto", num_samples=SAMPLES, sample_ids="id"), net()
    trainer(callback, label_names=["labels"]).train()
    assert callback.monitor.history[0].consensus is not None  # formed by training's predictions, which the ids name
    without = [r.model_copy(update={"consensus": None, "is_best": False}) for r in callback.monitor.history]
    expected = [r.model_copy(update={"is_best": False}) for r in plain(bare)[0]]
    assert_equal(without, expected)
    assert callback.monitor.faults == {}
    assert len(callback.monitor.suspects()) == min(100, SAMPLES)


def test_the_callback_adds_nothing_but_its_session_and_monitor():
    assert_adds_only_its_session(GWACallback(), TrainerCallback)


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


def test_what_the_trainer_logs_does_not_change():
    def run(*callbacks: Any) -> tuple[list[dict[str, float]], Tensor]:
        training = trainer(*callbacks, eval_strategy="epoch")
        training.train()
        timed = ("runtime", "per_second")
        rows = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in training.state.log_history]
        return rows, weights(training.model)

    (rows, end), (bare_rows, bare_end) = run(GWACallback(log_every_n_steps=1)), run()
    assert rows == bare_rows
    assert torch.equal(end, bare_end)


def test_a_line_per_epoch_appears_with_the_progress_bar(capsys):
    callback = GWACallback()
    trainer(callback, disable_tqdm=False).train()
    shown = capsys.readouterr().out
    assert [str(report) in shown for report in callback.monitor.history] == [True] * EPOCHS
    trainer(GWACallback(), disable_tqdm=True).train()
    assert "GWA" not in capsys.readouterr().out


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


def test_the_alert_stops_the_trainer_only_with_action_stop():
    alerted, stopped = (
        GWACallback(early_stop=EarlyStop(**RULE)),
        GWACallback(early_stop=EarlyStop(action="stop", **RULE)),
    )
    trainer(alerted).train()
    trainer(stopped).train()
    assert alerted.monitor.alert is not None
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == alerted.monitor.alert.epoch + 1 < EPOCHS


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
def test_a_resumed_training_equals_an_uninterrupted_one(saves, step):
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


def test_with_ids_replaces_a_column_of_ids():
    callback, own = GWACallback(**LEDGER | {"sample_ids": "sample_id"}), GWACallback(**LEDGER)
    rows = [{"x": row["x"], "labels": row["labels"]} for row in Samples(NAMES)]
    training = trainer(callback, remove_unused_columns=False)
    training.train_dataset = gwa_logging.with_ids(rows)
    training.train()
    trainer(own, remove_unused_columns=False).train()
    assert callback.monitor.suspects(SAMPLES) == own.monitor.suspects(SAMPLES)
    assert callback.monitor.faults == {}


def test_a_checkpoint_requested_after_the_callback_starts_gwa_from_zero_with_a_warning(caplog):
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


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("wandb", "mlflow")), "tensorboard"]
)
def test_results_go_into_the_run_that_the_trainer_reports_to(kind, monkeypatch, mlflow_uri):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if kind == "mlflow":
        import mlflow

        mlflow.set_tracking_uri(mlflow_uri())
    callback = GWACallback()
    trainer(callback, report_to=[kind]).train()
    place = read_journal(callback.monitor.journal)[0][0].places[kind].run
    assert callback.monitor.faults == {}
    if kind == "wandb":
        import wandb

        assert place == wandb.run.path
        wandb.finish()
    if kind == "mlflow":
        found = mlflow.MlflowClient().get_run(place).data.metrics
        assert found["gwa/stats/mean"] == pytest.approx(callback.monitor.history[-1].mean)
        assert "loss" in found
        mlflow.end_run()
    if kind == "tensorboard":
        assert Path(place).parent == Path("out/runs").absolute()
        assert list(Path(place).glob("events.out.*"))
        assert list(Path(place, "gwa").glob("events.out.*"))


def test_active_runs_are_used_for_the_trackers_that_are_known(tmp_path):
    reporting = TrainingArguments(output_dir=tmp_path, report_to=["wandb", "mlflow", "codecarbon"])
    assert _runs(reporting) == {"wandb": None, "mlflow": None}


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_wrong_argument_raises_before_the_trainer_is_built():
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)


def test_two_callbacks_in_one_trainer_are_refused_until_one_is_removed():
    training = trainer(GWACallback(), GWACallback())
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        training.train()
    training.remove_callback(GWACallback)
    training.train()


def test_a_callback_that_was_added_too_late_to_keep_the_ids_is_refused():
    training = trainer()
    training.add_callback(GWACallback(**LEDGER))
    with pytest.raises(
        InvalidInputError, match=r"pass the callback as Trainer\(callbacks=\[...\]\) instead of add_callback"
    ):
        training.train()


def test_the_trainer_keeps_the_column_of_ids_and_drops_others_as_before():
    kept, dropping = GWACallback(**LEDGER), GWACallback(**LEDGER)
    trainer(kept, remove_unused_columns=False).train()
    training = trainer(dropping, names=("x", "labels", "id"))
    training.train()
    assert dropping.monitor.suspects(SAMPLES) == kept.monitor.suspects(SAMPLES)
    assert set(next(iter(training.get_eval_dataloader()))) == {"x", "labels"}
    training.evaluate()
    assert "id" not in training._signature_columns


def test_ids_missing_from_the_batch_are_refused_at_the_first_batch():
    with pytest.raises(InvalidInputError, match="sample_ids='idx': not found in the batch"):
        trainer(GWACallback(num_samples=SAMPLES, sample_ids="idx"), remove_unused_columns=False).train()


def test_dropped_labels_are_refused_by_the_trainer_itself():
    callback = GWACallback()
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer(callback, names=("x", "target", "id")).train()
    assert callback.monitor.history == []


def test_a_training_without_steps_closes_the_monitor():
    callback = GWACallback()
    trainer(callback, epochs=0).train()
    assert_closed(callback.monitor)


def test_another_model_starts_from_zero():
    callback, first, second = GWACallback(), Classifier(), Classifier()
    trainer(callback, model=first).train()
    trainer(callback, model=second, epochs=2).train()
    assert_equal(callback.monitor.history, plain(net(), 2)[0])
    assert not first.model[2]._forward_hooks


def test_the_callback_works_again_after_a_training_that_failed():
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


def train_ddp(folder: str) -> None:
    """Runs in each of two processes, on half of every batch."""
    torch.set_num_threads(1)
    os.chdir(folder)
    callback = GWACallback(**LEDGER)
    halves = {"per_device_train_batch_size": BATCH // 2, "remove_unused_columns": False}
    training = trainer(callback, save_strategy="epoch", ddp_backend="gloo", **halves)
    training.train()
    result = [report.model_dump(mode="json") for report in callback.monitor.history]
    Path(folder, f"{training.args.process_index}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(tmp_path, two_processes):
    two_processes("tests.trainers.test_transformers", "train_ddp", tmp_path)
    assert len(list(tmp_path.glob("gwa_runs/*/journal.jsonl"))) == 1
    expected = plain(net())[0]
    for rank in (0, 1):
        reports = [EpochReport.model_validate(r) for r in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert_equal(reports, expected)


@pytest.mark.parametrize("keep_best", [True, "averaged"])
def test_the_best_weights_can_be_restored_after_the_training(keep_best):
    steps: list[list[Tensor]] = []

    class Copies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            steps.append([weight.detach().clone().double() for weight in model.parameters()])

    callback = GWACallback(keep_best=keep_best, early_stop=EarlyStop(warmup=0))
    trained = trainer(callback, Copies(), epochs=1)
    trained.train()
    with torch.no_grad():
        trained.model.model[2].weight.zero_()
    assert callback.monitor.restore_best() == 0
    expected = steps[-1] if keep_best is True else [torch.stack(each).mean(0) for each in zip(*steps, strict=True)]
    for weight, value in zip(trained.model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.double(), value, rtol=1e-6, atol=1e-6)
