"""The statistics that the stop rule can watch, each with its standard error.

Separation measures how well one threshold divides the scores into two groups: the largest share of their variance that any
threshold explains. While a model learns the pattern that most samples share, the scores of mislabelled samples stay low and
the two groups separate; when it memorises those samples, the groups merge. For a unimodal distribution, separation depends on
its shape only (2 / pi = 0.64 if normal, 3 / 4 if uniform); for two distant groups it is nearly 1. It has no pole, does not
depend on the scale, and needs neither labels nor sample ids.

Source: N. Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on Systems, Man, and
Cybernetics 9 (1979), equation 15 (eta), applied to alignment scores; `docs/study.md` compares the statistics.
"""

import math
from typing import NamedTuple

import numpy as np

from gwa_logging.alignment import GWA_BETA, STABLE_BETA, FloatArray
from gwa_logging.histogram import EDGES, Histogram

CENTRES = (EDGES[:-1].astype(np.float64) + EDGES[1:].astype(np.float64)) / 2
"""float64 [512], the centre of each bin."""


class Estimate(NamedTuple):
    """A statistic of a set of scores, with its standard error: its spread over independent sets of the same size."""

    value: float
    standard_error: float


def estimate(statistic: str, histogram: Histogram) -> Estimate:
    """Computes a statistic and its standard error, accurate to the width of a bin of the histogram.

    The standard error treats the scores as independent samples from an infinite data set. It does not include the change of
    the weights from epoch to epoch.

    Args:
        statistic: "separation", "stable", "gwa" or "mean".
        histogram: of the scores.

    Returns:
        Both are NaN where the statistic is undefined: all scores are in one bin, or there are none.

    Source: the influence function, F. Hampel, "The influence curve and its role in robust estimation", Journal of the
    American Statistical Association 69 (1974).
    """
    counts = histogram.dense()
    total = int(counts.sum())
    occupied = np.flatnonzero(counts)
    if len(occupied) < 2:
        return Estimate(math.nan, math.nan)
    x, share = CENTRES[occupied], counts[occupied] / total
    if statistic == "separation":
        value, influence = _separation(x, share)
    else:
        value, influence = _mean_over_kurtosis(
            x, share, {"stable": STABLE_BETA, "gwa": GWA_BETA, "mean": None}[statistic]
        )
    return Estimate(value, math.sqrt(float(share @ influence**2) / total))


def _separation(x: FloatArray, share: FloatArray) -> tuple[float, FloatArray]:
    """Returns the separation, and the influence of a score in each bin on it."""
    mean = float(share @ x)
    centred = x - mean
    variance = float(share @ centred**2)
    share_below = np.cumsum(share)[:-1]
    sums = np.cumsum(share * centred)[:-1]
    between = sums**2 / (share_below * (1 - share_below))  # variance between the groups, for a threshold after each bin
    best = int(np.argmax(between))
    value = float(between[best]) / variance
    # At the maximum the value does not depend on the threshold to first order, only on the two means and the variance.
    is_below = np.arange(len(x)) <= best
    group_mean = np.where(is_below, sums[best] / share_below[best], -sums[best] / (1 - share_below[best]))
    influence_on_between = 2 * group_mean * centred - group_mean**2 - between[best]
    return value, (influence_on_between - value * (centred**2 - variance)) / variance


def _mean_over_kurtosis(x: FloatArray, share: FloatArray, beta: float | None) -> tuple[float, FloatArray]:
    """Returns mean / (excess kurtosis + beta), or the mean if beta is None, and the influence of a score in each bin on it."""
    mean = float(share @ x)
    centred = x - mean
    if beta is None:
        return mean, centred
    m2, m3, m4 = (float(share @ centred**power) for power in (2, 3, 4))
    kurtosis = m4 / m2**2
    influence_on_kurtosis = (centred**4 - m4 - 4 * m3 * centred) / m2**2 - 2 * kurtosis * (centred**2 - m2) / m2
    denominator = kurtosis - 3 + beta
    value = mean / denominator if denominator else math.copysign(math.inf, mean)
    with np.errstate(all="ignore"):
        return value, (centred - value * influence_on_kurtosis) / denominator
