"""Criteria that pick an epoch. All are online, that is, use no later epoch, unless their name states otherwise.

Criteria from other papers are implemented from the papers.
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
    """What a criterion decides about a run.

    Attributes:
        epoch: the epoch whose model is kept.
        stopped: the last epoch that was trained.
        alarmed: True if training ended before the last planned epoch.
    """

    epoch: int
    stopped: int
    alarmed: bool


def by_rule(series: Series, **rule: Any) -> Pick:
    """This library's stop rule on its own statistics."""
    settings, state, planned = EarlyStop(**rule), StopState(), len(series["bins"])
    for epoch, bins in enumerate(series["bins"]):
        value, error = estimate(settings.statistic, Histogram.from_dense(bins))
        state, decision = step(settings, state, value, error if np.isfinite(error) else 0.0, planned)
        if decision is Decision.STOP:
            return Pick(state.best_epoch, epoch, True)
    return Pick(state.best_epoch if state.best_epoch >= 0 else planned - 1, planned - 1, False)


def best_with_patience(values: npt.NDArray[np.float64], skipped: float = 0.0, patience: int | None = PATIENCE) -> Pick:
    """The epoch of the maximum; training ends after `patience` epochs without a new maximum, or never (None)."""
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
    changed = series["changed"][1:]  # the first epoch has no predecessor
    average = np.convolve(changed, np.ones(3) / 3, mode="valid")  # index i: epochs i + 1 to i + 3
    for i in range(1, len(average)):
        if average[i] > average[i - 1]:
            return Pick(i + 2, i + 3, i + 3 < len(changed))
    return Pick(len(changed), len(changed), False)


def gradient_disparity(series: Series) -> Pick:
    """Mean distance between the gradients of five batches; training ends after its fifth increase.

    Source: "Disparity Between Batches as a Signal for Early Stopping", ECML 2021.
    """
    grown = np.cumsum(np.diff(series["disparity"]) > 0)
    last = len(series["disparity"]) - 1
    epoch = int(np.argmax(grown >= 5)) + 1 if (grown >= 5).any() else last
    return Pick(epoch, epoch, epoch < last)


def sign_agreement(series: Series) -> Pick:
    """Share of samples whose score has the same sign as the sum of their earlier scores, averaged over two epochs."""
    values = series["sign_agreement"]
    smooth = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2])
    smooth[1] = -np.inf  # the first epoch has no earlier scores
    return best_with_patience(smooth)


def last_epoch(series: Series) -> Pick:
    """No stopping."""
    last = len(series["test_accuracy"]) - 1
    return Pick(last, last, False)


def oracle(series: Series) -> Pick:
    """The best test accuracy, averaged over three epochs; what remains of its regret is the noise of single epochs."""
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
"""Criteria for the run on all training data."""

HELD_OUT: dict[str, Callable[[Series], Pick]] = {
    "10 % held out, accuracy": lambda series: best_with_patience(series["held_out_accuracy"]),
    "10 % held out, accuracy, whole run": lambda series: best_with_patience(series["held_out_accuracy"], patience=None),
    "10 % held out, loss": lambda series: best_with_patience(-series["held_out_loss"]),
}
"""Criteria for the run that holds data out; compared with that run's own epochs."""
RIVAL = "10 % held out, accuracy"
