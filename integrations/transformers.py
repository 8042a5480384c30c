"""Transformers: a callback for the Trainer.

from gwa_logging.integrations.transformers import GWACallback

trainer = Trainer(model, TrainingArguments(report_to="wandb"), train_dataset=data, callbacks=[GWACallback()])
"""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.integrations.torch.look_inputs import DatasetInputs
from gwa_logging.monitor import Monitor
from gwa_logging.registry import BACKENDS
from gwa_logging.trainer_session import TrainerSession

try:
    import torch
    from tqdm.auto import tqdm
    from transformers import Trainer, TrainerCallback
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

    TRL's trainers are Trainers too. Their head is fused with the loss, and its scores are exact nevertheless.

    Args:
        sample_ids: name of the data set's column with the sample ids, for the ledger (`num_samples=`): int, one per row, or a
            list with one per token for packed rows, -1 where a token belongs to no sample. The Trainer keeps the column, and
            the model does not receive it. Pass the callback to the trainer as `callbacks=[...]`.
        arguments: as in `gwa_logging.watch`.

    Raises:
        InvalidInputError: an argument is wrong; when the trainer is made: it is one of TRL's that has no ids; when training
            starts: the trainer has the callback twice, or the column of ids is missing.
    """

    def __init__(self, *, sample_ids: Any = None, **arguments: Any) -> None:
        super().__init__()
        self._gwa_session = TrainerSession(arguments, sample_ids)

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last training; None before the first."""
        return self._gwa_session.monitor

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gwa_session.sample_ids is not None:
            trainer = _calling_trainer()
            if trainer is not None:
                _keep_ids(trainer, self._gwa_session.sample_ids)
                self._gwa_session.trainer_keeps_ids = True

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        session = self._gwa_session
        if session.sample_ids is not None and args.remove_unused_columns and not session.trainer_keeps_ids:
            raise InvalidInputError(
                f"sample_ids={session.sample_ids!r}: the Trainer drops columns that the model's forward does not accept; pass "
                "the callback as Trainer(callbacks=[...]) instead of add_callback, so that it can keep the column"
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
        inputs = DatasetInputs(lambda: train_dataloader)
        session.begin(model, training=state, planned=planned, runs=runs, inputs=inputs)
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


def _calling_trainer() -> Any:
    """The Trainer whose constructor is running; None if it is not found. No event of a callback passes the Trainer itself."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _keep_ids(trainer: Any, name: str) -> None:
    """Makes the training batches of a trainer include the column of ids. Those of the evaluation stay as they are.

    Raises:
        InvalidInputError: the rows of the trainer's batches are not the rows of its data set.
    """
    kind = next((base for base in type(trainer).__mro__ if base.__module__.startswith("trl.")), None)
    if kind is not None and not any(base.__name__ == "SFTTrainer" for base in type(trainer).__mro__):
        raise InvalidInputError(
            f"sample_ids={name!r}: TRL's {kind.__name__} makes several rows of a batch from one row of the data set, so the "
            "ids would not match; leave out sample_ids and num_samples, or use the SFTTrainer"
        )
    make_loader = trainer.get_train_dataloader

    def make_loader_with_ids() -> Any:
        columns = getattr(trainer.train_dataset, "column_names", None)
        if isinstance(columns, list) and name not in columns:
            raise InvalidInputError(
                f"sample_ids={name!r}: the training set does not have this column; it has {columns}. Add one with "
                "with_ids(dataset). TRL's packing drops it: pack the data set before, as docs/language-models.md shows"
            )
        drops_columns = trainer.args.remove_unused_columns
        collator, kept = trainer.data_collator, None
        if drops_columns:
            trainer._set_signature_columns_if_needed()
            kept = trainer._signature_columns
            trainer._signature_columns = [*kept, name]
        trainer.data_collator = IdCollator(collator, name, is_hidden=drops_columns)
        try:
            return make_loader()
        finally:
            trainer.data_collator = collator
            if kept is not None:
                trainer._signature_columns = kept

    trainer.get_train_dataloader = make_loader_with_ids


class IdCollator:
    """A trainer's collator, which adds the ids of the samples to its batch: int64 [rows], or one per token.

    They are [rows, tokens] if a row has a list of ids, and if the collator joins all rows into one (padding-free batches). Ids
    of padding are -1. A batch that includes the ids already keeps them.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], name: str, *, is_hidden: bool) -> None:
        """With `is_hidden` the collator does not see the ids, as if the trainer had dropped them."""
        self.collate = collate
        self.name = name
        self.is_hidden = is_hidden

    def __call__(self, rows: list[Any]) -> Any:
        """Makes a batch.

        Raises:
            InvalidInputError: the ids do not match the tokens of their row.
        """
        if not all(isinstance(row, Mapping) and self.name in row for row in rows):
            return self.collate(rows)
        ids = [row[self.name] for row in rows]
        seen = [{key: row[key] for key in row if key != self.name} for row in rows] if self.is_hidden else rows
        lengths = [len(row["input_ids"]) if "input_ids" in row else 1 for row in rows]  # before a collator changes them
        batch = self.collate(seen)
        if isinstance(batch, Mapping) and self.name not in batch:
            batch[self.name] = self._ids(ids, lengths, batch)  # type: ignore[index]
        return batch

    def _ids(self, ids: list[Any], lengths: list[int], batch: Mapping[str, Any]) -> torch.Tensor:
        tokens = batch.get("input_ids")
        per_token = [torch.as_tensor(each) for each in ids]
        if all(each.ndim == 0 for each in per_token):
            if tokens is None or tokens.shape[0] == len(ids):
                return torch.stack(per_token)
            per_token = [each.expand(length) for each, length in zip(per_token, lengths, strict=True)]
        found = [each.numel() for each in per_token]
        if found != lengths:
            raise InvalidInputError(
                f"{self.name}: expected one id per row, or per token, which are {lengths}, found {found} in the rows of a batch"
            )
        if tokens is None or tokens.shape[0] not in (1, len(ids)):
            shape = None if tokens is None else tuple(tokens.shape)
            raise InvalidInputError(
                f"{self.name}: the collator made input_ids of shape {shape} of {len(ids)} rows, so the ids cannot be assigned"
            )
        placed = torch.full(tokens.shape, -1)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == tokens.shape and int(mask.sum()) == sum(lengths):
            placed[mask.bool()] = torch.cat(per_token)  # whichever side is padded
        elif tokens.shape[0] == 1:
            placed[0, : sum(lengths)] = torch.cat(per_token)
        else:
            for row, each in zip(placed, per_token, strict=True):
                row[: each.numel()] = each
        return placed


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
