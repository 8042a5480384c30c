"""Equinox: intercepts the linear layers of a model that is an argument of the loss, also under `jax.vmap`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.contractions import pointwise
from gwa_logging.integrations.jax.model_library import Library, named, path_of
from gwa_logging.integrations.jax.probe import Session, entered


class _Heard(eqx.Module):
    """Stands in for a linear layer for the time of a trace, and tells of its calls."""

    inner: eqx.nn.Linear | eqx.nn.Conv
    path: str = eqx.field(static=True)
    session: Session = eqx.field(static=True)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        inner = self.inner

        def layer(x: Array) -> Array:
            return inner(x, *args, **kwargs)

        if isinstance(inner, eqx.nn.Linear):
            return self.session.linear(self.path, layer, x, inner.weight, inner.bias)
        return pointwise(self.session, self.path, layer, x, inner.weight, inner.bias, range(1, x.ndim))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Equinox(Library):
    """An `equinox.Module`, differentiated as by `eqx.filter_value_and_grad`: by the loss's first argument."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def heard(value: Any) -> Any:
            if not self.is_model(value):
                return value
            session.parameters(named(value))
            return _with_heard_layers(value, session)

        with entered(session):
            return fun(*map(heard, args), **{key: heard(value) for key, value in kwargs.items()})

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        return eqx.filter_jit(fun)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return (lambda model, *inputs: model(*inputs)), (self.model, *inputs)

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any]
    ) -> Callable[..., tuple[Any, Array, Any]]:
        if argnums != 0:
            raise InvalidInputError(
                f"argnums={argnums!r}: Equinox differentiates by the first argument only; put it first"
            )

        def first_two(both: tuple[Array, Any], *args: Any, **kwargs: Any) -> Any:
            return fun(*both, *args, **kwargs)

        gradient = eqx.filter_value_and_grad(first_two, has_aux=has_aux, **options)

        def differentiated(probe: Array, *args: Any, **kwargs: Any) -> tuple[Any, Array, Any]:
            value, (scores, grads) = gradient((probe, args[0]), *args[1:], **kwargs)
            return value, scores, grads

        return differentiated


def _is_linear(value: Any) -> bool:
    if isinstance(value, eqx.nn.Conv):
        return set(value.kernel_size) == {1}
    return isinstance(value, eqx.nn.Linear)


def _with_heard_layers(model: Any, session: Session) -> Any:
    """The model with a stand-in for each linear layer; the parameters are the same, so the gradients are the model's."""

    def stand_in(path: Any, value: Any) -> Any:
        return _Heard(value, path_of(path), session) if _is_linear(value) else value

    return jax.tree_util.tree_map_with_path(stand_in, model, is_leaf=_is_linear)
