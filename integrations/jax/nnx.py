"""Flax NNX: intercepts the linear layers of a model that is an argument of the loss.

For the time of a trace each of them is of a subclass that tells the session; then it is what it was. So the paths of the
parameters, the graph and the gradients are the user's.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
from flax import nnx
from jax import Array

from gwa_logging.integrations.jax.contractions import Layer, einsum, general, pointwise
from gwa_logging.integrations.jax.model_library import Library
from gwa_logging.integrations.jax.probe import Session, current, entered


def _linear(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    return session.linear(module.path_heard, layer, inputs, module.kernel[...], _bias(module))


def _linear_general(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    if module.batch_axis:
        return layer(inputs)
    return general(session, module.path_heard, layer, inputs, module.kernel[...], _bias(module), module.axis)


def _einsum(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    equation = module.einsum_str or ""
    return einsum(session, module.path_heard, layer, inputs, module.kernel[...], _bias(module), equation)


def _conv(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    weight = module.kernel[...]
    if weight.size != math.prod(weight.shape[-2:]):
        return layer(inputs)
    return pointwise(session, module.path_heard, layer, inputs, weight, _bias(module), range(-weight.ndim + 1, -1))


def _attend(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    return session.linear(module.path_heard, layer, inputs, module.embedding[...], None)


def _bias(module: Any) -> Array | None:
    return None if module.bias is None else module.bias[...]


_METHODS: dict[type, tuple[str, Callable[[Session, Any, Layer, Array], Array]]] = {
    nnx.Linear: ("__call__", _linear),
    nnx.LinearGeneral: ("__call__", _linear_general),
    nnx.Einsum: ("__call__", _einsum),
    nnx.Conv: ("__call__", _conv),
    nnx.Embed: ("attend", _attend),
}
"""The linear layers, with the method that is their product, and how it runs by way of a session."""


@cache
def _heard_kind(kind: Any) -> type:
    """A subclass of a linear layer that tells of its calls."""
    name, by_way_of = next(method for base, method in _METHODS.items() if issubclass(kind, base))
    original = getattr(kind, name)

    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = current()
        keyword = "query" if name == "attend" else "inputs"
        if session is None or not (args or keyword in kwargs):
            return original(self, *args, **kwargs)
        inputs, *rest = args or (kwargs.pop(keyword),)
        return by_way_of(session, self, lambda inputs: original(self, inputs, *rest, **kwargs), inputs)

    return type(kind.__name__, (kind,), {name: heard})


class NNX(Library):
    """A `flax.nnx.Module`."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        models = [value for value in (*args, *kwargs.values()) if self.is_model(value)]
        with entered(session), _heard(models):
            for model in models:
                parameters = ((p, node) for p, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))
                session.parameters({".".join(map(str, path)): node[...] for path, node in parameters})
            return fun(*args, **kwargs)

    def run_apart(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def copied(value: Any) -> Any:
            if not isinstance(value, nnx.Module):
                return value
            graph, state = nnx.split(value)
            return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))  # variables of this trace, which may change

        return self.run(session, fun, [copied(v) for v in args], {k: copied(v) for k, v in kwargs.items()})

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        return nnx.jit(fun)  # type: ignore[no-any-return]

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return (lambda model, *inputs: model(*inputs)), (self.model, *inputs)

    def positional(
        self, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """NNX puts keywords in their places by the signature, which a function of (probe, *args) no longer tells."""
        if not kwargs:
            return args, kwargs
        bound = inspect.signature(fun).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any]
    ) -> Callable[..., tuple[Any, Array, Any]]:
        one = isinstance(argnums, int | nnx.DiffState)

        def later(n: Any, count: int) -> Any:
            if isinstance(n, nnx.DiffState):
                return nnx.DiffState(later(n.argnum, count), n.filter)
            return 1 + n if n >= 0 else 1 + n + count

        def differentiated(probe: Array, *args: Any, **kwargs: Any) -> tuple[Any, Array, Any]:
            shifted = (0, *(later(n, len(args)) for n in ((argnums,) if one else argnums)))
            gradient = nnx.value_and_grad(fun, argnums=shifted, has_aux=has_aux, **options)
            value, (scores, *grads) = gradient(probe, *args, **kwargs)
            return value, scores, grads[0] if one else tuple(grads)

        return differentiated


@contextmanager
def _heard(models: Sequence[nnx.Module]) -> Iterator[None]:
    layers: dict[int, tuple[Any, Any, str]] = {
        id(node): (node, type(node), ".".join(map(str, path)))
        for model in models
        for path, node in nnx.iter_graph(model)
        if isinstance(node, tuple(_METHODS))
    }
    for layer, kind, path in layers.values():
        object.__setattr__(layer, "path_heard", path)  # goes along where a transformation of NNX makes a copy
        object.__setattr__(layer, "__class__", _heard_kind(kind))
    try:
        yield
    finally:
        for layer, kind, _ in layers.values():
            object.__setattr__(layer, "__class__", kind)
            object.__delattr__(layer, "path_heard")
