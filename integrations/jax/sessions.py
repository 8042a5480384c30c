"""Sessions: what happens to the linear layers of a model while a loss is traced.

A model library (see `model_library`) calls the session for every linear layer that the loss runs. `Discovery` marks the layers
in the jaxpr, so that `find_head` can follow it; `probe.ProbeSession` puts the probe at the head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

from gwa_logging.integrations.jax.jaxpr_graph import mark

TAP_PATH = "tap"
"""The path of a head that is marked by `tap`."""

FUSED_PATH = "linear_cross_entropy"
"""The path of a head inside `linear_cross_entropy`."""

Layer = Callable[[Array], Array]
"""A layer with everything bound except its input."""


class FusedLoss(NamedTuple):
    """A call of `linear_cross_entropy`, which is a head and its loss at once.

    Attributes:
        hidden: the head's input, [..., D].
        weight: [D, V].
        bias: [V], or None.
        target: int [...].
        run: computes the loss, given the probe or None.
        reduce: computes the loss from the losses of all rows [...].
    """

    hidden: Array
    weight: Array
    bias: Array | None
    target: Array
    run: Callable[[Array | None], Array]
    reduce: Callable[[Array], Array]


class Session(Protocol):
    """Receives the linear layers that run while a loss is traced."""

    def run_linear(self, path: str, layer: Layer, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        """Runs a linear layer on its input and returns its output."""
        ...

    def tap(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        """Called when the user calls `tap`; returns the logits."""
        ...

    def fused_loss(self, fused: FusedLoss) -> Array:
        """Called when the user calls `linear_cross_entropy`; returns the loss."""
        ...

    def unsupported(self, path: str, output: Array, reason: str) -> Array:
        """Called after a layer that is linear in its weight but cannot be watched; returns its output."""
        ...

    def parameters(self, named: Mapping[str, Array]) -> None:
        """Receives parameters of the model by name, whichever layer uses them."""
        ...


_session: ContextVar[Session | None] = ContextVar("gwa_logging_session", default=None)


def current_session() -> Session | None:
    """The session of the loss that is being traced, if any."""
    return _session.get()


@contextmanager
def session_entered(session: Session) -> Iterator[None]:
    """Makes a session the current one."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


_make_context: Any = getattr(jax, "make_user_context", lambda: lambda _: nullcontext())  # not in old versions of JAX
_trace_context = _make_context()


def fresh_trace() -> AbstractContextManager[None]:
    """Makes JAX trace inner functions again instead of using cached traces.

    JAX caches the traces of inner functions that are jitted or checkpointed. A trace without a session has none of its layers,
    and a trace with a session must not be used by anything else, such as the user's evaluation.
    """
    return _trace_context(object())  # type: ignore[no-any-return]


def varying_axes(value: Any) -> frozenset[str]:
    """The mesh axes that an array, or an abstract value, varies over inside shard_map."""
    value = jax.typeof(value) if isinstance(value, jax.Array) else value
    manual = getattr(value, "manual_axis_type", None)  # JAX 0.10; before, the axes themselves
    return frozenset(manual.varying if manual is not None else getattr(value, "vma", ()))


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """A pytree of arrays that vary over these mesh axes. In the backward pass, gradients are summed over the added ones."""

    def vary(array: Array) -> Array:
        added = tuple(sorted(axes - varying_axes(array)))
        return jax.lax.pcast(array, added, to="varying") if added else array

    return jax.tree.map(vary, tree)


