"""The probe: an identity at the head with one more input, whose cotangent is defined as the scores.

    value, (scores, grads) = jax.value_and_grad(loss, argnums=(probe, params))

One backward pass, no labels, no callback; the user's gradients are bit-identical, since the identity hands them on and
adds nothing. What runs the head is told by a `Session`: it is entered while the user's loss is traced.

The scalar product of a sample's head gradient with the weights has two forms, <delta, logits - bias> and <dh, h>. The first
one needs the logits in the backward pass, the second one the embeddings and their gradient: the smaller of the two is taken.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard

from gwa_logging.alignment import DEAD, NO_GRADIENT, NOT_FINITE, SMALLEST
from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.jaxpr_walk import PREFIX, jaxprs_in


class Marks(NamedTuple):
    """What the scores of samples without a score are, see `gwa_logging.alignment`."""

    no_gradient: float
    dead: float
    not_finite: float


MARKS = Marks(NO_GRADIENT, DEAD, NOT_FINITE)

FINITE_MARKS = Marks(64.0, -128.0, 128.0)
"""Where `jax_debug_nans` or `jax_debug_infs` would end the training at the first padded sample."""


def _is_debugging() -> bool:
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs)  # type: ignore[attr-defined]  # not in the stubs


HAND_WRITTEN = "tap"
"""The path under which a call of `tap` is known."""


class Session(Protocol):
    """Who wants to know of the linear layers that run while a loss is traced."""

    def linear(
        self, path: str, layer: Callable[[Array], Array], embeddings: Array, weight: Array, bias: Array | None
    ) -> Array:
        """Runs a linear layer on its input; returns its output, tapped or not."""
        ...

    def marked(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        """The user has called `tap` with these; returns the logits, tapped or not."""
        ...

    def unfit(self, path: str, output: Array, reason: str) -> Array:
        """A layer has run that is linear in its weight, but cannot be watched; returns its output."""
        ...

    def parameters(self, named: Mapping[str, Array]) -> None:
        """These are parameters of the model, whichever layer uses them."""
        ...


_session: ContextVar[Session | None] = ContextVar("gwa_logging_session", default=None)


def current() -> Session | None:
    """The session that was entered, if any."""
    return _session.get()


_make_context: Any = getattr(jax, "make_user_context", lambda: lambda _: nullcontext())  # not in old versions of JAX
_apart = _make_context()


def apart() -> AbstractContextManager[None]:
    """Traces anew what is traced inside.

    JAX keeps the traces of inner functions that are jitted or checkpointed. One that was made without a session would not
    tell of its layers; one that was made with a session must never be used again, least of all in the user's evaluation.
    """
    return _apart(object())  # type: ignore[no-any-return]


@contextmanager
def entered(session: Session) -> Iterator[None]:
    """Makes a session the one that `tap` and the model's layers speak to."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def tap(
    logits: Array, embeddings: Array, weight: Array, bias: Array | None = None, probe: Array | None = None
) -> Array:
    """Marks the classifier head of a hand-written net: an identity on the logits.

    Inside of a loss given to `monitor.value_and_grad` nothing else is needed, and anywhere else it does nothing. With a
    `probe` of your own, the gradient of the probe is the scores, in plain `jax.grad`.

    Args:
        logits: float [..., C], on the device, `embeddings @ weight + bias`.
        embeddings: float [..., D].
        weight: float, [D, C] or [C, D]; only its norm is used.
        bias: float [C]; None only if the logits have none. With a `probe` of your own this is not checked.
        probe: float32 [...], zeros, one for each sample; or None.

    Returns:
        The logits, unchanged. Does not wait for the device.

    Raises:
        InvalidInputError: the shapes do not belong together.
    """
    _check(logits, embeddings, weight, bias, probe)
    if probe is not None:
        return _probed(logits, embeddings, bias, _size(weight), probe)
    session = current()
    return logits if session is None else session.marked(logits, embeddings, weight, bias)


