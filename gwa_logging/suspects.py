"""Finds the training samples that are probably mislabelled, in the per-sample ledger.

A sample with a low mean score over the run is suspect: its gradient keeps opposing the direction in which the other samples
push the head. Once the model memorises wrong labels, the scores of these samples rise. So a stop alert freezes the ranking, and
later scores do not change it.

The processes of a distributed run may each keep a part of the ledger (`gwa_logging.ledger.LedgerPart`). Then each finds the
suspects and counts of its part, and only those are exchanged.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.agreement import PastScores
from gwa_logging.class_pairs import concentration, count_pairs
from gwa_logging.document_details import unpack
from gwa_logging.errors import InvalidInputError
from gwa_logging.exports import SuspectsTable
from gwa_logging.faults import Faults
from gwa_logging.ledger import UNKNOWN, FrozenLedger, LedgerPart, check_number, lowest, record_invalid_ids
from gwa_logging.ledger_state import LedgerState
from gwa_logging.protocols import Adapter
from gwa_logging.records import StopAlert, Suspect, SuspectsRecord
from gwa_logging.thumbnail import thumbnail

COLLAPSED = 0.9
"""A model counts as collapsed if it predicts one class for at least this share of the samples."""

SUSPECTS = 100
"""Number of suspects that are written without being asked for."""


class SuspectFinder:
    """Reads the ledger of one monitor, and reports samples that were entered wrongly as faults.

    Attributes:
        frozen: the ledger at the stop alert that stands; None if there is none.
    """

    def __init__(
        self, adapter: Adapter, num_samples: int | None, labels: npt.NDArray[np.integer[Any]] | None, faults: Faults
    ) -> None:
        self._adapter = adapter
        self._num_samples = num_samples
        self._labels = labels
        self._faults = faults
        self.frozen: FrozenLedger | None = None
        self._untagged = 0  # samples without ids that have been reported

    @property
    def has_ledger(self) -> bool:
        """Returns True if the run has a per-sample ledger."""
        return self._num_samples is not None

    def read(self, caller: str) -> LedgerPart:
        """What this process keeps of the ledger. Waits for the device. In a distributed run every process must call this.

        Args:
            caller: the user's call, for the error.

        Raises:
            InvalidInputError: there is no ledger.
        """
        if self._num_samples is None:
            raise InvalidInputError(f"{caller}: there is no ledger: watch(..., num_samples=<size of the training set>)")
        part = self._adapter.ledger()
        ledger = part.ledger
        record_invalid_ids(self._faults, ledger.invalid_ids, self._num_samples)
        untagged = max(0, ledger.untagged - self._untagged)
        self._untagged = ledger.untagged
        if untagged:
            self._faults.record(
                "samples without ids",
                f"{untagged} samples came without an id, so they are not in the ledger: call tag(ids) before each forward "
                "pass, or update(scores, ids)",
                untagged,
            )
        return part

    def freeze_at(self, alert: StopAlert) -> StopAlert:
        """Keeps the ledger as it is at a stop alert: the ranking is read from it from now on.

        Waits for the device. In a distributed run every process must call this. It takes 8 to 16 bytes on the host for each
        sample that this process keeps. Never raises; an error is a fault.

        Returns:
            The alert with what the ledger has against it, see `caveats`; unchanged without a ledger.
        """
        if not self.has_ledger:
            return alert
        try:
            self.frozen = FrozenLedger(self.read("freeze_at()"), alert.epoch)
            return alert.model_copy(update={"caveats": (*alert.caveats, *self.caveats())})
        except Exception as error:  # noqa: BLE001 - the alert must be raised, and training must continue
            self._faults.record("suspects", f"{type(error).__name__}: {error}")
            return alert

    def unfreeze(self) -> None:
        """Drops the frozen ledger, because the alert was withdrawn."""
        self.frozen = None

    def state(self, past: PastScores | None, *, whole: bool) -> LedgerState | None:
        """The ledger for a state. In a distributed run every process must call this."""
        if self._num_samples is None:
            return None
        part = self._adapter.ledger()
        frozen = None if self.frozen is None else self._fitted(self.frozen.part)
        if past is not None and len(past.sums) != len(part.ledger.sums):  # the other processes can no longer be reached
            past = None
        return LedgerState.of(part, frozen, past, self._num_samples, whole=whole)

    def restore(self, state: LedgerState | None, alert: StopAlert | None) -> PastScores | None:
        """Resumes from a state and its alert. Returns the ledger at the end of the last epoch."""
        self.frozen = None
        if state is None:
            return None
        part, frozen, past = state.parts(self._adapter)
        self._adapter.load_ledger(part)
        if frozen is not None and alert is not None:
            self.frozen = FrozenLedger(frozen, alert.epoch)
        return past

    def _shown(self, caller: str, *, whole_run: bool = False) -> LedgerPart:
        """The frozen ledger, or that of the whole run if there is none or `whole_run` is set."""
        return self.read(caller) if whole_run or self.frozen is None else self._fitted(self.frozen.part)

    def _fitted(self, part: LedgerPart) -> LedgerPart:
        """A part that was kept earlier, with the samples that this process keeps now."""
        return part.fitted(self._adapter.own_samples(self._num_samples or 0))

    def suspects(self, k: int, *, whole_run: bool = False) -> list[Suspect]:
        """The k samples with the lowest mean score, most suspect first.

        Raises:
            InvalidInputError: there is no ledger, or k is less than 1.
        """
        check_number(k)  # in every process, before any of them waits for the others
        return self._most_suspect(self._shown("suspects()", whole_run=whole_run), k)

    def record(self, k: int, images: Any, *, step: int, epoch: int) -> SuspectsRecord:
        """The suspects as a record for the journal; `step` and `epoch` are the run's at this moment. See `suspects`."""
        check_number(k)
        part = self._shown("log_suspects()")
        return SuspectsRecord(
            step=step,
            epoch=epoch,
            samples=part.total(np.count_nonzero(part.ledger.seen)),
            suspects=tuple(self._most_suspect(part, k, images)),
            until_epoch=None if self.frozen is None else self.frozen.epoch,
        )

    def write_csv(self, record: SuspectsRecord, folder: Path) -> None:
        """Writes suspects.csv. Never raises; a failure is recorded as a fault."""
        try:
            (folder / "suspects.csv").write_text(record.csv(), encoding="utf-8")
        except OSError as error:
            self._faults.record("suspects.csv", error.strerror)

    def label_quality(self, *, whole_run: bool = False) -> npt.NDArray[np.float64]:
        """float64 [num_samples]: (mean score + 1) / 2, in [0, 1]; NaN for samples never seen."""
        part = self._shown("label_quality()", whole_run=whole_run)
        quality: npt.NDArray[np.float64] = part.gather(np.clip((part.ledger.means + 1) / 2, 0, 1))
        return quality

    def table(self, *, whole_run: bool = False) -> SuspectsTable:
        """All samples, in the order of their ids."""
        ledger = self._shown("suspects_table()", whole_run=whole_run).whole()
        labels = np.full(len(ledger.seen), UNKNOWN) if self._labels is None else np.asarray(self._labels)
        return SuspectsTable(
            mean_score=ledger.means,
            times_seen=np.asarray(ledger.seen, np.float64),
            label=labels.astype(np.int64),
            predicted=np.full(len(labels), UNKNOWN) if ledger.predicted is None else ledger.predicted.astype(np.int64),
            **({} if ledger.details is None else unpack(ledger.details)._asdict()),
        )

    def caveats(self) -> tuple[str, ...]:
        """Sentences about the ledger that a stop alert needs: a collapsed model, and few pairs of classes that are confused.

        Waits for the device. In a distributed run every process must call this.
        """
        part = self._shown("caveats()")
        found = [_collapse(part, self._labels)]
        if self._labels is not None and part.ledger.predicted is not None:
            negative = part.ledger.means < 0
            pairs = count_pairs(part.own(self._labels)[negative], part.ledger.predicted[negative], part.gather)
            found.append(concentration(pairs, len(np.unique(self._labels))))
        return tuple(caveat for caveat in found if caveat)

    def _most_suspect(self, part: LedgerPart, k: int, images: Any = None) -> list[Suspect]:
        ledger = part.ledger
        own = lowest(ledger.means, k)
        predicted, details = (
            np.zeros(len(own)) if column is None else column[own] for column in (ledger.predicted, ledger.details)
        )
        columns = (own + part.first, ledger.sums[own], ledger.seen[own], predicted, details)
        rows = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
        rows = part.gather(rows.ravel()).reshape(-1, len(columns))
        if ledger.predicted is None:
            rows[:, 3] = UNKNOWN
        return [self._suspect(rows[row], images) for row in lowest(rows[:, 1] / rows[:, 2], k)]

    def _suspect(self, row: npt.NDArray[np.float64], images: Any) -> Suspect:
        """The suspect of a row: id, sum of the scores, times seen, predicted class and details."""
        sample, predicted, details = (int(row[place]) for place in (0, 3, 4))
        return Suspect(
            id=sample,
            mean_score=float(row[1] / row[2]),
            times_seen=float(row[2]),
            label=None if self._labels is None else int(self._labels[sample]),
            predicted=None if predicted == UNKNOWN else predicted,
            thumbnail=None if images is None else self._thumbnail(images, sample),
            **_details(details),
        )

    def _thumbnail(self, images: Any, sample: int) -> str | None:
        try:
            return thumbnail(images[sample])
        except Exception as error:  # noqa: BLE001 - the user's data set may raise anything
            self._faults.record("thumbnails", f"sample {sample}: {type(error).__name__}: {error}")
            return None


