"""TrainerSession: what the trainers' callbacks share. It watches a model while a trainer runs, and closes its epochs."""

import base64
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import numpy as np

from gwa_logging._watch import RunTakenError, watch
from gwa_logging.errors import InvalidInputError, NoObservationsError
from gwa_logging.monitor import Monitor, logger
from gwa_logging.records import EpochReport
from gwa_logging.settings import WatchSettings

_following: "WeakSet[TrainerSession]" = WeakSet()


class TrainerSession:
    """Base of the callbacks.

    Attributes:
        monitor: of the training under way, or of the last one; None before the first.
    """

    def __init__(self, *, sample_ids: Any = None, **arguments: Any) -> None:
        super().__init__()
        # A mistake is an error here, not once the data is loaded.
        self._settings = WatchSettings(**{"backend": "local", **arguments})
        if sample_ids is not None and self._settings.num_samples is None:
            raise InvalidInputError(
                f"sample_ids={sample_ids!r}: there is no ledger to enter them in; add num_samples=<size of the training set>"
            )
        self.monitor: Monitor | None = None
        self._arguments = arguments
        self._sample_ids = sample_ids
        self._training: Any = None
        self._open: int | None = None  # the trainer's epoch that has samples which no report has counted yet
        self._state: dict[str, Any] | None = None  # from a checkpoint, until training begins

    def _begin(self, model: Any, *, training: Any, planned: int | None, runs: Mapping[str, Any]) -> Monitor:
        """Watches the model, and goes on from the checkpoint if one was loaded.

        Args:
            model: what `watch` takes.
            training: any object that two callbacks of one training, and only these, are given alike.
            planned: how many epochs there will be, if that is known.
            runs: the trainer's own runs by backend, None where the active one is meant; they fill in what the user left open.

        Raises:
            InvalidInputError: the trainer has this callback twice, or the checkpoint's state does not fit.
            GwaError: whatever `watch` raises.
        """
        if any(other._training is training for other in _following if other is not self):
            raise InvalidInputError(
                f"{type(self).__name__}: this trainer has it twice; remove one (one callback watches several heads with "
                "head=['a', 'b'], and sends to several trackers with backend=['wandb', 'mlflow'])"
            )
        self._end()
        self.monitor = self._watch(model, **self._arguments | self._places(runs))
        self._training, self._open = training, None
        _following.add(self)
        try:
            if planned is not None and planned > 0:
                self.monitor.plan(planned)
            if self._state is not None:
                self.load_state_dict(self._state)
        except BaseException:
            self._end()
            raise
        return self.monitor

    def _watch(self, model: Any, **arguments: Any) -> Monitor:
        """Watches; ends what the callback of an interrupted training left open in the same run under the same name."""
        try:
            return watch(model, **arguments)
        except RunTakenError as error:
            interrupted = [other for other in _following if other.monitor is error.monitor]
            if not interrupted:
                raise
            logger.warning(
                "gwa_logging: %s has not ended; it is closed, as another training writes to its run", error.monitor
            )
            interrupted[0]._end()
        return self._watch(model, **arguments)

    def _places(self, runs: Mapping[str, Any]) -> dict[str, Any]:
        """Where to send, as far as the user has left that open."""
        given = self._arguments.get("run")
        backend = self._settings.backend if "backend" in self._arguments else tuple(runs) or ("local",)
        if given is not None and not isinstance(given, dict):
            return {"backend": list(backend), "run": given}
        found = {name: run for name, run in runs.items() if name in backend and run is not None}
        return {"backend": list(backend), "run": found | (given or {}) or None}

    def _enter_epoch(self, epoch: int) -> None:
        """The trainer begins or resumes its epoch of this number: one that was left open has ended."""
        if self._open not in (None, epoch):
            self._end_epoch()

    def _tag(self, batch: Any) -> None:
        """Notes the ids in a batch that is about to run."""
        if self._sample_ids is None or self.monitor is None:
            return
        try:
            self.monitor.tag(batch[self._sample_ids])
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"sample_ids={self._sample_ids!r}: not in the batch, a {type(batch).__name__}; have the data set return each "
                "sample's id, and say under which key or index it is"
            ) from error

    def _step(self, epoch: int) -> None:
        """The trainer has made a step of its epoch."""
        self._open = epoch

    def _end_epoch(self) -> EpochReport | None:
        """Closes the epoch if there were steps; None if not, or if it closes by itself (samples_per_epoch)."""
        if self._open is None or self.monitor is None or self._settings.samples_per_epoch is not None:
            return None
        if self._training is None:  # another training has taken over the run
            return None
        self._open = None
        try:
            return self.monitor.end_epoch()
        except NoObservationsError as error:  # nothing that would be worth the user's training
            self.monitor._faults.record("epoch", error)
            return None

    @property
    def _should_stop(self) -> bool:
        """Returns True if the trainer is to be stopped."""
        return self.monitor is not None and self.monitor._ends_training

    def _shown(self, report: EpochReport) -> dict[str, float]:
        """What goes into a progress bar."""
        name = self._settings.name
        return {f"{name}/gwa": report.gwa, f"{name}/stable": report.stable_gwa}

    def _end(self) -> None:
        """Training is over, one way or another."""
        self._training = None
        _following.discard(self)
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint: plain JSON-able values. Every process must call it; waits for the device."""
        if self.monitor is None:
            return self._state or {}
        return {"epoch": self._open, "monitor": _plain(self.monitor.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, at once or when training begins.

        Raises:
            InvalidInputError: it does not fit.
        """
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("epoch"), int | None):
            raise InvalidInputError(
                f"state: not a state_dict() of a {type(self).__name__}: found {str(state_dict)[:80]}"
            )
        self._state = state_dict
        if self.monitor is not None and self._training is not None:
            try:
                state = _restored(state_dict.get("monitor", {}))
            except (TypeError, ValueError) as error:
                raise InvalidInputError(
                    f"state: an array in the checkpoint is damaged ({error}). Nothing was loaded: take an earlier "
                    "checkpoint, or start without the state"
                ) from error
            self.monitor.load_state_dict(state)
            self._open, self._state = state_dict.get("epoch"), None


def _plain(value: Any) -> Any:
    """Arrays as text, so that neither pickle nor a list of a million numbers gets into a checkpoint."""
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__"):  # of any framework
        value = np.asarray(value)
        return {
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "base64": base64.b64encode(value.tobytes()).decode(),
        }
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    """What `_plain` was given."""
    if isinstance(value, Mapping):
        if value.keys() == {"dtype", "shape", "base64"}:
            flat = np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"]))
            return flat.reshape(value["shape"]).copy()
        return {key: _restored(inner) for key, inner in value.items()}
    return [_restored(inner) for inner in value] if isinstance(value, list) else value
