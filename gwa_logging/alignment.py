"""The maths: per-sample gradient-weight alignment, and GWA. NumPy, float64: the reference for every adapter.

For a linear classifier head z = W h + b and a loss L, let delta_i = dL/dz_i. The gradient of sample i with respect to
the weight is the outer product delta_i h_i^T, and its alignment with the weight is

    score_i = -<delta_i h_i^T, W> / (|delta_i| |h_i| |W|_F)                 dimensionless, in [-1, 1]
    GWA_beta = mean(scores) / (excess kurtosis(scores) + beta)              over all scores of an epoch

The numerator has three equal forms, -<delta h^T, W> = -delta . (z - b) = -(dL/dh) . h, so nothing here needs labels,
the name of the loss, or a product of batch, classes and features. A positive factor on delta (mean or sum, loss
scaling, accumulation) cancels.

Some samples have no score. They are marked by a value that is not finite, so that `isfinite` tells scores from
non-scores, and the value tells why:

    NO_GRADIENT  nan    delta = 0: a padded or ignored position, or a saturated softmax; 0/0
    DEAD         -inf   h = 0 or W = 0: the sample cannot be seen by the head
    NOT_FINITE   +inf   a NaN or an infinity in delta, h or W, or a score outside [-1, 1]

Source: "Gradient-Weight Alignment", arXiv 2510.25480.
"""

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError

GWA_BETA = 1.2
"""The published constant in the denominator of GWA."""

STABLE_BETA = 3.0
"""The constant of the stable statistic. Excess kurtosis is at least -2, so any beta above 2 leaves no pole; with 3 the
denominator is Pearson's kurtosis, which is at least 1: the stable statistic is never larger than the mean. Which value above
2 makes little difference (`docs/study.md`)."""

GWA_MIN_DENOMINATOR = 0.1
"""Below this, the published denominator is not clearly positive: a change of 0.1 in the kurtosis would at least double
GWA or turn its sign, and the value says more about the pole than about the model."""

SCORE_TOLERANCE = 1e-3
"""How far rounding may take a score beyond [-1, 1] before it counts as not being a score."""

SMALLEST = 1e-18
"""Of a norm whose square float32 still holds to full precision. On the device a smaller gradient counts as none."""

NO_GRADIENT, DEAD, NOT_FINITE = math.nan, -math.inf, math.inf


class Markers(NamedTuple):
    """What stands for the score of a sample that has none."""

    no_gradient: float
    dead: float
    not_finite: float


MARKERS = Markers(NO_GRADIENT, DEAD, NOT_FINITE)
FINITE_MARKERS = Markers(64.0, -128.0, 128.0)
"""The same where every number must be finite, as in a gradient: NaN there would alarm users."""

FloatArray = npt.NDArray[np.float64]


def alignment_scores(logit_grads: npt.ArrayLike, embeddings: npt.ArrayLike, weight: npt.ArrayLike) -> FloatArray:
    """Scores every sample: the cosine between its negative head gradient and the head's weight.

    Args:
        logit_grads: float [..., C], the gradient of the loss with respect to the logits.
        embeddings: float [..., D], what went into the head.
        weight: float [C, D], the head's weight before the update.

    Returns:
        float64 [...], dimensionless, in [-1, 1]; NaN, -inf or +inf where a sample has no score (see the module).

    Raises:
        InvalidInputError: the shapes do not belong together.

    >>> alignment_scores([[-1.0, 0.0]], [[3.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]])
    array([1.])

    Source: arXiv 2510.25480, the definition of alignment.
    """
    delta, h, w = (np.asarray(a, dtype=np.float64) for a in (logit_grads, embeddings, weight))
    if w.ndim != 2:
        raise InvalidInputError(f"weight: expected 2 dimensions [classes, features], found shape {w.shape}")
    classes, features = w.shape
    if delta.ndim == 0 or delta.shape[-1] != classes:
        raise InvalidInputError(
            f"logit_grads: expected [..., {classes}] to go with a weight of shape {w.shape}, found {delta.shape}"
        )
    if h.shape != (*delta.shape[:-1], features):
        raise InvalidInputError(
            f"embeddings: expected {(*delta.shape[:-1], features)} to go with logit_grads of shape {delta.shape} "
            f"and a weight of shape {w.shape}, found {h.shape}"
        )
    with np.errstate(all="ignore"):
        numerator = -np.einsum("...c,...c->...", delta, h @ w.T)
        delta_norm = np.linalg.norm(delta, axis=-1)
        seen = np.linalg.norm(h, axis=-1) * np.linalg.norm(w)
        scores = numerator / (delta_norm * seen)
        scores = np.where(seen == 0, DEAD, scores)
        scores = np.where(delta_norm == 0, NO_GRADIENT, scores)
        return np.where(np.isfinite(numerator + delta_norm + seen), scores, NOT_FINITE)


def gwa(scores: npt.ArrayLike, beta: float = GWA_BETA) -> float:
    """Gradient-weight alignment of a set of scores: mean / (excess kurtosis + beta).

    Args:
        scores: float, any shape; values that are not finite are left out.
        beta: dimensionless; the published 1.2 has a pole for two-humped scores, any beta > 2 has none.

    Returns:
        Dimensionless. NaN where the kurtosis is undefined: no scores, or all of them equal.

    >>> round(gwa([0.1, 0.2, 0.2, 0.3, 0.9]), 6)
    0.355087

    Source: arXiv 2510.25480; kurtosis is Fisher's (excess) and biased, as in SciPy's default.
    """
    s = np.asarray(scores, dtype=np.float64).ravel()
    s = s[np.isfinite(s)]
    if not s.size:
        return math.nan
    centred = s - s.mean()
    variance = float(np.mean(centred**2))
    if is_constant(variance, float(np.abs(s).max())):
        return math.nan
    return gwa_from_moments(float(s.mean()), float(np.mean(centred**4)) / variance**2 - 3.0, beta)


def gwa_from_moments(mean: float, excess_kurtosis: float, beta: float) -> float:
    """mean / (excess kurtosis + beta), with the infinity that the formula has at its pole rather than an exception."""
    denominator = excess_kurtosis + beta
    return math.copysign(math.inf, mean) if denominator == 0 else mean / denominator


def is_constant(variance: float, largest: float) -> bool:
    """Whether a spread this small, among numbers of that size, is nothing but float64 rounding."""
    return variance <= (4 * sys.float_info.epsilon * largest) ** 2


def as_scores(value: Any) -> FloatArray:
    """A flat float64 array in which whatever is out of [-1, 1] by more than rounding is marked NOT_FINITE."""
    scores = np.asarray(value, dtype=np.float64).ravel()
    return np.where(np.abs(scores) > 1 + SCORE_TOLERANCE, np.where(scores == DEAD, DEAD, NOT_FINITE), scores)
