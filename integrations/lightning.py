"""Lightning: a callback, for `lightning` and for `pytorch_lightning`.

    from gwa_logging.integrations.lightning import GWACallback

    trainer = Trainer(callbacks=[GWACallback()], logger=WandbLogger())

An epoch is closed after its last batch, before validation: so the checkpoints that validation makes hold it.
"""

import weakref
from importlib import import_module
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.trainer_session import TrainerSession

# The two names are two packages, with a Callback each, which a Trainer of the other does not take.
_BASES: list[type] = []
for _name in ("lightning.pytorch", "pytorch_lightning"):
    try:
        _BASES.append(import_module(_name).Callback)
    except ModuleNotFoundError as error:
        if error.name not in (_name, _name.partition(".")[0]):
            raise
if not _BASES:
    raise MissingDependencyError("lightning", "lightning")


class GWACallback(TrainerSession, *_BASES):  # type: ignore[misc]  # lightning comes without types that both names share
    """Watches the model of a LightningModule while it is fitted.

    Results are sent to the trainer's own loggers (W&B, MLflow, TensorBoard) unless `backend=` says otherwise; GWA shows in the
    progress bar; with `EarlyStop(action="stop")` the alert stops the trainer; the state is kept in its checkpoints.

    Args:
        sample_ids: key or index of the samples' ids in a batch, for the ledger (`num_samples=`); or call
            `callback.monitor.tag(ids)` in `training_step`.
        arguments: as in `gwa_logging.watch`. Without `head=`, the head is looked for in the only submodule that has parameters,
            or, if there are several, in the LightningModule by its `forward`.

    Attributes:
        monitor: the Monitor of the present or last fit; None before the first.

    Raises:
        InvalidInputError: an argument is wrong; when the fit starts, that the trainer has the callback twice, or that it cannot
            be told which model to watch.
    """

    _fitted: Any = staticmethod(lambda: None)  # a weak reference to the module of the last fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A further fit of the same module goes on where the last one ended, as the trainer's own counters do."""
        goes_on = stage == "fit" and self._fitted() is pl_module and trainer.global_step > 0
        self._state = self.state_dict() if goes_on else None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to watch: the processes have met by now, and nothing has been run or compiled."""
        model = pl_module if self._settings.head is not None else _classifier(pl_module, len(trainer.optimizers))
        planned = trainer.max_epochs if trainer.max_steps == -1 else None
        runs = _runs(trainer.loggers) if trainer.is_global_zero else {}
        self._begin(model, training=trainer, planned=planned, runs=runs)
        self._fitted = weakref.ref(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._tag(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._step(trainer.current_epoch)
        if trainer.is_last_batch:
            self._close_epoch(trainer, pl_module)
        elif self._should_stop:  # a window of samples_per_epoch
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._close_epoch(trainer, pl_module)  # one that was cut short, by max_steps for instance

    def _close_epoch(self, trainer: Any, pl_module: Any) -> None:
        report = self._end_epoch()
        if report is not None:
            # For the progress bar (and for ModelCheckpoint's monitor); no logger of the user's is told.
            pl_module.log_dict(self._shown(report), prog_bar=True, logger=False, batch_size=1)
        if self._should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the monitor while the loggers and the process group are still there."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()  # a fit without a training step has no on_train_end


def _classifier(pl_module: Any, optimizers: int) -> Any:
    """The module whose output are the logits.

    Raises:
        InvalidInputError: nothing tells which one.
    """
    if optimizers > 1:
        raise InvalidInputError(
            f"{type(pl_module).__name__} trains with {optimizers} optimizers, so perhaps several models: say which head to "
            "watch, GWACallback(head='classifier.fc')"
        )
    parts = {name: part for name, part in pl_module.named_children() if next(part.parameters(), None) is not None}
    if len(parts) == 1:
        (part,) = parts.values()
        if "unimplemented" not in part.forward.__name__:  # as that of a ModuleList, which nobody calls
            return part  # it is called as a module, whether or not training_step goes by the LightningModule's forward
    classes = list(type(pl_module).__mro__)
    own = classes[: next(i for i, base in enumerate(classes) if base.__name__ == "LightningModule")]
    if parts and not any("forward" in vars(base) for base in own):
        raise InvalidInputError(
            f"{type(pl_module).__name__} has the parts {', '.join(parts)}, and no forward that would tell which one "
            "classifies: say which head to watch, GWACallback(head='classifier.fc')"
        )
    return pl_module


def _runs(loggers: list[Any]) -> dict[str, Any]:
    """The trainer's own runs, by backend; of several of one kind the first."""
    runs: dict[str, Any] = {}
    for logger in loggers:
        kinds = {base.__name__ for base in type(logger).__mro__}
        if "WandbLogger" in kinds:
            runs.setdefault("wandb", logger.experiment)
        elif "MLFlowLogger" in kinds:
            runs.setdefault("mlflow", logger.run_id)  # which also turns MLflow to the logger's server
        elif "TensorBoardLogger" in kinds:
            runs.setdefault("tensorboard", logger.log_dir)
    return runs
