"""Flax Linen: intercepts the linear layers that run, without changing the model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen
from jax import Array

from gwa_logging.integrations.jax.contractions import run_contraction, run_einsum, run_pointwise_convolution
from gwa_logging.integrations.jax.model_library import ModelLibrary, named_arrays, zeros_of
from gwa_logging.integrations.jax.sessions import Session, session_entered

_LINEAR = linen.Dense | linen.DenseGeneral | linen.Einsum | linen.Conv


class Linen(ModelLibrary):
    """A `flax.linen.Module`; parameters are arguments of the loss."""

    def __init__(self, model: linen.Module) -> None:
        super().__init__(model)
        self._classes = {type(model), _untransformed(type(model))}

    def is_model(self, value: Any) -> bool:
        """Returns True for the watched model; inside `nn.remat(Net)` and `nn.jit(Net)` it is a plain `Net`."""
        return type(value) in self._classes

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        models: list[bool] = []  # the models that are being called, the innermost last: True for the watched one
        layers: list[linen.Module] = []  # the linear layers that are being called, the innermost last

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            is_root = not module.path  # the watched model, or another one, such as a teacher
            is_bound_part = not is_root and not models  # model.bind(variables).head(h)
            if is_root or is_bound_part:
                model = module if is_root else _root(module)
                models.append(self._report_parameters(model, session, is_outermost=not models))
            try:
                in_super = bool(layers) and layers[-1] is module  # a subclass has called `super().__call__`
                if in_super or not (models and models[-1]):
                    return next_fun(*args, **kwargs)
                return _run_method(session, next_fun, args, kwargs, module, context.method_name, layers)
            finally:
                if is_root or is_bound_part:
                    models.pop()

        with session_entered(session), linen.intercept_methods(intercept):
            return fun(*args, **kwargs)

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        keys = {name: jax.random.key(0) for name in ("params", "dropout")}
        shapes = jax.eval_shape(partial(self.model.init, keys), *inputs)

        def run(*inputs: Any) -> Any:
            return self.model.apply(zeros_of(shapes), *inputs, rngs=keys, mutable=True)[0]

        return run, inputs

    def _report_parameters(self, root: linen.Module, session: Session, is_outermost: bool) -> bool:
        """Returns True if a bound model is the watched one; then the session receives its parameters."""
        is_watched = self._is_watched(root)
        if is_watched and is_outermost:
            session.parameters(named_arrays(linen.meta.unbox(root.variables.get("params", {}))))
        return is_watched

    def _is_watched(self, root: linen.Module) -> bool:
        """Returns True if a bound model has the class and the plain settings of the watched one."""
        if not self.is_model(root):
            return False
        names = [f.name for f in dataclasses.fields(self.model) if f.name not in ("parent", "name")]
        pairs = [(getattr(root, name, None), getattr(self.model, name, None)) for name in names]
        return all(a == b for a, b in pairs if isinstance(a, bool | int | float | str) and isinstance(b, type(a)))


def _untransformed(kind: type) -> type:
    """The class that `nn.remat` or `nn.jit` was applied to; the class itself if neither was."""
    names = ("Checkpoint", "Jit")
    base = kind.__bases__[0]
    return base if kind.__name__ in [name + base.__name__ for name in names] else kind


def _root(module: linen.Module) -> linen.Module:
    """The model that a bound module is a part of."""
    while isinstance(module.parent, linen.Module):
        module = module.parent
    return module


def _run_method(
    session: Session,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    module: linen.Module,
    method: str,
    layers: list[linen.Module],
) -> Any:
    """Runs a method of a module; through the session if the module is a linear layer and the method computes its product.

    While the layer runs, it is the last one in `layers`.
    """
    is_tied = isinstance(module, linen.Embed) and method == "attend"
    parameters = linen.meta.unbox(module.variables.get("params", {}))
    weight = parameters.get("embedding" if is_tied else "kernel")
    keyword = "query" if is_tied else "inputs"
    is_product = is_tied or (isinstance(module, _LINEAR) and method == "__call__")
    if weight is None or not is_product or not (args or keyword in kwargs):
        return next_fun(*args, **kwargs)
    kwargs = dict(kwargs)
    inputs, *rest = args or (kwargs.pop(keyword),)

    def layer(inputs: Array) -> Array:
        layers.append(module)
        try:
            return next_fun(inputs, *rest, **kwargs)  # type: ignore[no-any-return]
        finally:
            layers.pop()

    path, bias = ".".join(module.path), parameters.get("bias")
    if isinstance(module, linen.DenseGeneral) and module.batch_dims == ():
        axes = [module.axis] if isinstance(module.axis, int) else module.axis
        return run_contraction(session, path, layer, inputs, weight, bias, axes)
    if isinstance(module, linen.Einsum):
        equation = kwargs.get("einsum_str", rest[0] if rest else None) or module.einsum_str or ""
        return run_einsum(session, path, layer, inputs, weight, bias, equation)
    if isinstance(module, linen.Conv) and weight.size == math.prod(weight.shape[-2:]):
        spatial = range(-weight.ndim + 1, -1)
        return run_pointwise_convolution(session, path, layer, inputs, weight, bias, spatial)
    if is_tied or isinstance(module, linen.Dense):
        return session.run_linear(path, layer, inputs, weight, bias)
    return layer(inputs)
