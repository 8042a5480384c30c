"""watch(): the entry point of the library."""

import atexit
import gc
import re
import secrets
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from gwa_logging import _all_heads, registry
from gwa_logging._announce import announce
from gwa_logging._closer import closer
from gwa_logging._run_folder import RunFolder
from gwa_logging.best_weights import BestWeights
from gwa_logging.delivery import DeliveryGroup
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.monitor import Monitor
from gwa_logging.protocols import AdapterModule, Backend, BackendWriter, RunContext
from gwa_logging.recording import Recording
from gwa_logging.records import StopAlert, TrackerRunRef
from gwa_logging.settings import DEFAULT_EARLY_STOP, EarlyStop, WatchSettings, unknown_name

P = ParamSpec("P")
R = TypeVar("R")


class _Watch(NamedTuple):
    """An open monitor and what it watches. Weak references: neither is kept alive by having been watched."""

    subject: Callable[[], Any]
    monitor: "weakref.ref[Monitor]"

    @property
    def is_open(self) -> bool:
        monitor = self.monitor()
        return monitor is not None and not monitor._closed

    def close_if_model_is(self, subject: Any) -> None:
        """Closes the monitor if it watches this object, or if its model was deleted and nothing more can be observed."""
        monitor, own = self.monitor(), self.subject()
        if monitor is not None and (own is subject if own is not None else monitor._adapter.is_detached):
            monitor.close()


_watches: list[_Watch] = []

WANDB_ARGUMENTS = ("project", "entity", "group", "tags", "notes", "job_type", "config")
"""Arguments of `wandb.init` that people pass to `watch`."""

OPEN_BEFORE_COLLECTING = 8
"""With more open monitors than this, `watch` runs the garbage collector, because most of them were probably dropped."""


