"""The callback for Lightning: the results of the plain loop, and the trainer's own stopping, resuming and logging."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError
from gwa_logging.integrations.lightning import GWACallback, _runs
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

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def trainer(*callbacks: Any, epochs: int = EPOCHS, **arguments: Any) -> lightning.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), log_every_n_steps=1, **quiet | arguments
    )


def fit(callback: GWACallback, module: Any = None, **arguments: Any) -> Any:
    module = module or Classifier()
    trainer(callback, **arguments).fit(module, loader())
    return module


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    callback, bare = GWACallback(), net()
    module = fit(callback)
    assert_equal(callback.monitor.history, plain(bare)[0])
    assert torch.equal(weights(module.model), weights(bare))
    assert callback.monitor.faults == {}


def test_the_consensus_equals_that_of_the_plain_loop_and_a_checkpoint_can_monitor_it(tmp_path):
    look, bare = next(iter(loader()))[0], net()
    callback = GWACallback(look=look)
    best = ModelCheckpoint(tmp_path, monitor="gwa/consensus", mode="max", save_on_train_epoch_end=True)
    module = Classifier()
    trainer(callback, best, enable_checkpointing=True).fit(module, loader())
    assert_equal(callback.monitor.history, plain(bare, look=look)[0])
    assert torch.equal(weights(module.model), weights(bare))
    assert best.best_model_score == max(report.consensus for report in callback.monitor.history[1:])
    assert callback.monitor.faults == {}


@pytest.mark.parametrize("given", [False, True])
def test_the_inputs_of_a_look_are_chosen_from_the_trainers_data_set(given):
    """All of them, since there are fewer than 512; in batches of the training's size, or of 64."""
    arguments = {"dataset": Samples()} if given else {}
    callback, bare = GWACallback(look="auto", **arguments), net()
    fit(callback)
    x = torch.from_numpy(samples()[0])
    assert_equal(callback.monitor.history, plain(bare, look=list(x.split(64 if given else BATCH)))[0])
    assert callback.monitor.history[-1].consensus is not None
    assert callback.monitor.faults == {}


def test_a_training_set_that_has_no_index_is_a_fault_of_the_look(caplog):
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(Samples())

    callback = GWACallback(look="auto")
    trainer(callback).fit(Classifier(), DataLoader(Stream(), batch_size=BATCH))
    assert callback.monitor.faults == {"look": EPOCHS}
    assert "found Stream. From a stream, collect a few hundred inputs and pass look=<inputs> instead" in caplog.text


def test_modules_of_pytorch_lightning_are_accepted_too():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        forward, training_step = Classifier.forward, Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    callback = GWACallback()
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    pytorch_lightning.Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=[callback], **quiet).fit(
        Other(), loader()
    )
    assert_equal(callback.monitor.history, plain(net())[0])


def test_the_callback_adds_nothing_but_its_session_and_monitor():
    assert_adds_only_its_session(GWACallback(), lightning.Callback)


def test_accumulated_and_mixed_precision_steps_count_each_sample_once():
    callback = GWACallback()
    fit(callback, accumulate_grad_batches=2, precision="bf16-mixed")
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


def test_what_the_trainer_logs_does_not_change(tmp_path):
    def run(*callbacks: Any) -> tuple[str, dict[str, Any], Tensor]:
        module, logger = Classifier(), CSVLogger(tmp_path, name=f"{len(callbacks)}")
        fitting = trainer(*callbacks, logger=logger)
        fitting.fit(module, loader(), loader())
        return Path(logger.log_dir, "metrics.csv").read_text(), fitting.logged_metrics, weights(module)

    (rows, logged, end), (bare_rows, bare_logged, bare_end) = run(GWACallback(log_every_n_steps=1)), run()
    assert rows == bare_rows
    assert logged == bare_logged
    assert torch.equal(end, bare_end)


