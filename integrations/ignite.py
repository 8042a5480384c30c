"""Ignite: watches the model that an Engine trains.

    from gwa_logging.integrations.ignite import GWAHandler

    handler = GWAHandler(model, backend="wandb")
    handler.attach(trainer)

An epoch closes at `Events.EPOCH_COMPLETED`.
"""

from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.integrations.torch.look_inputs import DatasetInputs
from gwa_logging.monitor import Monitor
from gwa_logging.trainer_session import TrainerSession

try:
    from ignite.engine import Engine, Events
except ModuleNotFoundError as error:
    if error.name not in ("ignite", "ignite.engine"):
        raise
    raise MissingDependencyError("pytorch-ignite", "ignite") from error


class GWAHandler:
    """Watches a model while an Engine trains it.

    `engine.state.metrics` gets `gwa/gwa`, `gwa/stable` and `gwa/separation` after each epoch, for Ignite's loggers and
    `Checkpoint`. With `EarlyStop(action="stop")` an alert terminates the engine. To save and resume, put the handler into the
    `to_save` and `to_load` of a `Checkpoint`. If `terminate()` cuts an epoch short, a resumed run completes it.

    Args:
        model: the model that the engine trains, as in `gwa_logging.watch`: the one that `idist.auto_model` returned.
        sample_ids: key or index of the sample ids in a batch, for the ledger (`num_samples=`). Or call
            `handler.monitor.tag(ids)` in the engine's function.
        arguments: as in `gwa_logging.watch`. An engine does not know its loggers, so name the tracker: `backend="wandb"`.

    Raises:
        InvalidInputError: an argument is wrong; when the run starts: the engine has two of these handlers.
    """

    def __init__(self, model: Any, *, sample_ids: Any = None, **arguments: Any) -> None:
        if isinstance(model, Engine):
            raise InvalidInputError("model: found an Engine; GWAHandler(model).attach(engine)")
        self._model = model
        self._gwa_session = TrainerSession(arguments, sample_ids)
        self._is_loaded = False  # True if the next run resumes from a checkpoint
        self._open_state: dict[str, Any] | None = None  # of an ended run, if its last epoch was cut short

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the current or last run; None before the first."""
        return self._gwa_session.monitor

    def attach(self, engine: Engine) -> None:
        """Adds the handlers to the engine that trains.

        Raises:
            InvalidInputError: this is not an Engine, or it has the handler already.
        """
        if not isinstance(engine, Engine):
            raise InvalidInputError(f"engine: expected an ignite.engine.Engine, found {type(engine).__name__}")
        if engine.has_event_handler(self._start):
            raise InvalidInputError("engine: this GWAHandler is attached to it already")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_step)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._complete_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._complete_epoch)
        engine.add_event_handler(Events.TERMINATE | Events.COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        session = self._gwa_session
        if (
            not self._is_loaded
        ):  # a further run with more epochs resumes where the last one ended, like the engine itself
            is_further = session.monitor is not None and engine.state.iteration > 0
            session.resume_from(self.state_dict() if is_further else None)
        self._is_loaded, self._open_state = False, None
        inputs = DatasetInputs(lambda: engine.state.dataloader)
        session.begin(self._model, training=engine, planned=engine.state.max_epochs, runs={}, inputs=inputs)

    def _start_step(self, engine: Engine) -> None:
        self._gwa_session.enter_epoch(engine.state.epoch - 1)  # Ignite counts from 1
        self._gwa_session.tag(engine.state.batch)

    def _complete_step(self, engine: Engine) -> None:
        self._gwa_session.count_step()
        if self._gwa_session.ends_training:  # after a window of samples_per_epoch
            engine.terminate()

    def _complete_epoch(self, engine: Engine) -> None:
        session = self._gwa_session
        report = session.end_epoch()
        if report is not None:
            engine.state.metrics.update(session.progress(report))
        if session.ends_training:
            engine.terminate()

    def _end(self, engine: Engine) -> None:
        if self._gwa_session.is_within_epoch:  # after terminate(): a resumed run completes the epoch
            self._open_state = self._gwa_session.state_dict()
        self._gwa_session.end()

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._gwa_session.end()
        # Ignite raises it only if the event has no handler. Handlers of the user decide for themselves.
        handlers = [handler for handler, *_ in engine._event_handlers[Events.EXCEPTION_RAISED]]
        if all(getattr(handler, "__func__", None) is GWAHandler._fail for handler in handlers):
            raise error

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a Checkpoint. In a distributed run every process must call this."""
        return self._open_state or self._gwa_session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a checkpoint when the engine runs.

        Raises:
            InvalidInputError: this is not such a state.
        """
        self._gwa_session.load_state_dict(state_dict)
        self._is_loaded = True
