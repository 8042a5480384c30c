"""The per-sample ledger on the device: adds up scores by sample id, without waiting for the device.

In a distributed run nothing is added before the ranks meet, see `ledger_ranks`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gwa_logging.alignment import SCORE_TOLERANCE
from gwa_logging.integrations.torch.distributed import is_distributed, rank
from gwa_logging.integrations.torch.ledger_entries import Entries, joined, keep_last_write, nothing
from gwa_logging.integrations.torch.ledger_ranks import exchange, own_samples
from gwa_logging.integrations.torch.rows import LOST, group_by_input, owners
from gwa_logging.integrations.torch.scores import PADDING
from gwa_logging.ledger import NO_DOCUMENT, UNKNOWN, Ledger, LedgerPart, TaggedBatch
from gwa_logging.ranks import Identity, RankSelection

CHUNKS = 64
"""Number of groups of waiting entries that are joined to one, since many small tensors need more memory."""


class _Arrays(NamedTuple):
    """Arrays [N + 1] of the N samples that are kept here; the last element collects the invalid ids.

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

    It takes 8 bytes for each sample that this process keeps, and 4 more each for predictions and for the details of documents,
    once there are any. In a distributed run 9 to 20 bytes are added for each sample scored since the ranks last met, but never
    more than for a ledger of all samples.

    Attributes:
        untagged: rows without ids, as far as the host knows their number.
        mismatched: ids of batches with another number of samples. Those that only the device can count are added to the
            invalid ids there.
    """

    def __init__(self, num_samples: int) -> None:
        self.untagged = 0
        self.mismatched = 0
        self._size = num_samples
        self._samples = range(num_samples)  # that are kept here
        self._keeps_all = False  # also in a distributed run
        self._arrays: _Arrays | None = None
        self._waiting: list[Entries] = []
        self._invalid_waiting: Tensor | int = 0
        self._untagged_on_device: Tensor | int = 0

    def add_untagged(self, count: Tensor) -> None:
        """Adds a number of rows without ids, int64 [], that only the device knows."""
        self._untagged_on_device += moved(count, self._arrays_on(count.device).sums.device)

    def add(self, batches: Sequence[TaggedScores]) -> None:
        """Adds batches, in their order, so that sums are reproducible to the last bit."""
        for _, alike in groupby(batches, key=_form):
            group = list(alike)
            entries = _entries(group, self._arrays_on(group[0].scores.device).sums.device, self._size)
            if is_distributed() or self._samples != range(self._size):
                self._let_wait(entries)
            else:
                self._enter(entries)

    def _let_wait(self, entries: Entries) -> None:
        """Keeps entries until the ranks meet."""
        is_invalid = entries.ids == self._size
        self._invalid_waiting += torch.where(is_invalid, entries.seen.float(), 0.0).sum()
        seen = torch.where(is_invalid, torch.zeros_like(entries.seen), entries.seen)
        classes = None if entries.predicted is None else entries.predicted.to(torch.int32)
        self._waiting.append(entries._replace(ids=entries.ids.to(torch.int32), seen=seen, predicted=classes))
        if len(self._waiting) > CHUNKS:
            self._waiting = [joined(self._waiting)]
            if len(self._waiting[0].ids) > max(self._size, 2**16):
                self._waiting = [self._waiting[0].compact()]

    def _enter(self, entries: Entries, *, only_known: bool = False) -> None:
        """Adds entries to the arrays; with `only_known`, unknown predictions and details leave those of earlier entries."""
        classes, details = entries.predicted, entries.details
        sums, seen, predicted, known_details = self._arrays_on(
            entries.ids.device, has_predictions=classes is not None, has_details=details is not None
        )
        first, size = self._samples.start, len(self._samples)
        ids = entries.ids - first if first else entries.ids
        sums.index_add_(0, ids, entries.sums)
        seen.index_add_(0, ids, entries.seen.float())
        for array, values, unknown in ((predicted, classes, UNKNOWN), (known_details, details, 0)):
            if array is not None and values is not None:
                is_written = entries.seen > 0
                if only_known:
                    is_written &= values != unknown
                targets = torch.where(is_written, ids, size)
                if array.is_cpu:  # NumPy writes in order
                    array.numpy()[targets.numpy()] = values.numpy()
                else:
                    targets, order = keep_last_write(targets, size)
                    array.index_copy_(0, targets.long(), values[order].to(torch.int32))

    def _arrays_on(self, device: torch.device, *, has_predictions: bool = False, has_details: bool = False) -> _Arrays:
        """The arrays; they are created on `device`, each when it is needed."""
        size, arrays = len(self._samples) + 1, self._arrays
        if arrays is None:
            if is_distributed() and not self._keeps_all:
                self._samples = own_samples(self._size)
                size = len(self._samples) + 1
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
        columns = (column for columns in (self._arrays or (), *self._waiting) for column in columns)
        return sum(column.nbytes for column in columns if column is not None)

    def invalid_ids(self, like: Tensor) -> Tensor:
        """[1], of the dtype and on the device of `like`: the number of invalid ids so far."""
        invalid_ids = torch.full_like(like, self.mismatched)
        if self._arrays is None:
            return invalid_ids
        return invalid_ids + moved(self._arrays.seen[-1:] + self._invalid_waiting, like.device)

    def collect(self, device: torch.device) -> Entries:
        """The waiting entries, one for each id. They no longer wait. Waits for the device.

        Args:
            device: where the ledger is created if there is none.
        """
        self._keeps_all = False
        device = self._arrays_on(device).sums.device
        if self._samples != own_samples(self._size):  # there was no process group before
            self._waiting.insert(0, self._taken())
            self._arrays_on(device)
        waiting, self._waiting = self._waiting, []
        return joined([nothing(device), *waiting]).compact()

    def meet(self, own: Entries, identity: Identity) -> tuple[list[int], RankSelection]:
        """Sends entries to the ranks that keep their samples, and adds those that arrive (a collective).

        Returns:
            The invalid ids and the samples without an id of all ranks that count, and these ranks.
        """
        arrived, totals, found = exchange(own, self._size, self._lost(), identity)
        self._enter(arrived, only_known=True)
        return totals, found

    def _taken(self) -> Entries:
        """The contents of the arrays as entries. The arrays become empty."""
        sums, seen, predicted, details = self._arrays_on(torch.device("cpu"))
        self._invalid_waiting, self._arrays = self._invalid_waiting + seen[-1], None
        known = seen[:-1].nonzero().flatten()
        columns = (None if column is None else column[known] for column in (predicted, details))
        return Entries((known + self._samples.start).to(torch.int32), sums[known], seen[known], *columns)

    def _lost(self) -> tuple[int, int]:
        """The invalid ids, and the samples without an id, of this process. Blocks on the device."""
        seen = self._arrays_on(torch.device("cpu")).seen
        invalid = round(float(seen[-1] + self._invalid_waiting)) + self.mismatched
        return invalid, self.untagged + int(self._untagged_on_device)

    def keep_all(self) -> None:
        """Keeps all samples in this process, including those that wait: the other ranks cannot be reached."""
        self._keeps_all = True
        if self._samples != range(self._size):
            self._waiting.insert(0, self._taken())
            self._samples = range(self._size)
        if self._waiting:
            waiting, self._waiting = joined(self._waiting).compact(), []
            self._enter(waiting, only_known=True)

    def to_host(self) -> Ledger:
        """Returns the samples that are kept here, on the host. Blocks on the device."""
        sums, seen, predicted, details = (
            None if array is None else array.cpu().numpy().copy() for array in self._arrays_on(torch.device("cpu"))
        )
        assert sums is not None
        assert seen is not None
        return Ledger(
            sums[:-1],
            seen[:-1],
            None if predicted is None else predicted[:-1],
            *self._lost(),
            None if details is None else details[:-1],
        )

    def load(self, part: LedgerPart, device: torch.device) -> None:
        """Restores a part. Its numbers of lost samples are those of all processes, so only rank 0 takes them."""
        ledger = part.ledger
        counts = (ledger.invalid_ids, ledger.untagged) if rank() == 0 else (0, 0)

        def restored(array: np.ndarray | None, last: float) -> Tensor | None:
            return None if array is None else torch.from_numpy(np.append(array, last).astype(array.dtype)).to(device)

        sums, seen = restored(ledger.sums, 0.0), restored(ledger.seen, counts[0])
        assert sums is not None
        assert seen is not None
        self._arrays = _Arrays(sums, seen, restored(ledger.predicted, UNKNOWN), restored(ledger.details, 0))
        self._samples, self._waiting = range(part.first, part.first + len(ledger.sums)), []
        self.untagged, self._untagged_on_device, self._invalid_waiting, self.mismatched = counts[1], 0, 0, 0


def _entries(batches: Sequence[TaggedScores], device: torch.device, size: int) -> Entries:
    """The entries of n batches of the same shapes and dtypes.

    Their ids are int64, and `size` stands for an invalid one; its `seen` is 1 for each score or share that it cost.
    """
    ids, weights, scores, classes, details, lost = _assigned(batches, device)
    counted = scores.abs() <= 1 + SCORE_TOLERANCE
    scores = torch.where(counted, scores, 0.0)
    counted |= lost  # these ids are lost, with a score or without
    invalid = (ids < 0) | (ids >= size) | lost.reshape(*lost.shape, *[1] * (ids.ndim - 2))
    if weights is None:
        shares = counted
    else:
        weights = (weights[:, None] if weights.ndim == 2 else weights[:, : ids.shape[1]]).float().expand(ids.shape)
        invalid |= ~(weights >= 0) | torch.isinf(weights)
        shares = torch.where(counted[..., None], torch.where(invalid, 1.0, weights), 0.0)
        scores = scores[..., None]
    columns = (torch.where(invalid, size, ids), shares * scores, shares, classes, details)
    return Entries.of(None if column is None else column.flatten() for column in columns)


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
