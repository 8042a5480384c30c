"""The per-sample ledger on the device: adds up scores by sample id, without waiting for the device."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gwa_logging.alignment import SCORE_TOLERANCE
from gwa_logging.integrations.torch.rows import LOST, group_by_input, owners
from gwa_logging.integrations.torch.scores import PADDING
from gwa_logging.ledger import NO_DOCUMENT, UNKNOWN, Ledger, TaggedBatch, details_or_none


class _Arrays(NamedTuple):
    """Arrays [num_samples + 1]; the last element collects the invalid ids.

    Attributes:
        sums, seen: float32.
        predicted: int32; None until a prediction is given.
        details: int32, see `gwa_logging.document_details`; None until a sample may have several rows.
    """

    sums: Tensor
    seen: Tensor
    predicted: Tensor | None
    details: Tensor | None


class TaggedScores(NamedTuple):
    """A batch whose sample ids are known.

    Attributes:
        samples: the ids.
        scores: float32 [rows], with markers.
        starts: bool [rows], True in the first row of each input or document; None if each row is an input.
        lengths: float32 [rows], of the rows' gradients; None if each row is an input.
        row_ids: int64 [rows], the ids of rows that `sort_by_document` has sorted; None if the ids belong to inputs.
    """

    samples: TaggedBatch
    scores: Tensor
    starts: Tensor | None
    lengths: Tensor | None = None
    row_ids: Tensor | None = None


class DeviceLedger:
    """The ledger, on the device of the first scores.

    It takes 8 bytes per sample, and 4 more each for predictions and for the details of documents, once there are any.

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
        device, size = self._arrays_on(batches[0].scores.device).sums.device, self._size
        ids, weights, scores, classes, details, lost = _assigned(batches, device)
        counted = scores.abs() <= 1 + SCORE_TOLERANCE
        scores = torch.where(counted, scores, 0.0)
        counted |= lost  # these ids are lost, with a score or without
        invalid = (ids < 0) | (ids >= size) | lost.reshape(*lost.shape, *[1] * (ids.ndim - 2))
        if weights is None:
            shares = counted.float()
        else:
            weights = (weights[:, None] if weights.ndim == 2 else weights[:, : ids.shape[1]]).float().expand(ids.shape)
            invalid |= ~(weights >= 0) | torch.isinf(weights)
            shares = torch.where(counted[..., None], torch.where(invalid, 1.0, weights), 0.0)
            scores = scores[..., None]
        ids = torch.where(invalid, size, ids)
        sums, seen, predicted, known_details = self._arrays_on(
            device, has_predictions=classes is not None, has_details=details is not None
        )
        sums.index_add_(0, ids.flatten(), (shares * scores).flatten())
        seen.index_add_(0, ids.flatten(), shares.flatten())
        if classes is None and details is None:
            return
        targets, order = _keep_last_write(torch.where(counted, ids, size).flatten(), size)
        for array, values in ((predicted, classes), (known_details, details)):
            if array is not None and values is not None:
                array.index_copy_(0, targets, values.flatten()[order].to(torch.int32))

    def _arrays_on(self, device: torch.device, *, has_predictions: bool = False, has_details: bool = False) -> _Arrays:
        """The arrays; they are created on `device`, each when it is needed."""
        size, arrays = self._size + 1, self._arrays
        if arrays is None:
            arrays = _Arrays(torch.zeros(size, device=device), torch.zeros(size, device=device), None, None)
        if has_predictions and arrays.predicted is None:
            unknown = torch.full((size,), UNKNOWN, dtype=torch.int32, device=arrays.sums.device)
            arrays = arrays._replace(predicted=unknown)
        if has_details and arrays.details is None:
            arrays = arrays._replace(details=torch.zeros(size, dtype=torch.int32, device=arrays.sums.device))
        self._arrays = arrays
        return arrays

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(array.nbytes for array in self._arrays or () if array is not None)

    def invalid_ids(self, like: Tensor) -> Tensor:
        """[1], of the dtype and on the device of `like`: the number of invalid ids so far."""
        invalid_ids = torch.full_like(like, self.mismatched)
        return invalid_ids if self._arrays is None else invalid_ids + moved(self._arrays.seen[-1:], like.device)

    def to_host(self) -> Ledger:
        """Returns the ledger on the host. Blocks on the device."""
        sums, seen, predicted, details = (
            None if array is None else array.cpu().numpy().copy() for array in self._arrays_on(torch.device("cpu"))
        )
        assert sums is not None
        assert seen is not None
        return Ledger(
            sums[:-1],
            seen[:-1],
            None if predicted is None else predicted[:-1],
            round(float(seen[-1])) + self.mismatched,
            self.untagged + int(self._untagged_on_device),
            None if details is None else details_or_none(details[:-1]),
        )

    def load(self, ledger: Ledger, device: torch.device) -> None:
        """Restores what `to_host` returned."""

        def restored(array: np.ndarray | None, last: float) -> Tensor | None:
            return None if array is None else torch.from_numpy(np.append(array, last).astype(array.dtype)).to(device)

        sums, seen = restored(ledger.sums, 0.0), restored(ledger.seen, ledger.invalid_ids)
        assert sums is not None
        assert seen is not None
        self._arrays = _Arrays(sums, seen, restored(ledger.predicted, UNKNOWN), restored(ledger.details, 0))
        self.untagged, self._untagged_on_device, self.mismatched = ledger.untagged, 0, 0


