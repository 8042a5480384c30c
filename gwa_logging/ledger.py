"""The per-sample ledger: the sum of each sample's scores, and how often it was seen.

The adapters add these up on the device, by sample id. This is the form in which the host reads them.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults

UNKNOWN = -1
"""Stands for a predicted class that is not known."""


class TaggedBatch(NamedTuple):
    """The samples in a batch; arrays of any framework.

    Attributes:
        ids: int [batch]; or [batch, m] if each input is a mix of m samples (mixup, CutMix).
        weights: float [m] or [batch, m], the share of each sample in the mix, at least 0; None if nothing is mixed.
        predicted: int [batch], the classes that the model predicts; None if unknown.
    """

    ids: Any
    weights: Any = None
    predicted: Any = None

    def check(self, count: int | None, num_samples: int | None) -> None:
        """Checks dtypes and shapes. Does not wait for the device, so the values are not checked.

        Args:
            count: the number of scores in the batch; None if not known yet.
            num_samples: size of the ledger; None if there is none.

        Raises:
            InvalidInputError: there is no ledger, or an array has a wrong dtype or shape.
        """
        if num_samples is None:
            raise InvalidInputError(
                "sample_ids were given, but there is no ledger: watch(..., num_samples=<size of the training set>)"
            )
        dtype, shape = _dtype_and_shape(self.ids)
        mixed = self.weights is not None
        if "int" not in dtype or shape is None or len(shape) != 1 + mixed:
            wanted = "[batch, m] with weights" if mixed else "[batch], or [batch, m] and weights for mixed samples"
            raise InvalidInputError(f"sample_ids: expected an integer array {wanted}, found {dtype} of shape {shape}")
        if count is not None and shape[0] != count:
            raise InvalidInputError(f"sample_ids: expected {count}, one for each score, found {shape[0]}")
        if mixed:
            found = (
                np.shape(self.weights) if isinstance(self.weights, list | tuple) else _dtype_and_shape(self.weights)[1]
            )
            if found not in (shape, shape[1:]):
                raise InvalidInputError(
                    f"weights: expected {shape[1:]}, the same for every sample, or {shape}, as sample_ids, found {found}"
                )
        dtype, found = _dtype_and_shape(self.predicted)
        if self.predicted is not None and ("int" not in dtype or found != shape[:1]):
            raise InvalidInputError(f"predicted: expected integers {shape[:1]}, found {dtype} of shape {found}")


def _dtype_and_shape(array: Any) -> tuple[str, tuple[int, ...] | None]:
    shape = getattr(array, "shape", None)
    return str(getattr(array, "dtype", type(array).__name__)), None if shape is None else tuple(shape)


SAMPLE_IDS = "sample ids"
"""Fault: ids that were left out of the ledger."""


def record_invalid_ids(faults: Faults, invalid_ids: int, num_samples: int | None) -> None:
    """Records the ids that were left out of the ledger since the last call.

    Args:
        faults: where to record them.
        invalid_ids: how many there have been in the whole run.
        num_samples: size of the ledger.
    """
    new = invalid_ids - faults.counts.get(SAMPLE_IDS, 0)
    if new > 0:
        faults.record(
            SAMPLE_IDS,
            f"{new} ids were not in [0, {num_samples}), did not match the number of samples, or had a negative or NaN weight; "
            "they were left out",
            new,
        )


class Ledger(NamedTuple):
    """The ledger's contents, on the host.

    Attributes:
        sums: float32 [num_samples], sum of each sample's scores.
        seen: float32 [num_samples], how often each sample was scored; for mixed samples, the sum of its shares.
        predicted: int32 [num_samples], the class predicted when the sample was last seen; `UNKNOWN` where not known.
        invalid_ids: number of scores left out, because an id was out of range, the number of ids differed from that of the
            samples, or a weight was negative or NaN.
        untagged: number of samples without an id.
    """

    sums: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32]
    invalid_ids: int = 0
    untagged: int = 0

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """float64 [num_samples]: mean score of each sample; NaN if it was never seen."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.sums.astype(np.float64) / self.seen
        return np.where(self.seen > 0, means, np.nan)

    def merge(self, other: "Ledger") -> "Ledger":
        """The ledger of two processes together. Where both know a prediction, the other's wins."""
        return Ledger(
            self.sums + other.sums,
            self.seen + other.seen,
            np.where(other.predicted == UNKNOWN, self.predicted, other.predicted),
            self.invalid_ids + other.invalid_ids,
            self.untagged + other.untagged,
        )


def check_number(k: int) -> None:
    """Checks how many suspects a user asks for.

    Raises:
        InvalidInputError: k is less than 1.
    """
    if k < 1:
        raise InvalidInputError(f"k={k}: expected at least 1, the number of suspects wanted")


def lowest(means: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.intp]:
    """Indices of the k lowest means, lowest first, ties by index; NaN is omitted."""
    seen = np.flatnonzero(~np.isnan(means))
    if k < seen.size:  # avoids sorting ten million samples
        bound = np.partition(means[seen], k - 1)[k - 1]
        seen = seen[means[seen] <= bound]
    return seen[np.argsort(means[seen], kind="stable")[:k]]
