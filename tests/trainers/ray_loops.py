"""The training functions that test_ray.py runs in workers of Ray, and how they die."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as lightning
import ray.train
import ray.train.lightning as ray_lightning
import ray.train.torch
import ray.tune
import torch
from ray.train import Checkpoint
from ray.train.huggingface.transformers import RayTrainReportCallback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import TrainerCallback

import gwa_logging
from gwa_logging import EarlyStop
from gwa_logging.integrations.ray import metrics, save_state, storage_directory, watch
from tests.trainers import test_lightning as in_lightning
from tests.trainers import test_transformers as in_transformers
from tests.trainers.tasks import BATCH, EPOCHS, RATE, SAMPLES, Samples, loader, net

STEPS = SAMPLES // BATCH
EPOCHS_OF_KILLS = 8
FIRES_AT_ONCE = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
"""A rule that fires in epoch 1."""


def train(config: dict[str, Any]) -> None:
    """The plain loop in several workers, each of which trains on its share of every batch. A checkpoint follows each epoch.

    Args:
        config: `folder` for what a worker notes; optional `epochs`, `kills` (the number of attempts in which a worker dies;
            in the first one before any checkpoint),
            `fails_after` (an epoch, in the first attempt), `environment` (variables) and `watch` (arguments).
    """
    os.environ.update(config.get("environment", {}))
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    attempt = _count_attempt(Path(config["folder"]), rank)
    model = ray.train.torch.prepare_model(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _bare(model).load_state_dict(torch.load(Path(folder, "model.pt"), weights_only=True))
    with watch(model, log_every_n_steps=1, **config.get("watch", {})) as monitor:
        if 0 < attempt < config.get("kills", 0) and rank == attempt % world:
            _die_soon(seed=attempt)
        for epoch in monitor.epochs(config.get("epochs", EPOCHS)):
            for x, y, ids in loader():
                if monitor._recording.settings.num_samples:
                    monitor.tag(ids[rank::world])
                if "kills" in config:
                    time.sleep(0.02)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
                optimizer.step()
                if config.get("kills") and (attempt, rank, monitor._recording.intervals.steps) == (0, 0, 2):
                    monitor.flush()
                    os.kill(os.getpid(), signal.SIGKILL)  # before the first checkpoint
            monitor.end_epoch()
            _report(monitor, model, rank)
            if attempt == 0 and epoch == config.get("fails_after"):
                raise RuntimeError("as planned")
        history = [report.model_dump(mode="json") for report in monitor.history]
        found = {"history": history, "faults": monitor.faults, "alert": monitor.alert and monitor.alert.epoch}
        if config.get("watch", {}).get("num_samples"):
            found["suspects"] = [suspect.id for suspect in monitor.suspects(SAMPLES)]
    Path(config["folder"], f"rank {rank}.json").write_text(json.dumps(found))


def _report(monitor: gwa_logging.Monitor, model: nn.Module, rank: int) -> None:
    """Reports the epoch; rank 0 adds the checkpoint."""
    with TemporaryDirectory() as folder:
        save_state(monitor, folder)
        if rank == 0:
            torch.save(_bare(model).state_dict(), Path(folder, "model.pt"))
        checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"loss": 1.0, **metrics(monitor)}, checkpoint=checkpoint)


def _bare(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel, which Ray adds if there are several workers."""
    return getattr(model, "module", model)


def _count_attempt(folder: Path, rank: int) -> int:
    """The number of earlier attempts."""
    earlier = len(list(folder.glob(f"attempt * {rank}")))
    Path(folder, f"attempt {earlier} {rank}").touch()
    return earlier


def _die_soon(seed: int) -> None:
    """Kills this process at a random moment of its training, of which a step takes at least 20 ms."""
    delay = random.Random(seed).uniform(0, 0.02 * STEPS * EPOCHS_OF_KILLS)

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def _die_once(folder: Path) -> None:
    """Kills this process, unless an earlier one has died here."""
    marker = folder / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def train_in_lightning(config: dict[str, Any]) -> None:
    """Lightning's trainer, of which rank 1 dies once in epoch 1."""

    class DiesOnce(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 2, 1):
                _die_once(Path(config["folder"]))

    callback = in_lightning.GWACallback(directory=storage_directory(), log_every_n_steps=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices="auto",
        strategy=ray_lightning.RayDDPStrategy(),
        plugins=[ray_lightning.RayLightningEnvironment()],
        callbacks=[DiesOnce(), callback, ray_lightning.RayTrainReportCallback()],
        max_epochs=EPOCHS,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
    )
    trainer = ray_lightning.prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    context = ray.train.get_context()
    sampler = DistributedSampler(Samples(), context.get_world_size(), context.get_world_rank(), shuffle=False)
    data, module = DataLoader(Samples(), BATCH // 2, sampler=sampler), in_lightning.Classifier()
    if checkpoint is None:
        trainer.fit(module, data)
    else:
        with checkpoint.as_directory() as folder:
            trainer.fit(module, data, ckpt_path=str(Path(folder, "checkpoint.ckpt")))
    _note_history(config, callback, trainer.global_rank)


def train_in_transformers(config: dict[str, Any]) -> None:
    """The Trainer of transformers, of which rank 1 dies once in epoch 1."""

    class Report(RayTrainReportCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown = replace(state, log_history=[*state.log_history, metrics(callback.monitor)])
            super().on_save(args, shown, control, **kwargs)

    class DiesOnce(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS + 2 and ray.train.get_context().get_world_rank() == 1:
                _die_once(Path(config["folder"]))

    callback = in_transformers.GWACallback(directory=storage_directory(), log_every_n_steps=1)
    trainer = in_transformers.trainer(
        DiesOnce(),
        callback,
        Report(),
        per_device_train_batch_size=BATCH // 2,
        save_strategy="epoch",
        output_dir=str(Path(config["folder"], "out")),
    )
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
    else:
        with checkpoint.as_directory() as folder:
            trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint")))
    _note_history(config, callback, trainer.args.process_index)


def _note_history(config: dict[str, Any], callback: Any, rank: int) -> None:
    history = [report.model_dump(mode="json") for report in callback.monitor.history]
    found = {"history": history, "faults": callback.monitor.faults}
    Path(config["folder"], f"rank {rank}.json").write_text(json.dumps(found))


def trial(config: dict[str, Any]) -> None:
    """A trial of Tune, which trains in its own process, until Tune stops it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=config["rate"])
    with watch(model, early_stop=FIRES_AT_ONCE) as monitor:
        for epoch in range(len(monitor.history), 6):
            for x, y, _ in loader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            monitor.end_epoch()
            with TemporaryDirectory() as folder:
                save_state(monitor, folder)
                ray.tune.report(
                    {"epoch": epoch, **metrics(monitor)}, checkpoint=ray.tune.Checkpoint.from_directory(folder)
                )


def refusals(config: dict[str, Any]) -> None:
    """Notes the errors of wrong calls in a worker whose storage is not a folder of this machine."""
    found = {}
    try:
        storage_directory()
    except gwa_logging.InvalidInputError as error:
        found["storage"] = str(error)
    with watch(net(), directory=config["folder"]) as monitor:
        found["metrics"] = metrics(monitor)
        try:
            save_state(monitor, Path(config["folder"], "missing"))
        except gwa_logging.InvalidInputError as error:
            found["folder"] = str(error)
    Path(config["folder"], "found.json").write_text(json.dumps(found))
