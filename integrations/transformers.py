"""Transformers: a callback for the Trainer.

from gwa_logging.integrations.transformers import GWACallback

trainer = Trainer(model, TrainingArguments(report_to="wandb"), train_dataset=data, callbacks=[GWACallback()])
"""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.monitor import Monitor
from gwa_logging.registry import BACKENDS
from gwa_logging.trainer_session import TrainerSession

try:
    from tqdm.auto import tqdm
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "tqdm"):
        raise
    raise MissingDependencyError("transformers", "transformers") from error

logger = logging.getLogger("gwa_logging")

KEY = "gwa_logging"
"""Key of the state in `TrainerState.stateful_callbacks`, which a checkpoint stores in trainer_state.json."""


class GWACallback(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Watches the model of a Trainer while it trains.

    Results go to the trackers of `report_to` unless you set `backend=`. A line per epoch appears with the progress bar. With
    `EarlyStop(action="stop")` an alert stops the trainer. The trainer's checkpoints include the monitor's state, with or
    without `restore_callback_states_from_checkpoint`. Put your callbacks that request checkpoints before this one.

    Args:
        sample_ids: name of the data set's column with the sample ids, for the ledger (`num_samples=`). It needs
            `TrainingArguments(remove_unused_columns=False)`; the model does not receive the column.
        arguments: as in `gwa_logging.watch`.

    Raises:
        InvalidInputError: an argument is wrong; when training starts: the trainer has the callback twice, or would drop the
            column of ids.
    """

    def __init__(self, *, sample_ids: Any = None, **arguments: Any) -> None:
        super().__init__()
        self._gwa_session = TrainerSession(arguments, sample_ids)

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last training; None before the first."""
        return self._gwa_session.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        session = self._gwa_session
        if session.sample_ids is not None and args.remove_unused_columns:
            raise InvalidInputError(
                f"sample_ids={session.sample_ids!r}: the Trainer drops columns that the model's forward does not accept; set "
                "TrainingArguments(remove_unused_columns=False), and keep only this column and those of forward"
            )
        saved = state.stateful_callbacks.get(KEY)
        is_current = saved is not None and saved["global_step"] == state.global_step
        session.resume_from(saved if is_current else None)
        if state.global_step and not is_current:
            logger.warning(
                "gwa_logging: GWA starts again from zero: the checkpoint of step %d does not include its state, because "
                "GWACallback was missing, or a callback after it requested the checkpoint. Put GWACallback last.",
                state.global_step,
            )
        # The number of epochs of a stream is unknown; the trainer then plans a very large one.
        planned = state.num_train_epochs if state.num_train_epochs < 2**31 else None
        runs = _runs(args) if state.is_world_process_zero else {}
        session.begin(model, training=state, planned=planned, runs=runs)
        if session.sample_ids is not None:
            hook = model.register_forward_pre_hook(partial(_take_ids, session), with_kwargs=True)
            session.cleanup.callback(hook.remove)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gwa_session.enter_epoch(int(state.epoch + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._gwa_session
        session.count_step()
        control.should_training_stop |= session.ends_training  # after a window of samples_per_epoch
        _save(session, state, control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._gwa_session
        report = session.end_epoch()
        if report is not None and state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(str(report))  # as the trainer's own progress bar writes the loss
        control.should_training_stop |= session.ends_training
        _save(session, state, control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _save(self._gwa_session, state, args.save_strategy == "best")  # a checkpoint follows the best evaluation

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gwa_session.end()


def _take_ids(session: TrainerSession, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: removes the ids from the model's arguments, and tags the batch with them while training."""
    if model.training:
        session.tag(kwargs)
    return args, {name: value for name, value in kwargs.items() if name != session.sample_ids}


def _save(session: TrainerSession, state: Any, is_saved: bool) -> None:
    """Puts the session's state where the trainer saves its own, if a checkpoint follows. Every process must call this."""
    if is_saved and session.is_training(state):
        state.stateful_callbacks[KEY] = {"global_step": state.global_step, **session.state_dict()}


def _runs(args: Any) -> dict[str, Any]:
    """Returns the trackers that the trainer reports to. None stands for the active run; for TensorBoard its folder is found."""
    runs = dict.fromkeys(name for name in args.report_to if name in BACKENDS)
    if "tensorboard" in runs:
        folder = getattr(args, "logging_dir", None) or os.environ.get("TENSORBOARD_LOGGING_DIR")
        created = (found for found in Path(args.output_dir, "runs").glob("*") if found.is_dir())
        newest = max(created, key=lambda found: found.stat().st_mtime, default=args.output_dir)
        runs["tensorboard"] = folder or newest
    return runs
