"""Equinox: hears of the Linear layers of a model that is an argument of the loss, also under `jax.vmap`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Session, entered


class _Heard(eqx.Module):
    """Stands in for a Linear layer for the time of a trace, and tells of its calls."""

    inner: eqx.nn.Linear
    path: str = eqx.field(static=True)
    session: Session = eqx.field(static=True)

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        inner = self.inner
        return self.session.linear(self.path, lambda h: inner(h, key=key), x, inner.weight, inner.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Equinox(Library):
    """An `equinox.Module`, differentiated as by `eqx.filter_value_and_grad`: by the loss's first argument."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def heard(value: Any) -> Any:
            return _with_heard_layers(value, session) if self.is_model(value) else value

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
    return type(value) is eqx.nn.Linear


def _with_heard_layers(model: Any, session: Session) -> Any:
    """The model with a stand-in for each Linear layer; the parameters are the same, so the gradients are the model's."""

    def stand_in(path: Any, value: Any) -> Any:
        name = ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)
        return _Heard(value, name, session) if _is_linear(value) else value

    return jax.tree_util.tree_map_with_path(stand_in, model, is_leaf=_is_linear)
