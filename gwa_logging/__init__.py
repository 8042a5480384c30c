"""Monitors the gradient-weight alignment of a classifier during training. Start with `gwa_logging.watch`."""

from gwa_logging._watch import watch
from gwa_logging.alignment import GWA_BETA, STABLE_BETA, alignment_scores, gwa
from gwa_logging.dataset import with_ids
from gwa_logging.errors import (
    BackendError,
    GwaError,
    HeadNotFoundError,
    InvalidInputError,
    MissingDependencyError,
    NoObservationsError,
)
from gwa_logging.monitor import Monitor
from gwa_logging.records import EpochReport, StopAlert, StopReason, Suspect
from gwa_logging.settings import EarlyStop
from gwa_logging.summary import AlignmentSummary

__version__ = "0.1.0"

__all__ = [
    "GWA_BETA",
    "STABLE_BETA",
    "AlignmentSummary",
    "BackendError",
    "EarlyStop",
    "EpochReport",
    "GwaError",
    "HeadNotFoundError",
    "InvalidInputError",
    "MissingDependencyError",
    "Monitor",
    "NoObservationsError",
    "StopAlert",
    "StopReason",
    "Suspect",
    "alignment_scores",
    "gwa",
    "watch",
    "with_ids",
]