def test_the_progress_bar_shows_gwa():
    seen = []

    class Bar(TQDMProgressBar):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(self.get_metrics(trainer, pl_module))
            super().on_train_epoch_end(trainer, pl_module)

    callback = GWACallback(name="align")
    trainer(callback, Bar(), enable_progress_bar=True).fit(Classifier(), loader())
    reports = callback.monitor.history
    assert [float(bar["align/gwa"]) for bar in seen] == pytest.approx([r.gwa for r in reports], rel=1e-2)
    assert [float(bar["align/stable"]) for bar in seen] == pytest.approx([r.stable_gwa for r in reports], rel=1e-2)


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


def test_the_alert_stops_the_trainer_only_with_action_stop():
    alerted, stopped = (
        GWACallback(early_stop=EarlyStop(**RULE)),
        GWACallback(early_stop=EarlyStop(action="stop", **RULE)),
    )
    fit(alerted)
    fit(stopped)
    assert alerted.monitor.alert is not None
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == alerted.monitor.alert.epoch + 1 < EPOCHS


def test_a_window_of_samples_can_stop_the_trainer_within_an_epoch():
    callback = GWACallback(early_stop=EarlyStop(action="stop", **RULE), samples_per_epoch=BATCH, log_every_n_steps=1)
    fitting = trainer(callback)
    fitting.fit(Classifier(), loader())
    assert callback.monitor.alert.epoch == 1
    assert fitting.global_step < EPOCHS * SAMPLES // BATCH


class Resumable(DataLoader):
    """Lightning resumes in the middle of an epoch only with a stateful loader; with others it repeats the epoch's data."""

    drawn = 0

    def __iter__(self) -> Iterator[Any]:
        batches = list(super().__iter__())
        for batch in batches[self.drawn % len(batches) :]:
            self.__dict__["drawn"] = self.drawn + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


@pytest.mark.parametrize("when", ["validation", "epoch", "step"])
def test_a_resumed_fit_equals_an_uninterrupted_one(when, tmp_path):
    arguments = {"num_samples": SAMPLES, "sample_ids": 2, "log_every_n_steps": 3}
    validation = [loader()] if when == "validation" else []
    often = {"every_n_train_steps": 2} if when == "step" else {"every_n_epochs": 1}
    whole = GWACallback(**arguments)
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **often)
    trainer(whole, saving, enable_checkpointing=True).fit(Classifier(), Resumable(loader().dataset, BATCH), *validation)

    step = 6 if when == "step" else 4
    resumed, module = GWACallback(**arguments), Classifier()
    path = tmp_path / f"step={step}.ckpt"
    kept = torch.load(path, weights_only=True)["callbacks"]["GWACallback"]
    json.dumps(kept)
    trainer(resumed).fit(module, Resumable(loader().dataset, BATCH), *validation, ckpt_path=path)
    assert_equal(resumed.monitor.history, whole.monitor.history)
    assert resumed.monitor.suspects(SAMPLES) == whole.monitor.suspects(SAMPLES)
    assert_equal(whole.monitor.history, plain(net())[0])


@pytest.mark.parametrize("kind", [pytest.param("mlflow", marks=pytest.mark.slow), "wandb", "tensorboard"])
def test_results_go_into_the_run_of_the_trainers_own_logger(kind, tmp_path, monkeypatch, mlflow_uri):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = {
        "wandb": lambda: WandbLogger(save_dir=tmp_path),
        "mlflow": lambda: MLFlowLogger(tracking_uri=mlflow_uri()),
        "tensorboard": lambda: TensorBoardLogger(tmp_path),
    }[kind]()
    callback = GWACallback()
    fit(callback, logger=logger)
    opened = read_journal(callback.monitor.journal)[0][0]
    run = {"wandb": "path", "mlflow": "run_id", "tensorboard": "log_dir"}
    owner = logger.experiment if kind == "wandb" else logger
    assert opened.places[kind].run == str(getattr(owner, run[kind]))
    assert callback.monitor.faults == {}
    if kind == "wandb":
        logger.experiment.finish()
    if kind == "mlflow":
        found = logger.experiment.get_run(logger.run_id).data.metrics
        assert found["gwa/stats/mean"] == pytest.approx(callback.monitor.history[-1].mean)
        assert "loss" in found
    if kind == "tensorboard":
        assert list(Path(logger.log_dir, "gwa").glob("events.out.*"))


