"""The formula: the alignment score of a sample, from what an ordinary backward pass computes at the classifier head.

For a head z = W h + b and a loss L, let delta = dL/dz be the logit gradient of one sample. Its gradient with respect to the
weight is the outer product delta h^T, and the score is the cosine between the negative gradient and the weight:

    score = -<delta h^T, W> / (|delta h^T| |W|)            dimensionless, in [-1, 1]

The outer product has rank one, so |delta h^T| = |delta| |h|, and the numerator is delta^T W h, which has two short forms:

    delta . (z - b)    because z - b = W h: needs the logits           (`terms_by_logits`)
    (dL/dh) . h        because dL/dh = W^T delta: needs no logits      (`terms_by_embeddings`, for more classes than features)

So no labels, loss or product of batch, classes and features are needed. A positive factor on delta (a mean, a loss scale)
cancels. All terms are computed in float32 at least. Source: arXiv 2510.25480.

A score column also holds markers. In a gradient, where NaN would alarm users, `encode_scores` replaces them by finite ones:

    of a sample with delta = 0                 NO_GRADIENT   nan, in a gradient 64
    of a sample with h = 0 or W = 0            DEAD          -inf, in a gradient -128
    of a sample with NaN or infinite terms     NOT_FINITE    +inf, in a gradient 128
    of no sample                               PADDING       4, in a gradient a zero in the column VALID (see `rows`)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gwa_logging.alignment import DEAD, FINITE_MARKERS, MARKERS, MIN_NORM, NO_GRADIENT, NOT_FINITE

PADDING = 4.0
_WIDE = (torch.float32, torch.float64)
_norm, _vecdot = torch.linalg.vector_norm, torch.linalg.vecdot


class Terms(NamedTuple):
    """Of each row the numerator without its sign, and the norms |delta|, |h| and |W|: float32 [rows]; |W| may be []."""

    product: Tensor
    delta_norms: Tensor
    embedding_norms: Tensor
    weight_norm: Tensor


class PendingTerms(NamedTuple):
    """What `terms_by_products` takes: delta [rows, C], W h, float32 [rows, C], |h| [rows] and |W| []."""

    delta: Tensor
    products: Tensor
    embedding_norms: Tensor
    weight_norm: Tensor


def terms_by_logits(
    delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
) -> Terms:
    """Terms with the numerator delta . (z - b), of delta and logits [..., C], embeddings [..., D] and bias [C]."""
    return terms_by_products(delta, without_bias(logits, bias), row_norms(embeddings), weight_norm)


def without_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    """z - b = W h, in float32 at least: [..., C] of logits [..., C] and bias [C]."""
    logits = at_least_float32(logits)
    return logits if bias is None else logits - bias


def terms_by_products(delta: Tensor, products: Tensor, embedding_norms: Tensor, weight_norm: Tensor) -> Terms:
    """Terms with the numerator delta . (W h), of delta and W h [..., C] and |h| [...]."""
    if delta.ndim == 2 and delta.dtype is torch.float32:  # the usual case, with few calls
        return Terms(_vecdot(delta, products), _norm(delta, dim=-1), embedding_norms, weight_norm)
    product = _vecdot(at_least_float32(delta), products)
    return Terms(flat(product), flat(row_norms(delta)), flat(embedding_norms), weight_norm)


def terms_by_embeddings(delta_norms: Tensor, gradient: Tensor, embeddings: Tensor, weight_norm: Tensor) -> Terms:
    """Terms with the numerator (dL/dh) . h, of |delta| [rows], gradient and embeddings [..., D]."""
    product = torch.linalg.vecdot(at_least_float32(gradient), at_least_float32(embeddings))
    return Terms(flat(product), delta_norms, flat(row_norms(embeddings)), weight_norm)


def alignment_scores(terms: Terms) -> Tensor:
    """float32 [rows]: the scores, with a marker for each sample that has none."""
    product, delta_norms, embedding_norms, weight_norm = terms
    seen = embedding_norms * weight_norm
    scores = (product / delta_norms / seen).neg().float()
    scores = scores.masked_fill(seen == 0, DEAD).masked_fill(delta_norms < MIN_NORM, NO_GRADIENT)
    return torch.where((product + delta_norms + seen).abs() < torch.inf, scores, NOT_FINITE)  # False for NaN too


def encode_scores(scores: Tensor) -> Tensor:
    """float32 [rows], always finite: the scores with finite markers, as a gradient may hold them."""
    return torch.nan_to_num(scores, FINITE_MARKERS.no_gradient, FINITE_MARKERS.not_finite, FINITE_MARKERS.dead)


def decode_scores(scores: Tensor) -> Tensor:
    """float32 [rows]: the inverse of `encode_scores`."""
    for encoded, marker in zip(FINITE_MARKERS, MARKERS, strict=True):
        scores = torch.where(scores == encoded, marker, scores)
    return scores


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32 if its dtype is narrower, else unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x


def row_norms(x: Tensor) -> Tensor:
    """float32 [...] of [..., K]: Euclidean norms over the last dimension; float64 if the input is."""
    return _norm(x, dim=-1) if x.dtype in _WIDE else _norm(x, dim=-1, dtype=torch.float32)  # type: ignore[no-any-return]


def frobenius_norm(x: Tensor) -> Tensor:
    """float32 []: Euclidean norm of all elements; float64 if the input is."""
    return _norm(x) if x.dtype in _WIDE else _norm(x, dtype=torch.float32)  # type: ignore[no-any-return]


def flat(x: Tensor) -> Tensor:
    """[rows] of [...]."""
    return x if x.ndim == 1 else x.reshape(-1)
