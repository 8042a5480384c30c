"""What a call on the monitor does to all watched heads of a model. Their recordings come in order, the first head first."""

from collections.abc import Sequence
from time import monotonic
from typing import Any

from gwa_logging._closing_report import write_in_thread
from gwa_logging._continued_run import continue_run
from gwa_logging._recording_state import read_state
from gwa_logging._recording_state import restore as restore_recording
from gwa_logging.delivery import MAX_BLOCKING, wait_for
from gwa_logging.errors import NoObservationsError
from gwa_logging.recording import Recording
from gwa_logging.records import EpochReport

CLOSE_WITHIN = 10.0
"""Seconds that closing waits for the reports and all backends together."""


def notify(recordings: Sequence[Recording]) -> None:
    """Notifies the backends about new records. Blocks for a few milliseconds at most, see `delivery`."""
    first = recordings[0]
    for recording in recordings:
        if any(not delivery.backend.threaded for delivery in recording.deliveries):
            recording.writer.drain(MAX_BLOCKING)  # these backends read the journal now, while this thread waits
    first.group.notify(delivery for recording in recordings for delivery in recording.deliveries)
    first.group.take_turns(id(first))


def end_epoch(recordings: Sequence[Recording], params: Any = None) -> EpochReport:
    """Closes the epoch of all heads of a model. Returns the report of the first one, whose lock is held.

    `params` are the parameters to keep if it is the best epoch (JAX).

    Raises:
        NoObservationsError: the first head had no step. For a further head that is a fault.
    """
    for other in recordings[1:]:
        try:
            with other.lock:
                other.end_epoch()
        except NoObservationsError as error:  # this epoch did not train that head
            recordings[0].faults.record(f"head {other.adapter.path!r}", error)
    return recordings[0].end_epoch(params=params)


def flush(recordings: Sequence[Recording], timeout: float) -> bool:
    """Delivers everything seen so far. Returns True if all journals and backends have everything after `timeout` seconds."""
    for recording in recordings:
        with recording.lock:
            recording.intervals.flush()
    deadline = monotonic() + timeout
    is_written = all(recording.writer.drain(max(0.0, deadline - monotonic())) for recording in recordings)
    is_delivered = wait_for([d for recording in recordings for d in recording.deliveries], deadline)
    return is_written and is_delivered and all(recording.writer.is_complete for recording in recordings)


def restore(recordings: Sequence[Recording], state: Any) -> None:
    """Resumes all heads of a model from the state of the first one. Changes nothing if a head's part does not fit.

    Raises:
        InvalidInputError: see `read_state`.
    """
    first, *others = recordings
    own = read_state(first, state, {other.adapter.path for other in others})
    states = [own, *(read_state(other, own.heads[other.adapter.path], set()) for other in others)]
    continue_run(recordings, states)
    for recording, part in zip(recordings, states, strict=True):
        restore_recording(recording, part)


def close(families: Sequence[Sequence[Recording]]) -> None:
    """Closes the recordings of several models, with one deadline for their reports and all backends. Never raises.

    Args:
        families: for each model the recordings of its heads, the first head first.
    """
    closing = [(family[0], family[1:]) for family in families]
    members = [(head, ()) for _, further in closing for head in further] + closing
    open_members = [(recording, others) for recording, others in members if recording.finish()]
    deadline = monotonic() + CLOSE_WITHIN
    write_in_thread([recording.closing_report for recording, _ in open_members if recording.closing_report])
    for recording, others in open_members:
        recording.begin_close(deadline, others)
    for recording, _ in open_members:
        recording.end_close(deadline)
