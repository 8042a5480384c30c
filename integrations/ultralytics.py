"""Ultralytics: a callback for the training of YOLO classification models.

    from ultralytics import YOLO
    from gwa_logging.integrations.ultralytics import GWACallback

    model = YOLO("yolo11n-cls.pt")
    GWACallback().add_to(model)
    model.train(data="imagenette160", epochs=20)

An epoch closes after its last training batch, before validation. Ultralytics is licensed under AGPL-3.0: this module is the
only one that imports it, when a training starts.
"""

import os
import sys
from typing import Any

from gwa_logging.dataset import WithIds, with_ids
from gwa_logging.epoch_backup import EpochBackup
from gwa_logging.errors import InvalidInputError
from gwa_logging.monitor import Monitor
from gwa_logging.trainer_session import TrainerSession

EVENTS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
)


class GWACallback:
    """Watches the head of a YOLO classification model while Ultralytics trains it.

    Results go to W&B, MLflow and TensorBoard where Ultralytics's settings have turned them on, unless you set `backend=`. The
    log shows a line per epoch. With `EarlyStop(action="stop")` an alert ends the training. The state is saved in the run's
    folder, and `train(resume=True)` resumes from it.

    Args:
        arguments: as in `gwa_logging.watch`, except `look`. With `num_samples`, the size of the training set, the ledger's ids
            are the indices in Ultralytics's training set: its images sorted by class and file name.

    Raises:
        InvalidInputError: an argument is wrong; when training starts: the model is not a classifier, `num_samples` is not the
            size of the training set, or the trainer has the callback twice.
    """

    def __init__(self, **arguments: Any) -> None:
        self._gwa_session = TrainerSession(arguments)
        if self._gwa_session.settings.look is not None:
            raise InvalidInputError(
                "look=: not possible with Ultralytics, whose models return probabilities when evaluated"
            )
        if self._gwa_session.settings.num_samples is not None:
            self._gwa_session.sample_ids = "sample_id"
        self._backup: EpochBackup | None = None  # None if the trainer saves no checkpoints

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last training; None before the first."""
        return self._gwa_session.monitor

    def add_to(self, model: Any) -> None:
        """Registers the callbacks with a `YOLO` model, or with a trainer.

        Raises:
            InvalidInputError: it has no `add_callback`.
        """
        if not hasattr(model, "add_callback"):
            raise InvalidInputError(f"model: expected an ultralytics.YOLO or a trainer, found {type(model).__name__}")
        for event in EVENTS:
            model.add_callback(event, getattr(self, event))

    def on_train_start(self, trainer: Any) -> None:
        session = self._gwa_session
        self._backup = EpochBackup(trainer.save_dir / "gwa_logging.json") if trainer.args.save else None
        session.resume_from(None)
        if self._backup is not None and trainer.start_epoch > 0:
            session.resume_from(self._backup.load(trainer.start_epoch))
        session.begin(trainer.model, training=trainer, planned=trainer.epochs, runs=_runs(trainer), head=_head(trainer))
        if session.sample_ids is not None:
            preprocess = trainer.preprocess_batch

            def tag_and_preprocess(batch: Any) -> Any:
                session.tag(batch)
                return preprocess(batch)

            trainer.preprocess_batch = tag_and_preprocess
            session.cleanup.callback(delattr, trainer, "preprocess_batch")

    def on_train_epoch_start(self, trainer: Any) -> None:
        self._gwa_session.enter_epoch(trainer.epoch)
        if self._gwa_session.sample_ids is not None:
            _add_ids(trainer.train_loader, self._gwa_session.settings.num_samples)

    def on_train_batch_end(self, trainer: Any) -> None:
        self._gwa_session.count_step()
        trainer.stop |= self._gwa_session.ends_training  # after a window of samples_per_epoch

    def on_train_epoch_end(self, trainer: Any) -> None:
        session = self._gwa_session
        report = session.end_epoch()
        rank = int(os.environ.get("RANK", 0))
        if report is not None and rank == 0:
            from ultralytics.utils import LOGGER

            LOGGER.info(str(report))
        trainer.stop |= session.ends_training
        if self._backup is not None:
            state = session.state_dict()  # every process must call this
            if rank == 0:
                self._backup.save(trainer.epoch + 1, state)

    def on_train_end(self, trainer: Any) -> None:
        self._gwa_session.end()
        if self._backup is not None:
            self._backup.remove()  # the training is complete, and Ultralytics strips last.pt

    def teardown(self, trainer: Any) -> None:
        self._gwa_session.end()  # after an error, and in the processes that call no on_train_end


def _head(trainer: Any) -> Any:
    """Returns the linear layer of a YOLO classification model.

    Raises:
        InvalidInputError: the model has none.
    """
    from ultralytics.utils.torch_utils import unwrap_model

    layers = getattr(unwrap_model(trainer.model), "model", None) or [None]
    head = getattr(layers[-1], "linear", None)
    if trainer.args.task != "classify" or head is None:
        raise InvalidInputError(
            f"GWACallback: expected a classification model, such as YOLO('yolo11n-cls.pt'), found task {trainer.args.task!r} "
            f"with the head {type(layers[-1]).__name__}; GWA is defined for the linear head of a classifier"
        )
    return head


def _add_ids(loader: Any, num_samples: int | None) -> None:
    """Makes the batches of a loader include the ids, unless they do.

    Raises:
        InvalidInputError: the data set does not have this size.
    """
    if isinstance(loader.dataset, WithIds):
        return
    if len(loader.dataset) != num_samples:
        raise InvalidInputError(
            f"num_samples={num_samples}: Ultralytics's training set has {len(loader.dataset)} images; pass this number"
        )
    object.__setattr__(loader, "dataset", with_ids(loader.dataset))  # a DataLoader refuses it after its construction
    loader.reset()  # workers that have started have the data set without ids


def _runs(trainer: Any) -> dict[str, Any]:
    """Returns the runs of the trackers that Ultralytics reports to, by backend."""
    modules = {function.__module__ for found in trainer.callbacks.values() for function in found}
    logs = {name: f"ultralytics.utils.callbacks.{name}" in modules for name in ("wb", "mlflow", "tensorboard")}
    runs: dict[str, Any] = {}
    if logs["wb"] and (run := sys.modules["wandb"].run) is not None:
        runs["wandb"] = run
    if logs["mlflow"] and (run := sys.modules["mlflow"].active_run()) is not None:
        runs["mlflow"] = run
    return runs | ({"tensorboard": trainer.save_dir} if logs["tensorboard"] else {})
