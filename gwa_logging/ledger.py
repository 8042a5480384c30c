"""The per-sample ledger: each sample's sum of scores, and how often it was seen.

The adapters add them up on the device, by sample id; this is the form in which the host reads them.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults

UNKNOWN = -1
"""In place of a predicted class."""


class TaggedBatch(NamedTuple):
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


def record_invalid_ids(faults: Faults, invalid_ids: int, num_samples: int | None) -> None:
    """Reports ids that were left out.

    Args:
        faults: where; those that it has already are not reported again.
        invalid_ids: how many there are so far.
        num_samples: size of the ledger.
    """
    new = invalid_ids - faults.counts.get(SAMPLE_IDS, 0)
    if new > 0:
        faults.record(
            SAMPLE_IDS,
            f"{new} ids were not in [0, {num_samples}), not as many as their samples, or weighted by a negative number or NaN, "
            "and were left out",
            new,
        )


class Ledger(NamedTuple):
    """What the adapters have added up, on the host.

    Attributes:
        sums: float32 [num_samples], sum of a sample's scores.
        seen: float32 [num_samples], how often it was scored; of mixed samples, the sum of its shares.
        predicted: int32 [num_samples], the class predicted when it was last seen; `UNKNOWN` where not known.
        invalid_ids: scores whose ids were out of range, or not as many as the samples, or whose weights were negative or NaN.
        untagged: samples that came without an id.
    """

    sums: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32]
    invalid_ids: int = 0
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
            self.invalid_ids + other.invalid_ids,
            self.untagged + other.untagged,
        )
