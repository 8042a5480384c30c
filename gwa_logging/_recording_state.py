"""The state of a recording, for checkpoints: taken, read and restored."""

from typing import Any

from gwa_logging.checkpoint import HeadShape, MonitorState
from gwa_logging.consensus import Consensus
from gwa_logging.recording import Recording
from gwa_logging.saved_run import SavedRun
from gwa_logging.summary import AlignmentSummary


def state_of(recording: Recording, heads: dict[str, Any], *, whole_ledger: bool) -> dict[str, Any]:
    """The state as plain data; `heads` are the states of the further heads. Waits for the device."""
    recording.has_state = True
    recorded_steps, interval = recording.intervals.peek()
    recording.writer.drain()
    recording.group.notify(recording.deliveries)
    epoch = recording.intervals.summary
    return MonitorState(
        head=HeadShape.of(recording.adapter),
        processes=recording.adapter.processes,
        step=recording.intervals.steps,
        recorded_steps=recorded_steps,
        display_limit=recording.intervals.display_limit,
        planned=recording.rule.planned,
        stop=recording.rule.state,
        history=recording.history,
        alert=recording.alert,
        epoch=recording.adapter.reduce(epoch) if recording.intervals.in_epoch else epoch,
        interval=interval,
        look=recording.look.consensus.state(recording.adapter.to_checkpoint_array),
        ledger=recording.suspects.state(recording.agreement.past, whole=whole_ledger),
        heads=heads,
        best_weights=recording.best_weights.last_file() if recording.best_weights else None,
        run=saved_run(recording),
    ).to_dict(recording.adapter)


def read_state(recording: Recording, state: Any, heads: set[str]) -> MonitorState:
    """Reads a state and changes nothing.

    Raises:
        InvalidInputError: it does not fit this head, or the paths of the further heads.
    """
    read = MonitorState.from_dict(state)
    read.check(recording.adapter, recording.settings.num_samples, heads)
    return read


def restore(recording: Recording, state: MonitorState) -> None:
    """Resumes from a state."""
    with recording.lock:
        recording.has_state = True
        recording.intervals.flush()
        recording.history, recording.alert = state.history, state.alert
        recording.rule.restore(state.stop, state.planned, state.history)
        recording.look.consensus = Consensus.from_state(state.look)
        recording.agreement.past = recording.suspects.restore(state.ledger, state.alert)
        recording.expect_head(state.head)
        recording.intervals.restore(
            steps=state.step,
            epoch=len(state.history),
            # All processes may load the state of one of them: its samples must count once.
            summary=state.epoch if recording.adapter.writes else AlignmentSummary(),
            display_limit=state.display_limit,
            recorded_steps=state.recorded_steps,
            partial=state.interval,
            in_epoch=bool(state.epoch.seen),
        )
        if recording.best_weights is not None:
            recording.best_weights.resume(state.best_weights)
        for delivery in recording.deliveries:
            delivery.resume()


def saved_run(recording: Recording) -> SavedRun | None:
    """The run that the recording writes; None in a process that does not write."""
    if recording.journal is None:
        return None
    trackers = {name: delivery.backend for name, delivery in recording.trackers.items()}
    return SavedRun.of(recording.journal.path.parent.name, trackers)
