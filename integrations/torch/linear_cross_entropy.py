"""Cross-entropy of a language model's head without its logits, whose scores reach the monitor of the watched model.

A fused loss takes the hidden states and the head's weight, and never calls the head. So the probe at the head sees nothing.
This loss computes the logits in chunks, and has every term of the score in hand: see `chunked_cross_entropy`. It looks for the
probe that watches the weight, and gives it the terms when the loss is differentiated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.torch.chunked_cross_entropy import (
    Computed,
    Options,
    Shard,
    Wanted,
    chunk_rows,
    compute,
    compute_in_graph,
)
from gwa_logging.integrations.torch.compiled_probe import inputs_of
from gwa_logging.integrations.torch.distributed import is_split
from gwa_logging.integrations.torch.fused_pass import FusedPass, called, note_transform, observed_pass
from gwa_logging.integrations.torch.probe import is_in_transform
from gwa_logging.integrations.torch.rows import COLUMNS, encode_rows
from gwa_logging.integrations.torch.scores import Terms, row_norms
from gwa_logging.integrations.torch.sharded_vocabulary import local_parts, whole_norm

_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Computes `F.cross_entropy(F.linear(hidden, weight, bias), target)` without holding the logits [N, V].

    If a model is watched whose head has this weight, each differentiated pass is observed, as if the head had been called:
    no further line is needed, and `Monitor.tag` works as usual. With hidden states [B, T, D], the rows of one input belong to
    one id. The head must be in training mode.

    The gradient of the weight is computed in the forward pass, in float32 at least, and kept until the backward pass. With
    `reduction="none"` the backward pass computes the logits again instead. Inside the transforms of torch.func (grad, vmap) the
    logits are computed in full and nothing is observed.

    Under autocast the matrix products run in autocast's dtype. Everything else runs in float32 at least, as does the loss.

    A weight that is a DTensor sharded over the vocabulary (`Shard(0)` on a mesh of one dimension) needs hidden states that are
    a DTensor on the same mesh. The losses are plain tensors, the same on every rank.

    Args:
        hidden: float [..., D], the input of the head.
        weight: float [V, D], the head's weight itself, such as `model.lm_head.weight`: not a copy or a cast of it.
        target: int64 [...], the class of each row, in 0 to V - 1, or `ignore_index`.
        bias: float [V].
        ignore_index: rows with this target have no loss, and do not count in the mean.
        label_smoothing: share of the uniform distribution in the target, in [0, 1].
        reduction: "mean" over the rows that are not ignored (NaN if there are none), "sum" or "none".
        chunk: rows whose logits are computed at a time; by default as many as give 2**25 logits (128 MB in float32).

    Returns:
        float32 [], or [...] with `reduction="none"`; float64 if the input is.

    Raises:
        InvalidInputError: an argument has a wrong shape, dtype or value; or the loss is differentiated twice.
    """
    _check(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, chunk)
    if is_in_transform():
        note_transform(weight)
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(
            logits.flatten(0, -2), target.flatten(), None, None, ignore_index, None, reduction, label_smoothing
        ).view(target.shape if reduction == "none" else ())
    options = Options(ignore_index, float(label_smoothing), chunk_rows(chunk, weight.shape[0]))
    loss = _sharded if is_split(weight) or is_split(hidden) or is_split(bias) else _observed
    return loss(hidden, weight, bias, target, options, reduction)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sharded(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options, reduction: str
) -> Tensor:
    """The loss with a weight of which other ranks have parts. The compiler cannot trace its collectives."""
    return _observed(hidden, weight, bias, target, options, reduction)


def _observed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options, reduction: str
) -> Tensor:
    """The loss, observed if a probe watches the weight and anything is differentiated."""
    (local, local_weight, local_bias, target), shard = local_parts(hidden, weight, target, bias)
    rows = target.reshape(-1).to(torch.int64)
    is_trained = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (local, local_weight, local_bias)
    )
    per_row = reduction == "none"
    if is_trained:
        fused_pass, leaf = observed_pass(hidden, weight)
        losses: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
            local, local_weight, local_bias, rows, leaf, options, shard, fused_pass, per_row
        )
        if fused_pass is not None:
            called(fused_pass, losses, rows.shape[0])
    else:
        flat, matrix, vector = _cast(local.flatten(0, -2), local_weight, local_bias)
        losses = _computed(flat, matrix, vector, rows, None, options, _NOTHING, shard).losses
        losses = losses if per_row else losses.sum()
    if per_row:
        return losses.view(target.shape)
    if reduction == "sum":
        return losses
    used = (rows != options.ignore_index).sum()
    # Not divided by zero: the gradients are zero where every row is ignored, as those of PyTorch's loss are.
    return torch.where(used > 0, losses / used.clamp(min=1), torch.nan)


_NOTHING = Wanted(gradients=False, weight=False, bias=False, predicted=False)


