"""Accelerate: `watch` for your own training loop with an Accelerator.

from gwa_logging.integrations.accelerate import watch

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
monitor = watch(accelerator, model)  # sends to accelerator.trackers
for epoch in monitor.epochs(10):
    ...
monitor.close()
accelerator.end_training()
"""

from typing import Any
from weakref import WeakKeyDictionary

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.monitor import Monitor
from gwa_logging.registry import BACKENDS
from gwa_logging.trainer_session import TrainerSession

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise
    raise MissingDependencyError("accelerate", "accelerate") from error


class _CheckpointEntry:
    """What an accelerator's checkpoints store for a model: the state of the monitor that watches it now."""

    def __init__(self, accelerator: Accelerator, session: TrainerSession) -> None:
        self.accelerator = accelerator
        self.session = session
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        return self.session.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.session.load_state_dict(state)


_entries: WeakKeyDictionary[Any, _CheckpointEntry] = WeakKeyDictionary()


def watch(accelerator: Accelerator, model: Any, **arguments: Any) -> Monitor:
    """Watches a model that an accelerator trains. Call it after `init_trackers` and `prepare`, in every process.

    Results go to the accelerator's trackers (W&B, MLflow, TensorBoard, Trackio) unless you set `backend=`.
    `accelerator.save_state` and `load_state` save and restore the monitor's state. To save at the end of an epoch in the loop
    over `monitor.epochs`, call `monitor.end_epoch()` first; otherwise the resumed loop repeats that epoch. Watching the model
    again replaces the first watch.

    Args:
        accelerator: the Accelerator.
        model: the model, prepared or not.
        arguments: as in `gwa_logging.watch`.

    Returns:
        The monitor. Close it before `accelerator.end_training()`, which finishes the runs.

    Raises:
        InvalidInputError: an argument is wrong.
        GwaError: as in `gwa_logging.watch`.
    """
    if not isinstance(accelerator, Accelerator):
        raise InvalidInputError(
            f"accelerator: expected an accelerate.Accelerator, found {type(accelerator).__name__}: watch(accelerator, model)"
        )
    session = TrainerSession(arguments)
    runs = {}
    if accelerator.is_main_process:
        runs = {tracker.name: tracker.tracker for tracker in accelerator.trackers if tracker.name in BACKENDS}
    monitor = session.begin(model, training=session, planned=None, runs=runs)
    bare_model = accelerator.unwrap_model(model)
    entry = _entries.get(bare_model)
    if entry is not None and entry.accelerator is accelerator:
        entry.session = session
    else:
        _entries[bare_model] = _CheckpointEntry(accelerator, session)
    return monitor
