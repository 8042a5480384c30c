"""Monitor: what `watch` returns. It closes epochs, asks the stop rule, and writes everything into the journal.

The training thread is never kept: a summary travels to the host while training goes on, and is picked up by a later
step. Only `end_epoch`, `flush`, `close`, `state_dict` and what reads the ledger (`suspects`, `log_suspects`, `label_quality`,
the stop alert) wait for the device.
"""

import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from threading import RLock
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from gwa_logging.checkpoint import HeadShape, MonitorState
from gwa_logging.delivery import Delivery, DeliveryGroup, wait_for
from gwa_logging.early_stop import StopRule
from gwa_logging.errors import InvalidInputError, NoObservationsError
from gwa_logging.faults import Faults
from gwa_logging.intake import Intake
from gwa_logging.interval_recorder import IntervalRecorder
from gwa_logging.journal import Journal
from gwa_logging.protocols import Adapter, Backend
from gwa_logging.records import (
    AnyRecord,
    CloseRecord,
    EpochReport,
    RunRecord,
    StopAlert,
    Suspect,
    SuspectsRecord,
)
from gwa_logging.report.notebook import monitor_html
from gwa_logging.settings import EarlyStop, WatchSettings
from gwa_logging.summary import AlignmentSummary
from gwa_logging.suspects import SuspectFinder

logger = logging.getLogger("gwa_logging")

CLOSE_WITHIN = 10.0
"""Seconds that `close` gives the backends, all of them together."""

SUSPECTS = 100
"""How many suspects are written down without being asked for."""


