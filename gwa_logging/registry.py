"""Looks rooms up by name, lazily: nothing of a framework or a tracker is imported before it is asked for."""

import importlib
from importlib.metadata import entry_points
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.protocols import Backend, RunContext, with_defaults
from gwa_logging.records import TrackerRunRef

BACKENDS = {
    "wandb": "gwa_logging.integrations.wandb",
    "mlflow": "gwa_logging.integrations.mlflow",
    "tensorboard": "gwa_logging.integrations.tensorboard",
    "trackio": "gwa_logging.integrations.trackio",
}
"""Name to module. "local" is not here: the journal is always written, and "local" adds nothing to it."""

ENTRY_POINT_GROUP = "gwa_logging.backends"


def open_backend(backend: Any, context: RunContext) -> Backend | None:
    """Opens a backend by name, or completes an object that has `write` and `close`; None for "local".

    Raises:
        InvalidInputError: there is no backend of that name.
        MissingDependencyError: its package is not installed.
        BackendError: the tracker cannot be used.
    """
    if not isinstance(backend, str):
        return with_defaults(backend)
    if backend == "local":
        return None
    return with_defaults(find_backend(backend).open_backend(context))


def locate(backend: Any, context: RunContext) -> TrackerRunRef:
    """The place of the run that `open_backend` would take; empty if it would start one, or if only opening it can tell."""
    if not isinstance(backend, str) or backend == "local":
        return TrackerRunRef()
    found: TrackerRunRef = getattr(find_backend(backend), "locate", lambda _: TrackerRunRef())(context)
    return found


def find_backend(name: str) -> Any:
    """The module of a backend, imported."""
    if name in BACKENDS:
        return import_integration(BACKENDS[name], third_party=name, extra=name)
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in found:
        return found[name].load()
    names = ", ".join(repr(n) for n in ["local", *BACKENDS, *found])
    raise InvalidInputError(f"backend={name!r}: there is no such backend; there are {names}")


def import_integration(module: str, third_party: str, extra: str) -> Any:
    """Imports a module of `integrations`, whose missing third party becomes a MissingDependencyError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != third_party:
            raise
        raise MissingDependencyError(third_party, extra) from error


_JAX_MODELS = {
    "flax.linen.module.Module",
    "flax.nnx.module.Module",
    "equinox._module._module.Module",
    "equinox._module.Module",
    "haiku._src.transform.Transformed",
    "haiku._src.transform.TransformedWithState",
    "keras.src.models.model.Model",
}


def find_adapter(model: Any) -> Any:
    """The module that can watch this model: it has `attach(model, head, num_samples, on_step, faults)`.

    Raises:
        InvalidInputError: it is not a model of a framework that we know.
    """
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if "torch.nn.modules.module.Module" in bases:
        return import_integration("gwa_logging.integrations.torch", "torch", "torch")
    if bases & _JAX_MODELS:
        return import_integration("gwa_logging.integrations.jax", "jax", "jax")
    if (
        callable(model)
        and not isinstance(model, type)
        and type(model).__module__ in ("builtins", "functools", "jaxlib._jax")
    ):
        return import_integration("gwa_logging.integrations.jax", "jax", "jax")
    hint = " (the class; pass an instance)" if isinstance(model, type) else ""
    raise InvalidInputError(
        "model: expected a torch.nn.Module, a model of Flax, Equinox, Haiku or Keras, or a JAX function, found "
        f"{type(model).__module__}.{type(model).__qualname__}{hint}"
    )
