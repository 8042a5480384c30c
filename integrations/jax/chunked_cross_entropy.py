"""Cross-entropy of a linear head, computed chunk by chunk: the logits [N, V] never exist as a whole.

For the logits z = h W + b of a row h [D], with W [D, V], the label y and the smoothed target q = (1 - s) onehot(y) + s / V:

    loss = logsumexp(z) - q . z          delta = dloss/dz = softmax(z) - q
    dloss/dh = W delta                   dloss/dW = h delta^T

A `lax.scan` runs over the chunks. In the sum of all losses every row has the same factor, so the gradients are computed in the
forward pass, while the logits of a chunk are at hand: three matrix products, as with all logits in memory. In losses by row the
factors are known only in the backward pass, which computes the logits again: four products.

The terms of the alignment score (see `scores`) come from the same chunk: |delta|, |h| and (dloss/dh) . h. Only |delta| needs
another pass over a chunk of logits. A factor on the loss cancels except for its sign, and is applied last, so a large loss
scale does not overflow the scores.

Everything here is ordinary JAX, so second derivatives are exact too, but they keep all logits.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.integrations.jax.probe import define_scores
from gwa_logging.integrations.jax.scores import Terms, row_norms, row_products
from gwa_logging.integrations.jax.sessions import vary_over, varying_axes

_CHUNK_ELEMENTS = 2**25
"""Logits in a chunk of the default size: 128 MiB in float32."""

_SMALLEST_CHUNK = 512
"""Rows of the smallest chunk of the default size. Every chunk reads and writes the gradient of the whole weight."""


class Plan(NamedTuple):
    """What is known before the arrays are.

    Attributes:
        ignore_index: the label of rows that have no loss.
        label_smoothing: in [0, 1].
        chunk: rows in a chunk; None for the default.
        dtype: of the matrix products' operands; their results are at least float32.
    """

    ignore_index: int
    label_smoothing: float
    chunk: int | None
    dtype: Any

    @property
    def result(self) -> Any:
        """The dtype of logits, losses and sums: float32, or float64."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def chunks(self, rows: int, classes: int) -> int:
        """The number of chunks for a number of rows: one that divides it, if possible, since no row is added then."""
        chunk = self.chunk or max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // classes)
        least = max(1, -(-rows // chunk))
        return next((number for number in range(least, 2 * least) if rows % number == 0), least)


class Rows(NamedTuple):
    """The inputs that have one entry for each row.

    Attributes:
        hidden: [N, D], of the plan's dtype.
        target: int [N].
    """

    hidden: Array
    target: Array


class _Gradients(NamedTuple):
    """The gradients by `hidden` [N, D], `weight` [D, V] and `bias` [V], in the dtype of results; None if there is no bias."""

    hidden: Array
    weight: Array
    bias: Array | None


# --- one chunk --------------------------------------------------------------------------------------------------------


def _logits(plan: Plan, hidden: Array, weight: Array, bias: Array | None) -> Array:
    logits = jnp.dot(hidden, weight, preferred_element_type=plan.result)
    return logits if bias is None else logits + bias


def _losses_and_deltas(plan: Plan, logits: Array, target: Array) -> tuple[Array, Array]:
    """The losses [n] and their gradients by the logits [n, V]. A label that is no class gives NaN.

    At the label, softmax - 1 is computed as minus the sum of the other probabilities: a difference would leave nothing of the
    gradient of a row that is predicted with confidence.
    """
    classes, smoothing = logits.shape[-1], plan.label_smoothing
    is_label = jnp.arange(classes, dtype=target.dtype) == target[:, None]
    is_counted = target != plan.ignore_index
    is_wrong = is_counted & ((target < 0) | (target >= classes))
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    label = jnp.where(is_wrong, jnp.nan, jnp.sum(jnp.where(is_label, shifted, 0), axis=-1))
    exponentials = jnp.exp(shifted)
    others = jnp.sum(jnp.where(is_label, 0, exponentials), axis=-1)
    total = others + jnp.exp(label)
    losses = jnp.log(total) - (1 - smoothing) * label
    if smoothing:
        losses -= smoothing * jnp.mean(shifted, axis=-1)
    at_label = smoothing - others / total
    deltas = jnp.where(is_label, at_label[:, None], exponentials / total[:, None]) - smoothing / classes
    return jnp.where(is_counted, losses, 0), jnp.where(is_counted[:, None], deltas, 0)


def _counted_rows(plan: Plan, rows: Rows) -> Rows:
    """Rows of which the ignored ones are zero, since 0 * NaN is not."""
    return rows._replace(hidden=jnp.where((rows.target != plan.ignore_index)[:, None], rows.hidden, 0))


# --- all chunks -------------------------------------------------------------------------------------------------------


def _split(array: Array, chunks: int, fill: Any) -> Array:
    """[N, ...] as [chunks, n, ...]. Row i is in chunk i % chunks: rows sharded over devices stay where they are."""
    missing = -len(array) % chunks
    if missing:
        array = jnp.concatenate([array, jnp.full((missing, *array.shape[1:]), fill, array.dtype)])
    return jnp.swapaxes(array.reshape(-1, chunks, *array.shape[1:]), 0, 1)


def _join(array: Array, rows: int) -> Array:
    """The inverse of `_split`."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])[:rows]


def _split_rows(plan: Plan, rows: Rows, chunks: int) -> Rows:
    return Rows(_split(rows.hidden, chunks, 0), _split(rows.target, chunks, plan.ignore_index))


@partial(jax.jit, static_argnums=0)  # compiled once, also for a step that is not jitted
def _losses(plan: Plan, rows: Rows, weight: Array, bias: Array | None) -> Array:
    """The losses [N], without gradients."""
    number = len(rows.hidden)

    def of_chunk(_: None, chunk: Rows) -> tuple[None, Array]:
        chunk = _counted_rows(plan, chunk)
        return None, _losses_and_deltas(plan, _logits(plan, chunk.hidden, weight, bias), chunk.target)[0]

    _, losses = jax.lax.scan(of_chunk, None, _split_rows(plan, rows, plan.chunks(number, weight.shape[1])))
    return _join(losses, number)


@partial(jax.jit, static_argnums=(0, 5))
def _gradients(
    plan: Plan, rows: Rows, weight: Array, bias: Array | None, factors: Array | None, has_probe: bool
) -> tuple[Array, _Gradients, tuple[Array, Array, Array] | None]:
    """The losses [N], the gradients of their sum, and the terms of the scores.

    Args:
        plan: see there.
        rows: the inputs.
        weight: [D, V].
        bias: [V], or None.
        factors: [N]: the gradients are those of the losses times these; None for 1.
        has_probe: True if the terms are wanted.

    Returns:
        The losses; the gradients; and, for each row without its factor, (dloss/dh) . h, |delta| and |h|, float32 [N], or None.
    """
    number = len(rows.hidden)
    chunks = plan.chunks(number, weight.shape[1])
    parts = None if factors is None else _split(factors, chunks, 0)
    zeros = jnp.zeros(weight.shape, plan.result), jnp.zeros(weight.shape[1:], plan.result)
    zeros = vary_over(varying_axes(rows.hidden), zeros)

    def of_chunk(sums: tuple[Array, Array], chunk: tuple[Rows, Array | None]) -> tuple[tuple[Array, Array], Any]:
        (hidden, target), factor = _counted_rows(plan, chunk[0]), chunk[1]
        losses, deltas = _losses_and_deltas(plan, _logits(plan, hidden, weight, bias), target)
        operand = deltas.astype(plan.dtype)
        gradient = jnp.einsum("nv,dv->nd", operand, weight, preferred_element_type=plan.result)
        terms = (row_products(gradient, hidden), row_norms(deltas), row_norms(hidden)) if has_probe else None
        if factor is not None:
            gradient *= factor[:, None]
            hidden = (hidden * factor[:, None]).astype(plan.dtype)
            deltas *= factor[:, None]
        by_weight = sums[0] + jnp.einsum("nd,nv->dv", hidden, operand, preferred_element_type=plan.result)
        by_bias = sums[1] if bias is None else sums[1] + jnp.sum(deltas, axis=0)
        return (by_weight, by_bias), (losses, gradient, terms)

    (by_weight, by_bias), outputs = jax.lax.scan(of_chunk, zeros, (_split_rows(plan, rows, chunks), parts))
    losses, by_hidden, terms = jax.tree.map(partial(_join, rows=number), outputs)
    return losses, _Gradients(by_hidden, by_weight, None if bias is None else by_bias), terms


def _scaled(plan: Plan, gradients: _Gradients, factor: Array) -> _Gradients:
    """The gradients times a factor, in the dtypes of what they are the gradients of."""
    hidden, weight, bias = gradients
    return _Gradients(
        (hidden * factor).astype(plan.dtype),
        (weight * factor).astype(plan.dtype),
        None if bias is None else bias * factor,
    )


def _scores(factors: Array, terms: tuple[Array, Array, Array] | None, weight_norm: Array | None) -> Array | None:
    """The scores, float32 [N]; `factors`, [N] or one number, are those of the rows' losses."""
    return None if terms is None else define_scores(_terms_with_factors, factors, *terms, weight_norm)


def _terms_with_factors(
    factors: Array, products: Array, delta_norms: Array, embedding_norms: Array, weight_norm: Array
) -> Terms:
    signs = jnp.where(jnp.isfinite(factors), jnp.sign(factors), jnp.nan).astype(jnp.float32)
    return Terms(products * signs, jnp.where(signs == 0, 0, delta_norms), embedding_norms, weight_norm)


# --- the sum of all losses --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(
    plan: Plan,
    rows: Rows,
    weight: Array,
    bias: Array | None,
    weight_norm: Array | None,
    probe: Array | None,
) -> Array:
    """The sum of the losses [], in the dtype of results; 0 if all rows are ignored.

    Args:
        plan: see there.
        rows: the inputs.
        weight: [D, V], of the plan's dtype.
        bias: [V], in the dtype of results; or None.
        weight_norm: |W|, float32; only needed with a probe.
        probe: float32 [N], whose cotangent is the scores; or None.
    """
    return jnp.sum(_losses(plan, rows, weight, bias))


def _summed_loss_forward(
    plan: Plan, rows: Rows, weight: Array, bias: Array | None, weight_norm: Array | None, probe: Array | None
) -> tuple[Array, Any]:
    losses, gradients, terms = _gradients(plan, rows, weight, bias, None, probe is not None)
    return jnp.sum(losses), (gradients, terms, weight_norm)


def _summed_loss_backward(plan: Plan, saved: Any, factor: Array) -> tuple[Any, ...]:
    gradients, terms, weight_norm = saved
    hidden, weight, bias = _scaled(plan, gradients, factor)
    return Rows(hidden, None), weight, bias, None, _scores(factor, terms, weight_norm)  # type: ignore[arg-type]


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)


