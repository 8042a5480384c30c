"""Criteria that pick an epoch, each online: at no epoch do they know of a later one, unless their name says so.

Those of others are implemented from their papers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging import EarlyStop
from gwa_logging.alignment import GWA_BETA
from gwa_logging.early_stop import Decision, StopState, step
from gwa_logging.histogram import Histogram
from gwa_logging.statistic import estimate

Series = dict[str, npt.NDArray[Any]]

PATIENCE = 5


class Pick(NamedTuple):
    """What a criterion says of a run.

    Attributes:
        epoch: the one whose model is kept.
        stopped: the one after which training was ended, or the last one.
        alarmed: whether training was ended before the last one.
    """

    epoch: int
    stopped: int
    alarmed: bool


def by_rule(series: Series, **rule: Any) -> Pick:
    """Ours: the library's own stop rule on the library's own statistics."""
    settings, state, planned = EarlyStop(**rule), StopState(), len(series["bins"])
    for epoch, bins in enumerate(series["bins"]):
        value, error = estimate(settings.statistic, Histogram.from_dense(bins))
        state, decision = step(settings, state, value, error if np.isfinite(error) else 0.0, planned)
        if decision is Decision.STOP:
            return Pick(state.best_epoch, epoch, True)
    return Pick(state.best_epoch if state.best_epoch >= 0 else planned - 1, planned - 1, False)


def best_with_patience(values: npt.NDArray[np.float64], skipped: float = 0.0, patience: int | None = PATIENCE) -> Pick:
    """The maximum; training ends after `patience` epochs without a new one, or never (None)."""
    last = len(values) - 1
    best, waited = -1, 0
    for epoch in range(int(np.ceil(skipped * len(values))), last + 1):
        if best < 0 or values[epoch] > values[best]:
            best, waited = epoch, 0
            continue
        waited += 1
        if patience is not None and waited >= patience:
            return Pick(best, epoch, epoch < last)
    return Pick(best, last, False)


def published_gwa(series: Series, patience: int | None) -> Pick:
    """mean / (excess kurtosis + 1.2), maximum after the first tenth. Source: arXiv 2510.25480."""
    values = series["mean"] / (series["excess_kurtosis"] + GWA_BETA)
    return best_with_patience(np.nan_to_num(values, nan=-np.inf), 0.1, patience)


def label_wave(series: Series) -> Pick:
    """First local minimum of the moving average over three epochs of the share of training predictions that changed.

    Source: "Early Stopping Against Label Noise Without Validation Data", ICLR 2024.
    """
    changed = series["changed"][1:]  # nothing can have changed in the first epoch
    average = np.convolve(changed, np.ones(3) / 3, mode="valid")  # of index i: epochs i + 1 to i + 3
    for i in range(1, len(average)):
        if average[i] > average[i - 1]:
            return Pick(i + 2, i + 3, i + 3 < len(changed))
    return Pick(len(changed), len(changed), False)


def gradient_disparity(series: Series) -> Pick:
    """Mean distance between the gradients of five batches; training ends when it has grown five times.

    Source: "Disparity Between Batches as a Signal for Early Stopping", ECML 2021.
    """
    grown = np.cumsum(np.diff(series["disparity"]) > 0)
    last = len(series["disparity"]) - 1
    epoch = int(np.argmax(grown >= 5)) + 1 if (grown >= 5).any() else last
    return Pick(epoch, epoch, epoch < last)


def sign_agreement(series: Series) -> Pick:
    """Share of samples whose score has the sign of its own past sum, mean of two epochs; needs sample ids."""
    values = series["sign_agreement"]
    smooth = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2])
    smooth[1] = -np.inf  # the first epoch has no past
    return best_with_patience(smooth)


def last_epoch(series: Series) -> Pick:
    """No stopping."""
    last = len(series["test_accuracy"]) - 1
    return Pick(last, last, False)


def oracle(series: Series) -> Pick:
    """Sees the test set, but only as the mean of three epochs: what is left is the jitter of single epochs."""
    accuracy = np.pad(series["test_accuracy"], 1, mode="edge")
    return Pick(int(np.argmax(np.convolve(accuracy, np.ones(3) / 3, mode="valid"))), len(accuracy) - 3, False)


OURS = "separation (the default rule)"
CRITERIA: dict[str, Callable[[Series], Pick]] = {
    OURS: by_rule,
    "separation, warmup=2": partial(by_rule, warmup=2),
    "sign agreement (needs ids)": sign_agreement,
    "stable GWA (beta 3)": partial(by_rule, statistic="stable", drop=0),
    "GWA as published (beta 1.2)": partial(published_gwa, patience=PATIENCE),
    "GWA as published, maximum of the whole run": partial(published_gwa, patience=None),
    "mean score": partial(by_rule, statistic="mean", drop=0),
    "LabelWave": label_wave,
    "Gradient Disparity": gradient_disparity,
    "head-gradient norm": lambda series: best_with_patience(-series["head_norm"], 0.1),
    "training loss": lambda series: best_with_patience(-series["train_loss"]),
    "last epoch": last_epoch,
    "oracle: test accuracy, mean of 3 epochs": oracle,
}
"""Of the run on all training data."""

HELD_OUT: dict[str, Callable[[Series], Pick]] = {
    "10 % held out, accuracy": lambda series: best_with_patience(series["held_out_accuracy"]),
    "10 % held out, accuracy, whole run": lambda series: best_with_patience(series["held_out_accuracy"], patience=None),
    "10 % held out, loss": lambda series: best_with_patience(-series["held_out_loss"]),
}
"""Of the run that holds data out, and is judged by its own epochs."""
RIVAL = "10 % held out, accuracy"
