"""Per-sample alignment scores and GWA in NumPy, float64: the reference that both adapters are tested against.

For a linear classifier head z = W h + b and a loss L, let delta_i = dL/dz_i. The gradient of sample i with respect to
the weight is the outer product delta_i h_i^T, and its alignment with the weight is

    score_i = -<delta_i h_i^T, W> / (|delta_i| |h_i| |W|_F)                 dimensionless, in [-1, 1]
    GWA_beta = mean(scores) / (excess kurtosis(scores) + beta)              over all scores of an epoch

The numerator has three equal forms, -<delta h^T, W> = -delta . (z - b) = -(dL/dh) . h. So the score needs neither
labels, nor the kind of loss, nor a product of size batch x classes x features. A positive factor on delta (mean or sum
over the batch, loss scaling, gradient accumulation) cancels.

Some samples have no score. A value that is not finite takes its place and gives the reason:

    NO_GRADIENT  nan    delta = 0: a padded or ignored position, or a saturated softmax; 0/0
    DEAD         -inf   h = 0 or W = 0: the head receives or passes on nothing
    NOT_FINITE   +inf   a NaN or an infinity in delta, h or W, or a score outside [-1, 1]

Source: "Gradient-Weight Alignment", arXiv 2510.25480.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError

GWA_BETA = 1.2
"""The published constant in the denominator of GWA."""

STABLE_BETA = 3.0
"""The constant of the stable statistic. Excess kurtosis is at least -2, so the formula has no pole for any beta above 2.
With 3 the denominator is Pearson's kurtosis, which is at least 1, so the stable statistic never exceeds the mean. Other values
above 2 make little difference (`docs/study.md`)."""

GWA_MIN_DENOMINATOR = 0.1
"""Smallest denominator for which the published GWA counts as defined. Below it, a change of 0.1 in the kurtosis at least
doubles GWA or flips its sign, so the value reflects the pole rather than the model."""

SCORE_TOLERANCE = 1e-3
"""How far rounding may move a score outside [-1, 1]. Values further away are not scores (NOT_FINITE)."""

MIN_NORM = 1e-18
"""Smallest norm whose square float32 represents with full precision. On the device, smaller gradients count as zero."""

NO_GRADIENT, DEAD, NOT_FINITE = math.nan, -math.inf, math.inf


class Markers(NamedTuple):
    """The values that take the place of a score, by the reason why a sample has none."""

    no_gradient: float
    dead: float
    not_finite: float


MARKERS = Markers(NO_GRADIENT, DEAD, NOT_FINITE)

FINITE_MARKERS = Markers(64.0, -128.0, 128.0)
"""Markers for scores inside a gradient, where a NaN or an infinity would trigger the user's own checks for those."""

FloatArray = npt.NDArray[np.float64]


def alignment_scores(logit_grads: npt.ArrayLike, embeddings: npt.ArrayLike, weight: npt.ArrayLike) -> FloatArray:
    """Computes the score of every sample: the cosine between its negative head gradient and the head's weight.

    Args:
        logit_grads: float [..., C], the gradient of the loss with respect to the logits.
        embeddings: float [..., D], the inputs of the head.
        weight: float [C, D], the head's weight before the update.

    Returns:
        float64 [...], dimensionless, in [-1, 1]; NaN, -inf or +inf where a sample has no score (see the module).

    Raises:
        InvalidInputError: the shapes do not match.

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
            f"logit_grads: expected [..., {classes}] to match a weight of shape {w.shape}, found {delta.shape}"
        )
    if h.shape != (*delta.shape[:-1], features):
        raise InvalidInputError(
            f"embeddings: expected {(*delta.shape[:-1], features)} to match logit_grads of shape {delta.shape} "
            f"and a weight of shape {w.shape}, found {h.shape}"
        )
    with np.errstate(all="ignore"):
        numerator = -np.einsum("...c,...c->...", delta, h @ w.T)
        delta_norm = np.linalg.norm(delta, axis=-1)
        head_norm = np.linalg.norm(h, axis=-1) * np.linalg.norm(w)
        scores = numerator / (delta_norm * head_norm)
        scores = np.where(head_norm == 0, DEAD, scores)
        scores = np.where(delta_norm == 0, NO_GRADIENT, scores)
        return np.where(np.isfinite(numerator + delta_norm + head_norm), scores, NOT_FINITE)


def gwa(scores: npt.ArrayLike, beta: float = GWA_BETA) -> float:
    """Computes the gradient-weight alignment of a set of scores: mean / (excess kurtosis + beta).

    Args:
        scores: float, any shape; values that are not finite are ignored.
        beta: dimensionless. The published 1.2 has a pole for bimodal scores; any beta > 2 has none.

    Returns:
        Dimensionless. NaN where the kurtosis is undefined: there are no scores, or all are equal.

    >>> round(gwa([0.1, 0.2, 0.2, 0.3, 0.9]), 6)
    0.279307

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
    """Returns mean / (excess kurtosis + beta), which is infinite at the pole."""
    denominator = excess_kurtosis + beta
    return math.copysign(math.inf, mean) if denominator == 0 else mean / denominator


def is_constant(variance: float, largest: float) -> bool:
    """Returns True if the variance of numbers up to `largest` in size is no more than float64 rounding."""
    return variance <= (4 * sys.float_info.epsilon * largest) ** 2


def as_scores(value: npt.ArrayLike) -> FloatArray:
    """Returns a flat float64 array, in which NOT_FINITE replaces values outside [-1, 1] by more than SCORE_TOLERANCE."""
    scores = np.asarray(value, dtype=np.float64).ravel()
    return np.where(np.abs(scores) > 1 + SCORE_TOLERANCE, np.where(scores == DEAD, DEAD, NOT_FINITE), scores)
