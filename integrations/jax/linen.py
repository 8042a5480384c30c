"""Flax Linen: hears of the Dense layers that run, without touching the model."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen

from gwa_logging.integrations.jax.library import Library, zeros
from gwa_logging.integrations.jax.probe import Session, entered


class Linen(Library):
    """A `flax.linen.Module`; parameters are arguments of the loss."""

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inside: list[bool] = []

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            root = not context.module.path  # the watched model, or another one, such as a teacher
            if root:
                inside.append(self._is_watched(context.module))
            try:
                return heard(next_fun, args, kwargs, context.module, context.method_name)
            finally:
                if root:
                    inside.pop()

        def heard(next_fun: Callable[..., Any], args: Any, kwargs: Any, module: linen.Module, method: str) -> Any:
            parameters = module.variables.get("params", {})
            is_linear = isinstance(module, linen.Dense) and method == "__call__" and "kernel" in parameters
            if not (is_linear and inside and inside[-1]):
                return next_fun(*args, **kwargs)
            embeddings = args[0] if args else kwargs["inputs"]
            path = ".".join(module.path)
            return session.linear(path, next_fun, embeddings, parameters["kernel"], parameters.get("bias"))

        with entered(session), linen.intercept_methods(intercept):
            return fun(*args, **kwargs)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        keys = {name: jax.random.key(0) for name in ("params", "dropout")}
        shapes = jax.eval_shape(partial(self.model.init, keys), *inputs)

        def run(*inputs: Any) -> Any:
            return self.model.apply(zeros(shapes), *inputs, rngs=keys, mutable=True)[0]

        return run, inputs

    def _is_watched(self, bound: linen.Module) -> bool:
        """Whether a bound module is the watched one: of the same class, and with the same plain settings."""
        if not self.is_model(bound):
            return False
        names = [f.name for f in dataclasses.fields(self.model) if f.name not in ("parent", "name")]
        pairs = [(getattr(bound, name, None), getattr(self.model, name, None)) for name in names]
        return all(a == b for a, b in pairs if isinstance(a, bool | int | float | str) and isinstance(b, type(a)))
