"""Keras 3: a callback for `fit`, with PyTorch or JAX as Keras's backend.

    from gwa_logging.integrations.keras import GWACallback

    model.fit(x, y, epochs=20, callbacks=[GWACallback(backend="mlflow")])

On PyTorch the callback only watches the model. On JAX it also makes Keras's jitted train step return the scores.
"""

import os
from pathlib import Path
from typing import Any

from gwa_logging.epoch_backup import EpochBackup
from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.monitor import Monitor
from gwa_logging.trainer_session import TrainerSession

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise MissingDependencyError("keras", "keras") from error


class _FitSession(TrainerSession):
    """A session that saves its state at the end of each epoch, beside Keras's own backup.

    Attributes:
        backup: the files; None for no backup.
        model: the model of the current fit; None outside a fit.
    """

    backup: EpochBackup | None = None
    model: Any = None

    def parameters(self) -> Any:
        """The weights of the model on JAX; on PyTorch the monitor reads them itself."""
        is_kept = self.settings.keep_best and keras.backend.backend() == "jax"
        return self.model.get_weights() if is_kept else None


class GWACallback(keras.callbacks.Callback):  # type: ignore[misc]  # keras has no types
    """Watches the model while it is fitted.

    GWA is added to the epoch's logs, as the learning rate is: it appears in the progress bar and in the history, and
    ModelCheckpoint can monitor it (`monitor="gwa/stable", mode="max"`). With `EarlyStop(action="stop")` an alert sets
    `model.stop_training`. With `keep_best=True`, `callback.monitor.restore_best()` after the fit does what Keras calls
    restore_best_weights.

    Args:
        backup_dir: folder to save the state in at the end of each epoch, and to resume from; the same as that of
            `keras.callbacks.BackupAndRestore`.
        arguments: as in `gwa_logging.watch`, except `num_samples`: `fit` does not reveal which samples a batch holds.

    Raises:
        InvalidInputError: an argument is wrong, or Keras runs on another backend; when the fit starts: it has the callback
            twice.
    """

    def __init__(self, *, backup_dir: str | os.PathLike[str] | None = None, **arguments: Any) -> None:
        super().__init__()
        session = _FitSession(arguments)
        if keras.backend.backend() not in ("torch", "jax"):
            raise InvalidInputError(
                f"Keras runs on {keras.backend.backend()!r}, where gwa_logging cannot access the gradient at the head. Set "
                "KERAS_BACKEND=torch or KERAS_BACKEND=jax before you import keras"
            )
        if session.settings.keep_best == "averaged":
            raise InvalidInputError(
                "keep_best='averaged': Keras's fit does not show its steps. Let Keras average the weights, "
                "keras.optimizers.Adam(use_ema=True), or use keep_best=True"
            )
        if session.settings.num_samples is not None:
            raise InvalidInputError(
                f"num_samples={session.settings.num_samples}: Keras's fit does not reveal which samples a batch holds; for a "
                "ledger, write your own training loop"
            )
        session.backup = None if backup_dir is None else EpochBackup(Path(backup_dir, "gwa_logging.json"))
        self._gwa_session = session

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last fit; None before the first."""
        return self._gwa_session.monitor

    def on_train_begin(self, logs: Any = None) -> None:
        session = self._gwa_session
        session.resume_from(None)
        session.model = self.model
        monitor = session.begin(self.model, training=self.params, planned=self.params.get("epochs"), runs={})
        if keras.backend.backend() == "jax":
            # imported here: with Keras on PyTorch, JAX may not be installed
            from gwa_logging.integrations.jax.keras_fit import watch_fit

            session.cleanup.callback(watch_fit(self.model, monitor))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        session = self._gwa_session
        if session.backup is not None and session.epoch < 0 < epoch and (state := session.backup.load(epoch)):
            session.load_state_dict(state)
        session.enter_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._gwa_session.count_step()
        self.model.stop_training |= self._gwa_session.ends_training  # after a window of samples_per_epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        session = self._gwa_session
        report = session.end_epoch()
        if report is not None and logs is not None:
            logs.update(session.progress(report))
        self.model.stop_training |= session.ends_training
        if session.backup is not None:
            session.backup.save(epoch + 1, session.state_dict())

    def on_train_end(self, logs: Any = None) -> None:
        self._gwa_session.end()
        self._gwa_session.model = None
        if self._gwa_session.backup is not None:
            self._gwa_session.backup.remove()
