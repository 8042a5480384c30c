"""What the stop rule can watch: each statistic of an epoch's scores, with its standard error.

Separation asks how well the scores fall into two groups: the largest share of their variance that lies between the two
sides of any threshold. While a model learns what most samples teach, those that disagree fall behind and the two groups
part; when it memorises them, the groups melt into one. Of one hump it is a constant of its shape (2 / pi = 0.64 if normal,
3 / 4 if uniform), of two distant ones nearly 1. It has no pole, no scale, and needs neither labels nor sample ids.

Source: N. Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on Systems, Man, and
Cybernetics 9 (1979), equation 15 (eta), applied to alignment scores; which statistic to watch: `docs/study.md`.
"""

import math
from typing import NamedTuple

import numpy as np

from gwa_logging.alignment import GWA_BETA, STABLE_BETA, FloatArray
from gwa_logging.histogram import EDGES, Histogram

CENTRES = (EDGES[:-1].astype(np.float64) + EDGES[1:].astype(np.float64)) / 2
"""float64 [512], the middle of each bin."""


class Estimate(NamedTuple):
    """A statistic of a sample of scores, and how far another sample of the same size would be from it."""

    value: float
    standard_error: float


def estimate(statistic: str, histogram: Histogram) -> Estimate:
    """A statistic and its standard error, right to within a bin of the histogram.

    The standard error is that of independent scores: what an infinite data set of the same kind would leave. It does not
    know of the weights, which move from epoch to epoch.

    Args:
        statistic: "separation", "stable", "gwa" or "mean".
        histogram: of the scores.

    Returns:
        NaNs where the statistic is undefined: fewer than two scores, or all of them in one bin.

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
        value, influence = _over_kurtosis(x, share, {"stable": STABLE_BETA, "gwa": GWA_BETA, "mean": None}[statistic])
    return Estimate(value, math.sqrt(float(share @ influence**2) / total))


def _separation(x: FloatArray, share: FloatArray) -> tuple[float, FloatArray]:
    mean = float(share @ x)
    centred = x - mean
    variance = float(share @ centred**2)
    below = np.cumsum(share)[:-1]
    sums = np.cumsum(share * centred)[:-1]
    between = sums**2 / (below * (1 - below))  # of the thresholds after each bin
    cut = int(np.argmax(between))
    value = float(between[cut]) / variance
    # The threshold is a maximum, so it does not move to first order; the two means and the variance do.
    lower = np.arange(len(x)) <= cut
    means = np.where(lower, sums[cut] / below[cut], -sums[cut] / (1 - below[cut]))
    of_between = 2 * means * centred - means**2 - between[cut]
    return value, (of_between - value * (centred**2 - variance)) / variance


def _over_kurtosis(x: FloatArray, share: FloatArray, beta: float | None) -> tuple[float, FloatArray]:
    """mean / (excess kurtosis + beta); the mean alone if beta is None."""
    mean = float(share @ x)
    c = x - mean
    if beta is None:
        return mean, c
    m2, m3, m4 = (float(share @ c**power) for power in (2, 3, 4))
    kurtosis = m4 / m2**2
    of_kurtosis = (c**4 - m4 - 4 * m3 * c) / m2**2 - 2 * kurtosis * (c**2 - m2) / m2
    denominator = kurtosis - 3 + beta
    value = mean / denominator if denominator else math.copysign(math.inf, mean)
    with np.errstate(all="ignore"):
        return value, (c - value * of_kurtosis) / denominator
