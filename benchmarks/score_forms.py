"""The scores of one batch, computed in several ways: by this library, and by the published form with and without its product.

Each function takes the same `Batch`: what a linear head holds after a backward pass. So the ways can be timed and compared.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gwa_logging.integrations.torch.scores import (
    alignment_scores,
    frobenius_norm,
    row_norms,
    terms_by_embeddings,
    terms_by_logits,
)

SIZES = [(512, 512, 10), (1024, 768, 1000), (512, 1024, 21843)]
"""Samples, features and classes: B, D, C."""

TINY_SIZES = [(8, 16, 4), (8, 4, 16)]

PRODUCT_BYTES = 4 * 2**30
"""The most of the B x C x D product that is computed at a time; for the largest head the whole would not fit into memory."""


class Batch(NamedTuple):
    """What a scoring function may read, float32: delta and logits [B, C], embeddings and their gradient [B, D], labels [B]."""

    delta: Tensor
    logits: Tensor
    embeddings: Tensor
    embedding_grads: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor


def random_batch(samples: int, features: int, classes: int, device: torch.device) -> Batch:
    """A batch after a backward pass through cross-entropy, with random embeddings and weights."""
    h = torch.randn(samples, features, device=device)
    weight = torch.randn(classes, features, device=device) / features**0.5
    bias, labels = torch.randn(classes, device=device), torch.randint(0, classes, (samples,), device=device)
    logits = F.linear(h, weight, bias)
    delta = (logits.softmax(1) - F.one_hot(labels, classes)) / samples
    return Batch(delta, logits, h, delta @ weight, weight, bias, labels)


def by_logits(batch: Batch) -> Tensor:
    """This library's scores for heads with at most as many classes as features."""
    weight_norm = frobenius_norm(batch.weight)
    return alignment_scores(terms_by_logits(batch.delta, batch.logits, batch.embeddings, batch.bias, weight_norm))


def by_embeddings(batch: Batch) -> Tensor:
    """This library's scores for heads with more classes than features."""
    weight_norm, delta_norms = frobenius_norm(batch.weight), row_norms(batch.delta)
    return alignment_scores(terms_by_embeddings(delta_norms, batch.embedding_grads, batch.embeddings, weight_norm))


def library_form(features: int, classes: int) -> Callable[[Batch], Tensor]:
    """The form that this library uses for a head of this size."""
    return by_embeddings if classes > features else by_logits


def published_product(batch: Batch) -> Tensor:
    """The published closed form from labels; computes the weight's gradient of every sample, [B, C, D]."""
    classes = batch.logits.shape[1]
    negative_delta = F.one_hot(batch.labels, classes).float() - batch.logits.softmax(1)
    rows = max(1, PRODUCT_BYTES // (4 * batch.weight.numel()))
    pieces = []
    for deltas, h in zip(negative_delta.split(rows), batch.embeddings.split(rows), strict=True):
        grads = torch.einsum("bc,bd->bcd", deltas, h)
        pieces.append((grads * batch.weight).sum((1, 2)) / grads.flatten(1).norm(dim=1))
    return torch.cat(pieces) / batch.weight.norm()


def published_scores(logits: Tensor, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The published closed form, factored: costs one more multiplication by the head's weight, but no product."""
    negative_delta = F.one_hot(labels, logits.shape[1]).to(logits.dtype) - logits.softmax(1)
    product = ((negative_delta @ weight) * embeddings).sum(1)
    return product / (negative_delta.norm(dim=1) * embeddings.norm(dim=1) * weight.norm())


def published_factored(batch: Batch) -> Tensor:
    """`published_scores` of a batch."""
    return published_scores(batch.logits, batch.embeddings, batch.weight, batch.labels)


def bytes_read(samples: int, features: int, classes: int) -> int:
    """Bytes that the scores depend on, in float32: delta, z, h, W, b; with more classes than features delta, dL/dh, h, W."""
    if classes > features:
        return 4 * (samples * (classes + 2 * features) + classes * features)
    return 4 * (samples * (2 * classes + features) + classes * (features + 1))