class _Fused(torch.autograd.Function):
    """The losses [N], or their sum. The gradient of `leaf`, float32 [rows, columns], is defined as the encoded rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        leaf: Tensor | None,
        options: Options,
        shard: Shard | None,
        fused_pass: FusedPass | None,
        per_row: bool,
    ) -> Tensor:
        ctx.options, ctx.shard, ctx.fused_pass, ctx.per_row = options, shard, fused_pass, per_row
        ctx.shape, ctx.inputs = hidden.shape, inputs_of(hidden)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.is_observed = leaf is not None or fused_pass is not None
        ctx.columns = 0 if leaf is None else leaf.shape[1]
        needs_predicted = ctx.columns > COLUMNS or (fused_pass is not None and fused_pass.needs_predicted)
        wanted = Wanted(True, weight.requires_grad, bias is not None and bias.requires_grad, needs_predicted)
        ctx.wanted = wanted
        flat, matrix, vector = _cast(hidden.flatten(0, -2), weight, bias)
        if per_row:
            ctx.save_for_backward(flat, matrix, vector, target)
            return _computed(flat, matrix, vector, target, None, options, _NOTHING, shard).losses
        computed = _computed(flat, matrix, vector, target, None, options, wanted, shard)
        ctx.save_for_backward(*computed[1:], *_norms(ctx.is_observed, flat, matrix, shard))
        return computed.losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            hidden, weight, bias, leaf = _gradients(ctx, gradient)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hidden, weight, bias = _Once.apply(  # type: ignore[no-untyped-call]
                hidden.new_zeros((), requires_grad=True), hidden, weight, bias
            )
        return hidden, weight, bias, None, leaf, None, None, None, None


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the hidden states, the weight, the bias and the leaf."""
    wanted: Wanted = ctx.wanted
    if ctx.per_row:
        flat, matrix, vector, target = ctx.saved_tensors
        computed = _computed(flat, matrix, vector, target, gradient, ctx.options, wanted, ctx.shard)
        hidden, of_weight, of_bias, terms, predicted = computed[1:]
        norms = _norms(ctx.is_observed, flat, matrix, ctx.shard)
        factor, of_sum = gradient[:, None], None
    else:
        hidden, of_weight, of_bias, terms, predicted, *norms = ctx.saved_tensors
        factor = of_sum = gradient
    leaf = None
    if ctx.is_observed:
        sign = gradient.sign()
        scored = Terms(terms[0] * sign, terms[1] * sign.abs(), *norms)
        if ctx.fused_pass is not None:
            ctx.fused_pass.arrived(scored, predicted)
        else:
            leaf = encode_rows(scored, predicted if ctx.columns > COLUMNS else None, ctx.columns, ctx.inputs)
    kinds = ctx.dtypes
    return (
        (hidden * factor).to(kinds[0]).view(ctx.shape),
        (of_weight if of_sum is None else of_weight * of_sum).to(kinds[1]) if wanted.weight else None,
        (of_bias if of_sum is None else of_bias * of_sum).to(kinds[2]) if wanted.bias else None,
        leaf,
    )


class _Once(torch.autograd.Function):
    """Identity on the gradients, which cannot be differentiated themselves."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raise InvalidInputError(
            "linear_cross_entropy cannot be differentiated twice: its gradients are computed in chunks, without a graph. For "
            "second derivatives use F.cross_entropy on the logits of the head"
        )


def _computed(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    wanted: Wanted,
    shard: Shard | None,
) -> Computed:
    if torch.compiler.is_compiling():
        return compute_in_graph(flat, weight, bias, target, factors, options, wanted)
    return compute(flat, weight, bias, target, factors, options, wanted, shard)


def _norms(is_observed: bool, flat: Tensor, weight: Tensor, shard: Shard | None) -> tuple[Tensor, ...]:
    """|h| [N] and |W| []. With a sharded vocabulary every rank computes them, also one whose model is not watched."""
    return (row_norms(flat), whole_norm(weight, shard)) if is_observed or shard is not None else ()


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of the matrix products, in autocast's dtype if it is on."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _to(hidden, dtype), _to(weight, dtype), None if bias is None else _to(bias, dtype)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an operand: float64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    chunk: int | None,
) -> None:
    if weight.ndim != 2:
        partitioned = ". ZeRO-3 has partitioned it: gather it around the loss" if hasattr(weight, "ds_id") else ""
        raise InvalidInputError(f"weight: expected [V, D], found {tuple(weight.shape)}{partitioned}")
    classes, features = weight.shape
    if hidden.ndim < 2 or hidden.shape[-1] != features:
        raise InvalidInputError(f"hidden: expected [..., {features}], as the weight's D, found {tuple(hidden.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InvalidInputError(
            f"target: expected class indices (int64), found {target.dtype}. For class probabilities use F.cross_entropy"
        )
    if target.shape != hidden.shape[:-1]:
        raise InvalidInputError(
            f"target: expected {tuple(hidden.shape[:-1])}, one class for each row of hidden, found {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != (classes,):
        raise InvalidInputError(f"bias: expected [{classes}], one number for each class, found {tuple(bias.shape)}")
    if not weight.is_floating_point() or not hidden.is_floating_point():
        raise InvalidInputError(f"hidden and weight: expected floats, found {hidden.dtype} and {weight.dtype}")
    autocast = torch.amp.is_autocast_available(hidden.device.type) and torch.is_autocast_enabled(hidden.device.type)
    if not autocast and any(x is not None and x.dtype != weight.dtype for x in (hidden, bias)):
        raise InvalidInputError(
            f"hidden: is {hidden.dtype}, but weight is {weight.dtype}"
            + ("" if bias is None else f" and bias {bias.dtype}")
            + ". Use one dtype, or torch.autocast"
        )
    if not 0 <= label_smoothing <= 1:
        raise InvalidInputError(f"label_smoothing: expected a number in [0, 1], found {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise InvalidInputError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}, found {reduction!r}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InvalidInputError(f"chunk: expected a positive number of rows, found {chunk!r}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not is_in_transform() and target.numel():
        used = target[target != ignore_index]  # on an accelerator this would wait for the device
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < classes:
            raise InvalidInputError(
                f"target: expected classes in 0 to {classes - 1} or ignore_index={ignore_index}, found "
                f"{int(used.min())} to {int(used.max())}"
            )
