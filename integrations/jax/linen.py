"""Flax Linen: intercepts the linear layers that run, without touching the model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen
from jax import Array

from gwa_logging.integrations.jax.contractions import einsum, general, pointwise
from gwa_logging.integrations.jax.model_library import Library, named, zeros
from gwa_logging.integrations.jax.probe import Session, entered


class Linen(Library):
    """A `flax.linen.Module`; parameters are arguments of the loss."""

    def __init__(self, model: linen.Module) -> None:
        super().__init__(model)
        self._classes = {type(model), _untransformed(type(model))}

    def is_model(self, value: Any) -> bool:
        """Whether a module is the watched model; inside `nn.remat(Net)` and `nn.jit(Net)` it is a plain `Net`."""
        return type(value) in self._classes

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inside: list[bool] = []
        running: list[linen.Module] = []  # the linear layers that are being called, the innermost last

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            root = not context.module.path  # the watched model, or another one, such as a teacher
            if root:
                inside.append(self._enter(context.module, session, is_outermost=not inside))
            elif not inside:  # a part of a bound model: model.bind(variables).head(h)
                inside.append(self._enter(_top(context.module), session))
                root = True
            try:
                return heard(next_fun, args, kwargs, context.module, context.method_name)
            finally:
                if root:
                    inside.pop()

        def heard(next_fun: Callable[..., Any], args: Any, kwargs: Any, module: linen.Module, method: str) -> Any:
            in_super = bool(running) and running[-1] is module  # a subclass has called `super().__call__`
            if in_super or not (inside and inside[-1]):
                return next_fun(*args, **kwargs)
            return _heard(session, next_fun, args, kwargs, module, method, running)

        with entered(session), linen.intercept_methods(intercept):
            return fun(*args, **kwargs)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        keys = {name: jax.random.key(0) for name in ("params", "dropout")}
        shapes = jax.eval_shape(partial(self.model.init, keys), *inputs)

        def run(*inputs: Any) -> Any:
            return self.model.apply(zeros(shapes), *inputs, rngs=keys, mutable=True)[0]

        return run, inputs

    def _enter(self, bound: linen.Module, session: Session, is_outermost: bool = True) -> bool:
        """Whether a bound root is the watched model; if so, the session is given its parameters."""
        is_watched = self._is_watched(bound)
        if is_watched and is_outermost:
            session.parameters(named(linen.meta.unbox(bound.variables.get("params", {}))))
        return is_watched

    def _is_watched(self, bound: linen.Module) -> bool:
        """Whether a bound module is the watched one: of the same class, and with the same plain settings."""
        if not self.is_model(bound):
            return False
        names = [f.name for f in dataclasses.fields(self.model) if f.name not in ("parent", "name")]
        pairs = [(getattr(bound, name, None), getattr(self.model, name, None)) for name in names]
        return all(a == b for a, b in pairs if isinstance(a, bool | int | float | str) and isinstance(b, type(a)))


def _untransformed(kind: type) -> type:
    """The class that `nn.remat` or `nn.jit` was applied to; the class itself if neither was."""
    names = ("Checkpoint", "Jit")
    base = kind.__bases__[0]
    return base if kind.__name__ in [name + base.__name__ for name in names] else kind


def _top(module: linen.Module) -> linen.Module:
    """The model that a bound module is a part of."""
    while isinstance(module.parent, linen.Module):
        module = module.parent
    return module


def _heard(
    session: Session,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    module: linen.Module,
    method: str,
    running: list[linen.Module],
) -> Any:
    """Runs a method of a module, by way of the session if the module is a linear layer and the method its product.

    While the layer runs, it is the last one in `running`.
    """
    kinds = linen.Dense | linen.DenseGeneral | linen.Einsum | linen.Conv
    is_tied = isinstance(module, linen.Embed) and method == "attend"
    parameters = linen.meta.unbox(module.variables.get("params", {}))
    weight = parameters.get("embedding" if is_tied else "kernel")
    name = "query" if is_tied else "inputs"
    is_given = bool(args) or name in kwargs
    if weight is None or not is_given or not (is_tied or (isinstance(module, kinds) and method == "__call__")):
        return next_fun(*args, **kwargs)
    kwargs = dict(kwargs)
    inputs, *rest = args or (kwargs.pop(name),)

    def layer(inputs: Array) -> Array:
        running.append(module)
        try:
            return next_fun(inputs, *rest, **kwargs)  # type: ignore[no-any-return]
        finally:
            running.pop()

    given = (session, ".".join(module.path), layer, inputs, weight, parameters.get("bias"))
    if isinstance(module, linen.DenseGeneral) and module.batch_dims == ():
        return general(*given, [module.axis] if isinstance(module.axis, int) else module.axis)
    if isinstance(module, linen.Einsum):
        return einsum(*given, kwargs.get("einsum_str", rest[0] if rest else None) or module.einsum_str or "")
    if isinstance(module, linen.Conv) and weight.size == math.prod(weight.shape[-2:]):
        return pointwise(*given, range(-weight.ndim + 1, -1))
    if is_tied or isinstance(module, linen.Dense):
        return session.linear(*given[1:])
    return layer(inputs)