def _check(logits: Array, embeddings: Array, weight: Array, bias: Array | None, probe: Array | None) -> None:
    sizes = (jnp.shape(logits)[-1:], jnp.shape(embeddings)[-1:])
    if sorted(jnp.shape(weight)) != sorted((*sizes[0], *sizes[1])):
        raise InvalidInputError(
            f"weight: expected {(*sizes[1], *sizes[0])} or the transpose, to go with embeddings of shape "
            f"{jnp.shape(embeddings)} and logits of shape {jnp.shape(logits)}, found {jnp.shape(weight)}"
        )
    rows = jnp.shape(logits)[:-1]
    for name, value, shape in (
        ("embeddings", jnp.shape(embeddings)[:-1], rows),
        ("bias", sizes[0] if bias is None else jnp.shape(bias), sizes[0]),
        ("probe", rows if probe is None else jnp.shape(probe), rows),
    ):
        if value != shape:
            raise InvalidInputError(f"{name}: expected {shape} to go with logits {jnp.shape(logits)}, found {value}")


@jax.custom_vjp
def _probed(logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array, probe: Array) -> Array:
    return logits


def _forward(
    logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array, probe: Array
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    return logits, (logits, embeddings, bias, weight_norm)


def _backward(kept: tuple[Array, Array, Array | None, Array], delta: Array) -> tuple[Array, None, None, None, Array]:
    logits, embeddings, bias, weight_norm = kept
    return delta, None, None, None, _unseen(_scores_by_logits, delta, logits, embeddings, bias, weight_norm)


_probed.defvjp(_forward, _backward)


def _unseen(scores: Callable[..., Array], *args: Any) -> Array:
    """Computes scores where `jax_debug_nans` and `jax_debug_infs` look at the outcome only, which is finite then."""
    return (jax.jit(scores) if _is_debugging() else scores)(*args)


def _scores_by_logits(delta: Array, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Array:
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits -= bias.astype(jnp.float32).reshape((1,) * (logits.ndim - bias.ndim) + bias.shape)
    return _scores(_product(delta, logits), _norm(delta), _norm(embeddings) * weight_norm)


def _scores_by_embeddings(gradient: Array, embeddings: Array, delta_norm: Array, weight_norm: Array) -> Array:
    return _scores(_product(gradient, embeddings), delta_norm, _norm(embeddings) * weight_norm)


def _product(a: Array, b: Array) -> Array:
    """float32 [...]: scalar products of rows."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _norm(rows: Array) -> Array:
    """float32 [...]: of every row."""
    norms: Array = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
    return norms


def _size(weight: Array) -> Array:
    """float32 []: the weight's Frobenius norm, a constant to differentiation."""
    return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(weight).astype(jnp.float32))))


@jax.custom_vjp
def _after(weight_norm: Array, embeddings: Array) -> Array:
    """The embeddings, but not before the norm is known.

    Donated weights that are still to be read when they are updated would have to be copied first. XLA drops barriers too early
    for that, so there is a choice that always falls the same way, since no norm is below zero.
    """
    return jnp.where(weight_norm < 0, jnp.zeros_like(embeddings), embeddings)


_after.defvjp(lambda norm, embeddings: (_after(norm, embeddings), None), lambda _, gradient: (None, gradient))


def _scores(product: Array, delta_norm: Array, seen: Array) -> Array:
    """float32 [...]: the score of every sample, or the mark of why there is none.

    Args:
        product: of the sample's head gradient with the weight.
        delta_norm: of the logit gradient.
        seen: norm of the embedding times that of the weight.
    """
    marks = FINITE_MARKS if _is_debugging() else MARKS
    has_none, is_dead = delta_norm < SMALLEST, seen == 0
    scores = -product / jnp.where(has_none, 1, delta_norm) / jnp.where(is_dead, 1, seen)
    scores = jnp.where(is_dead, marks.dead, scores)
    scores = jnp.where(has_none, marks.no_gradient, scores)
    return jnp.where(jnp.isfinite(product + delta_norm + seen), scores, marks.not_finite)


@jax.custom_vjp
def _opened(embeddings: Array, weight_norm: Array, probe: Array) -> tuple[Array, Array]:
    """Before a wide head. The norm of the logit gradient, which `_closed` hands back, comes as the cotangent of the probe."""
    return embeddings, probe


