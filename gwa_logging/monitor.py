"""Monitor: what `watch` returns. It closes epochs, asks the stop rule, and writes everything into the journal.

The training thread is never kept: a summary travels to the host while training goes on, and is picked up by a later
step. Only `end_epoch`, `flush`, `suspects`, `state_dict` and `close` wait for the device.
"""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from threading import RLock
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from gwa_logging import samples
from gwa_logging.delivery import Delivery
from gwa_logging.early_stop import StopRule, StopState
from gwa_logging.errors import InvalidInputError, NoObservationsError
from gwa_logging.faults import Faults
from gwa_logging.intervals import Intervals
from gwa_logging.journal import Journal
from gwa_logging.settings import EarlyStop, WatchSettings
from gwa_logging.summary import AlignmentSummary
from gwa_logging.types import (
    Adapter,
    AnyRecord,
    Backend,
    CloseRecord,
    EpochReport,
    RunPlace,
    RunRecord,
    StopAlert,
    Suspect,
)

logger = logging.getLogger("gwa_logging")

CLOSE_WITHIN = 10.0
"""Seconds that `close` gives the backends."""

STATE_VERSION = 1


class Monitor:
    """Watches one model. Made by `gwa_logging.watch`.

    Attributes:
        journal: path of the run's journal, in whose folder the report goes too; None in a process that does not write.
        history: reports of the epochs so far.
        alert: the StopAlert that stands, or None. A clearly better epoch takes it back.
        heads: monitors of the further heads that are watched beside this one, by path. They follow its epochs.
    """

    def __init__(self, settings: WatchSettings, journal: Journal | None, faults: Faults) -> None:
        self.journal = journal.path if journal else None
        self.history: list[EpochReport] = []
        self.alert: StopAlert | None = None
        self.heads: dict[str, Monitor] = {}
        self._settings = settings
        self._rule = StopRule(settings.early_stop or EarlyStop())
        self._journal = journal
        self._faults = faults
        self._lock = RLock()
        self._deliveries: list[Delivery] = []
        self._adapter: Adapter
        self._intervals: Intervals
        self._closed = False

    def _start(self, name: str, adapter: Adapter, backends: list[Backend]) -> None:
        self._adapter = adapter
        # A window closes where an interval ends, so there the intervals must stay as short as they were asked for.
        grow = self._settings.samples_per_epoch is None
        every = self._settings.log_every_n_steps
        self._intervals = Intervals(adapter, every, self._write, self._faults, grow=grow)
        self._write(
            RunRecord(
                name=name,
                head=adapter.head,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                settings=self._settings.plain(),
                places={backend.name: getattr(backend, "place", RunPlace()) for backend in backends},
            )
        )
        if self._journal is not None:
            self._deliveries = [Delivery(backend, self._journal, self._faults) for backend in backends]
        self._notify()

    def _add(self, other: "Monitor") -> None:
        self.heads[other._adapter.path] = other

    def _runs(self) -> dict[str, Any]:
        """The trackers' runs, by backend, for the other heads."""
        return {delivery.backend.name: getattr(delivery.backend, "run", None) for delivery in self._deliveries}

    # --- training steps -------------------------------------------------------------------------------------------

    def update(self, scores: Any, sample_ids: Any = None) -> None:
        """Takes the scores of one training step (JAX, and PyTorch loops that make their own). Does not wait for them.

        Args:
            scores: float [...] on the device, as `value_and_grad` returns them; values that are not finite are
                samples without a score. In JAX also a `gwa_logging.integrations.jax.AlignmentState`, for loops inside of scan.
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`), or None.

        Raises:
            InvalidInputError: scores or ids of a wrong type, shape or dtype, or a tracer (call it outside jit).
        """
        if not self._closed:
            self._adapter.observe(scores, sample_ids)

    def tag(self, sample_ids: Any) -> None:
        """Says which samples the next forward pass is about (PyTorch).

        Where the head's pass is itself repeated in the backward pass (reentrant checkpointing of the whole model), of several
        passes before one backward only the last keeps its ids.

        Args:
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`).
        """
        for monitor in (self, *self.heads.values()):
            monitor._adapter.tag(sample_ids)

    def value_and_grad(
        self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any
    ) -> Any:
        """Like `jax.value_and_grad`, but the value gains the scores: `(value, scores), grads` (JAX only).

        Args:
            fun: the loss function, untouched; it must run the watched model.
            argnums, has_aux: as in `jax.value_and_grad`; with has_aux the first result is `((value, aux), scores)`.
            options: further arguments of `jax.value_and_grad`.

        Returns:
            A function of the same arguments; it may be jitted. Scores are float32 [...], one for each row of the
            head's output.

        Raises:
            HeadNotFoundError: when it is traced, if `fun` does not run the head once.
        """
        make = getattr(self._adapter, "value_and_grad", None)
        if make is None:
            raise InvalidInputError(
                "value_and_grad and grad are for JAX models; this one is PyTorch: call loss.backward() as ever"
            )
        return make(fun, argnums=argnums, has_aux=has_aux, **options)

    def grad(self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any) -> Any:
        """Like `jax.grad`, but the scores come along: `grads, scores`, or `grads, (aux, scores)` (JAX only).

        Arguments, scores and errors are those of `value_and_grad`.
        """
        value_and_grad = self.value_and_grad(fun, argnums, has_aux, **options)

        def gradient(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            (value, scores), grads = value_and_grad(*args, **kwargs)
            return grads, ((value[1], scores) if has_aux else scores)

        return gradient

    def _on_step(self) -> None:
        """Called by the adapter after each training step that it has seen."""
        with self._lock:
            if self._closed:
                return
            if self._intervals.step():
                self._notify()
            window = self._settings.samples_per_epoch
            if window is not None and self._intervals.summary.seen >= window:
                self.end_epoch()

    # --- epochs ---------------------------------------------------------------------------------------------------

    def end_epoch(self) -> EpochReport:
        """Closes an epoch: waits for its scores, reports them, asks the stop rule, writes it all down.

        Of several processes (torch.distributed, jax.distributed), each must call it; all get the same report, but for its
        `step`, which each counts for itself.

        Raises:
            NoObservationsError: no training step has passed the probe since the last epoch.
        """
        with self._lock:
            if self._closed:
                raise InvalidInputError("end_epoch(): this monitor is closed; watch the model again")
            for path, other in self.heads.items():
                try:
                    other.end_epoch()
                except NoObservationsError as error:  # a head that this epoch did not train
                    self._faults.record(f"head {path!r}", error)
            return self._end_epoch()

    def _end_epoch(self, *, partial: bool = False) -> EpochReport:
        self._gather()
        summary = self._intervals.summary if partial else self._adapter.reduce(self._intervals.summary)
        if not summary.seen:
            raise NoObservationsError(
                f"epoch {len(self.history)} has ended, but no training step has passed the probe. "
                f"{self._adapter.nothing_seen()}"
            )
        report = summary.report(epoch=len(self.history), step=self._intervals.steps - 1)
        alert, withdrawn = None, False
        if partial:
            report = report.model_copy(update={"notes": (*report.notes, "closed before the end of the epoch")})
        else:
            report, alert, withdrawn = self._rule.judge(report, self.history)
        self.history.append(report)
        self._intervals.begin_epoch(len(self.history))
        self._write(report, sync=True)
        if withdrawn and self.alert:
            logger.info("gwa_logging: epoch %s is clearly better: the stop alert is taken back", report.epoch)
            self.alert = None
        if alert and self._settings.early_stop:
            self.alert = alert
            logger.warning("gwa_logging: %s", alert.message)
            self._write(alert, sync=True)
            self._call_back(alert)
        self._notify()
        return report

    def _write(self, record: AnyRecord, *, sync: bool = False) -> None:
        if self._journal is not None:
            self._journal.append(record, sync=sync)

    def _gather(self) -> None:
        if self._intervals.gather():
            self._notify()

    def _call_back(self, alert: StopAlert) -> None:
        if self._settings.on_alert is None:
            return
        try:
            self._settings.on_alert(alert)
        except Exception as error:  # noqa: BLE001 - the user's channel must not end the user's training
            self._faults.record("on_alert", f"{type(error).__name__}: {error}")

    @property
    def should_stop(self) -> bool:
        """Whether a stop alert stands."""
        return self.alert is not None

    def epochs(self, n: int) -> Iterator[int]:
        """Yields the epoch numbers from the present one up to n - 1, closing each epoch after its turn.

        Shows a progress bar if tqdm is installed. Ends early after a stop alert if the rule's action is "stop". An epoch
        that the loop's body has closed itself is not closed again.

        Args:
            n: number of epochs planned for the whole run; the stop rule's warm-up is a share of it.

        Raises:
            InvalidInputError: n is not a positive number.
            NoObservationsError: an epoch has passed without a training step that the probe could see.
        """
        if n < 1:
            raise InvalidInputError(f"epochs(n={n}): expected at least 1")
        self._rule.planned = n
        return self._epochs(n)

    def _epochs(self, n: int) -> Iterator[int]:
        bar = _progress_bar(n, len(self.history))
        try:
            for epoch in range(len(self.history), n):
                yield epoch
                if len(self.history) == epoch:
                    self.end_epoch()
                report = self.history[-1]
                if bar is not None:
                    bar.set_postfix(gwa=f"{report.gwa:.3g}", separation=f"{report.separation:.3g}", refresh=False)
                    bar.update()
                if self.alert and self._rule.settings.action == "stop":
                    break
        finally:
            if bar is not None:
                bar.close()

    # --- results and state ----------------------------------------------------------------------------------------

    def suspects(self, k: int = 100) -> list[Suspect]:
        """The k training samples that are most probably mislabelled, most suspect first. Waits for the device.

        Of several processes, each must call it: the ledger is added up over them.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        if self._settings.num_samples is None:
            raise InvalidInputError(
                "suspects(): there is no ledger: watch(..., num_samples=<size of the training set>)"
            )
        with self._lock:
            sums, seen = self._adapter.ledger()
        strays = int(seen[-1])
        if strays:
            self._faults.record(
                "sample ids",
                f"{strays} ids were not in [0, {len(seen) - 1}), or not as many as their samples, and were left out",
            )
        return samples.suspects(sums[:-1], seen[:-1], k)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: plain JSON-able values and NumPy arrays. Waits for the device.

        Of several processes, each must call it if there is a ledger, which is added up over them; of an epoch in progress the
        state holds this process's samples only, so save it at an epoch's end.
        """
        with self._lock:
            self._gather()
            summary = self._intervals.summary
            state: dict[str, Any] = {
                "version": STATE_VERSION,
                "step": self._intervals.steps,
                "display_limit": self._intervals.display_limit,
                "stop_state": list(self._rule.state),
                "history": [report.model_dump(mode="json") for report in self.history],
                "alert": self.alert.model_dump(mode="json") if self.alert else None,
                "epoch_summary": {name: getattr(summary, name) for name in AlignmentSummary.__slots__},
            }
            if self._settings.num_samples is not None:
                state["ledger"] = list(self._adapter.ledger())
            state["heads"] = {path: other.state_dict() for path, other in self.heads.items()}
            return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`. Nothing is changed if the state does not fit.

        Raises:
            InvalidInputError: the state is of another version, or its ledger of another size.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise InvalidInputError(f"state: expected version {STATE_VERSION}, found {state['version']!r}")
            summary = AlignmentSummary(**state["epoch_summary"])
            history = [EpochReport.model_validate(report) for report in state["history"]]
            alert = StopAlert.model_validate(state["alert"]) if state["alert"] else None
            stop_state = StopState(*state["stop_state"])
            others = {path: state["heads"][path] for path in self.heads}
            step, limit, ledger = int(state["step"]), float(state["display_limit"]), state.get("ledger")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"state: not a state_dict() of a monitor ({error!r})") from error
        size = None if ledger is None else len(ledger[0]) - 1
        if size != self._settings.num_samples:
            raise InvalidInputError(
                f"state: its ledger is of size {size}, watch(num_samples={self._settings.num_samples})"
            )
        for path, other in others.items():
            self.heads[path].load_state_dict(other)
        with self._lock:
            self._gather()
            if ledger is not None:
                self._adapter.load_ledger(np.asarray(ledger[0]), np.asarray(ledger[1]))
            self.history, self.alert = history, alert
            self._rule.state = stop_state
            # All processes may load the state of one of them: its samples must count once.
            self._intervals.go_on(step, len(history), summary if self._adapter.writes else AlignmentSummary(), limit)

    @property
    def faults(self) -> dict[str, int]:
        """How often each kind of fault has happened; empty if none has."""
        return self._faults.counts

    def __repr__(self) -> str:
        last = str(self.history[-1]) if self.history else "no epoch yet"
        return f"<Monitor of {self._adapter.head}; {last}>"

    # --- the end --------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        for delivery in self._deliveries:
            delivery.notify()

    def flush(self, timeout: float = CLOSE_WITHIN) -> bool:
        """Sends on everything seen so far. Waits for the device, and at most `timeout` seconds for the backends.

        Returns:
            Whether every backend has everything.
        """
        with self._lock:
            self._gather()
        self._notify()
        deadline = monotonic() + timeout
        taken = [delivery.wait(deadline) for delivery in self._deliveries]
        taken += [other.flush(max(0.0, deadline - monotonic())) for other in self.heads.values()]
        return all(taken)

    def close(self) -> None:
        """Takes the probe off, reports an epoch in progress, ends the backends. Never raises; a second call does nothing.

        Waits at most 10 s for the backends; what a tracker has not taken by then stays in the journal.
        """
        for other in self.heads.values():
            other.close()
        with self._lock:
            if self._closed:
                return
            try:
                self._gather()
                if self._intervals.summary.seen:
                    self._end_epoch(partial=True)
            except Exception as error:  # noqa: BLE001 - closing must go on
                self._faults.record("close", f"{type(error).__name__}: {error}")
            self._closed = True
            self._adapter.close()
        state = self._rule.state
        self._write(
            CloseRecord(
                epochs=len(self.history),
                steps=self._intervals.steps,
                best_epoch=state.best_epoch if state.best_epoch >= 0 else None,
                best_value=state.best,
                faults=self._faults.counts,
            ),
            sync=True,
        )
        self._notify()
        deadline = monotonic() + CLOSE_WITHIN
        for delivery in self._deliveries:
            if not delivery.close(deadline):
                name, folder = delivery.backend.name, self.journal and self.journal.parent
                logger.warning(
                    "gwa_logging: backend %s has not taken everything in time: %d records are left. Send them with: "
                    "gwa-logging replay %s --backend %s",
                    *(name, delivery.left, folder, name),
                )
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.close()
        return False


def _progress_bar(total: int, done: int) -> Any:
    """A tqdm bar, or None if tqdm is not installed: it is a comfort, not a dependency."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, initial=done, unit="epoch", desc="GWA")
