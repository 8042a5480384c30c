"""fastai: a callback for the Learner.

    from gwa_logging.integrations.fastai import GWACallback

    Learner(dls, model, cbs=GWACallback()).fit_one_cycle(20)

An epoch closes after its last training batch, before validation.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from gwa_logging.epoch_backup import EpochBackup
from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.monitor import Monitor
from gwa_logging.trainer_session import TrainerSession

try:
    from fastai.callback.core import Callback, CancelEpochException, CancelFitException
except ModuleNotFoundError as error:
    if error.name not in ("fastai", "fastai.callback", "fastai.callback.core"):
        raise
    raise MissingDependencyError("fastai", "fastai") from error


class GWACallback(Callback):  # type: ignore[misc]  # fastai has no types
    """Watches the model of a Learner while it is fitted.

    Results go to the run of fastai's `WandbCallback` and `TensorBoardCallback` unless you set `backend=`. With
    `EarlyStop(action="stop")` an alert ends the fit after the epoch. Each fit is a run, and `fine_tune` consists of two fits.
    `lr_find`, `validate` and `get_preds` are not watched.

    Args:
        sample_ids: index of the sample ids in a batch, for the ledger (`num_samples=`): 2 with `with_ids` around items
            `x, y`. The callback removes the ids from the batches, also from those of the validation set if they have as many
            entries, so the model and the loss do not receive them.
        backup: file to save the state in at the end of each epoch; `fit(start_epoch=...)` resumes from it.
        arguments: as in `gwa_logging.watch`.

    Raises:
        InvalidInputError: an argument is wrong; when the fit starts: the Learner has the callback twice.
    """

    order = 68  # after all callbacks that record and save, since the ones after a CancelFitException are not called

    def __init__(
        self, *, sample_ids: int | None = None, backup: str | os.PathLike[str] | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if sample_ids is not None and not isinstance(sample_ids, int):
            raise InvalidInputError(
                f"sample_ids={sample_ids!r}: expected the index of the ids in a batch, such as 2 for batches x, y, ids"
            )
        self._gwa_session = TrainerSession(arguments, sample_ids)
        self._backup = None if backup is None else EpochBackup(backup)
        self._entries: int | None = None  # of a training batch, with its ids
        self._is_new = False  # True from the start of a fit until its first epoch
        self._patches = ExitStack()

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last fit; None before the first."""
        return self._gwa_session.monitor

    def before_fit(self) -> None:
        """Prepares for a fit. fastai fires the same event for `validate` and `get_preds`."""
        self._patches.close()
        self._is_new = not hasattr(self.learn, "lr_finder")
        self._replace("_do_epoch", self._end_if_it_fails(self.learn._do_epoch))

    def before_train(self) -> None:
        learn, session = self.learn, self._gwa_session
        if self._is_new:
            self._is_new = False
            session.resume_from(None)
            if self._backup is not None and self.epoch > 0:
                session.resume_from(self._backup.load(self.epoch))
            session.begin(learn.model, training=learn, planned=learn.n_epoch, runs=_runs(learn.cbs))
            if session.sample_ids is not None:
                self._replace("_split", self._without_ids(learn._split))
        session.enter_epoch(self.epoch)

    def after_batch(self) -> None:
        if self.training:
            self._gwa_session.count_step()

    def after_train(self) -> None:
        session = self._gwa_session
        report = session.end_epoch()
        if report is not None:
            bar = getattr(getattr(self.learn, "progress", None), "mbar", None)
            (self.learn.logger if bar is None else bar.write)(str(report))
        if self._backup is not None and session.is_training(self.learn):
            state = session.state_dict()  # every process must call this
            if not int(os.environ.get("RANK", 0)):
                self._backup.save(self.epoch + 1, state)

    def after_epoch(self) -> None:
        if self._gwa_session.is_training(self.learn) and self._gwa_session.ends_training:
            raise CancelFitException

    def after_fit(self) -> None:
        if self._backup is not None and self._gwa_session.is_training(self.learn):
            self._backup.remove()  # the fit is complete
        self._gwa_session.end()
        self._patches.close()

    def _replace(self, name: str, method: Callable[..., None]) -> None:
        """Replaces a method of this Learner until the fit ends."""
        setattr(self.learn, name, method)
        self._patches.callback(self.learn.__dict__.pop, name, None)

    def _end_if_it_fails(self, do_epoch: Callable[[], None]) -> Callable[[], None]:
        """Returns `do_epoch`, which also ends the session if it raises an error. fastai has no event for that."""

        def run() -> None:
            try:
                do_epoch()
            except (CancelEpochException, CancelFitException):
                raise
            except BaseException:
                self._gwa_session.end()
                self._patches.close()
                raise

        return run

    def _without_ids(self, split: Callable[[Any], None]) -> Callable[[Any], None]:
        """Returns the Learner's `_split`, which also tags a training batch with its ids and removes them from any batch."""
        learn, session = self.learn, self._gwa_session

        def run(batch: Any) -> None:
            if learn.training:
                session.tag(batch)
                self._entries = len(batch)
            split(batch)
            if len(batch) == self._entries:
                position = session.sample_ids % len(batch)
                rest = (*batch[:position], *batch[position + 1 :])
                inputs = min(len(learn.xb), len(rest) - 1)  # without n_inp, fastai takes all entries but the last one
                learn.xb, learn.yb = rest[:inputs], rest[inputs:]

        return run


def _runs(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Returns the trackers that the Learner reports to. None stands for the active run."""
    runs: dict[str, Any] = {}
    for callback in callbacks:
        kinds = {base.__name__ for base in type(callback).__mro__}
        if "WandbCallback" in kinds:
            runs["wandb"] = None
        elif "TensorBoardBaseCallback" in kinds:
            runs["tensorboard"] = callback.writer.log_dir
    return runs