def _opened_forward(
    embeddings: Array, weight_norm: Array, probe: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return (embeddings, probe), (embeddings, weight_norm)


def _opened_backward(kept: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, None, Array]:
    embeddings, weight_norm = kept
    gradient, delta_norm = cotangents
    return gradient, None, _unseen(_scores_by_embeddings, gradient, embeddings, delta_norm, weight_norm)


_opened.defvjp(_opened_forward, _opened_backward)


@jax.custom_vjp
def _closed(logits: Array, opened: Array) -> Array:
    """After a wide head: hands the norm of the logit gradient back to `_opened`."""
    return logits


_closed.defvjp(lambda logits, _: (logits, None), lambda _, delta: (delta, _norm(delta)))


class Call(NamedTuple):
    """A linear layer that has run: where, the width of its input, and the abstract value of its output."""

    path: str
    features: int
    logits: Any
    has_bias: bool = True

    def __str__(self) -> str:
        return f"{self.path!r}: {self.features} -> {self.logits.shape[-1]}"

    def probe(self) -> Array:
        """float32 zeros, one for each row of the output, with the type that the scores will have.

        That is, sharded as the rows are where shardings are part of the type (a mesh with explicit axes), and varying over the
        axes that the rows vary over (inside of shard_map).
        """
        zeros = jnp.zeros(self.logits.shape[:-1], jnp.float32)
        sharding = self.logits.sharding
        if any(part is not None for part in sharding.spec[:-1]):
            zeros = reshard(zeros, PartitionSpec(*sharding.spec[:-1]))  # type: ignore[no-untyped-call]
        manual = getattr(self.logits, "manual_axis_type", None)  # JAX 0.10; before, the axes themselves
        varying = tuple(manual.varying if manual is not None else getattr(self.logits, "vma", ()))
        return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


class Discovery:
    """A session that notes every linear layer in the jaxpr, so that `dataflow` can follow it.

    Attributes:
        calls: of the layers, in the order in which they run; a note's number is the index in here.
        refused: path and reason of the layers that cannot be watched.
        names: what to call the parameters.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.refused: list[tuple[str, str]] = []
        self.names: list[str] = []

    def linear(
        self, path: str, layer: Callable[[Array], Array], embeddings: Array, weight: Array, bias: Array | None
    ) -> Array:
        embeddings = jnp.asarray(embeddings)  # of NumPy, the layer and the note would make two constants
        number = self._call(path, embeddings, weight, bias)
        return self._output(number, layer(embeddings), weight)

    def marked(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        return self._output(self._call(HAND_WRITTEN, embeddings, weight, bias), logits, weight)

    def unfit(self, path: str, output: Array, reason: str) -> Array:
        self.refused.append((path, reason))
        return _note("unfit", len(self.refused) - 1, output)

    def parameters(self, named: Mapping[str, Array]) -> None:
        for name, value in named.items():
            shape = " x ".join(map(str, value.shape))
            self.names.append(f"the parameter {name!r}{f' ({shape})' if shape else ''}")
            _note("parameter", len(self.names) - 1, value)

    def _call(self, path: str, embeddings: Array, weight: Array, bias: Array | None) -> int:
        number = len(self.calls)
        self.calls.append(Call(path, embeddings.shape[-1], None, bias is not None))
        for kind, value in (("input", embeddings), ("weight", weight), ("bias", bias)):
            if value is not None:
                _note(kind, number, value)
        return number

    def _output(self, number: int, logits: Array, weight: Array) -> Array:
        call = self.calls[number] = self.calls[number]._replace(logits=jax.typeof(logits))
        if weight.size != call.features * logits.shape[-1]:
            shape = " x ".join(map(str, weight.shape))
            return self.unfit(
                call.path, logits, f"its weight ({shape}) does not map {call.features} to {logits.shape[-1]}"
            )

        @jax.custom_batching.custom_vmap
        def mark(z: Array) -> Array:
            return _note("layer", number, z)

        @mark.def_vmap
        def batched(size: int, in_batched: list[bool], z: Array) -> tuple[Array, bool]:
            self.calls[number] = self.calls[number]._replace(logits=jax.typeof(z))  # under vmap it was one row
            return mark(z), True

        return mark(logits)  # type: ignore[no-any-return]


def _note(kind: str, number: int, value: Array) -> Array:
    """An identity by which `dataflow` knows the value."""
    return checkpoint_name(value, f"{PREFIX}{kind}:{number}")  # type: ignore[no-any-return,no-untyped-call]


class Tapping:
    """A session that puts the probe at one layer."""

    def __init__(self, head: Call, probe: Array) -> None:
        self._path = head.path
        self._is_wide = head.logits.shape[-1] > head.features
        self._probe = probe

    def linear(
        self, path: str, layer: Callable[[Array], Array], embeddings: Array, weight: Array, bias: Array | None
    ) -> Array:
        if path != self._path:
            return layer(embeddings)
        weight_norm = _size(weight)
        embeddings = _after(weight_norm, embeddings)
        if not self._is_wide:
            return self._at(layer(embeddings), embeddings, bias, weight_norm)
        embeddings, opened = _whole_batch(_opened, _unopened, self._probe, (embeddings,), (weight_norm,))
        return _closed(layer(embeddings), opened)

    def marked(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        return self._at(logits, embeddings, bias, _size(weight)) if self._path == HAND_WRITTEN else logits

    def unfit(self, path: str, output: Array, reason: str) -> Array:
        return output

    def parameters(self, named: Mapping[str, Array]) -> None:
        pass

    def _at(self, logits: Array, embeddings: Array, bias: Array | None, weight_norm: Array) -> Array:
        rows, shared = (logits, embeddings), (bias, weight_norm)
        return _whole_batch(_probed, lambda logits, *_: logits, self._probe, rows, shared)  # type: ignore[no-any-return]


def _unopened(embeddings: Array, weight_norm: Array) -> tuple[Array, Array]:
    return embeddings, jnp.zeros(embeddings.shape[:-1], jnp.float32)


def _whole_batch(
    probed: Callable[..., Any],
    unprobed: Callable[..., Any],
    probe: Array,
    arrays: tuple[Array | None, ...],
    shared: tuple[Array | None, ...] = (),
) -> Any:
    """An identity with the probe, also inside of a vmap that the probe itself is not mapped by: there it waits for the batch.

    A vmap would give each row the whole probe, and add up their cotangents. Its rule gives the whole batch the probe. What is
    shared by all rows may be mapped by it too, as in an ensemble: then every row has its own.
    """
    rows_here = arrays[0].shape[:-1]  # type: ignore[union-attr]  # only a bias may be missing
    if rows_here == probe.shape:
        return probed(*arrays, *shared, probe)
    arrays += jax.tree.map(lambda one: jnp.broadcast_to(one, (*rows_here, *one.shape)), shared)

    @jax.custom_batching.custom_vmap
    def row(probe: Array, arrays: tuple[Array | None, ...]) -> Any:
        return unprobed(*arrays)

    @row.def_vmap
    def rows(size: int, in_batched: list[Any], probe: Array, arrays: tuple[Array | None, ...]) -> tuple[Any, Any]:
        def whole(array: Array, is_batched: bool) -> Array:
            return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

        out = _whole_batch(probed, unprobed, probe, jax.tree.map(whole, arrays, in_batched[1]))
        return out, jax.tree.map(lambda _: True, out)

    return row(probe, arrays)


def places(jaxpr: Any, numbers: Collection[int]) -> list[frozenset[str]]:
    """Where marked layers run: of every time, the primitives, such as jit or scan, that it is inside of."""
    found = []
    tags = {f"{PREFIX}layer:{number}" for number in numbers}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] in tags:
            found.append(frozenset[str]())
        around = {eqn.primitive.name} - {"custom_vmap_call"}  # the mark's own
        for sub in jaxprs_in(eqn.params):
            found.extend(inner | around for inner in places(getattr(sub, "jaxpr", sub), numbers))
    return found