def _refuse_unknown_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Raises InvalidInputError with the nearest name for a keyword that the function does not have."""
    names = list(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in WANDB_ARGUMENTS:
                raise InvalidInputError(
                    f"unknown argument {name!r}; for W&B, pass a run that has it: run=wandb.init({name}=...)"
                )
            if name not in names:
                raise InvalidInputError(unknown_name("argument", name, names[1:]))
        return function(*args, **kwargs)

    return checked


@_refuse_unknown_arguments
def watch(
    model: Any,
    backend: str | BackendWriter | Sequence[str | BackendWriter] = "local",
    *,
    run: object = None,
    head: Any = None,
    early_stop: EarlyStop | None = DEFAULT_EARLY_STOP,
    on_alert: Callable[[StopAlert], object] | None = None,
    log_every_n_steps: int = 50,
    samples_per_epoch: int | None = None,
    num_samples: int | None = None,
    labels: Any = None,
    unit: Literal["sample", "position"] | None = None,
    look: Any = None,
    look_ids: Any = None,
    dataset: Any = None,
    keep_best: bool | Literal["averaged"] = False,
    notify: str | Sequence[str] | None = None,
    directory: str | PathLike[str] = "gwa_runs",
    name: str = "gwa",
) -> Monitor:
    """Watches the gradient-weight alignment of a model's classifier head during training.

    In PyTorch this line is all that is needed. In JAX, use `monitor.value_and_grad` instead of `jax.value_and_grad`, and pass
    the scores to `monitor.update`. Watching a model again closes its first monitor. The monitor of a deleted model is closed
    once it is no longer referenced, or by the next `watch`.

    Args:
        model: a `torch.nn.Module` (also compiled or wrapped), a `PipelineStage` of `torch.distributed.pipelining`, a
            model of Flax (Linen, NNX), Equinox, Haiku or Keras 3 (on PyTorch or JAX), or a JAX function that calls
            `gwa_logging.integrations.jax.tap`.
        backend: where to send the results: "wandb", "mlflow", "tensorboard", "trackio", "local" (only the journal and the
            report), the name of an entry point in the group `gwa_logging.backends`, an object with `write` and `close`, or a
            list of these.
        run: a run of W&B, MLflow or Trackio, or its id; a TensorBoard log directory or SummaryWriter; with several backends
            a dict of runs by backend. None uses the active run; if there is none, a run is started and finished on close.
        head: the classifier head: a dotted path, or the module itself. None finds it. With a list (PyTorch), the alert follows
            the first head; each of the others has its own keys, `gwa/<path>/...`, and its own monitor in `Monitor.heads`. In
            a pipeline `gwa_logging.integrations.torch.HeadOnRanks(3)`, unless the model is a `PipelineStage`.
        early_stop: the stop rule, or None for no alert. With a look the default is `EarlyStop(statistic="consensus")`. By
            default a language model of transformers gets none, since the rules were validated on classifiers.
        on_alert: called with each StopAlert. A second alert comes only after a clearly better epoch has withdrawn the first.
        log_every_n_steps: steps between two histograms; at least 1. After 10,000 histograms it doubles each time the run has
            become twice as long, which bounds the size of the journal; with samples_per_epoch it stays constant.
        samples_per_epoch: closes an epoch automatically once at least this many samples have been seen; checked whenever a
            histogram is taken. For runs without epochs, in a single process.
        num_samples: size of the training set, below 2**31; turns on the per-sample ledger that `Monitor.suspects` reads. The
            ledger takes 8 bytes per sample on the device, and 4 more each once there are predictions and documents.
        labels: class indices of the training set, int [num_samples], an array on the host or a list, for the list of suspects;
            num_samples may be omitted then.
        unit: what a score belongs to where the head sees several rows of one input (tokens, views, clips). "sample": the input;
            its gradient is the sum over its rows. "position": each row. None finds out in the first backward passes: the
            input if the loss pools its rows after the head, else each row; in a compiled model and in JAX each row.
        look: training inputs, a few hundred, on which the model is evaluated at the end of each epoch (PyTorch): a batch (a
            tensor, a tuple of positional arguments, a dict of keyword arguments), a list of batches, or a function that returns
            one of these, the same inputs each time. Gives `EpochReport.consensus` and the metric `gwa/consensus`, and makes
            `EarlyStop(statistic="consensus")` possible. Neither the model nor the random numbers change by it. "auto" chooses
            512 inputs from `dataset`. In JAX, call `Monitor.look` instead.
        look_ids: the sample ids of these inputs, int [inputs], in their order. With them (and `num_samples`) the inputs are
            compared with what training itself predicted for them early in the run, which predicts the best epoch better than
            the outputs of earlier looks. look="auto" finds them out, if `num_samples` is given too.
        dataset: the training set for look="auto": a data set with `__len__` and `__getitem__`, or its `DataLoader`, whose
            `collate_fn` and batch size are used then. Required by look="auto", except in the callbacks for Lightning and
            Transformers, which know their training set.
        keep_best: True keeps the model's weights of the best epoch (`EpochReport.is_best`) in a file in the run's folder, for
            `Monitor.best_weights` and `Monitor.restore_best`; "averaged" keeps their running average over about one epoch. In
            JAX, pass the parameters: `update(scores, params=params)`.
        notify: where to send each StopAlert and its withdrawal: an Apprise URL such as "slack://..." or "mailto://...", or a
            list of them (extra `notify`). Only the scheme of a URL is logged or stored.
        directory: folder for journals and reports; each run has its own folder in it.
        name: prefix of every metric key; letters, digits, "_", "." and "-". Two models in one run need different names.

    Returns:
        The monitor. Close it at the end, or use it as a context manager. In JAX keep a reference to it: a monitor that is no
        longer referenced is closed.

    Raises:
        InvalidInputError: an argument is wrong or unknown, the model belongs to no supported framework, or the monitor of
            another model still writes to the same run under the same name.
        HeadNotFoundError: no head was found, or several modules could be it.
        MissingDependencyError: the package of a backend is not installed.
        BackendError: the tracker cannot be used, or the directory cannot be written.
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
        unit=unit,
        look=look,
        look_ids=look_ids,
        dataset=dataset,
        keep_best=keep_best,
        notify=notify,
        directory=directory,  # type: ignore[arg-type]  # converted by WatchSettings
        name=name,
    )
    framework = registry.find_adapter(model)
    heads = settings.heads
    if len(heads) > 1 and not framework.SEVERAL_HEADS:
        raise InvalidInputError(
            f"head={list(heads)!r}: in JAX a single head is watched, whose scores your step returns; choose one: "
            f"head={heads[0]!r}"
        )
    registry.open_notifiers(settings.notify)  # every process of a distributed run refuses a wrong URL
    _close_earlier(framework.subject(model))
    folder = settings.directory.absolute() / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    monitor = _open(framework, model, settings.for_head(heads[0]), folder)
    try:
        first = monitor._recording
        for other in heads[1:]:
            runs = {delivery.backend.name: delivery.backend.run for delivery in first.deliveries}
            further = _open(framework, model, settings.for_other_head(other, runs), folder, group=first.group)
            monitor.heads[further._adapter.path] = further
    except BaseException:
        monitor.close()
        raise
    _register(framework.subject(model), monitor)
    if monitor.journal is not None:
        watched = "; ".join(recording.adapter.head for recording in monitor._recordings())
        has_rule = first.settings.early_stop is settings.early_stop
        note = "" if has_rule else " (a language model: no stop alert unless you pass early_stop=EarlyStop())"
        announce(f"watching {watched}; journal: {monitor.journal}{note}")
    return monitor


