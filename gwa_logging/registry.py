"""Finds integrations by name. A framework or a tracker is imported only when it is used."""

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from gwa_logging.backend_defaults import with_defaults
from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.protocols import AdapterModule, Backend, BackendModule, BackendWriter, RunContext
from gwa_logging.records import TrackerRunRef
from gwa_logging.settings import unknown_name

BACKENDS = {
    "wandb": "gwa_logging.integrations.wandb",
    "mlflow": "gwa_logging.integrations.mlflow",
    "tensorboard": "gwa_logging.integrations.tensorboard",
    "trackio": "gwa_logging.integrations.trackio",
}
"""Name to module. "local" is missing because it adds nothing to the journal, which is always written."""

ENTRY_POINT_GROUP = "gwa_logging.backends"


def open_backend(backend: str | BackendWriter, context: RunContext) -> Backend | None:
    """Opens a backend by name, or completes an object that has `write` and `close`; None for "local".

    Raises:
        InvalidInputError: the name is unknown.
        MissingDependencyError: its package is not installed.
        BackendError: the tracker cannot be used.
    """
    if not isinstance(backend, str):
        return with_defaults(backend)
    if backend == "local":
        return None
    return with_defaults(find_backend(backend).open_backend(context))


def locate(backend: str | BackendWriter, context: RunContext) -> TrackerRunRef:
    """The run that `open_backend` would use; empty if it would start one, or if that is known only after opening it."""
    if not isinstance(backend, str) or backend == "local":
        return TrackerRunRef()
    found: TrackerRunRef = getattr(find_backend(backend), "locate", lambda _: TrackerRunRef())(context)
    return found


def open_notifiers(urls: Sequence[str], folder: Path | None = None) -> list[Backend]:
    """Checks the URLs of `watch(notify=)` and returns a backend for each, which sends the alerts there.

    Args:
        urls: the URLs; if there are none, nothing is imported.
        folder: the run's folder, which the messages name.

    Raises:
        InvalidInputError: a URL is wrong.
        MissingDependencyError: apprise is not installed.
    """
    if not urls:
        return []
    return list(notify_module().open_notifiers(urls, folder))


def notify_module() -> Any:
    """Imports the module that sends notifications.

    Raises:
        MissingDependencyError: apprise or Pillow is not installed.
    """
    return import_integration("gwa_logging.integrations.notify", third_party="apprise", extra="notify")


def find_backend(name: str) -> BackendModule:
    """Imports the module of a backend, or loads its entry point.

    Raises:
        InvalidInputError: the name is unknown; the message names the nearest one.
        MissingDependencyError: the backend's package is not installed.
    """
    if name in BACKENDS:
        return cast("BackendModule", import_integration(BACKENDS[name], third_party=name, extra=name))
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in found:
        return cast("BackendModule", found[name].load())
    raise InvalidInputError(unknown_name("backend", name, ["local", *BACKENDS, *found]))


def import_integration(module: str, third_party: str, extra: str) -> Any:
    """Imports a module of `gwa_logging.integrations`.

    Raises:
        MissingDependencyError: the third party that the module wraps is not installed.
    """
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


def find_adapter(model: Any) -> AdapterModule:
    """Imports the adapter for a model's framework.

    Raises:
        InvalidInputError: the model belongs to no supported framework.
        MissingDependencyError: a package that the adapter needs is not installed.
    """
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    is_function = callable(model) and not isinstance(model, type)
    if bases & {"torch.nn.modules.module.Module", "torch.distributed.pipelining.stage._PipelineStageBase"}:
        adapter = import_integration("gwa_logging.integrations.torch", "torch", "torch")
    elif bases & _JAX_MODELS or (is_function and type(model).__module__ in ("builtins", "functools", "jaxlib._jax")):
        adapter = import_integration("gwa_logging.integrations.jax", "jax", "jax")
    else:
        hint = " (the class; pass an instance)" if isinstance(model, type) else ""
        raise InvalidInputError(
            "model: expected a torch.nn.Module, a PipelineStage, a model of Flax, Equinox, Haiku or Keras, or a JAX function, "
            f"found {type(model).__module__}.{type(model).__qualname__}{hint}"
        )
    return cast("AdapterModule", adapter)
