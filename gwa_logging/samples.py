"""The per-sample ledger, read: which training samples are probably mislabelled.

The adapters add up, on the device and by sample id, every score and how often the sample was seen. A sample whose mean
score over the run is low asks the head, time and again, to move away from where the others have brought it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.types import Suspect


def suspects(sums: npt.NDArray[np.float32], seen: npt.NDArray[np.int32], k: int) -> list[Suspect]:
    """The k samples with the lowest mean score, most suspect first.

    Args:
        sums: float32 [num_samples], sum of a sample's scores.
        seen: int32 [num_samples], how often it was scored; samples never seen are left out.
        k: how many to return at most; at least 1.
    """
    if k < 1:
        raise InvalidInputError(f"k={k}: expected at least 1, the number of suspects wanted")
    ids = np.flatnonzero(seen)
    means = sums[ids].astype(np.float64) / seen[ids]
    order = np.argsort(means, kind="stable")[:k]
    return [Suspect(id=int(ids[i]), mean_score=float(means[i]), times_seen=int(seen[ids[i]])) for i in order]


def check_sample_ids(sample_ids: Any, count: int | None, num_samples: int | None) -> None:
    """Checks what can be checked of sample ids without waiting for the device.

    Args:
        sample_ids: int [count], an array of any framework.
        count: the number of samples that they go with; None if not known yet.
        num_samples: size of the ledger; None if there is none.
    """
    if num_samples is None:
        raise InvalidInputError(
            "sample_ids were given, but there is no ledger: watch(..., num_samples=<size of the training set>)"
        )
    dtype, shape = (
        str(getattr(sample_ids, "dtype", type(sample_ids).__name__)),
        getattr(sample_ids, "shape", None),
    )
    if "int" not in dtype or shape is None or len(shape) != 1:
        raise InvalidInputError(f"sample_ids: expected an integer array [batch], found {dtype} of shape {shape}")
    if count is not None and shape[0] != count:
        raise InvalidInputError(f"sample_ids: expected {count}, one for each score, found {shape[0]}")