def _open(
    framework: AdapterModule,
    model: Any,
    settings: WatchSettings,
    path: Path,
    *,
    group: DeliveryGroup | None = None,
) -> Monitor:
    """Watches one head. If anything fails, everything opened so far is closed, and no folder is left.

    Args:
        framework, model, settings: what to watch, and how.
        path: the run's folder. It is created last, with the journal, once the head and the trackers are known to work.
        group: of the first head, if this is a further one.
    """
    faults = Faults()
    adapter = framework.attach(model, settings, faults)
    if adapter.is_language_model:
        settings = settings.for_language_model()
    with ExitStack() as undo:
        undo.callback(adapter.close)
        weights = adapter.weights(averaged=settings.keep_best == "averaged") if settings.keep_best else None
        head = re.sub(r"[^\w.-]", "_", adapter.path)  # a module's name may contain any character, such as "/" or "%"
        name, path = (f"{settings.name}/{head}", path / head) if group else (settings.name, path)
        backends: list[Backend] = []
        journal = folder = None
        if adapter.writes:
            folder = RunFolder(path)
            folder.check_writable()
            contexts = [(wanted, RunContext(name, settings.run_of(wanted), path)) for wanted in settings.backend]
            for wanted, context in contexts:
                _check_is_free(wanted, registry.locate(wanted, context), name)
            for wanted, context in contexts:
                opened = registry.open_backend(wanted, context)
                if opened is not None:
                    undo.callback(opened.close)
                    backends.append(opened)
                    _check_is_free(opened, opened.run_ref, name)
            backends += registry.open_notifiers(settings.notify, path)
            journal = Journal(path / FILE_NAME, faults)
        best_weights = None
        if weights is not None:
            folder_of_weights = path if adapter.writes else None
            best_weights = BestWeights(weights, folder_of_weights, faults, averaged=settings.keep_best == "averaged")
        undo.pop_all()  # from here on the monitor closes everything
    monitor = Monitor(
        Recording(
            settings,
            name=name,
            adapter=adapter,
            faults=faults,
            backends=backends,
            journal=journal,
            folder=folder,
            group=group,
            best_weights=best_weights,
            is_taken=lambda backend, run: _writer_to(backend, run, name) is not None,
        )
    )
    try:
        adapter.start(monitor._on_step)
    except BaseException:
        monitor.close()
        raise
    return monitor


