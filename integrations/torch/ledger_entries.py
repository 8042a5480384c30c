"""What is added to the per-sample ledger: for each scored sample its id, its score, and what goes with it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gwa_logging.ledger import UNKNOWN


class Entries(NamedTuple):
    """Columns of n entries, on one device.

    Attributes:
        ids: int32 [n], in [0, num_samples).
        sums: float32 [n], each score times its share.
        seen: float32 [n], or bool if all are whole samples: the share of the sample in a mix; 0 where there is no score.
        predicted: int32 [n]; None if unknown.
        details: int32 [n], see `gwa_logging.document_details`; None if each sample has one row.
    """

    ids: Tensor
    sums: Tensor
    seen: Tensor
    predicted: Tensor | None = None
    details: Tensor | None = None

    @classmethod
    def of(cls, columns: Iterable[Tensor | None]) -> "Entries":
        """The entries with these columns."""
        ids, sums, seen, predicted, details = columns
        assert ids is not None
        assert sums is not None
        assert seen is not None
        return cls(ids, sums, seen, predicted, details)

    def compact(self) -> "Entries":
        """One entry for each id with a score, in ascending order. Waits for the device.

        Sums are added up in the order of the entries. The last known prediction counts, and so do the last known details.
        """
        ids, sums, seen, *others = Entries.of(None if column is None else column[self.seen > 0] for column in self)
        unique, place = torch.unique(ids, return_inverse=True)
        empty = torch.zeros(len(unique), dtype=torch.float32, device=ids.device)
        predicted, details = (
            None if column is None else _last_known(column, place, len(unique), unknown)
            for column, unknown in zip(others, (UNKNOWN, 0), strict=True)
        )
        return Entries(
            unique, empty.index_add(0, place, sums), empty.index_add(0, place, seen.float()), predicted, details
        )


EMPTY = ((0, torch.int32), (0, torch.float32), (0, torch.float32), (UNKNOWN, torch.int32), (0, torch.int32))
"""Of each column the value that stands for nothing, and the dtype, which has 4 bytes."""


def nothing(device: torch.device) -> Entries:
    """No entries."""
    none = torch.zeros(0, dtype=torch.int32, device=device)
    return Entries(none, none.float(), none.float())


def joined(parts: Sequence[Entries]) -> Entries:
    """The entries of several objects, one after the other, on the device of the first."""
    device = parts[0].ids.device
    columns = []
    for column, (unknown, dtype) in zip(zip(*parts, strict=True), EMPTY, strict=True):
        is_known = any(each is not None for each in column)
        filled = [
            torch.full_like(part.ids, unknown, dtype=dtype) if each is None else each
            for each, part in zip(column, parts, strict=True)
        ]
        columns.append(torch.cat([each.to(device) for each in filled]) if is_known else None)
    return Entries.of(columns)


def keep_last_write(ids: Tensor, discard: int) -> tuple[Tensor, Tensor]:
    """Makes sure that the last of several writes to an id wins, on devices that write in any order.

    Returns:
        int64 [writes]: the targets, sorted by id, with `discard` instead of the id for all writes but the last one; and the
        order that the values must be brought into.
    """
    ids, order = torch.sort(ids, stable=True)
    overwritten = torch.zeros_like(ids, dtype=torch.bool)
    overwritten[:-1] = ids[1:] == ids[:-1]
    return torch.where(overwritten, discard, ids), order


def _last_known(values: Tensor, place: Tensor, size: int, unknown: int) -> Tensor:
    """int32 [size]: of the values at each place the last that is known."""
    known = torch.full((size + 1,), unknown, dtype=torch.int32, device=values.device)
    targets, order = keep_last_write(torch.where(values == unknown, size, place), size)
    return known.index_copy_(0, targets, values[order])[:size]
