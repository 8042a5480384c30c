"""The alignment score of a sample, from what an ordinary backward pass computes at the classifier head.

For the head z = W h + b and the loss L, let delta = dL/dz for one sample. The sample's gradient with respect to W is the outer
product delta h^T. Its score is the cosine between the negative gradient and W, and the norm of an outer product is the
product of the norms:

    score = -<delta h^T, W> / (|delta h^T| |W|)  =  -<delta h^T, W> / (|delta| |h| |W|)          dimensionless, in [-1, 1]

The numerator has two forms that avoid the [C, D] gradient of each sample:

    <delta h^T, W>  =  delta . (W h)  =  delta . (z - b)      `terms_by_logits`, keeps the logits [B, C]
                    =  (W^T delta) . h  =  (dL/dh) . h        `terms_by_input`, keeps the embeddings [B, D]

`probe` takes the second form for heads with more classes than features. A factor on the loss scales delta and cancels.

Source: "Gradient-Weight Alignment", arXiv 2510.25480. `gwa_logging.alignment_scores` is the reference in NumPy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.alignment import DEAD, NO_GRADIENT, NOT_FINITE, SCORE_TOLERANCE, SMALLEST


class Codes(NamedTuple):
    """The values that stand for the reasons why a sample has no score, see `gwa_logging.alignment`."""

    no_gradient: float
    dead: float
    not_finite: float


CODES = Codes(NO_GRADIENT, DEAD, NOT_FINITE)

FINITE_CODES = Codes(64.0, -128.0, 128.0)
"""Used while `jax_debug_nans` or `jax_debug_infs` is on, which would stop the training at the other ones."""


class Terms(NamedTuple):
    """What scores are computed from, float32 [...]: score = -product / (delta_norms * embedding_norms * weight_norm).

    Attributes:
        product: delta . (z - b), or (dL/dh) . h.
        delta_norms: |delta|.
        embedding_norms: |h|.
        weight_norm: |W|, one number [] for all samples.
    """

    product: Array
    delta_norms: Array
    embedding_norms: Array
    weight_norm: Array

    def scores(self, codes: Codes = CODES) -> Array:
        """float32 [...]: the scores, and `codes` where a sample has none. Finite throughout if the terms and codes are."""
        visible = self.embedding_norms * self.weight_norm
        has_no_gradient, is_dead = self.delta_norms < SMALLEST, visible == 0
        scores = -self.product / jnp.where(has_no_gradient, 1, self.delta_norms) / jnp.where(is_dead, 1, visible)
        scores = jnp.where(is_dead, codes.dead, scores)
        scores = jnp.where(has_no_gradient, codes.no_gradient, scores)
        return jnp.where(jnp.isfinite(self.product + self.delta_norms + visible), scores, codes.not_finite)


def classify_scores(scores: Array) -> tuple[Array, Array, Array, Array]:
    """bool [...] each: valid, no gradient, dead, not finite. For either set of codes exactly one is True."""
    valid = jnp.abs(scores) <= 1 + SCORE_TOLERANCE  # False for NaN
    no_gradient = jnp.isnan(scores) | (scores == FINITE_CODES.no_gradient)
    dead = (scores == DEAD) | (scores == FINITE_CODES.dead)
    return valid, no_gradient, dead, ~(valid | no_gradient | dead)


def terms_by_logits(delta: Array, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Terms:
    """The terms from delta [..., C], the logits [..., C], the embeddings [..., D] and the bias [C]."""
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits -= bias.astype(jnp.float32).reshape((1,) * (logits.ndim - bias.ndim) + bias.shape)
    return Terms(_row_products(delta, logits), row_norms(delta), row_norms(embeddings), weight_norm)


def terms_by_input(gradient: Array, embeddings: Array, delta_norms: Array, weight_norm: Array) -> Terms:
    """The terms from dL/dh [..., D], the embeddings [..., D] and |delta| [...]."""
    return Terms(_row_products(gradient, embeddings), delta_norms, row_norms(embeddings), weight_norm)


def _row_products(a: Array, b: Array) -> Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def row_norms(rows: Array) -> Array:
    """float32 [...]: the norm of each row of [..., K]."""
    return jnp.asarray(jnp.linalg.norm(rows.astype(jnp.float32), axis=-1))


def frobenius_norm(weight: Array) -> Array:
    """float32 []: the norm of a weight, a constant to differentiation."""
    return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(weight).astype(jnp.float32))))
