"""Cross-entropy of a linear layer, computed in chunks of rows: the loss, its gradients and the terms of the scores.

The logits of one chunk exist at a time, float32 [chunk, V]. The softmax overwrites them, the logit gradient
delta = p - q overwrites the softmax, and the two matrix products of the gradients use it at once:

    dL/dh = delta W      dL/dW += delta^T h      (dL/dh) . h and |delta|, the terms of the score of each row

Everything is the gradient of the *sum* of the losses. What the loss is multiplied by afterwards (a mean, a loss scale) changes
a score by its sign at most, so it never enters the terms and cannot overflow them.

A weight that is sharded over the vocabulary needs the largest logit, the sum of exponentials and the target's logit of all
ranks: two small reductions per chunk, [chunk] and [3, chunk].
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from gwa_logging.integrations.torch.scores import at_least_float32, row_norms

CHUNK_ELEMENTS = 2**25
"""Number of logits per chunk by default: 128 MB in float32."""


class Shard(NamedTuple):
    """This rank's part of a vocabulary.

    Attributes:
        group: the ranks that share it.
        offset: the class of the weight's first row.
        classes: V, the number of classes of all ranks.
    """

    group: Any
    offset: int
    classes: int


class Options(NamedTuple):
    """How the loss is computed; see `linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    chunk: int


class Wanted(NamedTuple):
    """What is computed besides the losses. The terms of the scores come with the gradients."""

    gradients: bool
    weight: bool
    bias: bool
    predicted: bool


class Computed(NamedTuple):
    """Of N rows, with an empty tensor for what is not wanted.

    Attributes:
        losses: float32 [N], 0 in ignored rows; float64 if the input is.
        hidden: [N, D], the gradient of the losses' sum.
        weight, bias: [V, D] and [V], float32 at least, the gradient of the sum, or of the sum with the given factors.
        terms: float32 [2, N]: (dL/dh) . h and |delta|, without the factors.
        predicted: int64 [N].
    """

    losses: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    terms: Tensor
    predicted: Tensor


def chunk_rows(chunk: int | None, classes: int) -> int:
    """The number of rows per chunk."""
    return max(1, CHUNK_ELEMENTS // max(classes, 1)) if chunk is None else chunk


def compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    wanted: Wanted,
    shard: Shard | None = None,
) -> Computed:
    """Computes the losses, and what else is wanted, in chunks of rows.

    Args:
        hidden: [N, D].
        weight: [V, D] of the same dtype; this rank's rows of a sharded one.
        bias: [V] or None.
        target: int [N].
        factors: float [N], the gradient that arrives at each row's loss; None if it is 1.
        options: how the loss is computed.
        wanted: what is computed besides the losses.
        shard: which rows of the weight these are; None for all.
    """
    rows, wide = hidden.shape[0], hidden.new_empty(0, dtype=_accumulated_in(hidden.dtype))
    chunk = options.chunk
    result = Computed(
        losses=wide.new_empty(rows),
        hidden=torch.empty_like(hidden) if wanted.gradients else hidden.new_empty(0),
        weight=torch.zeros_like(weight, dtype=wide.dtype) if wanted.weight else wide.new_empty(0),
        bias=wide.new_zeros(weight.shape[0]) if wanted.bias else wide.new_empty(0),
        terms=wide.new_empty(2, rows if wanted.gradients else 0),
        predicted=target.new_empty(rows if wanted.predicted else 0, dtype=torch.int64),
    )
    with torch.no_grad(), _without_autocast(hidden.device.type):
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            delta = _losses(hidden[part], weight, bias, target[part], options, wanted, shard, result, part)
            if wanted.gradients:
                _gradients(
                    delta, hidden[part], weight, None if factors is None else factors[part], wanted, result, part
                )
            del delta  # before the next chunk's logits are made
        if wanted.gradients:
            _complete(result.terms, shard)
    return result


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    wanted: Wanted,
    shard: Shard | None,
    result: Computed,
    part: slice,
) -> Tensor:
    """Writes the losses of one chunk. Returns the logit gradients of their sum, float32 [chunk, V], if gradients are wanted."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    logits = at_least_float32(logits)
    if wanted.predicted:
        result.predicted[part] = logits.argmax(1)
    classes = weight.shape[0] if shard is None else shard.classes
    used = target != options.ignore_index
    index, owned = torch.where(used, target, 0)[:, None], used
    if shard is not None:
        index = index - shard.offset
        owned = ((index >= 0) & (index < weight.shape[0]))[:, 0]
        index = torch.where(owned[:, None], index, 0)
    # The largest logit is subtracted, so that no exponential overflows. A rank may have no class at all.
    largest = logits.amax(1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)
    _all_reduce(largest, shard, distributed.ReduceOp.MAX)
    logits -= largest[:, None]
    sums = logits.new_zeros(3, logits.shape[0])  # of exponentials, of the target's logit, of all logits
    if logits.shape[1]:
        sums[1] = torch.where(owned, logits.gather(1, index)[:, 0], 0.0)
    if options.label_smoothing:
        sums[2] = logits.sum(1)
    softmax = logits.exp_()
    sums[0] = softmax.sum(1)
    _all_reduce(sums, shard, distributed.ReduceOp.SUM)
    log_sum = sums[0].log()
    losses = log_sum - sums[1]
    smoothing = options.label_smoothing
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (log_sum - sums[2] / classes)
    losses = torch.where(used, losses, 0.0)
    if shard is not None:  # a class that no rank has; of an unsharded weight `gather` has refused it
        losses = torch.where(used & ((target < 0) | (target >= classes)), torch.nan, losses)
    result.losses[part] = losses
    if not wanted.gradients:
        return softmax
    delta = softmax.div_(sums[0][:, None])
    if smoothing:
        delta -= smoothing / classes
    if delta.shape[1]:
        delta.scatter_add_(1, index, (owned.to(delta.dtype) * (smoothing - 1))[:, None])
    return delta.masked_fill_(~used[:, None], 0.0)


def _gradients(
    delta: Tensor,
    hidden: Tensor,
    weight: Tensor,
    factors: Tensor | None,
    wanted: Wanted,
    result: Computed,
    part: slice,
) -> None:
    """Writes the gradients and the terms of one chunk, and adds to the gradients of the weight and the bias."""
    gradient = delta.to(weight.dtype) @ weight
    result.hidden[part] = gradient
    result.terms[0, part] = torch.linalg.vecdot(at_least_float32(gradient), at_least_float32(hidden))
    result.terms[1, part] = row_norms(delta)
    if factors is not None:
        delta *= factors[:, None]
    if wanted.bias:
        result.bias.add_(delta.sum(0))
    if wanted.weight:
        if result.weight.dtype == weight.dtype:
            result.weight.addmm_(delta.T, hidden)
        else:  # added up in float32: in the weight's dtype small contributions of later chunks would be lost
            result.weight.add_(delta.to(weight.dtype).T @ hidden)


def _complete(terms: Tensor, shard: Shard | None) -> None:
    """Adds up the terms of the ranks that share the vocabulary."""
    if shard is not None:
        terms[1] **= 2
        _all_reduce(terms, shard, distributed.ReduceOp.SUM)
        terms[1] **= 0.5


def _all_reduce(tensor: Tensor, shard: Shard | None, how: Any) -> None:
    if shard is not None:
        distributed.all_reduce(tensor, how, group=shard.group)


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? factors, int ignore_index, float label_smoothing, "
    "SymInt chunk, bool gradients, bool weight_gradient, bool bias_gradient, bool predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# In a compiled graph the loop is one operation. Traced, it would be unrolled, and compiled again for each number of rows.
@torch.library.custom_op("gwa_logging::linear_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _compute_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk: int,
    gradients: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    predicted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(ignore_index, label_smoothing, chunk)
    wanted = Wanted(gradients, weight_gradient, bias_gradient, predicted)
    return tuple(compute(hidden, weight, bias, target, factors, options, wanted))  # type: ignore[return-value]


@_compute_op.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk: int,
    gradients: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    predicted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, classes, wide = hidden.shape[0], weight.shape[0], _accumulated_in(hidden.dtype)
    return (
        hidden.new_empty(rows, dtype=wide),
        torch.empty_like(hidden) if gradients else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if weight_gradient else hidden.new_empty(0, dtype=wide),
        hidden.new_empty(classes if bias_gradient else 0, dtype=wide),
        hidden.new_empty(2, rows if gradients else 0, dtype=wide),
        target.new_empty(rows if predicted else 0, dtype=torch.int64),
    )


def compute_in_graph(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    wanted: Wanted,
) -> Computed:
    """`compute` as one operation of a compiled graph. The vocabulary must not be sharded."""
    op: Callable[..., Any] = _compute_op
    return Computed(*op(hidden, weight, bias, target, factors, *options, *wanted))
