"""Accelerate: `watch` for a loop of your own around an Accelerator.

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


class _Kept:
    """What an accelerator's checkpoints keep of a model: the state of the monitor that watches it now."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.follower: TrainerSession
        self.accelerator = accelerator
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        return self.follower.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.follower.load_state_dict(state)


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def watch(accelerator: Accelerator, model: Any, **arguments: Any) -> Monitor:
    """`gwa_logging.watch` for a model that an accelerator trains, in every process, after `init_trackers` and `prepare`.

    Results are sent to the accelerator's trackers (W&B, MLflow, TensorBoard, Trackio) unless `backend=` says otherwise.
    `accelerator.save_state` and `load_state` keep and restore the monitor's state. To save at the end of an epoch, inside of
    the loop over `monitor.epochs`, call `monitor.end_epoch()` first, or the resumed loop will begin that epoch again. Watching
    the model again replaces the first watch.

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
    follower = TrainerSession(**arguments)
    runs = {}
    if accelerator.is_main_process:
        runs = {tracker.name: tracker.tracker for tracker in accelerator.trackers if tracker.name in BACKENDS}
    monitor = follower._begin(model, training=follower, planned=None, runs=runs)
    bare = accelerator.unwrap_model(model)
    kept = _kept.get(bare)
    if kept is None or kept.accelerator is not accelerator:
        kept = _kept[bare] = _Kept(accelerator)
    kept.follower = follower
    return monitor
