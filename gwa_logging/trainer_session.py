"""TrainerSession: watches a model while a trainer trains it, and closes the epochs as the trainer does.

The callback of each trainer owns one session and forwards the trainer's events to it, in this order:

    begin -> (enter_epoch -> (tag -> count_step)* -> end_epoch)* -> end

A session can be used for several trainings, one after the other. The trainer's checkpoint holds its `state_dict`.
"""

import base64
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import numpy as np

from gwa_logging import registry
from gwa_logging._watch import RunTakenError, watch
from gwa_logging.errors import InvalidInputError, NoObservationsError
from gwa_logging.faults import logger
from gwa_logging.monitor import Monitor
from gwa_logging.records import EpochReport
from gwa_logging.settings import WatchSettings

_training_now: "WeakSet[TrainerSession]" = WeakSet()


class TrainerSession:
    """What the callbacks of all trainers share.

    Attributes:
        settings: the validated arguments of `watch`.
        sample_ids: key or index of the sample ids in a batch; None without a ledger.
        trainer_keeps_ids: True if the trainer has been made to keep the sample ids in its batches.
        monitor: the Monitor of the current or last training; None before the first.
        epoch: the trainer's current epoch.
        cleanup: callbacks that `end` runs, for what a training has to undo.
    """

    def __init__(self, arguments: Mapping[str, Any], sample_ids: Any = None) -> None:
        """Validates the arguments of `gwa_logging.watch` now, before the trainer loads any data.

        Raises:
            InvalidInputError: an argument is wrong, or `sample_ids` is set without a ledger.
        """
        self.settings = WatchSettings(**{"backend": "local", **arguments})
        registry.open_notifiers(self.settings.notify)
        if sample_ids is not None and self.settings.num_samples is None:
            raise InvalidInputError(
                f"sample_ids={sample_ids!r}: the ledger is off; add num_samples=<size of the training set>"
            )
        self.sample_ids = sample_ids
        self.trainer_keeps_ids = False
        self.monitor: Monitor | None = None
        self.epoch = -1
        self.cleanup = ExitStack()
        self._arguments = dict(arguments)
        self._training: object = None  # the current one; None between two
        self._open_epoch: int | None = None  # the trainer's epoch that has steps not yet reported
        self._pending_state: dict[str, Any] | None = None  # loaded when the next training begins

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the current training: a trainer that is copied or pickled with its callbacks takes the arguments along."""
        return vars(self) | {"monitor": None, "cleanup": ExitStack(), "_training": None, "_open_epoch": None}

    def begin(
        self,
        model: Any,
        *,
        training: object,
        planned: int | None,
        runs: Mapping[str, Any],
        inputs: Any = None,
        head: Any = None,
    ) -> Monitor:
        """Watches the model, and resumes from the state if one was loaded.

        Args:
            model: as in `gwa_logging.watch`.
            training: an object that identifies this training: the same one for all callbacks of the trainer.
            planned: number of epochs planned, if known.
            runs: the trainer's own runs by backend, None for the active one. Used where the user named no backend or run.
            inputs: the look that stands for look="auto" if the user named no data set, from the trainer's training set.
            head: the head to watch if the user named none, where the trainer knows it.

        Raises:
            InvalidInputError: the trainer has two of these callbacks, or the loaded state does not fit.
            GwaError: as in `gwa_logging.watch`.
        """
        if any(other.is_training(training) for other in _training_now if other is not self):
            raise InvalidInputError(
                "GWACallback: this trainer has two of them; remove one (one callback watches several heads with "
                "head=['a', 'b'] and sends to several trackers with backend=['wandb', 'mlflow'])"
            )
        self.end()
        arguments = self._arguments | self._destination(runs)
        if isinstance(self.settings.look, str) and self.settings.dataset is None and inputs is not None:
            arguments |= {"look": inputs}
        if self.settings.head is None and head is not None:
            arguments |= {"head": head}
        self.monitor = self._watch(model, arguments)
        self._training, self._open_epoch, self.epoch = training, None, -1
        _training_now.add(self)
        try:
            if planned is not None and planned > 0:
                self.monitor.plan(planned)
            if self._pending_state is not None:
                self.load_state_dict(self._pending_state)
        except BaseException:
            self.end()
            raise
        return self.monitor

    def _watch(self, model: Any, arguments: dict[str, Any]) -> Monitor:
        """Watches the model; ends the session of an interrupted training that still writes to the same run."""
        try:
            return watch(model, **arguments)
        except RunTakenError as error:
            interrupted = [session for session in _training_now if session.monitor is error.monitor]
            if not interrupted:
                raise
            logger.warning(
                "gwa_logging: closing %s: its training did not end, and the next one writes to its run", error.monitor
            )
            interrupted[0].end()
        return self._watch(model, arguments)

    def _destination(self, runs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments `backend` and `run` of `watch`: the user's where given, else the trainer's."""
        given = self._arguments.get("run")
        backend = self.settings.backend if "backend" in self._arguments else tuple(runs) or ("local",)
        if given is not None and not isinstance(given, dict):
            return {"backend": list(backend), "run": given}
        found = {name: run for name, run in runs.items() if name in backend and run is not None}
        return {"backend": list(backend), "run": found | (given or {}) or None}

    def is_training(self, training: object) -> bool:
        """Returns True if this training has begun, has not ended, and no later one has taken over its run."""
        return self._training is training and training is not None

    def enter_epoch(self, epoch: int) -> None:
        """Notes that the trainer is in its epoch of this number, and closes an earlier one that is still open."""
        if self._open_epoch not in (None, epoch):
            self.end_epoch()
        self.epoch = epoch

    def tag(self, batch: Any) -> None:
        """Passes the sample ids in a batch to the monitor, before the batch runs.

        Raises:
            InvalidInputError: the batch has no entry `sample_ids`.
        """
        if self.sample_ids is None or self.monitor is None:
            return
        try:
            self.monitor.tag(batch[self.sample_ids])
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"sample_ids={self.sample_ids!r}: not found in the batch, a {type(batch).__name__}; have the data set return "
                "the id of each sample, and pass its key or index in the batch"
            ) from error

    def count_step(self) -> None:
        """Notes that the trainer has made a step of the current epoch."""
        self._open_epoch = self.epoch

    def end_epoch(self) -> EpochReport | None:
        """Closes the epoch.

        Returns:
            Its report. None if it had no step, if windows close by themselves (`samples_per_epoch`), or if another training
            has taken over the run.
        """
        is_over = self._training is None
        if self._open_epoch is None or self.monitor is None or is_over or self.settings.samples_per_epoch is not None:
            return None
        self._open_epoch = None
        try:
            return self.monitor.end_epoch(self.parameters())
        except NoObservationsError as error:  # not a reason to end the user's training
            self.monitor._faults.record("epoch", error)
            return None

    def parameters(self) -> Any:
        """The parameters to keep (`keep_best`), if the trainer holds them (JAX); else None."""
        return None

    @property
    def is_within_epoch(self) -> bool:
        """Returns True if the training has made steps that no report includes yet."""
        return self._training is not None and self._open_epoch is not None

    @property
    def ends_training(self) -> bool:
        """Returns True if the trainer must stop."""
        return self.monitor is not None and self.monitor._ends_training

    def progress(self, report: EpochReport) -> dict[str, float]:
        """The values for the trainer's progress bar, by key."""
        name = self.settings.name
        values = {"gwa": report.gwa, "stable": report.stable_gwa, "separation": report.separation}
        if self.settings.look is not None:
            values["consensus"] = math.nan if report.consensus is None else report.consensus
        if self.settings.early_stop is not None and self.settings.early_stop.statistic == "agreement":
            values["agreement"] = math.nan if report.agreement is None else report.agreement
        return {f"{name}/{key}": value for key, value in values.items()}

    def end(self) -> None:
        """Closes the monitor and runs `cleanup`; does nothing if no training is open."""
        self._training = None
        _training_now.discard(self)
        self.cleanup.close()
        if self.monitor is not None:
            self.monitor.close()

    def resume_from(self, state: dict[str, Any] | None) -> None:
        """Sets the state that the next training resumes from; None to start from zero."""
        self._pending_state = state

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON-able values for the trainer's checkpoint.

        In a distributed run every process must call this. Waits for the device.
        """
        if self.monitor is None:
            return self._pending_state or {}
        return {"epoch": self._open_epoch, "monitor": encode_arrays(self.monitor.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict`: now during a training, else when the next one begins.

        Raises:
            InvalidInputError: the state does not fit.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("epoch"), int | None):
            raise InvalidInputError(f"state: expected a state_dict() of GWACallback, found {str(state)[:80]}")
        self._pending_state = state
        if self.monitor is not None and self._training is not None:
            try:
                monitor_state = decode_arrays(state.get("monitor", {}))
            except (TypeError, ValueError) as error:
                raise InvalidInputError(
                    f"state: an array in the checkpoint is damaged ({error}). Nothing was loaded: use an earlier "
                    "checkpoint, or start without the state"
                ) from error
            self.monitor.load_state_dict(monitor_state)
            self._open_epoch, self._pending_state = state.get("epoch"), None


def encode_arrays(value: Any) -> Any:
    """Replaces the arrays of any framework in nested dicts and lists by dicts with base64 text, and NumPy scalars by numbers.

    So a checkpoint needs neither pickle nor a list of a million numbers. The inverse is `decode_arrays`.
    """
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__"):
        value = np.asarray(value)
        return {
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "base64": base64.b64encode(value.tobytes()).decode(),
        }
    if isinstance(value, Mapping):
        return {key: encode_arrays(inner) for key, inner in value.items()}
    return [encode_arrays(inner) for inner in value] if isinstance(value, list | tuple) else value


def decode_arrays(value: Any) -> Any:
    """Restores the arrays that `encode_arrays` has replaced, as NumPy arrays, bit for bit.

    Raises:
        TypeError, ValueError: an encoded array is damaged.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"dtype", "shape", "base64"}:
            flat = np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"]))
            return flat.reshape(value["shape"]).copy()
        return {key: decode_arrays(inner) for key, inner in value.items()}
    return [decode_arrays(inner) for inner in value] if isinstance(value, list) else value
