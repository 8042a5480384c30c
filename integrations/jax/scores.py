"""The alignment score of a sample, from what an ordinary backward pass computes at the classifier head.

For the head z = W h + b and the loss L, let delta = dL/dz for one sample. The sample's gradient with respect to W is the outer
product delta h^T. Its score is the cosine between the negative gradient and W, and the norm of an outer product is the
product of the norms:

    score = -<delta h^T, W> / (|delta h^T| |W|)  =  -<delta h^T, W> / (|delta| |h| |W|)          dimensionless, in [-1, 1]

The numerator has two forms that avoid the [C, D] gradient of each sample:

    <delta h^T, W>  =  delta . (W h)  =  delta . (z - b)      `terms_by_logits`, keeps the logits [B, C]
                    =  (W^T delta) . h  =  (dL/dh) . h        `terms_by_embeddings`, keeps the embeddings [B, D]

`probe` takes the second form for heads with more classes than features. A factor on the loss scales delta and cancels.

A sample without a score gets a marker, which is not finite. While `jax_debug_nans` or `jax_debug_infs` is on, which would stop
the training there, it is a finite one:

    delta = 0                        NO_GRADIENT   nan, or 64
    h = 0 or W = 0                   DEAD          -inf, or -128
    NaN or infinity in the terms     NOT_FINITE    +inf, or 128

Source: "Gradient-Weight Alignment", arXiv 2510.25480. `gwa_logging.alignment_scores` is the reference in NumPy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.alignment import FINITE_MARKERS, MARKERS, MIN_NORM, SCORE_TOLERANCE, Markers


class Terms(NamedTuple):
    """Of each sample the numerator without its sign, and the norms |delta| and |h|, float32 [...]; and |W|, one number []."""

    product: Array
    delta_norms: Array
    embedding_norms: Array
    weight_norm: Array


def terms_by_logits(delta: Array, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Terms:
    """Terms with the numerator delta . (z - b), from delta and logits [..., C], embeddings [..., D] and bias [C]."""
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits -= bias.astype(jnp.float32).reshape((1,) * (logits.ndim - bias.ndim) + bias.shape)
    return Terms(row_products(delta, logits), row_norms(delta), row_norms(embeddings), weight_norm)


def terms_by_embeddings(delta_norms: Array, gradient: Array, embeddings: Array, weight_norm: Array) -> Terms:
    """Terms with the numerator (dL/dh) . h, from |delta| [...], and the gradient and embeddings [..., D]."""
    return Terms(row_products(gradient, embeddings), delta_norms, row_norms(embeddings), weight_norm)


def terms_by_inputs(delta: Array, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Terms:
    """Terms of inputs with several rows each, whose gradients are summed: of [B, ..., C], [B, ..., D] and bias [C], all [B].

    The gradient sum_p delta_p h_p^T does not have rank one. Its norm is the ghost norm,
    |sum_p delta_p h_p^T|^2 = sum_pq (delta_p . delta_q) (h_p . h_q), of which |delta| is one factor here.
    Source: Li et al., "Large language models can be strong differentially private learners", 2021.
    """
    products = terms_by_logits(delta, logits, embeddings, bias, weight_norm).product
    delta, embeddings = (
        (x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])).astype(jnp.float32) for x in (delta, embeddings)
    )
    delta_norms = jnp.sqrt(jnp.sum(delta * delta, axis=(1, 2)))
    if delta.shape[1] ** 2 <= delta.shape[2] * embeddings.shape[2]:
        pairs = jnp.einsum("bpc,bqc->bpq", delta, delta) * jnp.einsum("bpd,bqd->bpq", embeddings, embeddings)
        norms = jnp.sqrt(jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 0))
    else:
        norms = jnp.linalg.norm(jnp.einsum("bpc,bpd->bcd", delta, embeddings), axis=(1, 2))
    factor = jnp.where(delta_norms > 0, norms / jnp.where(delta_norms > 0, delta_norms, 1), 1)
    if weight_norm.ndim > 1:  # inside vmap, which repeats it for each row
        weight_norm = weight_norm.reshape(weight_norm.shape[0], -1)[:, 0]
    return Terms(jnp.sum(products, axis=tuple(range(1, products.ndim))), delta_norms, factor, weight_norm)


def alignment_scores(terms: Terms, markers: Markers = MARKERS) -> Array:
    """float32 [...]: the scores, with a marker for each sample that has none.

    JAX's debugging options check every operation, so with `FINITE_MARKERS` all of them are finite if the terms are: scores are
    never encoded or decoded, as they are in PyTorch.
    """
    product, delta_norms, embedding_norms, weight_norm = terms
    visible = embedding_norms * weight_norm
    has_no_gradient, is_dead = delta_norms < MIN_NORM, visible == 0
    scores = -product / jnp.where(has_no_gradient, 1, delta_norms) / jnp.where(is_dead, 1, visible)
    scores = jnp.where(is_dead, markers.dead, scores)
    scores = jnp.where(has_no_gradient, markers.no_gradient, scores)
    return jnp.where(jnp.isfinite(product + delta_norms + visible), scores, markers.not_finite)


def classify_scores(scores: Array) -> tuple[Array, Array, Array, Array]:
    """bool [...] each: valid, no gradient, dead, not finite. Exactly one is True for a score or a marker of either kind."""
    valid = jnp.abs(scores) <= 1 + SCORE_TOLERANCE  # False for NaN
    no_gradient = jnp.isnan(scores) | (scores == FINITE_MARKERS.no_gradient)
    dead = (scores == MARKERS.dead) | (scores == FINITE_MARKERS.dead)
    return valid, no_gradient, dead, ~(valid | no_gradient | dead)


def row_products(a: Array, b: Array) -> Array:
    """float32 [...]: the products of the rows of two arrays [..., K]."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def row_norms(rows: Array) -> Array:
    """float32 [...]: the norm of each row of [..., K]."""
    return jnp.asarray(jnp.linalg.norm(rows.astype(jnp.float32), axis=-1))


def frobenius_norm(weight: Array) -> Array:
    """float32 []: the norm of a weight, a constant to differentiation."""
    return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(weight).astype(jnp.float32))))
