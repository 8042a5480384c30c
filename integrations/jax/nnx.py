"""Flax NNX: hears of the Linear layers of a model that is an argument of the loss.

For the time of a trace each of them is of a subclass that tells the session; then it is what it was. So the paths of the
parameters, the graph and the gradients are the user's.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx
from jax import Array

from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, current, entered


class _Heard(nnx.Linear):  # type: ignore[misc]  # flax comes without types
    """A Linear layer that tells of its calls."""

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        session = current()

        def layer(inputs: Array) -> Array:
            return super(_Heard, self).__call__(inputs, *args, **kwargs)  # type: ignore[no-any-return]

        bias = None if self.bias is None else self.bias[...]
        if session is None:
            return layer(inputs)
        return session.linear(self.path_heard, layer, inputs, self.kernel[...], bias)


class NNX(Library):
    """A `flax.nnx.Module`."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        models = [value for value in (*args, *kwargs.values()) if self.is_model(value)]
        with entered(session), _heard(models):
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
    layers = {
        id(node): (node, ".".join(map(str, path)))
        for model in models
        for path, node in nnx.iter_graph(model)
        if type(node) is nnx.Linear
    }
    for layer, path in layers.values():
        object.__setattr__(layer, "path_heard", path)  # goes along where a transformation of NNX makes a copy
        object.__setattr__(layer, "__class__", _Heard)
    try:
        yield
    finally:
        for layer, _ in layers.values():
            object.__setattr__(layer, "__class__", nnx.Linear)
            object.__delattr__(layer, "path_heard")