def _register(subject: Any, monitor: Monitor) -> None:
    """Remembers an open monitor. It is closed once it is no longer referenced, by a later `watch`, or when the program ends."""
    closer.start()
    _watches.append(_Watch(weakref.ref(subject), weakref.ref(monitor)))
    weakref.finalize(subject, _release_head, weakref.ref(monitor)).atexit = False
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # after the trackers have registered their own, so it runs before them


def _release_head(reference: "weakref.ref[Monitor]") -> None:
    """Called when a model has been deleted: nothing more can be observed, unless its scores come from the user (JAX).

    The monitor stays open as long as somebody references it, since the epoch in progress may still be reported.
    """
    monitor = reference()
    if monitor is not None and not monitor._closed and monitor._adapter.is_detached:
        for recording in monitor._recordings():
            recording.adapter.close()


class RunTakenError(InvalidInputError):
    """Another monitor of this process writes to the same run under the same name.

    Attributes:
        monitor: that other monitor.
    """

    def __init__(self, message: str, monitor: Monitor) -> None:
        super().__init__(message)
        self.monitor = monitor


def _check_is_free(backend: str | BackendWriter, run_ref: TrackerRunRef, name: str) -> None:
    """Checks that no other monitor writes to this run under this name. One whose model was deleted is closed first.

    Raises:
        RunTakenError: the monitor of another model writes there.
    """
    if _writer_to(backend, run_ref, name) is None:
        return
    gc.collect()
    _close_earlier()
    writer = _writer_to(backend, run_ref, name)
    if writer is None:
        return
    kind = backend if isinstance(backend, str) else getattr(backend, "name", type(backend).__name__)
    run = "it" if run_ref == TrackerRunRef() else f"its run {run_ref.run or run_ref.url!r}"
    prefix = writer._recording.settings.name
    raise RunTakenError(
        f"backend={kind!r}: the monitor of another model ({writer._adapter.head}) still writes to {run} under "
        f"name={prefix!r}, so their values would be mixed. Close that monitor first, or give this one another name, such as "
        f"name='{prefix}2'",
        writer,
    )


def _writer_to(backend: str | BackendWriter, run_ref: TrackerRunRef, name: str) -> Monitor | None:
    """The open monitor, if any, that writes to this run under this name."""
    for watch in _watches:
        monitor = watch.monitor()
        for recording in monitor._recordings() if monitor is not None and not monitor._closed else ():
            backends = [delivery.backend for delivery in recording.deliveries]
            if recording.name == name and any(_is_same(opened, backend, run_ref) for opened in backends):
                return monitor
    return None


def _is_same(opened: Backend, backend: str | BackendWriter, run_ref: TrackerRunRef) -> bool:
    """Returns True if an opened backend is the given one, or writes to the same run."""
    if opened == backend:
        return True
    kind = backend if isinstance(backend, str) else getattr(backend, "name", None)
    its = opened.run_ref
    return opened.name == kind and its != TrackerRunRef() and (its.run or its.url) == (run_ref.run or run_ref.url)


def _close_earlier(subject: Any = None) -> None:
    """Closes the monitors of this model and of deleted models, whose runs may still be active.

    Dropped models and monitors are in reference cycles, and the garbage collector can leave hundreds of them on the device.
    """
    if sum(watch.is_open for watch in _watches) > OPEN_BEFORE_COLLECTING:
        gc.collect()
    for watch in _watches:
        watch.close_if_model_is(subject)
    closer.wait(2 * _all_heads.CLOSE_WITHIN)
    _watches[:] = [watch for watch in _watches if watch.is_open]


def _close_all() -> None:
    """Closes all monitors at the end of the program."""
    monitors = [monitor for watch in _watches if (monitor := watch.monitor()) is not None and not monitor.is_copy]
    has_failed = isinstance(getattr(sys, "last_value", None), Exception)  # set by the exception that ended the program
    for recording in (recording for monitor in monitors for recording in monitor._recordings()):
        recording.is_resumable = has_failed and recording.has_state
    _all_heads.close([monitor._recordings() for monitor in monitors])
    closer.wait(_all_heads.CLOSE_WITHIN)
