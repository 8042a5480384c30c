"""Recording: everything that happens to the scores of one head, from a training step to the journal and the trackers."""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from threading import RLock
from time import monotonic
from typing import Any

from gwa_logging._announce import announce
from gwa_logging._closing_report import ClosingReport
from gwa_logging._run_folder import RunFolder
from gwa_logging.agreement import EpochAgreement
from gwa_logging.best_weights import BestWeights
from gwa_logging.checkpoint import HeadShape
from gwa_logging.delivery import Delivery, DeliveryGroup
from gwa_logging.early_stop import StopRule, withdrawal_of
from gwa_logging.errors import InvalidInputError, NoObservationsError
from gwa_logging.faults import Faults
from gwa_logging.interval_recorder import IntervalRecorder
from gwa_logging.journal import Journal
from gwa_logging.journal_writer import JournalWriter
from gwa_logging.look import EpochLook
from gwa_logging.protocols import Adapter, Backend
from gwa_logging.records import AnyRecord, CloseRecord, EpochReport, RunRecord, StopAlert, Suspect, TrackerRunRef
from gwa_logging.settings import EarlyStop, WatchSettings
from gwa_logging.suspects import SUSPECTS, SuspectFinder

logger = logging.getLogger("gwa_logging")


class Recording:
    """Records one head: closes its epochs, applies the stop rule and writes everything to the journal.

    Attributes:
        settings: the arguments of `watch`.
        name: prefix of the metric keys.
        adapter: watches the head.
        journal: None in a process that does not write.
        writer: writes it in a thread.
        faults: counts errors.
        group: the deliveries of all heads of the model.
        deliveries: those of this head, one for each backend.
        history, alert: as in `Monitor`.
        rule: the stop rule and its state.
        intervals: turns steps into interval records.
        suspects: reads the ledger.
        look, agreement: compute the statistics of each epoch that need more than its scores.
        best_weights: keeps the weights of the best epoch; None if they are not kept.
        is_taken: returns True if another monitor writes to this run of a backend under this name.
        lock: held while a step or a call of the user changes anything.
        has_state: True if a state was taken or restored.
        is_resumable: True if `finish` must leave the epoch and the interval in progress to the process that resumes.
        is_closed: True after `finish`.
        closing_report: the report to write after `finish`; None if the run has no epoch, or another process writes.
    """

    def __init__(
        self,
        settings: WatchSettings,
        *,
        name: str,
        adapter: Adapter,
        faults: Faults,
        backends: Sequence[Backend] = (),
        journal: Journal | None = None,
        folder: RunFolder | None = None,
        group: DeliveryGroup | None = None,
        best_weights: BestWeights | None = None,
        is_taken: Callable[[str, TrackerRunRef], bool] = lambda backend, run: False,
    ) -> None:
        """Takes over the adapter, which has not been started, the backends and the journal: `_all_heads.close` closes them.

        Args:
            settings, name, adapter, faults, journal: see the class.
            backends: where the journal is delivered.
            folder: the journal's folder.
            group: of the first head, if this is a further head of the same model.
            best_weights, is_taken: see the class.
        """
        self.settings, self.name, self.adapter, self.journal, self.faults = settings, name, adapter, journal, faults
        self.writer = JournalWriter(journal, faults)
        self.history: list[EpochReport] = []
        self.alert: StopAlert | None = None
        self.rule = StopRule(settings.early_stop or EarlyStop())
        # A window closes where an interval ends, so with windows the intervals must not grow.
        grow = settings.samples_per_epoch is None
        self.intervals = IntervalRecorder(adapter, settings.log_every_n_steps, self.write, faults, grow=grow)
        self.suspects = SuspectFinder(adapter, settings.num_samples, settings.labels, faults)
        self.look = EpochLook(adapter, settings, faults, self.suspects.read)
        self.agreement = EpochAgreement(self.suspects.read, settings.early_stop, faults)
        self.best_weights = best_weights
        self.is_taken = is_taken
        self.lock = RLock()
        self.has_state = self.is_resumable = self.is_closed = False
        self.closing_report: ClosingReport | None = None
        self._folder = folder
        self._pauses = 0
        self._suspects_written_at = -1  # number of epochs at that time
        self._head_at_start = adapter.head
        self.awaits_first_step = True
        self._restored_head: HeadShape | None = None  # of a loaded state, until the present head is known
        self.write(self.run_record(backends))
        self.writer.drain()
        self.group = group or DeliveryGroup()
        self.deliveries = [Delivery(backend, journal, faults) for backend in backends] if journal else []
        for delivery in self.deliveries:
            self.group.add(delivery)
        self._notify_when_written()

    def run_record(self, backends: Sequence[Backend], created: str | None = None) -> RunRecord:
        """The first line of the journal, for a run that was started now or at `created`."""
        return RunRecord(
            name=self.name,
            head=self.adapter.head,
            created=created or datetime.now(UTC).isoformat(timespec="seconds"),
            settings=self.settings.to_dict(),
            places={backend.name: backend.run_ref for backend in backends if not backend.is_notifier},
            classes=self.adapter.shape[1] if self.adapter.shape else None,
        )

    def move_to(self, journal: Journal) -> None:
        """Continues in another journal. The earlier one is closed, and removed if it is in another folder.

        The deliveries must be replaced, see `replace_deliveries`.
        """
        earlier, self.journal = self.journal, journal
        writer, self.writer = self.writer, JournalWriter(journal, self.faults)
        self.writer.listeners += writer.listeners
        if earlier is not None:
            is_closed = writer.close()
            if is_closed and self._folder is not None and earlier.path != journal.path:
                self._folder.remove(earlier.path)
                self._folder = None
        if self.best_weights is not None:
            self.best_weights.move_to(journal.path.parent)

    def replace_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Delivers the journal with other deliveries. The earlier ones have been retired or closed."""
        earlier = [delivery for delivery in self.deliveries if delivery not in deliveries]
        for delivery in deliveries:
            if delivery not in self.deliveries:
                self.group.add(delivery)
        self.group.remove(earlier)
        self.deliveries[:] = deliveries
        self._notify_when_written()

    def _notify_when_written(self) -> None:
        threaded = (delivery for delivery in self.deliveries if delivery.backend.threaded)
        self.writer.listeners[:] = [delivery.notify for delivery in threaded]

    @property
    def trackers(self) -> dict[str, Delivery]:
        """The deliveries to trackers that `watch(backend=)` named, by that name."""
        wanted = [backend for backend in self.settings.backend if backend != "local"]
        pairs = zip(wanted, self.deliveries, strict=False)  # after these come the notifiers
        return {name: delivery for name, delivery in pairs if isinstance(name, str)}

    def expect_head(self, head: HeadShape | None) -> None:
        """Has the next step compare the head with that of a loaded state."""
        self._restored_head, self.awaits_first_step = head, True

    def write(self, record: AnyRecord, *, sync: bool = False) -> None:
        """Appends a record to the journal; `sync` waits until it is on the disk."""
        self.writer.append(record, sync=sync)

    def disown(self) -> None:
        """In a forked process: replaces the locks, which a thread of the parent may have held, and leaves the journal alone."""
        self.lock = RLock()
        self.faults.renew_lock()
        if self.journal is not None:
            self.journal.disown()

    @property
    def last_report(self) -> str:
        """The last epoch in one line."""
        return str(self.history[-1]) if self.history else "no epoch yet"

    # --- steps and epochs -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Counts a training step. Does not wait for the device. Returns True if a record was written."""
        if self.awaits_first_step:
            self._check_head()
        return self.intervals.step()

    @property
    def is_paused(self) -> bool:
        """Returns True between `pause` and `resume`."""
        return self._pauses > 0

    def pause(self) -> None:
        """Stops counting steps until `resume` has been called as often as this."""
        self._pauses += 1
        if self._pauses == 1:
            self.adapter.pause(True)

    def resume(self) -> None:
        """Ends the last `pause`."""
        self._pauses -= 1
        if self._pauses == 0:
            self.adapter.pause(False)

    @property
    def window_is_full(self) -> bool:
        """Returns True if the samples of a window (`samples_per_epoch`) have been seen."""
        window = self.settings.samples_per_epoch
        return window is not None and self.intervals.summary.seen >= window

    def _check_head(self) -> None:
        """Examines the head at the first step, when it is known."""
        self.awaits_first_step = False
        restored, self._restored_head = self._restored_head, None
        head = HeadShape.of(self.adapter)
        if head is None:
            return
        if restored is not None and not head.matches(restored):
            self.faults.record(
                "state",
                f"it was saved with the head {restored}, this model's is {head}: the records before and after it do not "
                "belong together",
            )
        if self.journal is not None and self.adapter.head != self._head_at_start:
            announce(f"watching {self.adapter.head}")
        if self.journal is not None and head.classes == 1:
            announce(
                f"head {head.path!r} has a single logit: alignment is meaningful with binary cross-entropy, and meaningless "
                "with a regression loss"
            )

    def end_epoch(self, *, partial: bool = False, params: Any = None) -> EpochReport:
        """Closes an epoch; with `partial` one that closing interrupts, in which no other process takes part.

        `params` are the parameters to keep if it is the best epoch (JAX).

        Raises:
            NoObservationsError: it had no step.
        """
        self.intervals.flush()
        summary = self.intervals.summary if partial else self.adapter.reduce(self.intervals.summary)
        if not summary.seen:
            raise NoObservationsError(
                f"epoch {len(self.history)} has ended, but no training step has passed the probe. "
                f"{self.adapter.no_observation_hint()}"
            )
        report = summary.report(epoch=len(self.history), step=self.intervals.steps - 1)
        notes = ("closed before the end of the epoch",) if partial else self.adapter.notes
        report = report.model_copy(update={"notes": (*report.notes, *self.faults.take_notes(), *notes)})
        alert, withdrawn = None, False
        if not partial:
            consensus = self.look.end_epoch(self.pause, self.resume)
            agreement = self.agreement.end_epoch(has_scores=report.count > 0)
            report, alert, withdrawn = self.rule.judge(report, self.history, consensus, agreement)
        alert = alert if self.settings.early_stop else None
        stop = not withdrawn and (alert or self.alert) is not None
        report = report.model_copy(update={"stop": stop})
        self.history.append(report)
        self.intervals.begin_epoch(len(self.history))
        self.write(report, sync=True)
        if self.best_weights is not None and not partial:
            self.best_weights.end_epoch(report.epoch, params, is_best=report.is_best)
        if withdrawn and self.alert:
            withdrawal, self.alert = withdrawal_of(self.alert, report), None
            self.suspects.unfreeze()
            logger.info("gwa_logging: %s", withdrawal.message.removeprefix("GWA: "))
            self.write(withdrawal, sync=True)
        if alert:
            self._raise_alert(alert)
        return report

    def _raise_alert(self, alert: StopAlert) -> None:
        alert = self.suspects.freeze_at(alert)
        if self.best_weights is not None and (place := self.best_weights.sentence(alert.best_epoch)):
            alert = alert.model_copy(update={"message": alert.message + place})
        self.alert = alert
        logger.warning("gwa_logging: %s", alert.message)
        self.write(alert, sync=True)
        self.write_suspects()
        if self.settings.on_alert is not None:
            try:
                self.settings.on_alert(alert)
            except Exception as error:  # noqa: BLE001 - the user's callback must not end the training
                self.faults.record("on_alert", f"{type(error).__name__}: {error}")

    # --- suspects ---------------------------------------------------------------------------------------------------

    def log_suspects(self, k: int, images: Any) -> list[Suspect]:
        """Writes the suspects to the journal and to suspects.csv. See `Monitor.log_suspects`."""
        with self.lock:
            if self.is_closed:
                raise InvalidInputError("log_suspects(): this monitor is closed; call it before close()")
            record = self.suspects.record(k, images, step=self.intervals.steps - 1, epoch=self.intervals.epoch)
            if self.journal is not None:
                self.write(record, sync=True)
                self.suspects.write_csv(record, self.journal.path.parent)
            self._suspects_written_at = len(self.history)
        return list(record.suspects)

    def write_suspects(self) -> None:
        """Logs the suspects if there is a ledger and the list may have changed since the last time. All processes agree."""
        frozen = self.suspects.frozen
        if not self.suspects.has_ledger or self._suspects_written_at >= (
            frozen.epoch + 1 if frozen else len(self.history)
        ):
            return
        try:
            self.log_suspects(SUSPECTS, None)
        except Exception as error:  # noqa: BLE001 - training must continue
            self.faults.record("suspects", f"{type(error).__name__}: {error}")

    # --- the end ----------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """In a forked process: removes the probe and writes nothing."""
        self.is_closed = True
        self.adapter.close()

    def finish(self) -> bool:
        """Writes the end of the run to the journal and removes the probe. Returns False if that was done before."""
        with self.lock:
            if self.is_closed:
                return False
            try:
                if self.is_resumable:
                    self.intervals.peek()
                else:
                    self._finish_epoch()
            except Exception as error:  # noqa: BLE001 - closing must continue
                self.faults.record("close", f"{type(error).__name__}: {error}")
            self.is_closed = True
            self.adapter.close()
        if self.is_resumable:
            self.writer.drain()
        else:
            self._write_close()
        if self.journal is not None and self.history and not self._is_unused:
            self.closing_report = ClosingReport(self.journal.path.parent, self.faults)
        return True

    def _finish_epoch(self) -> None:
        self.intervals.flush()
        if self.intervals.summary.seen:
            self.end_epoch(partial=True)
        if self.adapter.processes == 1:  # in a distributed run the other processes may be gone
            self.write_suspects()

    def _write_close(self) -> None:
        state = self.rule.state
        self.write(
            CloseRecord(
                epochs=len(self.history),
                steps=self.intervals.steps,
                best_epoch=state.best_epoch if state.best_epoch >= 0 else None,
                best_value=state.best,
                faults=self.faults.counts,
            ),
            sync=True,
        )

    @property
    def _is_unused(self) -> bool:
        """Returns True if the journal of a closed run has only its RunRecord and, unless it is resumable, its CloseRecord."""
        return self.journal is not None and self.journal.count <= (1 if self.is_resumable else 2)

    def begin_close(self, deadline: float, others: "Sequence[Recording]") -> None:
        """Starts closing the backends, each after the report, which it may upload.

        A backend whose run the recordings `others` share is closed after theirs.
        """
        report = self.closing_report.done if self.closing_report else None
        shared = [delivery for other in others for delivery in other.deliveries]
        for delivery in self.deliveries:
            delivery.begin_close(deadline, [d for d in shared if d.backend.name == delivery.backend.name], report)

    def end_close(self, deadline: float) -> None:
        """Waits until the report is written and the backends are closed; reports both, and closes the journal."""
        is_delivered = True
        for delivery in self.deliveries:
            if shortfall := delivery.shortfall():
                is_delivered = False
                logger.warning("gwa_logging: backend %s %s. %s", delivery.backend.name, shortfall, delivery.remedy)
        if self.closing_report is not None:
            self.closing_report.end(deadline)
        if self.best_weights is not None:
            self.best_weights.wait(max(0.0, deadline - monotonic()))
        self.group.remove(self.deliveries)
        is_closed = self.writer.close()
        if self.journal is not None and self._folder is not None and self._is_unused and is_delivered and is_closed:
            self._folder.remove(self.journal.path)
