"""Flax Linen: tells a session of the Dense layers that run, without touching the model."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flax import linen

from gwa_logging.integrations.jax.probe import Session, entered


@contextmanager
def listening(model: linen.Module, session: Session) -> Iterator[None]:
    """While it is entered, `session` hears of every `nn.Dense` that runs inside of `model`, by its path."""
    inside: list[bool] = []

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not module.path:  # a root: the watched model, or another one, such as a teacher
            inside.append(same_model(module, model))
            try:
                return (
                    heard(next_fun, args, kwargs, context)
                    if isinstance(module, linen.Dense)
                    else next_fun(*args, **kwargs)
                )
            finally:
                inside.pop()
        return heard(next_fun, args, kwargs, context)

    def heard(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        module = context.module
        if not (isinstance(module, linen.Dense) and context.method_name == "__call__" and inside and inside[-1]):
            return output
        parameters = module.variables["params"]
        embeddings = args[0] if args else kwargs["inputs"]
        return session.linear(".".join(module.path), output, embeddings, parameters["kernel"], parameters.get("bias"))

    with entered(session), linen.intercept_methods(intercept):
        yield


def same_model(bound: linen.Module, model: linen.Module) -> bool:
    """Whether a bound module is the given one: of the same class, and with the same plain settings."""
    if type(bound) is not type(model):
        return False
    names = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    pairs = [(getattr(bound, name, None), getattr(model, name, None)) for name in names]
    return all(a == b for a, b in pairs if isinstance(a, bool | int | float | str) and isinstance(b, type(a)))
