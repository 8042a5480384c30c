"""Checks sample ids that users pass with the inputs of a look."""

from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST_ID = 2**31 - 1


def sample_ids(ids: Any, inputs: int | None, num_samples: int | None) -> npt.NDArray[np.int64]:
    """int64 [inputs] on the host.

    Args:
        ids: int [inputs], as an array of any framework or a list.
        inputs: number of inputs, if known.
        num_samples: the size of the ledger; None without one.

    Raises:
        ValueError: they have another shape or dtype, are out of range, or are not all different. The message does not name
            the argument.
    """
    array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") and hasattr(ids, "cpu") else ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or inputs not in (None, len(array)):
        wanted = "[inputs]" if inputs is None else f"[{inputs}], as many as logits"
        raise ValueError(f"expected int {wanted}, found {array.dtype} {array.shape}")
    largest = LARGEST_ID if num_samples is None else num_samples - 1
    if (wrong := array[(array < 0) | (array > largest)]).size:
        upper = "2**31 - 1" if num_samples is None else f"{largest}, as num_samples={num_samples}"
        raise ValueError(f"expected numbers from 0 to {upper}, found {wrong[:3].tolist()}")
    if len(np.unique(array)) != len(array):
        raise ValueError("expected different ids, found one twice")
    return array.astype(np.int64)
