"""Transformers: a callback for its Trainer.

from gwa_logging.integrations.transformers import GWACallback

trainer = Trainer(model, TrainingArguments(report_to="wandb"), train_dataset=data, callbacks=[GWACallback()])
"""

import logging
import os
from pathlib import Path
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
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
"""Where our state is in `TrainerState.stateful_callbacks`, and so in a checkpoint's trainer_state.json."""


class GWACallback(TrainerSession, TrainerCallback):  # type: ignore[misc]  # transformers is not looked into for types
    """Watches the model of a Trainer while it trains.

    Results are sent to the trackers of `report_to` unless `backend=` says otherwise; a line for each epoch shows beside the
    progress bar; with `EarlyStop(action="stop")` the alert stops the trainer; the state is kept in its checkpoints, whether or
    not `restore_callback_states_from_checkpoint` is set. A callback of yours that asks for a checkpoint goes before this one.

    Args:
        sample_ids: name of the data set's column with the samples' ids, for the ledger (`num_samples=`). It needs
            `TrainingArguments(remove_unused_columns=False)`, and the model never sees it.
        arguments: as in `gwa_logging.watch`.

    Attributes:
        monitor: the Monitor of the present or last training; None before the first.

    Raises:
        InvalidInputError: an argument is wrong; when training starts, that the trainer has the callback twice, or would drop
            the column of ids.
    """

    _epoch = 0
    _popping: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._sample_ids is not None and args.remove_unused_columns:
            raise InvalidInputError(
                f"sample_ids={self._sample_ids!r}: the Trainer drops columns that the model's forward does not take; set "
                "TrainingArguments(remove_unused_columns=False), and leave only this column and those of the forward"
            )
        kept = state.stateful_callbacks.get(KEY)
        self._state = kept if kept is not None and kept["global_step"] == state.global_step else None
        if state.global_step and self._state is None:
            logger.warning(
                "gwa_logging: GWA begins anew, since the checkpoint of step %d has no state of it: it was made without "
                "GWACallback, or asked for by a callback after it. Put GWACallback last.",
                state.global_step,
            )
        # Of a stream there is no telling how many epochs it will be: the trainer's number is then a very large one.
        planned = state.num_train_epochs if state.num_train_epochs < 2**31 else None
        self._begin(model, training=state, planned=planned, runs=_runs(args) if state.is_world_process_zero else {})
        if self._sample_ids is not None:
            self._popping = model.register_forward_pre_hook(self._pop, with_kwargs=True)

    def _pop(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the ids out of what the model is called with."""
        if model.training:
            self._tag(kwargs)
        return args, {name: value for name, value in kwargs.items() if name != self._sample_ids}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = int(state.epoch + 1e-6)
        self._enter_epoch(self._epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step(self._epoch)
        control.should_training_stop |= self._should_stop  # after a window of samples_per_epoch
        self._keep(state, control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._end_epoch()
        if report is not None and state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(str(report))  # as the trainer's own progress bar writes the loss
        control.should_training_stop |= self._should_stop
        self._keep(state, control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(state, args.save_strategy == "best")  # if the evaluation is the best one, a checkpoint follows

    def _keep(self, state: Any, is_saved: bool) -> None:
        """Every process takes part; the first one of them writes the file."""
        if is_saved and self._training is state:
            state.stateful_callbacks[KEY] = {"global_step": state.global_step, **self.state_dict()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._popping is not None:
            self._popping.remove()
        super()._end()


def _runs(args: Any) -> dict[str, Any]:
    """The trackers that the trainer reports to. Their runs are the active ones by now, but for TensorBoard's folder."""
    runs = dict.fromkeys(name for name in args.report_to if name in BACKENDS)
    if "tensorboard" in runs:
        folder = getattr(args, "logging_dir", None) or os.environ.get("TENSORBOARD_LOGGING_DIR")
        made = (found for found in Path(args.output_dir, "runs").glob("*") if found.is_dir())
        runs["tensorboard"] = folder or max(made, key=lambda found: found.stat().st_mtime, default=args.output_dir)
    return runs
