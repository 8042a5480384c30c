"""Takes the users' sample ids: checks them, and copies them to tensors of this library."""

import torch
from torch import Tensor

from gwa_logging.errors import InvalidInputError
from gwa_logging.ledger import TaggedBatch


class TaggedTensors:
    """Checks and copies the ids of each batch.

    Most batches of a run have ids of one dtype and shape, on which alone the checks depend. So these are made once.
    """

    def __init__(self, num_samples: int | None) -> None:
        """Takes the size of the ledger; None if there is none."""
        self._num_samples = num_samples
        self._accepted: tuple[torch.dtype, torch.Size] | None = None  # the last ids of a batch that is not mixed

    def read(self, samples: TaggedBatch, scores: tuple[int, ...] | None = None) -> TaggedBatch:
        """Copies of the arrays, since a buffer may be filled with the next batch before these ids are in the ledger.

        Args:
            samples: arrays of any framework.
            scores: shape of the batch's scores; None if not known yet.

        Raises:
            InvalidInputError: there is no ledger, or an array has a wrong dtype, shape or device.
        """
        ids = samples.ids
        is_plain = type(ids) is Tensor and samples.weights is None and samples.predicted is None and scores is None
        if is_plain and (ids.dtype, ids.shape) == self._accepted and not ids.is_meta:
            return TaggedBatch(ids.clone())
        samples.check(scores, self._num_samples)
        tensors = TaggedBatch(*(None if array is None else torch.as_tensor(array).clone() for array in samples))
        if tensors.ids.is_meta:
            raise InvalidInputError("sample_ids: expected numbers, found a tensor on the device 'meta'")
        if is_plain:
            self._accepted = (ids.dtype, ids.shape)
        return tensors
