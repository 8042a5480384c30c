"""Which training samples are probably mislabelled, read from the per-sample ledger.

A sample with a low mean score over the run is suspect: its gradient keeps opposing the direction in which the other samples
push the head.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.ledger import UNKNOWN, Ledger, record_invalid_ids
from gwa_logging.protocols import Adapter
from gwa_logging.records import Suspect
from gwa_logging.thumbnail import thumbnail

COLLAPSED = 0.9
"""Share of the samples that are predicted as one class from which a model is called collapsed."""


class SuspectFinder:
    """Reads the ledger for the monitor, and says what went into it wrongly."""

    def __init__(
        self, adapter: Adapter, num_samples: int | None, labels: npt.NDArray[np.int64] | None, faults: Faults
    ) -> None:
        self._adapter = adapter
        self._num_samples = num_samples
        self._labels = labels
        self._faults = faults
        self._told = 0  # samples without ids

    def read(self, what: str) -> Ledger:
        """The ledger of all processes, each of which must call this. Waits for the device.

        Raises:
            InvalidInputError: there is none.
        """
        if self._num_samples is None:
            raise InvalidInputError(f"{what}: there is no ledger: watch(..., num_samples=<size of the training set>)")
        ledger: Ledger = self._adapter.ledger()
        record_invalid_ids(self._faults, ledger.invalid_ids, self._num_samples)
        untagged = max(0, ledger.untagged - self._told)
        self._told = ledger.untagged
        if untagged:
            self._faults.record(
                "samples without ids",
                f"{untagged} samples came without an id, and are not in the ledger: call tag(ids) before each forward pass, "
                "or update(scores, ids)",
                untagged,
            )
        return ledger

    def suspects(self, k: int, images: Any = None) -> tuple[list[Suspect], int]:
        """The k samples with the lowest mean score, most suspect first, and how many have been scored at all."""
        if k < 1:
            raise InvalidInputError(f"k={k}: expected at least 1, the number of suspects wanted")
        ledger = self.read("suspects()")
        found = [self._suspect(ledger, int(i), images) for i in lowest(ledger.means, k)]
        return found, int(np.count_nonzero(ledger.seen))

    def collapse(self) -> str | None:
        """A sentence if nearly all samples are predicted as one class, though their labels, where known, are not.

        Waits for the device. Of several processes, each must call it.
        """
        predicted = self.read("collapse()").predicted
        known = predicted[predicted != UNKNOWN]
        if not known.size:
            return None
        classes, counts = np.unique(known, return_counts=True)
        top = int(classes[np.argmax(counts)])
        share = float(counts.max()) / known.size
        truly = 0.0 if self._labels is None else float(np.mean(self._labels == top))
        if share < COLLAPSED or truly >= COLLAPSED:
            return None
        return f"{share:.0%} of the samples are predicted as class {top}: the model may have collapsed to it"

    def _suspect(self, ledger: Ledger, sample: int, images: Any) -> Suspect:
        known = int(ledger.predicted[sample])
        return Suspect(
            id=sample,
            mean_score=float(ledger.sums[sample]) / float(ledger.seen[sample]),
            times_seen=float(ledger.seen[sample]),
            label=None if self._labels is None else int(self._labels[sample]),
            predicted=None if known == UNKNOWN else known,
            thumbnail=None if images is None else self._thumbnail(images, sample),
        )

    def _thumbnail(self, images: Any, sample: int) -> str | None:
        try:
            return thumbnail(images[sample])
        except Exception as error:  # noqa: BLE001 - the user's data set may raise anything, and the numbers must not suffer
            self._faults.record("thumbnails", f"sample {sample}: {type(error).__name__}: {error}")
            return None


def lowest(means: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.intp]:
    """Indices of the k lowest means, lowest first, ties by index; NaN is left out."""
    seen = np.flatnonzero(~np.isnan(means))
    if k < seen.size:  # so that of ten million only a few are sorted
        bound = np.partition(means[seen], k - 1)[k - 1]
        seen = seen[means[seen] <= bound]
    return seen[np.argsort(means[seen], kind="stable")[:k]]