def _details(details: int) -> dict[str, Any]:
    """The fields of a Suspect that describe a document; empty if the sample is one row."""
    if not details:
        return {}
    return {name: column.item() for name, column in unpack(np.array([details], np.int32))._asdict().items()}


def _collapse(part: LedgerPart, labels: npt.NDArray[np.integer[Any]] | None) -> str | None:
    """Returns a sentence if the model predicts one class for nearly all samples; None if not, or if their labels agree.

    A class of nearly all samples is the most frequent one in the parts that hold most of them. So the parts name their most
    frequent classes, and then count the one that was named for most samples.
    """
    predicted = part.ledger.predicted
    own = np.empty(0, np.int32) if predicted is None else predicted[predicted != UNKNOWN]
    classes, counts = np.unique(own, return_counts=True)
    most = np.argmax(counts, keepdims=True) if counts.size else np.empty(0, np.int64)
    named, supporters = part.gather(classes[most].astype(np.int64)), part.gather(counts[most])
    if not named.size:
        return None
    top = int(max(set(named.tolist()), key=lambda label: int(supporters[named == label].sum())))
    share = part.total(np.count_nonzero(own == top)) / part.total(own.size)
    labelled = 0.0 if labels is None else float(np.mean(labels == top))
    if share < COLLAPSED or labelled >= COLLAPSED:
        return None
    return f"{share:.0%} of the samples are predicted as class {top}: the model may have collapsed to it"
