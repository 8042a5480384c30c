"""The document of each position in packed rows, from position ids that restart with each document."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gwa_logging.errors import InvalidInputError
from gwa_logging.ledger import NO_DOCUMENT


def document_ids(ids: Tensor | Sequence[int], position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Returns the id of each position, for `monitor.tag`, given the ids of the documents in packed or padding-free rows.

    A document begins at the start of each row, and wherever a position id is not one more than the one before. So a document
    that continues in the next row is given twice.

    >>> document_ids([7, 4, 9], torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]), torch.tensor([[1] * 5, [1] * 4 + [0]]))
    tensor([[ 7,  7,  7,  4,  4],
            [ 9,  9,  9,  9, -1]])

    Blocks on the device of `position_ids`, so call it on the host, for example in the collator.

    Args:
        ids: int [documents], in their order in the rows, row after row.
        position_ids: int [batch, positions], as the model takes them.
        attention_mask: bool or int [batch, positions], 0 in padding; None if there is no padding.

    Returns:
        int64 [batch, positions]; -1 in padding.

    Raises:
        InvalidInputError: an argument has another dtype or shape, or there are not as many ids as documents.
    """
    ids = torch.as_tensor(ids, device=position_ids.device)
    ids = ids.to(torch.int64) if not ids.numel() else ids  # an empty list has no dtype
    for name, tensor, dimensions in (("ids", ids, 1), ("position_ids", position_ids, 2)):
        if tensor.ndim != dimensions or tensor.is_floating_point():
            shape = "[documents]" if dimensions == 1 else "[batch, positions]"
            raise InvalidInputError(
                f"{name}: expected integers {shape}, found {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    used = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != position_ids.shape:
            raise InvalidInputError(
                f"attention_mask: expected the shape of position_ids, {tuple(position_ids.shape)}, found "
                f"{tuple(attention_mask.shape)}"
            )
        used = attention_mask.to(position_ids.device) > 0
    starts = used.clone()
    starts[:, 1:] &= ~used[:, :-1] | (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    documents = int(starts.sum())
    if ids.shape[0] != documents:
        raise InvalidInputError(
            f"ids: expected {documents}, one for each document that begins in position_ids, found {ids.shape[0]}. A document "
            "begins at the start of each row, and wherever a position is not one more than the one before; pass "
            "attention_mask if there is padding"
        )
    if not documents:
        return torch.full_like(position_ids, NO_DOCUMENT, dtype=torch.int64)
    numbers = (starts.flatten().cumsum(0) - 1).clamp(min=0).view_as(position_ids)
    return torch.where(used, ids.to(torch.int64)[numbers], NO_DOCUMENT)
