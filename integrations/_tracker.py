"""Base class of the trackers: one method for each kind of record.

The smallest useful tracker overrides `on_interval` and `on_epoch`::

    class PrintTracker(Tracker):
        name = "print"

        def on_epoch(self, report: EpochReport) -> None:
            print(self.keyed(report.metrics))
"""

from collections.abc import Mapping
from typing import TypeVar

from gwa_logging.errors import InvalidInputError
from gwa_logging.protocols import Backend
from gwa_logging.records import (
    AlertWithdrawal,
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    SuspectsRecord,
)

Value = TypeVar("Value")


class Tracker(Backend):
    """A backend that passes each record to the method for its kind. Each of these methods does nothing by default.

    A method that raises leaves its record unwritten: the same record is written again later. Kinds of records that a later
    version adds are ignored. See `gwa_logging.protocols.Backend` for the other members.

    Attributes:
        prefix: prefix of every metric key.
    """

    def __init__(self, prefix: str = "gwa") -> None:
        self.prefix = prefix

    def write(self, record: AnyRecord) -> None:
        """Passes a record to the method for its kind."""
        match record:
            case RunRecord():
                self.on_run(record)
            case IntervalRecord():
                if record.count:
                    self.on_interval(record)
            case EpochReport():
                self.on_epoch(record)
            case StopAlert():
                self.on_alert(record)
            case AlertWithdrawal():
                self.on_withdrawal(record)
            case SuspectsRecord():
                self.on_suspects(record)
            case CloseRecord():
                self.on_close(record)

    def on_run(self, run: RunRecord) -> None:
        """Called first: the head and the settings."""

    def on_interval(self, interval: IntervalRecord) -> None:
        """Called every `log_every_n_steps` steps, unless no sample of the interval has a score."""

    def on_epoch(self, report: EpochReport) -> None:
        """Called after each epoch."""

    def on_alert(self, alert: StopAlert) -> None:
        """Called when the stop alert fires. `alert.text` is the whole alert."""

    def on_withdrawal(self, withdrawal: AlertWithdrawal) -> None:
        """Called when a clearly better epoch withdraws the stop alert."""

    def on_suspects(self, suspects: SuspectsRecord) -> None:
        """Called with each list of suspects; never called without a ledger."""

    def on_close(self, end: CloseRecord) -> None:
        """Called with the last record, before `close`."""

    def close(self) -> None:
        """Does nothing: override it if there is something to close."""

    def keyed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns `values` with the prefix added to each key."""
        return {f"{self.prefix}/{key}": value for key, value in values.items()}


def invalid_run(run: object, expected: str) -> InvalidInputError:
    """Returns the error for a `run=` of the wrong type."""
    return InvalidInputError(f"run={run!r}: expected {expected}, found {type(run).__module__}.{type(run).__qualname__}")
