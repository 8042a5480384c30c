"""Journal records for tests: each factory builds a valid record, and keyword arguments replace any of its fields."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gwa_logging import AlignmentSummary, StopAlert, StopReason
from gwa_logging.records import CloseRecord, EpochReport, IntervalRecord, RunRecord

SCORES = (0.1, 0.2, -0.1)


def run_record(**fields: Any) -> RunRecord:
    """The first record of a run that watches one head."""
    defaults = {"name": "gwa", "head": "head 'fc'", "created": "2026-01-31T12:00:00+00:00", "settings": {}}
    return RunRecord(**defaults | fields)


def interval_record(
    step: int = 0, scores: Iterable[float] | AlignmentSummary = SCORES, **fields: Any
) -> IntervalRecord:
    """An interval of one step that ends at `step` and holds these scores."""
    summary = _summary(scores)
    defaults = {
        "step": step,
        "epoch": 0,
        "steps": 1,
        "count": summary.count,
        "excluded": summary.excluded,
        "mean": summary.mean,
        "minimum": summary.minimum,
        "maximum": summary.maximum,
        "histogram": summary.histogram,
        "display_limit": 0.5,
    }
    return IntervalRecord(**defaults | fields)


def epoch_report(epoch: int = 0, scores: Iterable[float] | AlignmentSummary = SCORES, **fields: Any) -> EpochReport:
    """The report of an epoch of ten steps with these scores."""
    report = _summary(scores).report(epoch=epoch, step=10 * epoch + 9)
    return report.model_copy(update=fields)


def stop_alert(epoch: int = 7, best_epoch: int = 2, **fields: Any) -> StopAlert:
    """An alert about a fall of the separation from 0.75 to 0.5."""
    defaults = {
        "epoch": epoch,
        "best_epoch": best_epoch,
        "statistic": "separation",
        "value": 0.5,
        "best_value": 0.75,
        "reason": StopReason.DECLINE,
        "message": "stop now",
    }
    return StopAlert(**defaults | fields)


def close_record(epochs: int = 0, steps: int = 0, **fields: Any) -> CloseRecord:
    """The last record of a run without a best epoch and without faults."""
    defaults = {"epochs": epochs, "steps": steps, "best_epoch": None, "best_value": math.nan, "faults": {}}
    return CloseRecord(**defaults | fields)


def _summary(scores: Iterable[float] | AlignmentSummary) -> AlignmentSummary:
    if isinstance(scores, AlignmentSummary):
        return scores
    return AlignmentSummary.from_scores(np.asarray(list(scores), dtype=np.float64))
