"""The per-sample ledger on the device: adds up scores by sample id, without waiting for the device."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gwa_logging.alignment import SCORE_TOLERANCE
from gwa_logging.integrations.torch.rows import mean_by_input
from gwa_logging.integrations.torch.scores import PADDING
from gwa_logging.ledger import UNKNOWN, Ledger, TaggedBatch


class _Arrays(NamedTuple):
    """float32, float32 and int32 [num_samples + 1]; the last element collects the invalid ids."""

    sums: Tensor
    seen: Tensor
    predicted: Tensor


class TaggedScores(NamedTuple):
    """A batch whose sample ids are known.

    Attributes:
        samples: the ids.
        scores: float32 [rows], with markers.
        starts: bool [rows], True in the first row of each input; None if each row is an input.
    """

    samples: TaggedBatch
    scores: Tensor
    starts: Tensor | None


class DeviceLedger:
    """The ledger, on the device of the first scores.

    Attributes:
        untagged: rows without ids, as far as the host knows their number.
        mismatched: ids of batches with another number of samples. Those that only the device can count are added to the
            invalid ids there.
    """

    def __init__(self, num_samples: int) -> None:
        self.untagged = 0
        self.mismatched = 0
        self._size = num_samples
        self._arrays: _Arrays | None = None
        self._untagged_on_device: Tensor | int = 0

    def add_untagged(self, count: Tensor) -> None:
        """Adds a number of rows without ids, int64 [], that only the device knows."""
        self._untagged_on_device += moved(count, self._arrays_on(count.device).sums.device)

    def add(self, batches: Sequence[TaggedScores]) -> None:
        """Adds batches, in their order, so that sums are reproducible to the last bit."""
        for _, alike in groupby(batches, key=_form):
            self._scatter_add(list(alike))

    def _scatter_add(self, batches: Sequence[TaggedScores]) -> None:
        """Adds n batches of the same shapes and dtypes in one operation."""
        sums, seen, predicted = self._arrays_on(batches[0].scores.device)
        device, size = sums.device, self._size
        samples, all_scores, all_starts = zip(*batches, strict=True)
        ids, weights, classes = (_stacked(column, device) for column in zip(*samples, strict=True))
        scores = _stacked(all_scores, device)  # [n, rows]
        starts = _stacked(all_starts, device)
        assert ids is not None
        assert scores is not None
        ids = ids.to(torch.int64)  # before it is compared with a size that a narrower type may not hold
        if starts is not None:
            scores, classes = mean_by_input(scores, starts, classes)
        is_row = scores != PADDING
        mismatched = is_row.sum(1, keepdim=True) != ids.shape[1]
        invalid = (ids < 0) | (ids >= size) | mismatched.reshape(-1, *[1] * (ids.ndim - 1))
        rows = min(scores.shape[1], ids.shape[1])
        ids, scores, invalid, is_row = (tensor[:, :rows] for tensor in (ids, scores, invalid, is_row))
        counted = scores.abs() <= 1 + SCORE_TOLERANCE
        scores = torch.where(counted, scores, 0.0)
        counted |= mismatched & is_row  # these ids are lost, with a score or without
        if weights is None:
            shares = counted.float()
        else:
            weights = (weights[:, None] if weights.ndim == 2 else weights[:, :rows]).float().expand(ids.shape)
            invalid |= ~(weights >= 0) | torch.isinf(weights)
            shares = torch.where(counted[..., None], torch.where(invalid, 1.0, weights), 0.0)
            scores = scores[..., None]
        ids = torch.where(invalid, size, ids)
        sums.index_add_(0, ids.flatten(), (shares * scores).flatten())
        seen.index_add_(0, ids.flatten(), shares.flatten())
        if classes is not None and ids.ndim == 2:  # the prediction for a mixed input belongs to no single sample
            targets, order = _keep_last_write(torch.where(counted, ids, size).flatten(), size)
            predicted.index_copy_(0, targets, classes[:, :rows].flatten()[order].to(torch.int32))

    def _arrays_on(self, device: torch.device) -> _Arrays:
        if self._arrays is None:
            size = self._size + 1
            self._arrays = _Arrays(
                torch.zeros(size, device=device),
                torch.zeros(size, device=device),
                torch.full((size,), UNKNOWN, dtype=torch.int32, device=device),
            )
        return self._arrays

    def invalid_ids(self, like: Tensor) -> Tensor:
        """[1], of the dtype and on the device of `like`: the number of invalid ids so far."""
        invalid_ids = torch.full_like(like, self.mismatched)
        return invalid_ids if self._arrays is None else invalid_ids + moved(self._arrays.seen[-1:], like.device)

    def to_host(self) -> Ledger:
        """Returns the ledger on the host. Blocks on the device."""
        sums, seen, predicted = (array.cpu().numpy().copy() for array in self._arrays_on(torch.device("cpu")))
        invalid_ids = round(float(seen[-1])) + self.mismatched
        return Ledger(sums[:-1], seen[:-1], predicted[:-1], invalid_ids, self.untagged + int(self._untagged_on_device))

    def load(self, ledger: Ledger, device: torch.device) -> None:
        """Restores what `to_host` returned."""
        last = (0.0, ledger.invalid_ids, UNKNOWN)
        arrays = (np.append(array, end).astype(array.dtype) for array, end in zip(ledger[:3], last, strict=True))
        self._arrays = _Arrays(*(torch.from_numpy(array).to(device) for array in arrays))
        self.untagged, self._untagged_on_device, self.mismatched = ledger.untagged, 0, 0


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Blocks only if that is the host, where it could be read before it has arrived."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def _form(batch: TaggedScores) -> object:
    """What batches must have in common to be added together."""
    tensors = (*batch.samples, batch.scores, batch.starts)
    return [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _stacked(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """[n, ...] on a device, from n tensors of the same form; None if there are none."""
    known = [tensor for tensor in tensors if tensor is not None]
    return moved(torch.stack(known), device) if known else None


def _keep_last_write(ids: Tensor, discard: int) -> tuple[Tensor, Tensor]:
    """Makes sure that the last of several writes to an id wins, on devices that write in any order.

    Returns:
        int64 [writes]: the targets, sorted by id, with `discard` instead of the id for all writes but the last one; and the
        order that the values must be brought into.
    """
    ids, order = torch.sort(ids, stable=True)
    overwritten = torch.zeros_like(ids, dtype=torch.bool)
    overwritten[:-1] = ids[1:] == ids[:-1]
    return torch.where(overwritten, discard, ids), order