class _Assigned(NamedTuple):
    """n batches after each score has got its id: a score is that of a row, an input or a document.

    Attributes:
        ids: int64 [n, scores], or [n, scores, m] of mixed samples.
        weights: as in `TaggedBatch`, with n batches in the first dimension.
        scores: float32 [n, scores], with markers.
        predicted: [n, scores]; None if unknown.
        details: int32 [n, scores]; None if each score is that of a row.
        lost: bool [n, scores], True for ids that could not be assigned.
    """

    ids: Tensor
    weights: Tensor | None
    scores: Tensor
    predicted: Tensor | None
    details: Tensor | None
    lost: Tensor


def _assigned(batches: Sequence[TaggedScores], device: torch.device) -> _Assigned:
    """Stacks batches of the same form on a device, and adds up the rows that belong to the same id."""
    samples, *rest = zip(*batches, strict=True)
    ids, weights, predicted = (_stacked(column, device) for column in zip(*samples, strict=True))
    scores, starts, lengths, row_ids = (_stacked(column, device) for column in rest)
    assert ids is not None
    assert scores is not None
    details = None
    if starts is not None and lengths is not None and row_ids is not None:
        ids = torch.full_like(row_ids, NO_DOCUMENT).scatter_(1, owners(starts), row_ids)
        scores, _, details = group_by_input(scores, starts, lengths, None)
        scores = torch.where(ids == NO_DOCUMENT, PADDING, scores)
        return _Assigned(ids, None, scores, None, details, ids == LOST)
    if starts is not None and lengths is not None:
        scores, predicted, details = group_by_input(scores, starts, lengths, predicted)
    is_row = scores != PADDING
    lost = is_row & (is_row.sum(1, keepdim=True) != ids.shape[1])
    count = min(scores.shape[1], ids.shape[1])
    if weights is not None:  # the prediction for a mixed input, and its rows, belong to no single sample
        predicted = details = None
    predicted, details = (None if values is None else values[:, :count] for values in (predicted, details))
    # An integer type that is too narrow for the size could not be compared with it.
    wide_ids = ids[:, :count].to(torch.int64)
    return _Assigned(wide_ids, weights, scores[:, :count], predicted, details, lost[:, :count])


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Blocks only if that is the host, where it could be read before it has arrived."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def _form(batch: TaggedScores) -> object:
    """What batches must have in common to be added together."""
    tensors = (*batch.samples, *batch[1:])
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
