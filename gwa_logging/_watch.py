"""watch(): the one way in."""

import atexit
import gc
import re
import secrets
import weakref
from collections.abc import Callable
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Never

from gwa_logging import registry
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.monitor import Monitor, close_all, logger
from gwa_logging.protocols import Backend, RunContext
from gwa_logging.records import TrackerRunRef
from gwa_logging.settings import EarlyStop, WatchSettings

_watched: list[tuple[Callable[[], Any], Monitor]] = []  # weak references to models, and their monitors
_DEFAULT = EarlyStop()


def watch(
    model: Any,
    *,
    backend: Any = "local",
    run: Any = None,
    head: Any = None,
    early_stop: EarlyStop | None = _DEFAULT,
    on_alert: Callable[..., Any] | None = None,
    log_every_n_steps: int = 50,
    samples_per_epoch: int | None = None,
    num_samples: int | None = None,
    labels: Any = None,
    directory: str | PathLike[str] = "gwa_runs",
    name: str = "gwa",
    **unknown: Never,
) -> Monitor:
    """Watches the gradient-weight alignment of a model's classifier head while it trains.

    PyTorch needs nothing else. In JAX, take `monitor.value_and_grad` in place of `jax.value_and_grad`, and pass the
    scores to `monitor.update`. Watching a model again closes its first monitor.

    Args:
        model: a `torch.nn.Module` (compiled or wrapped ones too), a model of Flax (Linen, NNX), Equinox, Haiku or Keras 3 (on
            PyTorch or JAX), or a JAX function that calls `gwa_logging.integrations.jax.tap`.
        backend: where to send: "wandb", "mlflow", "tensorboard", "trackio", "local" (only the journal and the report), a
            list of them, the name of an entry point in the group `gwa_logging.backends`, or an object with `write` and
            `close`.
        run: a run of W&B, MLflow or Trackio, or its id, a TensorBoard log directory or SummaryWriter; with
            several backends a dict of them, by backend. None takes the active one; if there is none, one is started, and
            finished on close.
        head: the classifier head: a dotted path, or the module itself. None finds it. Of a list (PyTorch), the first one is
            the head that the alert follows; the others are watched beside it, each with keys of its own,
            `gwa/<path>/...`, and a monitor in `Monitor.heads`.
        early_stop: the stop rule, or None for no alert.
        on_alert: called with each StopAlert; a second one comes only after a clearly better epoch took the first one back.
        log_every_n_steps: steps between two histograms; at least 1. After 10,000 histograms it doubles, and again whenever the
            run has become twice as long, so that the histograms in the journal are bounded; not with samples_per_epoch.
        samples_per_epoch: closes an epoch by itself whenever at least so many samples have been seen; looked at each
            time a histogram is taken. For runs without epochs.
        num_samples: size of the training set, below 2**31; turns on the per-sample ledger behind `Monitor.suspects`: 12 bytes a
            sample on the device (8 in JAX, if no predictions are given).
        labels: the samples' class indices, int [num_samples], an array on the host or a list, for the list of suspects;
            num_samples need not be given then.
        directory: where journals and reports go; each watch makes a folder of its own in it.
        name: prefix of every metric key; letters, digits, "_", "." and "-". Two models in one run need different names.

    Returns:
        The monitor. Use it as a context manager, or close it.

    Raises:
        InvalidInputError: an argument is wrong or unknown, the model is not one, or the open monitor of another model writes
            to the same run under the same name.
        HeadNotFoundError: there is no head, or several modules could be it.
        MissingDependencyError: the package of a backend is not installed.
        BackendError: the tracker cannot be used, or the directory not be written.
    """
    settings = WatchSettings(
        backend=backend,
        run=run,
        head=head,
        early_stop=early_stop,
        on_alert=on_alert,
        log_every_n_steps=log_every_n_steps,
        samples_per_epoch=samples_per_epoch,
        num_samples=num_samples,
        labels=labels,
        directory=Path(directory),
        name=name,
        **unknown,
    )
    room = registry.find_adapter(model)
    subject = room.subject(model)
    _close_previous(subject)
    heads = settings.heads
    if len(heads) > 1 and not room.SEVERAL_HEADS:
        raise InvalidInputError(
            f"head={list(heads)!r}: in JAX one head is watched, whose scores your step returns; name one: head={heads[0]!r}"
        )
    folder = settings.directory.absolute() / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    monitor = _open(room, model, settings.for_head(heads[0]), folder)
    try:
        for other in heads[1:]:
            monitor._add(_open(room, model, settings.for_other_head(other, monitor._runs()), folder, beside=monitor))
    except BaseException:
        monitor.close()
        raise
    _watched.append((weakref.ref(subject), monitor))
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # after the trackers have registered theirs, so before they are gone at exit
    return monitor