class Monitor(Intake):
    """Watches one model. Made by `gwa_logging.watch`.

    It belongs to the process that made it. In a process that was forked from that one it can be read (`history`, `alert`,
    `journal`, `should_stop`, `faults`), and everything else does nothing, with one warning.

    Attributes:
        journal: path of the run's journal, in whose folder the report goes too; None in a process that does not write.
        history: reports of the epochs so far.
        alert: the StopAlert that stands, or None. A clearly better epoch takes it back.
        heads: monitors of the further heads that are watched beside this one, by path. They follow its epochs.
    """

    def __init__(
        self, settings: WatchSettings, journal: Journal | None, faults: Faults, group: DeliveryGroup | None = None
    ) -> None:
        """`group` is that of the first head, if this is another one of the same model."""
        super().__init__()
        self.journal = journal.path if journal else None
        self.history: list[EpochReport] = []
        self.alert: StopAlert | None = None
        self.heads: dict[str, Monitor] = {}
        self._settings = settings
        self._rule = StopRule(settings.early_stop or EarlyStop())
        self._journal = journal
        self._faults = faults
        self._lock = RLock()
        self._group = group or DeliveryGroup()
        self._deliveries: list[Delivery] = []
        self._adapter: Adapter
        self._name: str
        self._intervals: IntervalRecorder
        self._ledger: SuspectFinder
        self._suspects_of = -1  # how many epochs there were when they were written down last
        self._expected: HeadShape | None = None  # the head of a loaded state, while the present one is not known
        self._closed = False

    def _start(self, name: str, adapter: Adapter, backends: list[Backend]) -> None:
        self._adapter, self._name = adapter, name
        # A window closes where an interval ends, so there the intervals must stay as short as they were asked for.
        grow = self._settings.samples_per_epoch is None
        every = self._settings.log_every_n_steps
        self._intervals = IntervalRecorder(adapter, every, self._write, self._faults, grow=grow)
        self._ledger = SuspectFinder(adapter, self._settings.num_samples, self._settings.labels, self._faults)
        self._write(
            RunRecord(
                name=name,
                head=adapter.head,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                settings=self._settings.plain(),
                places={backend.name: backend.run_ref for backend in backends},
            )
        )
        if self._journal is not None:
            self._deliveries = [Delivery(backend, self._journal, self._faults) for backend in backends]
        for delivery in self._deliveries:
            self._group.add(delivery)
        self._notify()

    def _backends(self) -> list[Backend]:
        """The backends that this monitor writes to, none once it is closed."""
        return [] if self._closed else [delivery.backend for delivery in self._deliveries]

    def _add(self, other: "Monitor") -> None:
        self.heads[other._adapter.path] = other

    def _runs(self) -> dict[str, Any]:
        """The trackers' runs, by backend, for the other heads."""
        return {delivery.backend.name: delivery.backend.run for delivery in self._deliveries}

    def _disown(self) -> None:
        super()._disown()
        self._lock = RLock()
        self._faults.renew_lock()
        if self._journal is not None:
            self._journal.disown()

    # --- training steps -------------------------------------------------------------------------------------------

    def _on_step(self) -> None:
        """Called by the adapter after each training step that it has seen."""
        with self._lock:
            if self._closed:
                return
            if self.is_copy:
                self._is_refused("a training step")
                self.close()
                return
            if self._expected is not None:
                self._compare_heads(self._expected)
            if self._intervals.step():
                window = self._settings.samples_per_epoch
                if window is not None and self._intervals.summary.seen >= window:
                    self.end_epoch()
                else:
                    self._notify()
            elif self._group.waiting:
                self._group.take_turns(self)

    # --- epochs ---------------------------------------------------------------------------------------------------

    def end_epoch(self) -> EpochReport:
        """Closes an epoch: waits for its scores, reports them, asks the stop rule, writes it all down.

        Of several processes (torch.distributed, jax.distributed), each must call it; all get the same report, but for its
        `step`, which each counts for itself.

        Raises:
            NoObservationsError: no training step has passed the probe since the last epoch.
        """
        if self._is_refused("end_epoch()"):
            return AlignmentSummary().report(epoch=len(self.history), step=self._intervals.steps - 1)
        with self._lock:
            if self._closed:
                raise InvalidInputError("end_epoch(): this monitor is closed; watch the model again")
            try:
                for path, other in self.heads.items():
                    try:
                        with other._lock:
                            other._end_epoch()
                    except NoObservationsError as error:  # a head that this epoch did not train
                        self._faults.record(f"head {path!r}", error)
                return self._end_epoch()
            finally:
                self._notify()

    def _end_epoch(self, *, partial: bool = False) -> EpochReport:
        self._intervals.gather()
        summary = self._intervals.summary if partial else self._adapter.reduce(self._intervals.summary)
        if not summary.seen:
            raise NoObservationsError(
                f"epoch {len(self.history)} has ended, but no training step has passed the probe. "
                f"{self._adapter.no_observation_hint()}"
            )
        report = summary.report(epoch=len(self.history), step=self._intervals.steps - 1)
        report = report.model_copy(update={"notes": (*report.notes, *self._faults.take_notes())})
        alert, withdrawn = None, False
        if partial:
            report = report.model_copy(update={"notes": (*report.notes, "closed before the end of the epoch")})
        else:
            report = report.model_copy(update={"notes": (*report.notes, *self._adapter.notes)})
            report, alert, withdrawn = self._rule.judge(report, self.history)
        self.history.append(report)
        self._intervals.begin_epoch(len(self.history))
        self._write(report, sync=True)
        if withdrawn and self.alert:
            logger.info("gwa_logging: epoch %s is clearly better: the stop alert is taken back", report.epoch)
            self.alert = None
        if alert and self._settings.early_stop:
            collapse = self._ledger.collapse() if self._settings.num_samples is not None else None
            if collapse:
                alert = alert.model_copy(update={"caveats": (*alert.caveats, collapse)})
            self.alert = alert
            logger.warning("gwa_logging: %s", alert.message)
            self._write(alert, sync=True)
            self._write_suspects()
            self._call_back(alert)
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
        """Returns True while a stop alert stands, whatever `EarlyStop.action` is: the caller decides what to do about it."""
        return self.alert is not None

    @property
    def _ends_training(self) -> bool:
        """Returns True if the user asked for training to be ended (`EarlyStop(action="stop")`) and a stop alert stands."""
        return self.should_stop and self._rule.settings.action == "stop"

    def plan(self, n: int) -> None:
        """Sets how many epochs the whole run is planned to have: the stop rule's warm-up is a share of it.

        `epochs(n)` does this itself; call it in a loop of your own.

        Raises:
            InvalidInputError: n is less than 1.
        """
        if n < 1:
            raise InvalidInputError(f"n={n}: expected at least 1 planned epoch")
        if not self._is_refused("plan()"):
            self._rule.planned = n

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
        self.plan(n)
        return iter(range(len(self.history), n)) if self.is_copy else self._epochs(n)

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
                if self._ends_training:
                    break
            for monitor in (self, *self.heads.values()):  # here are all processes; in `close` there may be one
                monitor._write_suspects()
            self._notify()
        finally:
            if bar is not None:
                bar.close()

    # --- results and state ----------------------------------------------------------------------------------------

    def suspects(self, k: int = SUSPECTS) -> list[Suspect]:
        """The k training samples that are most probably mislabelled, most suspect first. Waits for the device.

        Of several processes, each must call it: the ledger is added up over them.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        self._refuse_copy("suspects()")
        with self._lock:
            return self._ledger.suspects(k)[0]

    def label_quality(self) -> npt.NDArray[np.float64]:
        """How well each training sample's label is borne out, as cleanlab's label quality scores are: lower is more suspect.

        For `cleanlab.rank.find_top_issues(monitor.label_quality(), top=100)`, or a `label_score` column of your own. Waits for
        the device. Of several processes, each must call it.

        Returns:
            float64 [num_samples], in [0, 1]: (mean score + 1) / 2; NaN for samples never seen, which sorting puts last.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        self._refuse_copy("label_quality()")
        with self._lock:
            return np.clip((self._ledger.read("label_quality()").means + 1) / 2, 0, 1)

    def log_suspects(self, k: int = SUSPECTS, images: Any = None) -> list[Suspect]:
        """Writes the k most suspect samples into the journal, suspects.csv in the run's folder, and the trackers.

        That is done without asking, for 100 of them, at the stop alert, after `epochs`, and, of a single process, on `close`.
        Waits for the device. Of several processes, each must call it.

        Args:
            k: how many; the journal holds them all in one line.
            images: what gives a sample's picture by its id, `images[id]`: an array, or a data set whose items begin with the
                picture. See `gwa_logging.thumbnail.thumbnail`; one that fails is counted, and its suspect goes without.

        Returns:
            The suspects, as `suspects` does.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        if self._is_refused("log_suspects()"):
            return []
        found = self._log_suspects(k, images)
        self._notify()
        return found

    def _log_suspects(self, k: int, images: Any) -> list[Suspect]:
        with self._lock:
            if self._closed:
                raise InvalidInputError("log_suspects(): this monitor is closed; call it before close()")
            found, scored = self._ledger.suspects(k, images)
            step, epoch = self._intervals.steps - 1, self._intervals.epoch
            if self._journal is not None:
                record = SuspectsRecord(step=step, epoch=epoch, samples=scored, suspects=tuple(found))
                self._write(record, sync=True)
                self._write_csv(record)
            self._suspects_of = len(self.history)
        return found

    def _write_csv(self, record: SuspectsRecord) -> None:
        assert self.journal is not None
        try:
            (self.journal.parent / "suspects.csv").write_text(record.csv(), encoding="utf-8")
        except OSError as error:
            self._faults.record("suspects.csv", error.strerror)

    def _write_suspects(self) -> None:
        """Writes suspects if there is a ledger, and an epoch since they were written last: which all processes see alike."""
        if self._settings.num_samples is None or self._suspects_of == len(self.history):
            return
        try:
            self._log_suspects(SUSPECTS, None)
        except Exception as error:  # noqa: BLE001 - nobody has asked for it; training goes on
            self._faults.record("suspects", f"{type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, also in the middle of an epoch: JSON-able values, and the ledger's arrays, as
        tensors in PyTorch (`torch.save` and `torch.load` take it) and as NumPy in JAX. Waits for the device.

        Of several processes, each must call it, and all get the state of all of them together, but for their own step.
        """
        self._refuse_copy("state_dict()")
        with self._lock:
            heads = {path: other.state_dict() for path, other in self.heads.items()}
            taken, interval = self._intervals.hold()
            self._group.notify(self._deliveries)
            epoch = self._intervals.summary
            return MonitorState(
                head=HeadShape.of(self._adapter),
                processes=self._adapter.processes,
                step=self._intervals.steps,
                taken=taken,
                display_limit=self._intervals.display_limit,
                planned=self._rule.planned,
                stop=self._rule.state,
                history=self.history,
                alert=self.alert,
                epoch=self._adapter.reduce(epoch) if self._intervals.in_epoch else epoch,
                interval=interval,
                ledger=None if self._settings.num_samples is None else self._adapter.ledger(),
                heads=heads,
            ).plain(self._adapter)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, in a monitor that has just been made. Nothing is changed if the state does not fit.

        Steps and epochs count on. The journal is a new one, and begins where the state ends. A tracker's run that goes on
        (`watch(run=)`) is asked what it has of the steps after the state, if the earlier run went on after it was saved: it is
        not sent again.

        Of several processes, each must call it, with the state of any of them.

        Raises:
            InvalidInputError: the state is of another version, head or number of processes, or its ledger of another size.
        """
        if self._is_refused("load_state_dict()"):
            return
        mine = self._fitting(state)
        others = {path: other._fitting(mine.heads[path]) for path, other in self.heads.items()}
        self._go_on(mine)
        for path, other in self.heads.items():
            other._go_on(others[path])

    def _fitting(self, state: Any) -> MonitorState:
        read = MonitorState.from_plain(state)
        read.check(self._adapter, self._settings.num_samples, set(self.heads))
        return read

    def _go_on(self, state: MonitorState) -> None:
        with self._lock:
            self._gather()
            if state.ledger is not None:
                self._adapter.load_ledger(state.ledger)
            self.history, self.alert = state.history, state.alert
            self._rule.state, self._rule.planned = state.stop, state.planned
            self._expected = None if HeadShape.of(self._adapter) else state.head
            # All processes may load the state of one of them: its samples must count once.
            epoch = state.epoch if self._adapter.writes else AlignmentSummary()
            self._intervals.go_on(
                state.step,
                len(state.history),
                epoch,
                state.display_limit,
                state.taken,
                state.interval,
                in_epoch=bool(state.epoch.seen),
            )
            for delivery in self._deliveries:
                delivery.resume()

    def _compare_heads(self, expected: HeadShape) -> None:
        """Looks at the head as soon as the first step has told which it is."""
        self._expected, found = None, HeadShape.of(self._adapter)
        if found is not None and not found.is_that_of(expected):
            self._faults.record(
                "state",
                f"it was saved with the head {expected}, this model's is {found}: what was recorded before does not belong to "
                "what comes now",
            )

    @property
    def faults(self) -> dict[str, int]:
        """How often each kind of fault has happened; empty if none has."""
        return self._faults.counts

    def __repr__(self) -> str:
        last = str(self.history[-1]) if self.history else "no epoch yet"
        return f"<Monitor of {self._adapter.head}; {last}>"

    def _repr_html_(self) -> str:
        return monitor_html(
            name=self._settings.name,
            head=self._adapter.head,
            history=list(self.history),
            alert=self.alert,
            journal=self.journal,
            faults=self.faults,
            others={
                path: str(other.history[-1]) if other.history else "no epoch yet" for path, other in self.heads.items()
            },
        )

    # --- the end --------------------------------------------------------------------------------------------------

    def _refuse_copy(self, call: str) -> None:
        """For calls that read the device, whose state a fork does not copy.

        Raises:
            InvalidInputError: this is a copy in a forked process.
        """
        if self.is_copy:
            raise InvalidInputError(f"{call}: the monitor belongs to process {self._owner}; call it there")

    def _notify(self) -> None:
        """Notifies the backends of all heads about new records. Blocks for `delivery.MAX_BLOCKING` at most."""
        for monitor in (self, *self.heads.values()):
            self._group.notify(monitor._deliveries)
        self._group.take_turns(self)

    def flush(self, timeout: float = CLOSE_WITHIN) -> bool:
        """Sends on everything seen so far. Waits for the device, and at most `timeout` seconds for the backends.

        Returns:
            Whether the journal and every backend have everything.
        """
        if self._is_refused("flush()"):
            return False
        monitors = (self, *self.heads.values())
        for monitor in monitors:
            with monitor._lock:
                monitor._intervals.gather()
        everything = [delivery for monitor in monitors for delivery in monitor._deliveries]
        taken = wait_for(everything, monotonic() + timeout)
        return taken and all(monitor._journal is None or monitor._journal.is_complete for monitor in monitors)

    def close(self) -> None:
        """Takes the probe off, reports an epoch in progress, ends the backends. Never raises; a second call does nothing.

        Waits at most 10 s for the backends; what a tracker has not taken by then stays in the journal.
        """
        if self._is_refused("close()"):
            for monitor in (*self.heads.values(), self):
                monitor._closed = True
                monitor._adapter.close()
            return
        close_all([self])

    def _finish(self) -> bool:
        """Writes the end into the journal, and takes the probe off; whether there was anything to end."""
        with self._lock:
            if self._closed:
                return False
            try:
                self._intervals.gather()
                if self._intervals.summary.seen:
                    self._end_epoch(partial=True)
                if self._adapter.processes == 1:  # of several, the others may be gone
                    self._write_suspects()
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
        return True

    def _begin_close(self, deadline: float) -> None:
        """Has the backends closed; that of a run which other heads share, after theirs."""
        for delivery in self._deliveries:
            others = [other for head in self.heads.values() for other in head._deliveries]
            delivery.begin_close(deadline, [o for o in others if o.backend.name == delivery.backend.name])

    def _end_close(self) -> None:
        """Waits until the backends are closed, and says what they lack; closes the journal."""
        for delivery in self._deliveries:
            if shortfall := delivery.shortfall():
                name, folder = delivery.backend.name, self.journal and self.journal.parent
                logger.warning(
                    "gwa_logging: backend %s %s. To send what it lacks: gwa-logging replay %s --backend %s",
                    *(name, shortfall, folder, name),
                )
        self._group.remove(self._deliveries)
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.close()
        return False


def close_all(monitors: Iterable[Monitor]) -> None:
    """Closes monitors, and those of their further heads, with one deadline for all backends. Never raises."""
    families = [(*monitor.heads.values(), monitor) for monitor in monitors]
    closing = [member for family in families for member in family if member._finish()]
    deadline = monotonic() + CLOSE_WITHIN
    for member in closing:
        member._begin_close(deadline)
    for member in closing:
        member._end_close()


def _progress_bar(total: int, done: int) -> Any:
    """A tqdm bar, or None if tqdm is not installed: it is a comfort, not a dependency."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, initial=done, unit="epoch", desc="GWA")
