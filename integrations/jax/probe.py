"""The probe: an identity at the head with one more input, whose cotangent is defined as the scores.

    value, (scores, grads) = jax.value_and_grad(loss, argnums=(probe, params))

One backward pass, no labels, no callback. The user's gradients are bit-identical, since the identity passes them through.
The formula of the score is in `scores`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.alignment import FINITE_MARKERS
from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.scores import (
    Terms,
    alignment_scores,
    frobenius_norm,
    row_norms,
    terms_by_embeddings,
    terms_by_inputs,
    terms_by_logits,
)
from gwa_logging.integrations.jax.sessions import (
    FUSED_PATH,
    TAP_PATH,
    FusedLoss,
    Layer,
    LayerCall,
    current_session,
)


def tap(
    logits: Array, embeddings: Array, weight: Array, bias: Array | None = None, probe: Array | None = None
) -> Array:
    """Marks the classifier head of a hand-written net: an identity on the logits.

    Inside a loss given to `monitor.value_and_grad` nothing else is needed; anywhere else it does nothing. With a `probe` of
    your own, the gradient of the probe is the scores, in plain `jax.grad`.

    Args:
        logits: float [..., C], on the device, `embeddings @ weight + bias`.
        embeddings: float [..., D].
        weight: float, [D, C] or [C, D]; only its norm is used.
        bias: float [C]; None only if the logits have none. With a `probe` of your own this is not checked.
        probe: float32 [...], zeros, one for each sample; or None.

    Returns:
        The logits, unchanged. Does not block on the device.

    Raises:
        InvalidInputError: the shapes do not match.
    """
    _check_shapes(logits, embeddings, weight, bias, probe)
    if probe is not None:
        return _logits_probe(logits, embeddings, bias, frobenius_norm(weight), probe)
    session = current_session()
    return logits if session is None else session.tap(logits, embeddings, weight, bias)


def _check_shapes(logits: Array, embeddings: Array, weight: Array, bias: Array | None, probe: Array | None) -> None:
    classes, features = jnp.shape(logits)[-1:], jnp.shape(embeddings)[-1:]
    if sorted(jnp.shape(weight)) != sorted((*classes, *features)):
        raise InvalidInputError(
            f"weight: expected {(*features, *classes)} or the transpose, to match embeddings of shape "
            f"{jnp.shape(embeddings)} and logits of shape {jnp.shape(logits)}, found {jnp.shape(weight)}"
        )
    rows = jnp.shape(logits)[:-1]
    for name, found, expected in (
        ("embeddings", jnp.shape(embeddings)[:-1], rows),
        ("bias", classes if bias is None else jnp.shape(bias), classes),
        ("probe", rows if probe is None else jnp.shape(probe), rows),
    ):
        if found != expected:
            raise InvalidInputError(f"{name}: expected {expected} to match logits {jnp.shape(logits)}, found {found}")


class ProbeSession:
    """A session that puts the probe at one layer."""

    def __init__(self, head: LayerCall, probe: Array, *, pools_rows: bool = False) -> None:
        """Puts `probe` at a layer. With `pools_rows` it has one element for each input, whatever the number of its rows."""
        self._path = head.path
        self._rows = head.logits.shape[:-1]
        self._pools_rows = pools_rows and len(self._rows) > 1
        self._is_wide = head.logits.shape[-1] > head.features and not self._pools_rows
        self._probe = probe

    def run_linear(self, path: str, layer: Layer, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        if path != self._path:
            return layer(embeddings)
        weight_norm = frobenius_norm(weight)
        embeddings = depend_on(weight_norm, embeddings)
        if not self._is_wide:
            return self._probe_logits(layer(embeddings), embeddings, bias, weight_norm)
        embeddings, link = _lift_through_vmap(
            _wide_input, _unprobed_input, self._probe, self._rows, (embeddings,), (weight_norm,)
        )
        return _wide_output(layer(embeddings), link)

    def tap(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        if self._path != TAP_PATH:
            return logits
        return self._probe_logits(logits, embeddings, bias, frobenius_norm(weight))

    def fused_loss(self, fused: FusedLoss) -> Array:
        if self._path == FUSED_PATH and self._pools_rows:
            raise InvalidInputError(
                "unit='sample': linear_cross_entropy has a loss for each row, so each row is a sample; leave unit out"
            )
        return fused.run(self._probe if self._path == FUSED_PATH else None)

    def unsupported(self, path: str, output: Array, reason: str) -> Array:
        return output

    def parameters(self, named: Mapping[str, Array]) -> None:
        pass

    def _probe_logits(self, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Array:
        by_row, shared = (logits, embeddings), (bias, weight_norm)
        probed = _pooled_probe if self._pools_rows else _logits_probe
        return _lift_through_vmap(probed, lambda logits, *_: logits, self._probe, self._rows, by_row, shared)  # type: ignore[no-any-return]


def define_scores(terms_of: Callable[..., Terms], *args: Array | None) -> Array:
    """The scores, in the form that JAX's debugging options permit."""
    is_debugging = jax.config.jax_debug_nans or jax.config.jax_debug_infs  # type: ignore[attr-defined]  # not in the stubs
    scores: Array = _finite_scores(terms_of, *args) if is_debugging else alignment_scores(terms_of(*args))
    return scores


