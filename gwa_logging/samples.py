"""The per-sample ledger, read: which training samples are probably mislabelled.

The adapters add up, on the device and by sample id, every score and how often the sample was seen. A sample whose mean
score over the run is low asks the head, time and again, to move away from where the others have brought it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.thumbnail import thumbnail
from gwa_logging.types import Adapter, Suspect

UNKNOWN = -1
"""In place of a predicted class."""


class Samples(NamedTuple):
    """Which samples a batch is about; arrays of any framework.

    Attributes:
        ids: int [batch]; or [batch, m] of samples that were mixed out of m each (mixup, CutMix).
        weights: float [m] or [batch, m], the shares of the mixed ones, at least 0; None if nothing is mixed.
        predicted: int [batch], the classes that the model predicts; None where unknown.
    """

    ids: Any
    weights: Any = None
    predicted: Any = None

    def check(self, count: int | None, num_samples: int | None) -> None:
        """Checks what can be checked without waiting for the device.

        Args:
            count: the number of scores that they go with; None if not known yet.
            num_samples: size of the ledger; None if there is none.

        Raises:
            InvalidInputError: there is no ledger, or something has a wrong dtype or shape.
        """
        if num_samples is None:
            raise InvalidInputError(
                "sample_ids were given, but there is no ledger: watch(..., num_samples=<size of the training set>)"
            )
        dtype, shape = _kind(self.ids)
        mixed = self.weights is not None
        if "int" not in dtype or shape is None or len(shape) != 1 + mixed:
            wanted = "[batch, m] with weights" if mixed else "[batch], or [batch, m] and weights of mixed samples"
            raise InvalidInputError(f"sample_ids: expected an integer array {wanted}, found {dtype} of shape {shape}")
        if count is not None and shape[0] != count:
            raise InvalidInputError(f"sample_ids: expected {count}, one for each score, found {shape[0]}")
        if mixed:
            found = np.shape(self.weights) if isinstance(self.weights, list | tuple) else _kind(self.weights)[1]
            if found not in (shape, shape[1:]):
                raise InvalidInputError(
                    f"weights: expected {shape[1:]}, the same for every sample, or {shape}, as sample_ids, found {found}"
                )
        dtype, found = _kind(self.predicted)
        if self.predicted is not None and ("int" not in dtype or found != shape[:1]):
            raise InvalidInputError(f"predicted: expected integers {shape[:1]}, found {dtype} of shape {found}")


def _kind(array: Any) -> tuple[str, tuple[int, ...] | None]:
    shape = getattr(array, "shape", None)
    return str(getattr(array, "dtype", type(array).__name__)), None if shape is None else tuple(shape)


SAMPLE_IDS = "sample ids"
"""The kind of the fault for ids that were left out."""


def record_strays(faults: Faults, strays: int, num_samples: int | None) -> None:
    """Reports ids that were left out.

    Args:
        faults: where; those that it has already are not reported again.
        strays: how many there are so far.
        num_samples: size of the ledger.
    """
    new = strays - faults.counts.get(SAMPLE_IDS, 0)
    if new > 0:
        faults.record(
            SAMPLE_IDS,
            f"{new} ids were not in [0, {num_samples}), not as many as their samples, or weighted by a negative number or NaN, "
            "and were left out",
            new,
        )


COLLAPSED = 0.9
"""Share of the samples that are predicted as one class from which a model is called collapsed."""


class Ledger(NamedTuple):
    """What the adapters have added up, on the host.

    Attributes:
        sums: float32 [num_samples], sum of a sample's scores.
        seen: float32 [num_samples], how often it was scored; of mixed samples, the sum of its shares.
        predicted: int32 [num_samples], the class predicted when it was last seen; `UNKNOWN` where not known.
        strays: scores whose ids were out of range, or not as many as the samples, or whose weights were negative or NaN.
        untagged: samples that came without an id.
    """

    sums: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32]
    strays: int = 0
    untagged: int = 0

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """float64 [num_samples]: mean scores; NaN of samples never seen."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.sums.astype(np.float64) / self.seen
        return np.where(self.seen > 0, means, np.nan)

    def merge(self, other: "Ledger") -> "Ledger":
        """What two processes have seen together; where both know a prediction, the other's is taken."""
        return Ledger(
            self.sums + other.sums,
            self.seen + other.seen,
            np.where(other.predicted == UNKNOWN, self.predicted, other.predicted),
            self.strays + other.strays,
            self.untagged + other.untagged,
        )


class LedgerReader:
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
        record_strays(self._faults, ledger.strays, self._num_samples)
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