@pytest.mark.parametrize(
    ("logger", "attribute", "backend"),
    [
        ("WandbLogger", "experiment", "wandb"),
        ("MLFlowLogger", "run_id", "mlflow"),
        ("TensorBoardLogger", "log_dir", "tensorboard"),
    ],
)
def test_the_run_of_each_kind_of_logger_is_found_also_in_subclasses(logger, attribute, backend):
    kind = type("Derived", (type(logger, (), {}),), {attribute: "first"})
    second = type(logger, (), {attribute: "second"})
    assert _runs([kind(), second(), CSVLogger("out")]) == {backend: "first"}


def test_a_backend_named_by_the_user_takes_precedence_over_the_loggers(tmp_path):
    callback = GWACallback(backend="local")
    fit(callback, logger=TensorBoardLogger(tmp_path))
    assert read_journal(callback.monitor.journal)[0][0].places == {}


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_wrong_argument_raises_before_the_trainer_is_built():
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)
    with pytest.raises(InvalidInputError, match="num_samples="):
        GWACallback(sample_ids="id")


def test_two_callbacks_in_one_trainer_are_refused():
    with pytest.raises(RuntimeError, match="GWACallback"):  # Lightning's own check
        trainer(GWACallback(), GWACallback())

    class Another(GWACallback):
        pass

    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        trainer(GWACallback(), Another()).fit(Classifier(), loader())


@pytest.mark.parametrize("limits", [{"limit_train_batches": 0}, {"max_steps": 0}, {"epochs": 0}], ids=str)
def test_a_fit_without_training_steps_closes_the_monitor(limits):
    callback = GWACallback()
    trainer(callback, **limits).fit(Classifier(), loader())
    assert callback.monitor.history == []
    assert_closed(callback.monitor)


def test_ids_missing_from_the_batch_are_refused_at_the_first_batch():
    with pytest.raises(InvalidInputError, match="sample_ids='id': not found in the batch"):
        fit(GWACallback(num_samples=SAMPLES, sample_ids="id"))


def test_a_further_fit_resumes_for_the_same_model_and_starts_from_zero_for_another():
    callback, first, second = GWACallback(), Classifier(), Classifier()
    fitting = trainer(callback)
    fitting.fit(first, loader())
    earlier = callback.monitor
    fitting.fit_loop.max_epochs = EPOCHS + 2
    fitting.fit(first, loader())
    assert [report.epoch for report in callback.monitor.history] == list(range(EPOCHS + 2))
    assert_equal(callback.monitor.history, plain(net(), EPOCHS + 2)[0])
    fitting.fit_loop.max_epochs = EPOCHS + 4
    fitting.fit(second, loader())
    assert_equal(callback.monitor.history, plain(net(), 2)[0])
    assert len(earlier.history) == EPOCHS
    assert not first.model[2]._forward_hooks


class ManualOptimization(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(x), y))
        optimizer.step()


def test_manual_optimization_is_counted():
    callback = GWACallback()
    fit(callback, ManualOptimization())
    assert_equal(callback.monitor.history, plain(net())[0])


