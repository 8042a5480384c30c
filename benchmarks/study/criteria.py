"""Criteria that pick an epoch. All are online, that is, use no later epoch, unless their name states otherwise.

Criteria from other papers are implemented from the papers; GradStop from its abstract and our own derivation, see `grad_stop`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from benchmarks.study.series import Series
from benchmarks.study.train import DIRECTIONS
from gwa_logging import EarlyStop
from gwa_logging.alignment import GWA_BETA
from gwa_logging.early_stop import Decision, StopState, step

Floats = npt.NDArray[np.float64]

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


# --- this library's rules ---------------------------------------------------------------------------------------------


def by_rule(series: Series, **rule: Any) -> Pick:
    """The stop rule on a statistic of the scores."""
    settings = EarlyStop(**rule)
    name = {"gwa": "published"}.get(settings.statistic, settings.statistic)
    return _by_rule(settings, series[f"{name}_value"], series[f"{name}_error"])


def by_look(series: Series, name: str = "consensus", *, weight: float = 1.0, waits: bool = True, **rule: Any) -> Pick:
    """The stop rule on the sum of a series of the look and the separation.

    Args:
        series: of a run.
        name: the series of the look.
        weight: of the separation in the sum; 1 in the library.
        waits: whether the rule waits until the separation has declined, as the library's does.
        rule: settings that differ from the library's.
    """
    values = series[name] + weight * np.nan_to_num(series["separation_value"])
    declined = decline(series) if waits else np.ones(len(values), bool)
    return _by_rule(EarlyStop(statistic="consensus", **rule), values, np.zeros(len(declined)), declined)


def decline(series: Series) -> npt.NDArray[np.bool_]:
    """For each epoch whether the default rule has fired, and no clearly better epoch has withdrawn that."""
    settings, state, planned = EarlyStop(), StopState(), len(series["separation_value"])
    fired = []
    for value, error in zip(series["separation_value"], series["separation_error"], strict=True):
        state, _ = step(settings, state, float(value), float(np.nan_to_num(error)), planned)
        fired.append(state.fired)
    return np.array(fired)


def _by_rule(
    settings: EarlyStop, values: Floats, errors: Floats, may_fire: npt.NDArray[np.bool_] | None = None
) -> Pick:
    state, planned = StopState(), len(values)
    for epoch, (value, error) in enumerate(zip(values, errors, strict=True)):
        if np.isnan(value) and settings.statistic == "consensus":
            state = state._replace(epochs=epoch + 1)
            continue
        may = may_fire is None or bool(may_fire[epoch])
        state, decision = step(settings, state, float(value), float(np.nan_to_num(error)), planned, may_fire=may)
        if decision is Decision.STOP:
            return Pick(state.best_epoch, epoch, epoch < planned - 1)
    return Pick(state.best_epoch if state.best_epoch >= 0 else planned - 1, planned - 1, False)


def agreement(series: Series) -> Pick:
    """The stop rule on agreement + separation, mean of two epochs."""
    values = series["sign_agreement"] + series["separation_value"]
    values = np.concatenate([[np.nan, np.nan], (values[2:] + values[1:-1]) / 2])
    return _by_rule(EarlyStop(statistic="agreement"), np.where(np.isnan(values), 0.0, values), np.zeros(len(values)))


# --- others -------------------------------------------------------------------------------------------------------------


def best_with_patience(values: Floats, skipped: float = 0.0, patience: int | None = PATIENCE) -> Pick:
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


def grad_stop(series: Series) -> Pick:
    """The first epoch whose weights are a typical draw from the posterior.

    Near an optimum the posterior is normal, and its precision H is the sum of the squared gradients of the samples. So
    g H^-1 g, where g is the sum of the gradients, is chi-squared for a draw; we stop below its median. It is computed from the
    gradients of the head's weights in an epoch, in 32 random directions. Source: the idea of arXiv 2508.19028, of which only
    the abstract was at hand; the paper draws the threshold at random.
    """
    below = series["grad_stop"] <= chi2.median(DIRECTIONS)
    last = len(below) - 1
    epoch = int(np.argmax(below)) if below.any() else last
    return Pick(epoch, epoch, epoch < last)


def last_epoch(series: Series) -> Pick:
    """No stopping."""
    last = len(series["test_accuracy"]) - 1
    return Pick(last, last, False)


def _centred(values: Floats) -> Floats:
    return np.convolve(np.pad(values, 1, mode="edge"), np.ones(3) / 3, mode="valid")


def oracle(series: Series) -> Pick:
    """The best test accuracy, averaged over three epochs; what remains of its regret is the noise of single epochs."""
    accuracy = series["test_accuracy"]
    return Pick(int(np.argmax(_centred(accuracy))), len(accuracy) - 1, False)


class Criterion(NamedTuple):
    """A criterion.

    Attributes:
        pick: picks the epoch.
        part: the run that it is applied to, "full" or "held-out", and whose epochs it is compared with.
        averaged: True if the averaged weights of the picked epoch are kept.
        needs: the series without which it cannot be applied; the runs of the group "first" lack some.
    """

    pick: Callable[[Series], Pick]
    part: str = "full"
    averaged: bool = False
    needs: str = "test_accuracy"


def _held_out(pick: Callable[[Series], Pick], *, averaged: bool = False) -> Criterion:
    return Criterion(pick, "held-out", averaged, "averaged_held_out_accuracy" if averaged else "held_out_accuracy")


OURS = "consensus + separation (the rule with a look)"
DEFAULT = "separation (the rule without)"
AGREEMENT = "agreement + separation (needs ids)"
RIVAL = "10 % held out, accuracy"
BLINDED = "10 % held out, blinded"
ORACLE = "oracle: test accuracy, mean of 3 epochs"
AVERAGED = ", averaged weights"

CRITERIA: dict[str, Criterion] = {
    OURS: Criterion(by_look, needs="consensus"),
    OURS + AVERAGED: Criterion(partial(by_look, name="averaged_consensus"), averaged=True, needs="averaged_consensus"),
    DEFAULT: Criterion(by_rule),
    DEFAULT + AVERAGED: Criterion(by_rule, averaged=True, needs="averaged_test_accuracy"),
    AGREEMENT: Criterion(agreement),
    "stable GWA (beta 3)": Criterion(partial(by_rule, statistic="stable", drop=0)),
    "GWA as published (beta 1.2)": Criterion(partial(published_gwa, patience=PATIENCE)),
    "GWA as published, maximum of the whole run": Criterion(partial(published_gwa, patience=None)),
    "mean score": Criterion(partial(by_rule, statistic="mean", drop=0)),
    "LabelWave": Criterion(label_wave),
    "Gradient Disparity": Criterion(gradient_disparity),
    "GradStop": Criterion(grad_stop, needs="grad_stop"),
    "head-gradient norm": Criterion(lambda series: best_with_patience(-series["head_norm"], 0.1)),
    "training loss": Criterion(lambda series: best_with_patience(-series["train_loss"])),
    "last epoch": Criterion(last_epoch),
    "last epoch" + AVERAGED: Criterion(last_epoch, averaged=True, needs="averaged_test_accuracy"),
    ORACLE: Criterion(oracle),
    RIVAL: _held_out(lambda series: best_with_patience(series["held_out_accuracy"])),
    RIVAL + AVERAGED: _held_out(lambda series: best_with_patience(series["averaged_held_out_accuracy"]), averaged=True),
    BLINDED: _held_out(lambda series: best_with_patience(_centred(series["held_out_accuracy"]))),
    "10 % held out, accuracy, whole run": _held_out(
        lambda series: best_with_patience(series["held_out_accuracy"], patience=None)
    ),
    "10 % held out, loss": _held_out(lambda series: best_with_patience(-series["held_out_loss"])),
}
"""All criteria of the tables. "Blinded" smooths over three epochs, so it cannot see how lucky a single epoch is."""

VARIANTS: dict[str, Criterion] = {
    "as it is": CRITERIA[OURS],
    "patience 8": Criterion(partial(by_look, patience=8), needs="consensus"),
    "the consensus alone": Criterion(partial(by_look, weight=0.0), needs="consensus"),
    "half the separation": Criterion(partial(by_look, weight=0.5), needs="consensus"),
    "twice the separation": Criterion(partial(by_look, weight=2.0), needs="consensus"),
    "does not wait for the separation": Criterion(partial(by_look, waits=False), needs="consensus"),
    "does not wait, patience 8": Criterion(partial(by_look, waits=False, patience=8), needs="consensus"),
    "the consensus alone, does not wait": Criterion(partial(by_look, weight=0.0, waits=False), needs="consensus"),
    "softmax outputs of training instead of its predictions": Criterion(
        partial(by_look, name="softmax"), needs="softmax"
    ),
    "all epochs so far instead of the first half": Criterion(partial(by_look, name="all_epochs"), needs="all_epochs"),
    "the looks' own outputs (without ids)": Criterion(partial(by_look, name="own_looks"), needs="own_looks"),
    "alignment score with the consensus as label": Criterion(partial(by_look, name="alignment"), needs="alignment"),
    "look at the averaged weights": Criterion(partial(by_look, name="averaged_consensus"), needs="averaged_consensus"),
    "averaged weights kept, look at those in training": Criterion(by_look, averaged=True, needs="consensus"),
}
"""Variants of our criterion, for the table of what was tried."""
