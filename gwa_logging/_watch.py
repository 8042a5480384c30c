"""watch(): the one way in."""

import atexit
import secrets
import weakref
from collections.abc import Callable
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Never

from gwa_logging import registry
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.monitor import Monitor, logger
from gwa_logging.settings import EarlyStop, WatchSettings
from gwa_logging.types import Backend, RunContext

_watched: dict[int, tuple[Callable[[], Any], Monitor]] = {}  # id(model) -> weak reference to it, its monitor
_open: weakref.WeakSet[Monitor] = weakref.WeakSet()
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
    directory: str | PathLike[str] = "gwa_runs",
    name: str = "gwa",
    **unknown: Never,
) -> Monitor:
    """Watches the gradient-weight alignment of a model's classifier head while it trains.

    PyTorch needs nothing else. In JAX, take `monitor.value_and_grad` in place of `jax.value_and_grad`, and pass the
    scores to `monitor.update`. Watching a model again closes its first monitor.

    Args:
        model: a `torch.nn.Module` (compiled or wrapped ones too), a `flax.linen.Module`, or a JAX function that calls
            `gwa_logging.integrations.jax.tap`.
        backend: where to send: "wandb", "mlflow", "local" (only the journal and the report), a list of them, the name of
            an entry point in the group `gwa_logging.backends`, or an object with `write` and `close`.
        run: a `wandb.Run`, or an MLflow run or run id; with several backends a dict of them, by backend. None takes the
            active one; if there is none, one is started, and finished on close.
        head: the classifier head: a dotted path, or the module itself. None finds it.
        early_stop: the stop rule, or None for no alert.
        on_alert: called once with the StopAlert.
        log_every_n_steps: steps between two histograms; at least 1.
        samples_per_epoch: closes an epoch by itself whenever at least so many samples have been seen; looked at each
            time a histogram is taken. For runs without epochs.
        num_samples: size of the training set; turns on the per-sample ledger behind `Monitor.suspects`.
        directory: where journals and reports go; each watch makes a folder of its own in it.
        name: prefix of every metric key; letters, digits, "_", "." and "-".

    Returns:
        The monitor. Use it as a context manager, or close it.

    Raises:
        InvalidInputError: an argument is wrong or unknown, or the model is not one.
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
        directory=Path(directory),
        name=name,
        **unknown,
    )
    room = registry.find_adapter(model)
    _close_previous(model)
    faults = Faults()
    monitor: Monitor | None = None
    # The probe calls a weak reference, so that a model that lives on does not keep the monitor, nor the other way round.
    adapter = room.attach(model, settings, faults)
    backends: list[Backend] = []
    try:
        journal = None
        if adapter.writes:
            journal = Journal(_new_folder(settings.directory) / FILE_NAME, faults)
            for wanted in settings.backend:
                context = RunContext(settings.name, settings.run_of(wanted), journal.path.parent)
                opened = registry.open_backend(wanted, context)
                if opened is not None:
                    backends.append(opened)
        monitor = Monitor(settings, journal, faults)
        monitor._start(adapter, backends)
    except BaseException:
        adapter.close()
        for opened in backends:
            opened.close()
        raise
    adapter.start(monitor._on_step)
    logger.info("gwa_logging: %s; journal: %s", adapter.head, monitor.journal)
    _watched[id(model)] = (weakref.ref(model), monitor)
    _open.add(monitor)
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # after the trackers have registered theirs, so before they are gone at exit
    return monitor


def _close_previous(model: Any) -> None:
    for key, (reference, monitor) in list(_watched.items()):
        if reference() is model:
            monitor.close()
        if reference() is None or reference() is model:
            del _watched[key]


def _new_folder(directory: Path) -> Path:
    """A path for a run of its own: sorted by time, never shared."""
    return directory / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _close_all() -> None:
    for monitor in list(_open):
        monitor.close()
