"""Flax NNX: intercepts the linear layers of a model that is an argument of the loss.

During a trace each of these layers has a subclass that calls the session. So the paths of the parameters, the graph and the
gradients stay the user's.
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

from gwa_logging.integrations.jax.contractions import run_contraction, run_einsum, run_pointwise_convolution
from gwa_logging.integrations.jax.model_library import ModelLibrary, substituted_classes
from gwa_logging.integrations.jax.sessions import Layer, Session, current_session, session_entered

_PATH = "_gwa_logging_path"
"""The attribute in which a layer has its path during a trace. NNX copies it when a transformation copies the layer."""


def _run_linear(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    return session.run_linear(_path(module), layer, inputs, module.kernel[...], _bias(module))


def _run_linear_general(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    if module.batch_axis:
        return layer(inputs)
    return run_contraction(session, _path(module), layer, inputs, module.kernel[...], _bias(module), module.axis)


def _run_einsum(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    equation = module.einsum_str or ""
    return run_einsum(session, _path(module), layer, inputs, module.kernel[...], _bias(module), equation)


def _run_conv(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    weight = module.kernel[...]
    if weight.size != math.prod(weight.shape[-2:]):
        return layer(inputs)
    spatial = range(-weight.ndim + 1, -1)
    return run_pointwise_convolution(session, _path(module), layer, inputs, weight, _bias(module), spatial)


def _run_attend(session: Session, module: Any, layer: Layer, inputs: Array) -> Array:
    return session.run_linear(_path(module), layer, inputs, module.embedding[...], None)


def _path(module: Any) -> str:
    return getattr(module, _PATH)  # type: ignore[no-any-return]


def _bias(module: Any) -> Array | None:
    return None if module.bias is None else module.bias[...]


_METHODS: dict[type, tuple[str, Callable[[Session, Any, Layer, Array], Array]]] = {
    nnx.Linear: ("__call__", _run_linear),
    nnx.LinearGeneral: ("__call__", _run_linear_general),
    nnx.Einsum: ("__call__", _run_einsum),
    nnx.Conv: ("__call__", _run_conv),
    nnx.Embed: ("attend", _run_attend),
}
"""The linear layers: the method that computes the product, and how it runs through a session."""


@cache
def _intercepted(kind: Any) -> type:
    """A subclass of a linear layer that calls the session."""
    name, run = next(method for base, method in _METHODS.items() if issubclass(kind, base))
    original = getattr(kind, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = current_session()
        keyword = "query" if name == "attend" else "inputs"
        if session is None or not (args or keyword in kwargs):
            return original(self, *args, **kwargs)
        inputs, *rest = args or (kwargs.pop(keyword),)
        return run(session, self, lambda inputs: original(self, inputs, *rest, **kwargs), inputs)

    return type(kind.__name__, (kind,), {name: method})


class NNX(ModelLibrary):
    """A `flax.nnx.Module`."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        models = [value for value in (*args, *kwargs.values()) if self.is_model(value)]
        with session_entered(session), _layers_intercepted(models):
            for model in models:
                parameters = ((p, node) for p, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))
                session.parameters({".".join(map(str, path)): node[...] for path, node in parameters})
            return fun(*args, **kwargs)

    def run_without_effects(
        self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        def copy(value: Any) -> Any:
            if not isinstance(value, nnx.Module):
                return value
            graph, state = nnx.split(value)
            return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))  # variables of this trace, which may change

        return self.run(session, fun, [copy(v) for v in args], {k: copy(v) for k, v in kwargs.items()})

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        return nnx.jit(fun)  # type: ignore[no-any-return]

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return (lambda model, *inputs: model(*inputs)), (self.model, *inputs)

    def bind_arguments(
        self, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """NNX makes keywords positional by the loss's signature, which a function of (probe, *args) does not show."""
        if not kwargs:
            return args, kwargs
        bound = inspect.signature(fun).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any]
    ) -> Callable[..., tuple[Any, Array, Any]]:
        is_single = isinstance(argnums, int | nnx.DiffState)

        def shift(n: Any, count: int) -> Any:
            """The argument's number after the probe has been put first."""
            if isinstance(n, nnx.DiffState):
                return nnx.DiffState(shift(n.argnum, count), n.filter)
            return 1 + n if n >= 0 else 1 + n + count

        def differentiated(probe: Array, *args: Any, **kwargs: Any) -> tuple[Any, Array, Any]:
            shifted = (0, *(shift(n, len(args)) for n in ((argnums,) if is_single else argnums)))
            gradient = nnx.value_and_grad(fun, argnums=shifted, has_aux=has_aux, **options)
            value, (scores, *grads) = gradient(probe, *args, **kwargs)
            return value, scores, grads[0] if is_single else tuple(grads)

        return differentiated


@contextmanager
def _layers_intercepted(models: Sequence[nnx.Module]) -> Iterator[None]:
    layers: dict[int, tuple[Any, str]] = {
        id(node): (node, ".".join(map(str, path)))
        for model in models
        for path, node in nnx.iter_graph(model)
        if isinstance(node, tuple(_METHODS))
    }
    for layer, path in layers.values():
        object.__setattr__(layer, _PATH, path)
    try:
        with substituted_classes((layer for layer, _ in layers.values()), _intercepted):
            yield
    finally:
        for layer, _ in layers.values():
            object.__delattr__(layer, _PATH)