def _open(room: Any, model: Any, settings: WatchSettings, folder: Path, *, beside: Monitor | None = None) -> Monitor:
    """Watches one head, perhaps beside that of another monitor; what was begun is undone if anything fails."""
    faults = Faults()
    adapter = room.attach(model, settings, faults)
    backends: list[Backend] = []
    try:
        path = re.sub(r"[^\w.-]", "_", adapter.path)  # of modules that people may call what they like, "/" or "%" too
        name = f"{settings.name}/{path}" if beside else settings.name
        journal = None
        if adapter.writes:
            folder = folder / path if beside else folder
            contexts = [(wanted, RunContext(name, settings.run_of(wanted), folder)) for wanted in settings.backend]
            for wanted, context in contexts:
                _check_is_free(wanted, registry.locate(wanted, context), name)
            journal = Journal(folder / FILE_NAME, faults)
            for wanted, context in contexts:
                opened = registry.open_backend(wanted, context)
                if opened is not None:
                    backends.append(opened)
                    _check_is_free(opened, opened.run_ref, name)
        monitor = Monitor(settings, journal, faults, beside._group if beside else None)
        monitor._start(name, adapter, backends)
        adapter.start(monitor._on_step)
    except BaseException:
        adapter.close()
        for opened in backends:
            opened.close()
        raise
    # A model that is dropped takes its head along, even if nobody closes the monitor.
    weakref.finalize(room.subject(model), adapter.close).atexit = False
    logger.info("gwa_logging: %s; journal: %s", adapter.head, monitor.journal)
    return monitor


class RunTakenError(InvalidInputError):
    """Another monitor of this process writes to the same run, under the same name.

    Attributes:
        monitor: the other one.
    """

    def __init__(self, message: str, monitor: Monitor) -> None:
        super().__init__(message)
        self.monitor = monitor


def _check_is_free(backend: Any, run_ref: TrackerRunRef, name: str) -> None:
    """Closes the monitor of a model that no longer exists, if it writes to this run_ref under this name.

    Raises:
        RunTakenError: the monitor of another model writes there.
    """
    for reference, watcher in list(_watched):
        for monitor in (watcher, *watcher.heads.values()):
            if monitor._name != name or not any(_is_at(other, backend, run_ref) for other in monitor._backends()):
                continue
            gc.collect()
            if reference() is None and monitor._adapter.is_detached:
                logger.info("gwa_logging: closing %r, whose model no longer exists", watcher)
                watcher.close()
                break
            kind = backend if isinstance(backend, str) else getattr(backend, "name", type(backend).__name__)
            run = "it" if run_ref == TrackerRunRef() else f"its run {run_ref.run or run_ref.url!r}"
            raise RunTakenError(
                f"backend={kind!r}: the monitor of another model ({monitor._adapter.head}) still writes to {run} under "
                f"name={monitor._settings.name!r}, and their values would be mixed. Close that monitor first, or give this one "
                f"another name, such as name='{monitor._settings.name}2'",
                watcher,
            )


def _is_at(opened: Backend, backend: Any, run_ref: TrackerRunRef) -> bool:
    """Returns True if an opened backend is the same one, or writes to the same run_ref."""
    if opened == backend:
        return True
    kind = backend if isinstance(backend, str) else getattr(backend, "name", None)
    its = opened.run_ref
    return opened.name == kind and its != TrackerRunRef() and (its.run or its.url) == (run_ref.run or run_ref.url)


def _close_previous(subject: Any) -> None:
    for entry in list(_watched):
        reference, monitor = entry
        if reference() is subject:
            monitor.close()
            _watched.remove(entry)


def _close_all() -> None:
    close_all(monitor for _, monitor in _watched if not monitor.is_copy)
