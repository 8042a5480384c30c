"""Equinox: intercepts the linear layers of a model that is an argument of the loss, also under `jax.vmap`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.contractions import run_pointwise_convolution
from gwa_logging.integrations.jax.model_library import ModelLibrary, dotted_path, named_arrays
from gwa_logging.integrations.jax.sessions import Session, session_entered


class _InterceptedLayer(eqx.Module):
    """Replaces a linear layer during a trace; its calls go through the session."""

    inner: eqx.nn.Linear | eqx.nn.Conv
    path: str = eqx.field(static=True)
    session: Session = eqx.field(static=True)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        inner = self.inner

        def layer(x: Array) -> Array:
            return inner(x, *args, **kwargs)

        if isinstance(inner, eqx.nn.Linear):
            return self.session.run_linear(self.path, layer, x, inner.weight, inner.bias)
        spatial = range(1, x.ndim)
        return run_pointwise_convolution(self.session, self.path, layer, x, inner.weight, inner.bias, spatial)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Equinox(ModelLibrary):
    """An `equinox.Module`, differentiated as by `eqx.filter_value_and_grad`: by the loss's first argument."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def intercepted(value: Any) -> Any:
            if not self.is_model(value):
                return value
            session.parameters(named_arrays(value))
            return _with_intercepted_layers(value, session)

        with session_entered(session):
            return fun(*map(intercepted, args), **{key: intercepted(value) for key, value in kwargs.items()})

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        return eqx.filter_jit(fun)

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        return (lambda model, *inputs: model(*inputs)), (self.model, *inputs)

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any]
    ) -> Callable[..., tuple[Any, Array, Any]]:
        if argnums != 0:
            raise InvalidInputError(
                f"argnums={argnums!r}: Equinox differentiates by the first argument only; put it first"
            )

        def of_pair(probe_and_model: tuple[Array, Any], *args: Any, **kwargs: Any) -> Any:
            return fun(*probe_and_model, *args, **kwargs)

        gradient = eqx.filter_value_and_grad(of_pair, has_aux=has_aux, **options)

        def differentiated(probe: Array, *args: Any, **kwargs: Any) -> tuple[Any, Array, Any]:
            value, (scores, grads) = gradient((probe, args[0]), *args[1:], **kwargs)
            return value, scores, grads

        return differentiated


def _is_linear(value: Any) -> bool:
    if isinstance(value, eqx.nn.Conv):
        return set(value.kernel_size) == {1}
    return isinstance(value, eqx.nn.Linear)


def _with_intercepted_layers(model: Any, session: Session) -> Any:
    """The model with its linear layers replaced. The parameters are the same, so the gradients are the model's."""

    def replacement(path: Any, value: Any) -> Any:
        return _InterceptedLayer(value, dotted_path(path), session) if _is_linear(value) else value

    return jax.tree_util.tree_map_with_path(replacement, model, is_leaf=_is_linear)
