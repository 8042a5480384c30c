"""Monitor: what `watch` returns. Its calls act on the `Recording` of each watched head.

A training step never waits for the device: a summary is copied to the host while training continues, and a later step picks
it up. Only `end_epoch`, `flush`, `close`, `state_dict` and what reads the ledger (`suspects`, `log_suspects`,
`label_quality`, the stop alert) wait for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gwa_logging import _all_heads
from gwa_logging._closer import closer
from gwa_logging._epoch_bar import EpochBar
from gwa_logging._gradient_calls import GradientCalls
from gwa_logging._look_calls import LookCalls
from gwa_logging._recording_state import state_of
from gwa_logging._weights_calls import WeightsCalls
from gwa_logging.errors import InvalidInputError
from gwa_logging.exports import SuspectsTable
from gwa_logging.ledger import TaggedBatch
from gwa_logging.recording import Recording
from gwa_logging.records import EpochReport, StopAlert, Suspect
from gwa_logging.report.notebook import monitor_html
from gwa_logging.summary import AlignmentSummary
from gwa_logging.suspects import SUSPECTS


class Monitor(GradientCalls, LookCalls, WeightsCalls):
    """Watches one model. Created by `gwa_logging.watch`.

    A monitor belongs to the process that created it. A copy in a forked process can be read (`history`, `alert`, `journal`,
    `should_stop`, `faults`); all other calls on it do nothing, with one warning.

    Attributes:
        heads: monitors of the further heads, by path. They follow the epochs of this one.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.heads: dict[str, Monitor] = {}
        self._recording = recording
        self._adapter, self._faults, self._deliveries = recording.adapter, recording.faults, recording.deliveries
        _all_heads.notify(self._recordings())

    @property
    def journal(self) -> Path | None:
        """Path of the run's journal; the report is written to the same folder. None in a process that does not write."""
        journal = self._recording.journal
        return journal.path if journal else None

    @property
    def history(self) -> list[EpochReport]:
        """Reports of the epochs so far."""
        return self._recording.history

    @property
    def alert(self) -> StopAlert | None:
        """The current StopAlert, or None. A clearly better epoch withdraws it."""
        return self._recording.alert

    @property
    def faults(self) -> dict[str, int]:
        """How often each kind of fault has happened; empty if there was none."""
        return self._faults.counts

    @property
    def _closed(self) -> bool:
        return self._recording.is_closed

    def _recordings(self) -> list[Recording]:
        """The recordings of all heads, the first head first."""
        return [self._recording, *(other._recording for other in self.heads.values())]

    def _disown(self) -> None:
        super()._disown()
        self._recording.disown()

    # --- training steps: nothing here waits for the device ----------------------------------------------------------

    def update(
        self, scores: Any, sample_ids: Any = None, *, weights: Any = None, predicted: Any = None, params: Any = None
    ) -> None:
        """Adds the scores of one training step (JAX, and PyTorch loops that compute them). Does not wait for the device.

        Args:
            scores: float [...] on the device, as returned by `value_and_grad`; values that are not finite count as
                samples without a score. In JAX also a `gwa_logging.integrations.jax.AlignmentState`, for loops inside scan.
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`), or None; see `tag` for documents and mixed samples.
            weights: the shares of mixed samples, see `tag`.
            predicted: int [batch], the predicted classes for the list of suspects, for example from the loss's aux.
            params: the parameters after this step, a pytree of arrays, for `watch(keep_best=)` (JAX).

        Raises:
            InvalidInputError: scores, ids or params have a wrong type, shape or dtype, or are tracers (call it outside jit).
        """
        if sample_ids is None and not (weights is None and predicted is None):
            raise InvalidInputError("weights and predicted are entered by sample id: update(scores, sample_ids, ...)")
        if not self._closed and not self._is_refused("update()") and not self._recording.is_paused:
            if params is not None:
                self._kept("update(params=)").observe(params)
            self._adapter.observe(scores, None if sample_ids is None else TaggedBatch(sample_ids, weights, predicted))

    def tag(self, sample_ids: Any, weights: Any = None) -> None:
        """Sets which samples the next forward pass processes (PyTorch).

        For inputs that mix several samples (mixup, CutMix), give all ids and their weights; the score is divided by weight:
        `tag(torch.stack([ids, ids[order]], 1), weights=(lam, 1 - lam))`.

        All calls of the head in one forward pass of the model get these ids. If its logits are [batch, rows, classes], there
        may be an id for each row or for each input. Ids [batch, positions] name the document of each position, -1 for none.
        Rows without a gradient then count as no samples. Of several rows of an input or document, the mean is entered,
        weighted by the norms of their gradients.

        If the backward pass repeats the head's forward pass (reentrant checkpointing of the whole model), and several passes
        precede one backward, only the last keeps its ids.

        Args:
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`), or [batch, positions], or with weights [batch, m].
            weights: float [m], the same for every sample of the batch, or [batch, m]; at least 0.
        """
        if self.is_copy and self._is_refused("tag()"):
            return
        for recording in self._recordings():
            recording.adapter.tag(TaggedBatch(sample_ids, weights))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in the body of a `with` statement: neither passes, compiled or not, nor `update`.

        For passes that are not training, such as those that create adversarial examples, or a generator's step through a
        watched discriminator. Ids from `tag` are kept for the next counted pass. Applies to all heads and threads, and nests.
        """
        for recording in self._recordings():
            recording.pause()
        try:
            yield
        finally:
            for recording in self._recordings():
                recording.resume()

    def _on_step(self) -> None:
        """Called by the adapter after each observed training step."""
        recording = self._recording
        with recording.lock:
            if recording.is_closed:
                return
            if self.is_copy:
                self._is_refused("a training step")
                self.close()
            elif recording.step():
                if recording.window_is_full:
                    self.end_epoch()
                else:
                    _all_heads.notify(self._recordings())
            elif recording.group.waiting:
                recording.group.take_turns(id(recording))

    # --- epochs -----------------------------------------------------------------------------------------------------

    def end_epoch(self, params: Any = None) -> EpochReport:
        """Closes an epoch: waits for its scores, reports them, applies the stop rule and writes the results.

        In a distributed run (torch.distributed, jax.distributed) every process must call this. All get the same report,
        except that `step` is each process's own.

        Args:
            params: the parameters, a pytree of arrays, for `watch(keep_best=True)`, if `update` does not receive them (JAX).

        Raises:
            NoObservationsError: no training step has passed the probe since the last epoch.
            InvalidInputError: the monitor is closed, or the parameters cannot be kept.
        """
        if self._is_refused("end_epoch()"):
            return AlignmentSummary().report(epoch=len(self.history), step=self._recording.intervals.steps - 1)
        with self._recording.lock:
            if self._closed:
                raise InvalidInputError(
                    "end_epoch(): this monitor is closed: by close(), or by a later watch() because its model was deleted; "
                    "watch the model again"
                )
            self._check_params("end_epoch(params=)", params)
            try:
                return _all_heads.end_epoch(self._recordings(), params)
            finally:
                _all_heads.notify(self._recordings())

    @property
    def should_stop(self) -> bool:
        """Returns True while a stop alert stands, whatever `EarlyStop.action` is: the caller decides what to do about it."""
        return self.alert is not None

    @property
    def _ends_training(self) -> bool:
        """Returns True if the user asked for training to be ended (`EarlyStop(action="stop")`) and a stop alert stands."""
        return self.should_stop and self._recording.rule.settings.action == "stop"

    def plan(self, n: int) -> None:
        """Sets how many epochs the whole run is planned to have: the stop rule's warm-up is a share of it.

        `epochs(n)` calls this itself; call it in your own loop.

        Raises:
            InvalidInputError: n is less than 1.
        """
        if n < 1:
            raise InvalidInputError(f"n={n}: expected at least 1 planned epoch")
        if not self._is_refused("plan()"):
            self._recording.rule.planned = n

    def epochs(self, n: int) -> Iterator[int]:
        """Yields the epoch numbers from the current one to n - 1, and closes each epoch after the loop's body.

        Shows a progress bar if tqdm is installed. Ends early after a stop alert if the rule's action is "stop". An epoch
        that the loop's body has closed is not closed again.

        Args:
            n: number of epochs planned for the whole run; the stop rule's warm-up is a share of it.

        Raises:
            InvalidInputError: n is less than 1.
            NoObservationsError: an epoch had no training step that passed the probe.
        """
        self.plan(n)
        return iter(range(len(self.history), n)) if self.is_copy else self._epochs(n)

    def _epochs(self, n: int) -> Iterator[int]:
        with EpochBar(n, done=len(self.history)) as bar:
            for epoch in range(len(self.history), n):
                yield epoch
                if len(self.history) == epoch:
                    self.end_epoch()
                bar.advance(self.history[-1])
                if self._ends_training:
                    break
            for recording in self._recordings():  # all processes are here; in `close` there may be only one
                recording.write_suspects()
            _all_heads.notify(self._recordings())

    # --- suspects ---------------------------------------------------------------------------------------------------

    def suspects(self, k: int = SUSPECTS, *, whole_run: bool = False) -> list[Suspect]:
        """The k training samples that are most probably mislabelled, most suspect first. Waits for the device.

        While a stop alert stands, only the scores up to it count, because later ones show what the model has memorised. In a
        distributed run every process must call this, because each may keep a part of the ledger.

        Args:
            k: number of suspects.
            whole_run: True counts the scores after a stop alert too.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        self._refuse_copy("suspects()")
        with self._recording.lock:
            return self._recording.suspects.suspects(k, whole_run=whole_run)

    def suspects_table(self, *, whole_run: bool = False) -> SuspectsTable:
        """All samples with mean score, times seen, label and predicted class, for `gwa_logging.exports`. As `suspects`."""
        self._refuse_copy("suspects_table()")
        with self._recording.lock:
            return self._recording.suspects.table(whole_run=whole_run)

    def label_quality(self, *, whole_run: bool = False) -> npt.NDArray[np.float64]:
        """How well training supports each sample's label, like cleanlab's label quality scores: lower is more suspect.

        For `cleanlab.rank.find_top_issues(monitor.label_quality(), top=100)`, or your own `label_score` column. Waits for
        the device. In a distributed run every process must call this. `whole_run` as in `suspects`.

        Returns:
            float64 [num_samples], in [0, 1]: (mean score + 1) / 2; NaN for samples never seen, which sorting puts last.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        self._refuse_copy("label_quality()")
        with self._recording.lock:
            return self._recording.suspects.label_quality(whole_run=whole_run)

    def log_suspects(self, k: int = SUSPECTS, images: Any = None) -> list[Suspect]:
        """Writes the k most suspect samples to the journal, to suspects.csv in the run's folder, and to the trackers.

        This happens automatically, for 100 of them, at the stop alert, after `epochs`, and, in a run of a single process, on
        `close`. Waits for the device. In a distributed run every process must call this.

        Args:
            k: number of suspects; the journal holds all of them in one line.
            images: gives a sample's picture by its id, `images[id]`: an array, or a data set whose items begin with the
                picture. See `gwa_logging.thumbnail.thumbnail`. If one fails, it is counted and the suspect has no picture.

        Returns:
            The suspects, as `suspects` does.

        Raises:
            InvalidInputError: there is no ledger: `watch(..., num_samples=N)`.
        """
        if self._is_refused("log_suspects()"):
            return []
        suspects = self._recording.log_suspects(k, images)
        _all_heads.notify(self._recordings())
        return suspects

    def state_dict(self, *, whole_ledger: bool = True) -> dict[str, Any]:
        """Everything needed to resume, also in the middle of an epoch. Waits for the device.

        In a distributed run every process must call this; all get the state of all processes together, except that the step
        is each process's own.

        Args:
            whole_ledger: False leaves each process its own part of the ledger, for ledgers that do not fit into the memory of
                one host. Then each process must save its state to a file of its own, and load it from there.

        Returns:
            JSON-able values, and the ledger's arrays: tensors in PyTorch (for `torch.save` and `torch.load`), NumPy in JAX.
        """
        self._refuse_copy("state_dict()")
        with self._recording.lock:
            heads = {path: other.state_dict(whole_ledger=whole_ledger) for path, other in self.heads.items()}
            return state_of(self._recording, heads, whole_ledger=whole_ledger)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict`, in a new monitor. Changes nothing if the state does not fit.

        Steps and epochs continue to count. The journal, the report and the trackers' runs of the state are continued, as far as
        they can be found: the journal in `directory`, a tracker's run unless `watch(run=)` or an active run names another one.
        What the trackers already have is not sent again. See "Restarts" in the documentation.

        In a distributed run every process must call this, with the state of rank 0 for the journal to be continued.

        Raises:
            InvalidInputError: the version, head, number of processes or size of the ledger differs from the state's.
        """
        if self._is_refused("load_state_dict()"):
            return
        _all_heads.restore(self._recordings(), state)
        _all_heads.notify(self._recordings())

    def __repr__(self) -> str:
        return f"<Monitor of {self._adapter.head}; {self._recording.last_report}>"

    def _repr_html_(self) -> str:
        return monitor_html(
            name=self._recording.settings.name,
            head=self._adapter.head,
            history=list(self.history),
            alert=self.alert,
            journal=self.journal,
            faults=self.faults,
            others={path: other._recording.last_report for path, other in self.heads.items()},
        )

    def flush(self, timeout: float = _all_heads.CLOSE_WITHIN) -> bool:
        """Delivers everything seen so far. Waits for the device, and at most `timeout` seconds for the backends.

        Returns:
            True if the journal and every backend have everything.
        """
        if self._is_refused("flush()"):
            return False
        return _all_heads.flush(self._recordings(), timeout)

    def close(self, *, resumable: bool = False) -> None:
        """Removes the probe, reports an epoch in progress, writes report.html if plotly is installed, and closes the backends.

        Never raises; a second call does nothing. Waits at most 10 s for the report and the backends; what a tracker has not
        accepted by then remains in the journal. A run without any training step leaves no journal.

        Args:
            resumable: True if another process will resume from a `state_dict` of this moment, as after a preemption. Then the
                epoch in progress is not reported, so that its complete report is the only one. The same happens if an
                exception ends the program or the `with` statement after a call of `state_dict`.
        """
        if self._is_refused("close()"):
            for recording in self._recordings():
                recording.abandon()
        else:
            for recording in self._recordings():
                recording.is_resumable = resumable
            _all_heads.close([self._recordings()])

    def __del__(self) -> None:
        if not self._closed and not self.is_copy:
            closer.close_later(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(resumable=self._recording.has_state and kind is not None and issubclass(kind, Exception))