class LayerCall(NamedTuple):
    """One call of a linear layer.

    Attributes:
        path: of the layer.
        features: width of its input.
        logits: abstract value of its output.
        has_bias: True if the layer has a bias.
    """

    path: str
    features: int
    logits: Any
    has_bias: bool = True

    def __str__(self) -> str:
        return f"{self.path!r}: {self.features} -> {self.logits.shape[-1]}"

    def empty_probe(self, *, pools_rows: bool = False) -> Array:
        """float32 zeros, one for each row of the output, or for each input if its rows are pooled, with the scores' type.

        It is sharded as the rows are where shardings are part of the type (a mesh with explicit axes), and varies over the axes
        that the rows vary over (inside shard_map).
        """
        axes = min(1, self.logits.ndim - 1) if pools_rows else self.logits.ndim - 1
        zeros = jnp.zeros(self.logits.shape[:axes], jnp.float32)
        sharding = self.logits.sharding
        if any(part is not None for part in sharding.spec[:axes]):
            zeros = reshard(zeros, PartitionSpec(*sharding.spec[:axes]))  # type: ignore[no-untyped-call]
        varied: Array = vary_over(varying_axes(self.logits), zeros)
        return varied


class Discovery:
    """A session that marks every linear layer in the jaxpr.

    Attributes:
        calls: of the layers, in the order in which they run; the number of a marker is the index in here.
        refused: path and reason of the layers that cannot be watched.
        names: descriptions of the parameters.
    """

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self.refused: list[tuple[str, str]] = []
        self.names: list[str] = []

    def run_linear(self, path: str, layer: Layer, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        embeddings = jnp.asarray(
            embeddings
        )  # a NumPy array would become one constant for the layer and one for the marker
        number = self._mark_inputs(path, embeddings, weight, bias)
        return self._mark_output(number, layer(embeddings), weight)

    def tap(self, logits: Array, embeddings: Array, weight: Array, bias: Array | None) -> Array:
        return self._mark_output(self._mark_inputs(TAP_PATH, embeddings, weight, bias), logits, weight)

    def fused_loss(self, fused: FusedLoss) -> Array:
        """Marks an array with the shape of the logits, which exists only in this abstract trace.

        Like the logits and the loss it comes from all arguments, so that a vmap that maps any of them maps it too.
        """
        hidden, weight, bias, target = fused.hidden, fused.weight, fused.bias, fused.target
        number = self._mark_inputs(FUSED_PATH, hidden, weight, bias)
        mapped = (
            weight.sum() + target.sum().astype(weight.dtype) + (0 if bias is None else bias.sum().astype(weight.dtype))
        )
        logits = jnp.broadcast_to(hidden.sum(-1, keepdims=True) + mapped, (*hidden.shape[:-1], weight.shape[-1]))
        return fused.reduce(self._mark_output(number, logits, weight)[..., 0])

    def unsupported(self, path: str, output: Array, reason: str) -> Array:
        self.refused.append((path, reason))
        return mark("unsupported", len(self.refused) - 1, output)

    def parameters(self, named: Mapping[str, Array]) -> None:
        for name, value in named.items():
            shape = " x ".join(map(str, value.shape))
            self.names.append(f"the parameter {name!r}{f' ({shape})' if shape else ''}")
            mark("parameter", len(self.names) - 1, value)

    def _mark_inputs(self, path: str, embeddings: Array, weight: Array, bias: Array | None) -> int:
        number = len(self.calls)
        self.calls.append(LayerCall(path, embeddings.shape[-1], None, bias is not None))
        for kind, value in (("input", embeddings), ("weight", weight), ("bias", bias)):
            if value is not None:
                mark(kind, number, value)
        return number

    def _mark_output(self, number: int, logits: Array, weight: Array) -> Array:
        call = self.calls[number] = self.calls[number]._replace(logits=jax.typeof(logits))
        if weight.size != call.features * logits.shape[-1]:
            shape = " x ".join(map(str, weight.shape))
            reason = f"its weight ({shape}) does not map {call.features} to {logits.shape[-1]}"
            return self.unsupported(call.path, logits, reason)

        @jax.custom_batching.custom_vmap
        def marked(z: Array) -> Array:
            return mark("layer", number, z)

        @marked.def_vmap
        def marked_batch(size: int, in_batched: list[bool], z: Array) -> tuple[Array, bool]:
            self.calls[number] = self.calls[number]._replace(logits=jax.typeof(z))  # before, it was that of one row
            return marked(z), True

        return marked(logits)  # type: ignore[no-any-return]
