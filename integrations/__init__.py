"""Adapters (frameworks) and backends (trackers), and everything needed to write a backend.

Each module wraps one third party and imports it at its top, so import the modules by name only where they are needed. The names
below need no third party. docs/backends.md explains how to write a backend.
"""

from gwa_logging.errors import BackendError
from gwa_logging.integrations._tracker import Tracker
from gwa_logging.protocols import Backend, RunContext, TrackerContents, samples_by_epoch
from gwa_logging.records import (
    AlertWithdrawal,
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    StopAlert,
    Suspect,
    SuspectsRecord,
    TrackerRunRef,
)

__all__ = [
    "AlertWithdrawal",
    "AnyRecord",
    "Backend",
    "BackendError",
    "CloseRecord",
    "EpochReport",
    "IntervalRecord",
    "RunContext",
    "RunRecord",
    "StopAlert",
    "Suspect",
    "SuspectsRecord",
    "Tracker",
    "TrackerContents",
    "TrackerRunRef",
    "samples_by_epoch",
]
