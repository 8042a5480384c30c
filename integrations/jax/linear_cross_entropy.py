"""`linear_cross_entropy`: a language model's head and its loss in one function, which never holds the logits [N, V].

The arithmetic is in `chunked_cross_entropy`. Here are the checks of the arguments, the reductions, and what a watched loss
needs: the probe, also where a vmap inside the loss maps the rows.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec, auto_axes

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.chunked_cross_entropy import Plan, Rows, row_losses, summed_loss
from gwa_logging.integrations.jax.probe import depend_on
from gwa_logging.integrations.jax.scores import frobenius_norm
from gwa_logging.integrations.jax.sessions import FusedLoss, current_session, vary_over, varying_axes

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    target: Array,
    bias: Array | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
    probe: Array | None = None,
) -> Array:
    """Cross-entropy of the logits `hidden @ weight + bias`, computed in chunks of rows: the logits never exist as a whole.

    Inside a loss given to `monitor.value_and_grad` this is the classifier head, and its scores are returned like those of a
    layer; nothing else is needed. Anywhere else it is only a loss. With a `probe` of your own, the gradient of the probe is
    the scores, in plain `jax.grad`.

    The gradients are those of the cross-entropy of the whole logits, to rounding. Products have the operands' precision and
    are added up in float32, or in float64 if the operands are.

    Args:
        hidden: float [..., D], the head's input, on the device. For a scale on the logits, multiply it by the scale.
        weight: float [D, V], like a kernel of Flax; pass the transpose of a weight [V, D] and of a tied embedding. If it has
            a wider dtype than `hidden`, the products are computed in that one: cast it first for 16-bit products.
        target: int [...], classes in [0, V). A row with another class gives NaN.
        bias: float [V], or None.
        ignore_index: rows with this target have no loss, no gradient and no score.
        label_smoothing: in [0, 1]: the share of the target that is spread evenly over all classes.
        reduction: "mean" over the rows that are not ignored, 0 if there are none; "sum"; or "none", which computes the logits
            again in the backward pass.
        chunk: rows whose logits are in memory at once. Default: 2**25 / V, at least 512.
        probe: float32 [...], zeros, one for each row; or None.

    Returns:
        float32, or float64 for operands in float64: the loss []; with reduction="none", the losses [...], 0 for ignored rows.
        Does not block on the device.

    Raises:
        InvalidInputError: an argument has the wrong shape, dtype or value.

    Source: the score is that of "Gradient-Weight Alignment", arXiv 2510.25480, of each row.
    """
    hidden, weight, target = _array("hidden", hidden), _array("weight", weight), _array("target", target)
    bias = None if bias is None else _array("bias", bias)
    _check_arrays(hidden, weight, target, bias, probe)
    _check_options(ignore_index, label_smoothing, reduction, chunk)
    dtype = jnp.promote_types(hidden.dtype, weight.dtype)
    plan = Plan(int(ignore_index), float(label_smoothing), None if chunk is None else int(chunk), dtype)
    arrays = (
        hidden.astype(dtype),
        weight.astype(dtype),
        target.astype(jnp.promote_types(target.dtype, jnp.int32)),
        None if bias is None else bias.astype(plan.result),
    )
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((arrays, probe))))
    hidden, weight, target, bias = vary_over(axes, arrays)

    def run(probe: Array | None) -> Array:
        if probe is not None and probe.shape != target.shape:  # inside a vmap that does not map the probe
            return reduce(_lift_through_vmap(plan, probe, hidden, weight, bias, target))
        run_here = partial(_run, plan, reduction == "none")
        losses = _with_auto_axes(run_here, hidden, reduction)(hidden, weight, bias, target, probe)
        return _divided(losses, plan, target) if reduction == "mean" else losses

    def reduce(losses: Array) -> Array:
        losses = losses.astype(plan.result)
        if reduction == "none":
            return losses
        return _divided(jnp.sum(losses), plan, target) if reduction == "mean" else jnp.sum(losses)

    session = current_session()
    if session is None or probe is not None:
        return run(probe)
    return session.fused_loss(FusedLoss(hidden, weight, bias, target, run, reduce))


def _run(
    plan: Plan,
    is_by_row: bool,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    target: Array,
    probe: Array | None,
) -> Array:
    """The losses [...] of hidden [..., D], or their sum."""
    weight_norm = None
    if probe is not None:
        weight_norm = frobenius_norm(weight)
        hidden = depend_on(weight_norm, hidden)
        probe = probe.ravel()
    rows = Rows(hidden.reshape(-1, hidden.shape[-1]), target.ravel())
    loss = (row_losses if is_by_row else summed_loss)(plan, rows, weight, bias, weight_norm, probe)
    return loss.reshape(target.shape) if is_by_row else loss


def _divided(total: Array, plan: Plan, target: Array) -> Array:
    """The mean of the losses of rows that are not ignored, from their sum."""
    return total / jnp.maximum(jnp.sum(target != plan.ignore_index), 1).astype(plan.result)


def _with_auto_axes(run: Any, hidden: Array, reduction: Reduction) -> Any:
    """`run`, in which XLA chooses the shardings, also if the mesh has explicit axes."""
    sharding = jax.typeof(hidden).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return run
    rows = sharding.spec[:-1] if reduction == "none" else ()
    return auto_axes(run, out_sharding=PartitionSpec(*rows))  # type: ignore[no-untyped-call]


def _lift_through_vmap(
    plan: Plan, probe: Array, hidden: Array, weight: Array, bias: Array | None, target: Array
) -> Array:
    """The losses of the rows here, in a vmap inside the loss. All rows of all calls that it maps get the probe together.

    A weight that is mapped too, as in an ensemble, has the mapped axes in front.
    """
    if hidden.shape[:-1] == probe.shape:
        run: Callable[..., Array] = partial(_run, plan, True)
        for _ in range(weight.ndim - 2):
            run = jax.vmap(run)
        return run(hidden, weight, bias, target, probe)

    @jax.custom_batching.custom_vmap
    def of_one(probe: Array, hidden: Array, target: Array, shared: tuple[Array, Array | None]) -> Array:
        return _run(plan, True, hidden, shared[0], shared[1], target, None)

    @of_one.def_vmap
    def of_all(
        size: int, in_batched: Any, probe: Array, hidden: Array, target: Array, shared: Any
    ) -> tuple[Array, bool]:
        def batch(array: Array, is_batched: bool) -> Array:
            return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

        if shared[0].ndim > 2 or any(jax.tree.leaves(in_batched[3])):
            shared = jax.tree.map(batch, shared, in_batched[3])
        hidden, target = batch(hidden, in_batched[1]), batch(target, in_batched[2])
        return _lift_through_vmap(plan, probe, hidden, shared[0], shared[1], target), True

    losses: Array = of_one(probe, hidden, target, (weight, bias))
    return losses


def _array(name: str, value: Any) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name}: expected an array, found {type(value).__name__}: {error}") from error


def _check_arrays(hidden: Array, weight: Array, target: Array, bias: Array | None, probe: Array | None) -> None:
    for name, array in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise InvalidInputError(f"{name}: expected a floating-point array, found {array.dtype}")
    if not jnp.issubdtype(target.dtype, jnp.integer):
        raise InvalidInputError(
            f"target: expected class indices as integers, found {target.dtype} of shape {target.shape}; for probabilities as "
            "targets compute the logits, and mark them with gwa_logging.integrations.jax.tap"
        )
    if not hidden.ndim:
        raise InvalidInputError("hidden: expected an array [..., D], found one without axes")
    features = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != features or not weight.shape[1]:
        is_transposed = weight.ndim == 2 and weight.shape[1] == features
        raise InvalidInputError(
            f"weight: expected [{features}, classes] to match hidden of shape {hidden.shape}, found {weight.shape}"
            + ("; pass weight.T" if is_transposed else "")
        )
    for name, found, expected in (
        ("target", target.shape, hidden.shape[:-1]),
        ("bias", weight.shape[1:] if bias is None else bias.shape, weight.shape[1:]),
        ("probe", hidden.shape[:-1] if probe is None else jnp.shape(probe), hidden.shape[:-1]),
    ):
        if found != expected:
            raise InvalidInputError(
                f"{name}: expected shape {expected} to match hidden of shape {hidden.shape} and weight of shape "
                f"{weight.shape}, found {found}"
            )


def _check_options(ignore_index: Any, label_smoothing: Any, reduction: Any, chunk: Any) -> None:
    if not isinstance(ignore_index, Integral):
        raise InvalidInputError(f"ignore_index: expected an int, found {ignore_index!r}")
    if not isinstance(label_smoothing, Real) or not 0 <= float(label_smoothing) <= 1:
        raise InvalidInputError(f"label_smoothing: expected a number in [0, 1], found {label_smoothing!r}")
    if reduction not in get_args(Reduction):
        raise InvalidInputError(f"reduction: expected 'mean', 'sum' or 'none', found {reduction!r}")
    if chunk is not None and (not isinstance(chunk, Integral) or int(chunk) < 1):
        raise InvalidInputError(f"chunk: expected a number of rows of at least 1, or None, found {chunk!r}")
