"""The probe: an identity on the logits with one more input, whose cotangent is defined as the scores.

    value, (scores, grads) = jax.value_and_grad(loss, argnums=(probe, params))

One backward pass, no labels, no callback; the user's gradients are bit-identical, since the identity hands them on and
adds nothing. What runs the head is told by a `Session`: it is entered while the user's loss is traced.
"""

from collections.abc import Iterator
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

HAND_WRITTEN = "tap"
"""The path under which a call of `tap` is known."""


class Session(Protocol):
    """Who wants to know of the linear layers that run while a loss is traced."""

    def linear(self, path: str, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        """A linear layer has run; returns the logits, tapped or not."""
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
        bias: float [C], or None.
        probe: float32 [...], zeros, one for each sample; or None.

    Returns:
        The logits, unchanged. Does not wait for the device.

    Raises:
        InvalidInputError: the shapes do not belong together.
    """
    _check(logits, embeddings, weight, bias, probe)
    if probe is not None:
        return _probed(logits, embeddings, weight, bias, probe)
    session = current()
    return logits if session is None else session.linear(HAND_WRITTEN, logits, embeddings, weight, bias)


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
def _probed(logits: Array, embeddings: Array, weight: Array, bias: Array | None, probe: Array) -> Array:
    return logits


def _forward(
    logits: Array, embeddings: Array, weight: Array, bias: Array | None, probe: Array
) -> tuple[Array, tuple[Array, Array, Array, Array | None]]:
    return logits, (logits, embeddings, weight, bias)


def _backward(kept: tuple[Array, Array, Array, Array | None], delta: Array) -> tuple[Array, None, None, None, Array]:
    logits, embeddings, weight, bias = kept
    return delta, None, None, None, alignment_scores(delta, logits, embeddings, weight, bias)


_probed.defvjp(_forward, _backward)


def alignment_scores(delta: Array, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
    """float32 [...]: the score of every sample; not finite where there is none, see `gwa_logging.alignment`.

    Args:
        delta, logits: float [..., C].
        embeddings: float [..., D].
        weight: float, [D, C] or [C, D].
        bias: float [C], or None.
    """
    delta, logits, embeddings, weight = (x.astype(jnp.float32) for x in (delta, logits, embeddings, weight))
    product = jnp.sum(delta * (logits if bias is None else logits - bias), axis=-1)
    delta_norm = jnp.linalg.norm(delta, axis=-1)
    seen = jnp.linalg.norm(embeddings, axis=-1) * jnp.sqrt(jnp.sum(weight * weight))
    scores = -product / delta_norm / seen
    scores = jnp.where(seen == 0, DEAD, scores)
    scores = jnp.where(delta_norm < SMALLEST, NO_GRADIENT, scores)
    return jnp.where(jnp.isfinite(product + delta_norm + seen), scores, NOT_FINITE)


class Call(NamedTuple):
    """A linear layer that has run: where, the width of its input, and the abstract value of its output."""

    path: str
    features: int
    logits: Any

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


_NAME = "gwa_logging:"


class Discovery:
    """A session that notes every linear layer, and marks its output so that dataflow can be followed in the jaxpr."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def linear(self, path: str, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        number = len(self.calls)
        self.calls.append(Call(path, embeddings.shape[-1], jax.typeof(logits)))

        @jax.custom_batching.custom_vmap
        def mark(z: Array) -> Array:
            return checkpoint_name(z, _NAME + path)  # type: ignore[no-any-return,no-untyped-call]

        @mark.def_vmap
        def batched(size: int, in_batched: list[bool], z: Array) -> tuple[Array, bool]:
            self.calls[number] = self.calls[number]._replace(logits=jax.typeof(z))  # under vmap it was one row
            return mark(z), True

        return mark(logits)  # type: ignore[no-any-return]


class Tapping:
    """A session that puts the probe at one layer."""

    def __init__(self, path: str, probe: Array) -> None:
        self._path = path
        self._probe = probe

    def linear(self, path: str, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        return _anywhere(logits, embeddings, weight, bias, self._probe) if path == self._path else logits


def _anywhere(logits: Array, embeddings: Array, weight: Array, bias: Array | None, probe: Array) -> Array:
    """The probe, also inside of a vmap that the probe itself is not mapped by: there it waits for the whole batch.

    A vmap would give each row the whole probe, and add up their cotangents. Its rule gives the whole batch the probe.
    """
    if logits.shape[:-1] == probe.shape:
        return _probed(logits, embeddings, weight, bias, probe)

    @jax.custom_batching.custom_vmap
    def row(z: Array, h: Array, w: Array, b: Array | None, p: Array) -> Array:
        return z

    @row.def_vmap
    def rows(size: int, in_batched: list[Any], z: Array, h: Array, w: Array, b: Array | None, p: Array) -> Any:
        z, h = (
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip((z, h), in_batched, strict=False)
        )
        return _anywhere(z, h, w, b, p), True

    return row(logits, embeddings, weight, bias, probe)  # type: ignore[no-any-return]


def makers(jaxpr: Any) -> frozenset[str]:
    """The layers that the first output of a jaxpr comes from, without passing through another one of them."""
    sets = _follow(jaxpr.jaxpr, [frozenset()] * len(jaxpr.jaxpr.invars))
    return sets[0]


def places(jaxpr: Any, path: str) -> list[frozenset[str]]:
    """Where a marked layer runs: of every time, the primitives, such as jit or scan, that it is inside of."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] == _NAME + path:
            found.append(frozenset[str]())
        around = {eqn.primitive.name} - {"custom_vmap_call"}  # the mark's own
        found.extend(inner | around for sub in _jaxprs_in(eqn.params) for inner in places(sub, path))
    return found


def _follow(jaxpr: Any, inputs: list[frozenset[str]]) -> list[frozenset[str]]:
    """For every output of a jaxpr, the marked layers nearest to it, given those of its inputs."""
    known: dict[Any, frozenset[str]] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(variable: Any) -> frozenset[str]:
        return frozenset() if hasattr(variable, "val") else known.get(variable, frozenset())  # literals have a value

    for eqn in jaxpr.eqns:
        sources = [of(v) for v in eqn.invars]
        together = frozenset().union(*sources)
        outputs = [together] * len(eqn.outvars)
        name = eqn.params.get("name")
        if eqn.primitive.name == "name" and str(name).startswith(_NAME):
            outputs = [frozenset({str(name).removeprefix(_NAME)})]
        elif eqn.primitive.name == "stop_gradient":
            outputs = [frozenset()] * len(eqn.outvars)
        else:
            inner = [_follow_inner(sub, sources, together) for sub in _jaxprs_in(eqn.params)]
            if inner:
                fits = all(len(sets) == len(eqn.outvars) for sets in inner)
                columns = zip(*inner, strict=True) if fits else [[s for sets in inner for s in sets]] * len(eqn.outvars)
                outputs = [frozenset().union(*column) for column in columns]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _follow_inner(jaxpr: Any, sources: list[frozenset[str]], together: frozenset[str]) -> list[frozenset[str]]:
    """An inner jaxpr whose inputs are not the equation's own one by one (a loop, a branch) is given them all."""
    fits = len(jaxpr.invars) == len(sources)
    return _follow(jaxpr, sources if fits else [together] * len(jaxpr.invars))


def _jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item