# --- the loss of every row --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_losses(
    plan: Plan,
    rows: Rows,
    weight: Array,
    bias: Array | None,
    weight_norm: Array | None,
    probe: Array | None,
) -> Array:
    """The losses [N], in the dtype of results; 0 for ignored rows. The arguments are those of `summed_loss`."""
    losses: Array = _losses(plan, rows, weight, bias)
    return losses


def _row_losses_forward(
    plan: Plan, rows: Rows, weight: Array, bias: Array | None, weight_norm: Array | None, probe: Array | None
) -> tuple[Array, Any]:
    return _losses(plan, rows, weight, bias), (rows, weight, bias, weight_norm, probe)


def _row_losses_backward(plan: Plan, saved: Any, factors: Array) -> tuple[Any, ...]:
    rows, weight, bias, weight_norm, probe = saved
    largest = jnp.max(jnp.abs(factors), initial=0)  # so that a large factor does not overflow 16-bit rows
    scale = jnp.where(largest == 0, 1, largest)
    _, gradients, terms = _gradients(plan, rows, weight, bias, factors / scale, probe is not None)
    by_hidden, by_weight, by_bias = _scaled(plan, gradients, scale)
    return Rows(by_hidden, None), by_weight, by_bias, None, _scores(factors, terms, weight_norm)  # type: ignore[arg-type]


row_losses.defvjp(_row_losses_forward, _row_losses_backward)
