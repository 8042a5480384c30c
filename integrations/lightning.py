"""Lightning: a callback for the Trainer of `lightning` and of `pytorch_lightning`.

    from gwa_logging.integrations.lightning import GWACallback

    trainer = Trainer(callbacks=[GWACallback()], logger=WandbLogger())

An epoch closes after its last batch, before validation, so that checkpoints saved during validation include it.
"""

import weakref
from importlib import import_module
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.integrations.torch.look_inputs import DatasetInputs
from gwa_logging.monitor import Monitor
from gwa_logging.trainer_session import TrainerSession

# Two packages with these names exist, and the Trainer of each accepts only its own Callback: so ours inherits from both.
_BASES: list[type] = []
for _name in ("lightning.pytorch", "pytorch_lightning"):
    try:
        _BASES.append(import_module(_name).Callback)
    except ModuleNotFoundError as error:
        if error.name not in (_name, _name.partition(".")[0]):
            raise
if not _BASES:
    raise MissingDependencyError("lightning", "lightning")


class _FitSession(TrainerSession):
    """A session that knows which module was fitted last."""

    _module: Any = staticmethod(lambda: None)  # a weak reference

    def remember(self, pl_module: Any) -> None:
        """Notes that this LightningModule is being fitted."""
        self._module = weakref.ref(pl_module)

    def has_fitted(self, pl_module: Any) -> bool:
        """Returns True if the last fit was of this LightningModule."""
        return self._module() is pl_module


class GWACallback(*_BASES):  # type: ignore[misc]  # the two packages share no typed base
    """Watches the model of a LightningModule while it is fitted.

    Results go to the trainer's own loggers (W&B, MLflow, TensorBoard) unless you set `backend=`. GWA appears in the progress
    bar. With `EarlyStop(action="stop")` an alert stops the trainer. The trainer's checkpoints include the monitor's state.

    Args:
        sample_ids: key or index of the sample ids in a batch, for the ledger (`num_samples=`). Or call
            `callback.monitor.tag(ids)` in `training_step`.
        arguments: as in `gwa_logging.watch`. Without `head=`, the head is searched for in the only submodule that has
            parameters, or, if several have, in the LightningModule through its `forward`.

    Raises:
        InvalidInputError: an argument is wrong; when the fit starts: the trainer has the callback twice, or it is unclear which
            model to watch.
    """

    def __init__(self, *, sample_ids: Any = None, **arguments: Any) -> None:
        super().__init__()
        self._gwa_session = _FitSession(arguments, sample_ids)

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last fit; None before the first."""
        return self._gwa_session.monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets a further fit of the same module resume where the last one ended, as the trainer's own counters do."""
        session = self._gwa_session
        resumes = stage == "fit" and session.has_fitted(pl_module) and trainer.global_step > 0
        session.resume_from(session.state_dict() if resumes else None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts to watch. By now the process group exists, and no model has run or been compiled."""
        session = self._gwa_session
        model = pl_module if session.settings.head is not None else _classifier(pl_module, len(trainer.optimizers))
        planned = trainer.max_epochs if trainer.max_steps == -1 else None
        runs = _runs(trainer.loggers) if trainer.is_global_zero else {}
        inputs = DatasetInputs(lambda: trainer.train_dataloader)  # which the trainer makes after this event
        session.begin(model, training=trainer, planned=planned, runs=runs, inputs=inputs)
        session.remember(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._gwa_session.enter_epoch(trainer.current_epoch)
        self._gwa_session.tag(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._gwa_session.count_step()
        if trainer.is_last_batch:
            _close_epoch(self._gwa_session, trainer, pl_module)
        elif self._gwa_session.ends_training:  # after a window of samples_per_epoch
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes an epoch that was cut short, by max_steps for instance."""
        _close_epoch(self._gwa_session, trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the monitor while the loggers and the process group still exist."""
        self._gwa_session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._gwa_session.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._gwa_session.end()  # a fit without a training step calls no on_train_end

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for the trainer's checkpoint."""
        return self._gwa_session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a checkpoint when the fit starts."""
        self._gwa_session.load_state_dict(state_dict)


def _close_epoch(session: TrainerSession, trainer: Any, pl_module: Any) -> None:
    report = session.end_epoch()
    if report is not None:
        # For the progress bar, and for ModelCheckpoint(monitor=...); nothing goes to the user's loggers.
        pl_module.log_dict(session.progress(report), prog_bar=True, logger=False, batch_size=1)
        pl_module.log(f"{session.settings.name}/stop", float(report.stop), logger=False, batch_size=1)
    if session.ends_training:
        trainer.should_stop = True


def _classifier(pl_module: Any, optimizers: int) -> Any:
    """Returns the module that outputs the logits.

    Raises:
        InvalidInputError: it is unclear which one does.
    """
    if optimizers > 1:
        raise InvalidInputError(
            f"{type(pl_module).__name__} has {optimizers} optimizers, so perhaps several models: name the head to watch, "
            "GWACallback(head='classifier.fc')"
        )
    parts = {name: part for name, part in pl_module.named_children() if next(part.parameters(), None) is not None}
    if len(parts) == 1:
        (part,) = parts.values()
        if "unimplemented" not in part.forward.__name__:  # a container such as ModuleList has no forward
            return part  # training_step calls it, directly or through the LightningModule's forward
    if parts and not _defines_forward(type(pl_module)):
        raise InvalidInputError(
            f"{type(pl_module).__name__} has the submodules {', '.join(parts)} and no forward that shows which one is "
            "the classifier: name the head to watch, GWACallback(head='classifier.fc')"
        )
    return pl_module


def _defines_forward(module_class: type) -> bool:
    """Returns True if the class or one of its bases below LightningModule has its own forward."""
    for base in module_class.__mro__:
        if base.__name__ == "LightningModule":
            return False
        if "forward" in vars(base):
            return True
    return False


def _runs(loggers: list[Any]) -> dict[str, Any]:
    """Returns the trainer's own runs by backend: of several loggers of one kind, the run of the first."""
    runs: dict[str, Any] = {}
    for logger in loggers:
        kinds = {base.__name__ for base in type(logger).__mro__}
        if "WandbLogger" in kinds:
            runs.setdefault("wandb", logger.experiment)
        elif "MLFlowLogger" in kinds:
            runs.setdefault("mlflow", logger.run_id)  # this also points MLflow to the logger's server
        elif "TensorBoardLogger" in kinds:
            runs.setdefault("tensorboard", logger.log_dir)
    return runs
