"""Keras 3: a callback for `fit`, on the PyTorch and on the JAX backend.

    from gwa_logging.integrations.keras import GWACallback

    model.fit(x, y, epochs=20, callbacks=[GWACallback(backend="mlflow")])

On PyTorch watching the model is all that it takes; on JAX the scores must be brought out of Keras's jitted train step.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.trainer_session import TrainerSession

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise MissingDependencyError("keras", "keras") from error

logger = logging.getLogger("gwa_logging")


class GWACallback(TrainerSession, keras.callbacks.Callback):  # type: ignore[misc]  # keras comes without types
    """Watches the model while it is fitted.

    GWA joins the epoch's logs, as the learning rate does: it shows in the progress bar and in the history, and ModelCheckpoint
    can follow it (`monitor="gwa/stable", mode="max"`). With `EarlyStop(action="stop")` the alert sets `model.stop_training`.

    Args:
        backup_dir: keeps the state in this folder at the end of each epoch, and goes on from it; that of
            `keras.callbacks.BackupAndRestore`.
        arguments: as in `gwa_logging.watch`, but for `num_samples`: `fit` does not tell which samples a batch holds.

    Attributes:
        monitor: the Monitor of the present or last fit; None before the first.

    Raises:
        InvalidInputError: an argument is wrong, or Keras runs on another backend; when the fit starts, that it has the callback
            twice.
    """

    def __init__(self, *, backup_dir: str | os.PathLike[str] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        if keras.backend.backend() not in ("torch", "jax"):
            raise InvalidInputError(
                f"Keras runs on {keras.backend.backend()!r}, where gwa_logging has no way to see the gradient at the head. Set "
                "KERAS_BACKEND=torch or KERAS_BACKEND=jax before keras is imported"
            )
        if self._settings.num_samples is not None:
            raise InvalidInputError(
                f"num_samples={self._settings.num_samples}: Keras's fit does not tell which samples a batch holds; for a "
                "ledger, train in a loop of your own"
            )
        self._backup = None if backup_dir is None else Path(backup_dir, "gwa_logging.json")
        self._epoch = -1
        self._undo: Callable[[], None] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._state, self._epoch = None, -1
        monitor = self._begin(self.model, training=self.params, planned=self.params.get("epochs"), runs={})
        if keras.backend.backend() == "jax":
            from gwa_logging.integrations.jax.keras_fit import watch_fit  # here, because on PyTorch there may be no JAX

            self._undo = watch_fit(self.model, monitor)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._epoch < 0 < epoch and self._backup is not None:
            self._go_on(epoch, self._backup)
        self._epoch = epoch
        self._enter_epoch(epoch)

    def _go_on(self, epoch: int, backup: Path) -> None:
        """The fit begins with a later epoch than the first."""
        kept = json.loads(backup.read_text()) if backup.exists() else {}
        if kept.get("epochs") == epoch:
            self.load_state_dict(kept["state"])
        else:
            logger.warning("gwa_logging: GWA begins anew: %s has no state of the end of epoch %d", backup, epoch - 1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step(self._epoch)
        self.model.stop_training |= self._should_stop  # after a window of samples_per_epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        report = self._end_epoch()
        if report is not None and logs is not None:
            logs.update(self._shown(report))
        self.model.stop_training |= self._should_stop
        if self._backup is not None:
            self._backup.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._backup.with_suffix(".new")
            fresh.write_text(json.dumps({"epochs": epoch + 1, "state": self.state_dict()}))
            fresh.replace(self._backup)

    def on_train_end(self, logs: Any = None) -> None:
        self._end()
        if self._backup is not None:
            self._backup.unlink(missing_ok=True)

    def _end(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
        super()._end()
