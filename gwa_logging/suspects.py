"""Finds the training samples that are probably mislabelled, in the per-sample ledger.

A sample with a low mean score over the run is suspect: its gradient keeps opposing the direction in which the other samples
push the head. Once the model memorises wrong labels, the scores of these samples rise. So a stop alert freezes the ranking, and
later scores do not change it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.class_pairs import concentration
from gwa_logging.document_details import unpack
from gwa_logging.errors import InvalidInputError
from gwa_logging.exports import SuspectsTable
from gwa_logging.faults import Faults
from gwa_logging.ledger import UNKNOWN, FrozenLedger, Ledger, check_number, lowest, record_invalid_ids
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

    def read(self, caller: str) -> Ledger:
        """The ledger of all processes. Waits for the device. In a distributed run every process must call this.

        Args:
            caller: the user's call, for the error.

        Raises:
            InvalidInputError: there is no ledger.
        """
        if self._num_samples is None:
            raise InvalidInputError(f"{caller}: there is no ledger: watch(..., num_samples=<size of the training set>)")
        ledger = self._adapter.ledger()
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
        return ledger

    def freeze_at(self, alert: StopAlert) -> StopAlert:
        """Keeps the ledger as it is at a stop alert: the ranking is read from it from now on.

        Waits for the device. In a distributed run every process must call this; what reads the frozen ledger later needs no
        other process. It takes 8 to 16 bytes per sample on the host. Never raises; an error is a fault.

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

    def _shown(self, caller: str, *, whole_run: bool = False) -> Ledger:
        """The frozen ledger, or that of the whole run if there is none or `whole_run` is set."""
        return self.read(caller) if whole_run or self.frozen is None else self.frozen.ledger

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
        ledger = self._shown("log_suspects()")
        return SuspectsRecord(
            step=step,
            epoch=epoch,
            samples=int(np.count_nonzero(ledger.seen)),
            suspects=tuple(self._most_suspect(ledger, k, images)),
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
        return np.clip((self._shown("label_quality()", whole_run=whole_run).means + 1) / 2, 0, 1)

    def table(self, *, whole_run: bool = False) -> SuspectsTable:
        """All samples, in the order of their ids."""
        ledger = self._shown("suspects_table()", whole_run=whole_run)
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
        ledger = self._shown("caveats()")
        found = [_collapse(ledger, self._labels)]
        if self._labels is not None and ledger.predicted is not None:
            negative = ledger.means < 0
            classes = len(np.unique(self._labels))
            found.append(concentration(self._labels[negative], ledger.predicted[negative], classes))
        return tuple(caveat for caveat in found if caveat)

    def _most_suspect(self, ledger: Ledger, k: int, images: Any = None) -> list[Suspect]:
        return [self._suspect(ledger, int(sample), images) for sample in lowest(ledger.means, k)]

    def _suspect(self, ledger: Ledger, sample: int, images: Any) -> Suspect:
        predicted = UNKNOWN if ledger.predicted is None else int(ledger.predicted[sample])
        return Suspect(
            id=sample,
            mean_score=float(ledger.sums[sample]) / float(ledger.seen[sample]),
            times_seen=float(ledger.seen[sample]),
            label=None if self._labels is None else int(self._labels[sample]),
            predicted=None if predicted == UNKNOWN else predicted,
            thumbnail=None if images is None else self._thumbnail(images, sample),
            **_details(ledger, sample),
        )

    def _thumbnail(self, images: Any, sample: int) -> str | None:
        try:
            return thumbnail(images[sample])
        except Exception as error:  # noqa: BLE001 - the user's data set may raise anything
            self._faults.record("thumbnails", f"sample {sample}: {type(error).__name__}: {error}")
            return None


def _details(ledger: Ledger, sample: int) -> dict[str, Any]:
    """The fields of a Suspect that describe a document; empty if the sample is one row."""
    if ledger.details is None or not ledger.details[sample]:
        return {}
    return {name: column.item() for name, column in unpack(ledger.details[sample : sample + 1])._asdict().items()}


def _collapse(ledger: Ledger, labels: npt.NDArray[np.integer[Any]] | None) -> str | None:
    """Returns a sentence if the model predicts one class for nearly all samples; None if not, or if their labels agree."""
    known = np.empty(0) if ledger.predicted is None else ledger.predicted[ledger.predicted != UNKNOWN]
    if not known.size:
        return None
    classes, counts = np.unique(known, return_counts=True)
    top = int(classes[np.argmax(counts)])
    share = float(counts.max()) / known.size
    labelled = 0.0 if labels is None else float(np.mean(labels == top))
    if share < COLLAPSED or labelled >= COLLAPSED:
        return None
    return f"{share:.0%} of the samples are predicted as class {top}: the model may have collapsed to it"