@partial(jax.jit, static_argnums=0)  # the options check only the outputs of a jitted function
def _finite_scores(terms_of: Callable[..., Terms], *args: Array | None) -> Array:
    return alignment_scores(terms_of(*args), FINITE_MARKERS)


# --- a head with fewer classes than features: one identity, on the logits ---------------------------------------------


@jax.custom_vjp
def _logits_probe(logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array, probe: Array) -> Array:
    """Identity on the logits. The cotangent of the probe is the scores."""
    return logits


def _logits_probe_forward(
    logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array, probe: Array
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    return logits, (logits, embeddings, bias, weight_norm)


def _logits_probe_backward(
    saved: tuple[Array, Array, Array | None, Array], delta: Array
) -> tuple[Array, None, None, None, Array]:
    return delta, None, None, None, define_scores(terms_by_logits, delta, *saved)


_logits_probe.defvjp(_logits_probe_forward, _logits_probe_backward)


@jax.custom_vjp
def _pooled_probe(logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array, probe: Array) -> Array:
    """Identity on the logits [B, ..., C]. The cotangent of the probe [B] is the scores of the inputs."""
    return logits


def _pooled_probe_backward(
    saved: tuple[Array, Array, Array | None, Array], delta: Array
) -> tuple[Array, None, None, None, Array]:
    return delta, None, None, None, define_scores(terms_by_inputs, delta, *saved)


_pooled_probe.defvjp(_logits_probe_forward, _pooled_probe_backward)


# --- a head with more classes than features: two identities, on its input and on its output ---------------------------


@jax.custom_vjp
def _wide_input(embeddings: Array, weight_norm: Array, probe: Array) -> tuple[Array, Array]:
    """Identity on the input of a wide head, and the link that its `_wide_output` must be given.

    The backward pass reaches `_wide_output` first. It makes |delta| the cotangent of the link, which is what is missing here.
    """
    return embeddings, probe


def _wide_input_forward(
    embeddings: Array, weight_norm: Array, probe: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return (embeddings, probe), (embeddings, weight_norm)


def _wide_input_backward(saved: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, None, Array]:
    embeddings, weight_norm = saved
    gradient, delta_norms = cotangents
    return gradient, None, define_scores(terms_by_embeddings, delta_norms, gradient, embeddings, weight_norm)


_wide_input.defvjp(_wide_input_forward, _wide_input_backward)


@jax.custom_vjp
def _wide_output(logits: Array, link: Array) -> Array:
    """Identity on the output of a wide head. The cotangent of the link is |delta|."""
    return logits


_wide_output.defvjp(lambda logits, _: (logits, None), lambda _, delta: (delta, row_norms(delta)))


def _unprobed_input(embeddings: Array, weight_norm: Array) -> tuple[Array, Array]:
    """What `_wide_input` returns, without a probe."""
    return embeddings, jnp.zeros(embeddings.shape[:-1], jnp.float32)


# --- the order of operations, and vmap --------------------------------------------------------------------------------


@jax.custom_vjp
def depend_on(weight_norm: Array, embeddings: Array) -> Array:
    """The embeddings, which XLA must not compute before the norm.

    If the weight was still to be read when it is updated, its donated memory would have to be copied first. XLA removes
    barriers too early to prevent that, so this is a choice with only one outcome, since no norm is negative.
    """
    return jnp.where(weight_norm < 0, jnp.zeros_like(embeddings), embeddings)


depend_on.defvjp(lambda norm, embeddings: (depend_on(norm, embeddings), None), lambda _, gradient: (None, gradient))


def _lift_through_vmap(
    probed: Callable[..., Any],
    unprobed: Callable[..., Any],
    probe: Array,
    rows: tuple[int, ...],
    by_row: tuple[Array | None, ...],
    shared: tuple[Array | None, ...] = (),
) -> Any:
    """Calls `probed(*by_row, *shared, probe)` with the whole batch, also inside a vmap over its rows.

    Such a vmap does not map the probe: each row would get the whole probe, and their cotangents would be summed. The batching
    rule here gives the probe to all rows together, whose shape is `rows`. `shared` may be mapped too, as in an ensemble; then
    each row has its own.
    """
    rows_here = by_row[0].shape[:-1]  # type: ignore[union-attr]  # only a bias may be None
    if rows_here == rows:
        return probed(*by_row, *shared, probe)
    by_row += jax.tree.map(lambda array: jnp.broadcast_to(array, (*rows_here, *array.shape)), shared)

    @jax.custom_batching.custom_vmap
    def one_row(probe: Array, by_row: tuple[Array | None, ...]) -> Any:
        return unprobed(*by_row)

    @one_row.def_vmap
    def all_rows(size: int, in_batched: list[Any], probe: Array, by_row: tuple[Array | None, ...]) -> tuple[Any, Any]:
        def batch(array: Array, is_batched: bool) -> Array:
            return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

        out = _lift_through_vmap(probed, unprobed, probe, rows, jax.tree.map(batch, by_row, in_batched[1]))
        return out, jax.tree.map(lambda _: True, out)

    return one_row(probe, by_row)