class TwoModels(Classifier):
    """Two models with an optimizer each; `model` is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        for optimizer, loss in zip(self.optimizers(), (self.other(x).square().mean(), self(x)), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss if loss.ndim == 0 else nn.functional.cross_entropy(loss, y))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=RATE) for part in (self.other, self.model)]


def test_with_two_optimizers_the_head_must_be_named():
    with pytest.raises(InvalidInputError, match=r"2 optimizers.*head='classifier\.fc'"):
        fit(GWACallback(), TwoModels())
    callback = GWACallback(head="model.2")
    fit(callback, TwoModels())
    assert_equal(callback.monitor.history, plain(net())[0])


class BodyAndHead(lightning.LightningModule):
    """A body and a head; only training_step connects them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = net()[2], net()[:2]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    configure_optimizers = Classifier.configure_optimizers


class WithForward(BodyAndHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_with_two_submodules_the_head_is_found_through_forward_or_must_be_named():
    with pytest.raises(InvalidInputError, match=r"the submodules head, body and no forward"):
        fit(GWACallback(), BodyAndHead())
    torch.manual_seed(0)
    for module, arguments in ((BodyAndHead(), {"head": "head"}), (WithForward(), {})):
        callback = GWACallback(**arguments)
        fit(callback, module)
        assert "Linear 16 -> 4" in read_journal(callback.monitor.journal)[0][0].head
        assert [report.count for report in callback.monitor.history] == [SAMPLES] * EPOCHS


def test_a_fit_that_fails_closes_the_monitor():
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 5:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    callback, module = GWACallback(), Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(callback, module)
    assert read_journal(callback.monitor.journal)[0][-1].kind == "close"
    assert not module.model[2]._forward_hooks


# --- several processes ------------------------------------------------------------------------------------------------


class Halves(Classifier):
    """Each of two processes takes every second sample, so that together they see the batches of a single process.

    The trainer's own sampler would shuffle.
    """

    def train_dataloader(self) -> DataLoader:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        sampler = DistributedSampler(loader().dataset, ranks, rank, shuffle=False)
        return DataLoader(loader().dataset, BATCH // ranks, sampler=sampler)


class Sharded(Halves):
    """Sharded by fully_shard, as ModelParallelStrategy requires."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (self.model[2], self.model):
            fully_shard(part, mesh=mesh)


def train_ddp_and_fsdp(folder: str) -> None:
    """Runs in each of two processes."""
    torch.set_num_threads(1)
    os.chdir(folder)
    both = {"devices": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    for name, strategy, module in (("ddp", "ddp", Halves()), ("fsdp", sharded, Sharded())):
        callback = GWACallback(num_samples=SAMPLES, sample_ids=2, directory=name)
        fitting = trainer(callback, ModelCheckpoint(f"{name} checkpoints"), strategy=strategy, **both)
        fitting.fit(module)
        result = [report.model_dump(mode="json") for report in callback.monitor.history]
        Path(f"{name} {fitting.global_rank}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(tmp_path, two_processes):
    two_processes("tests.trainers.test_lightning", "train_ddp_and_fsdp", tmp_path)
    expected = plain(net())[0]
    for name in ("ddp", "fsdp"):
        assert len(list(tmp_path.glob(f"{name}/*/journal.jsonl"))) == 1
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{name} {rank}.json").read_text())
            assert_equal([EpochReport.model_validate(report) for report in found], expected)


@pytest.mark.parametrize("keep_best", [True, "averaged"])
def test_the_best_weights_can_be_restored_after_the_fit(keep_best):
    steps: list[list[Tensor]] = []

    class Copies(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            steps.append([weight.detach().clone().double() for weight in pl_module.parameters()])

    callback = GWACallback(keep_best=keep_best, early_stop=EarlyStop(warmup=0))
    module = Classifier()
    trainer(Copies(), callback, epochs=1).fit(module, loader())
    with torch.no_grad():
        module.model[2].weight.zero_()
    assert callback.monitor.restore_best() == 0
    expected = steps[-1] if keep_best is True else [torch.stack(each).mean(0) for each in zip(*steps, strict=True)]
    for weight, value in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.double(), value, rtol=1e-6, atol=1e-6)
    assert callback.monitor.best_weights().keys() == module.model.state_dict().keys()
