"""The values of backward passes until they are folded, and how those of many passes are joined."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from gwa_logging.integrations.torch.ledger import moved
from gwa_logging.integrations.torch.rows import (
    FIRST,
    LENGTH,
    VALID,
    decode_rows,
    first_rows,
    gradient_lengths,
    sort_by_document,
)
from gwa_logging.integrations.torch.scores import Terms, alignment_scores
from gwa_logging.ledger import TaggedBatch


class Batch(NamedTuple):
    """One backward pass.

    Attributes:
        values: terms (eager), encoded rows (compiled), or scores.
        rows: number of rows; of encoded rows, including the padding.
        samples: their ids, if known.
        inputs: number of inputs that the rows belong to, if there are several rows per input. Encoded rows with all columns
            hold that themselves.
    """

    values: Terms | Tensor
    rows: int
    samples: TaggedBatch | None
    inputs: int

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device if isinstance(self.values, Tensor) else self.values.product.device

    @property
    def is_grouped(self) -> bool:
        """Returns True if several rows may belong to one id."""
        has_starts = are_encoded(self.values) and self.values.shape[1] > FIRST
        return self.samples is not None and (has_starts or self.inputs > 0 or self.samples.is_by_position)

    def grouped(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Brings the rows of each document together.

        Args:
            scores: float32 [rows], the decoded scores of this pass.

        Returns:
            The scores; bool [rows], True in the first row of each input or document, and in every row unless several belong to
            one id; float32 [rows], the lengths of the rows' gradients; int64 [rows], the ids of rows that were sorted by
            document, or None.
        """
        lengths = self._lengths(scores)
        if self.samples is not None and self.samples.is_by_position:
            rows, inputs = torch.ones_like(scores, dtype=torch.bool), None
            if are_encoded(self.values):
                rows = self.values[:, VALID] > 0
                inputs = (self.values[:, FIRST] > 0).sum() if self.values.shape[1] > FIRST else None
            return sort_by_document(scores, lengths, rows, moved(self.samples.ids, scores.device), inputs)
        if self.samples is not None and are_encoded(self.values) and self.is_grouped:
            rows, starts = self.values[:, VALID] > 0, self.values[:, FIRST] > 0
            return scores, torch.where(rows.sum() == self.samples.ids.shape[0], rows, starts), lengths, None
        return scores, first_rows(scores, self.inputs), lengths, None

    def _lengths(self, scores: Tensor) -> Tensor:
        """float32 [rows]: the lengths of the rows' gradients; ones where they are not known."""
        if isinstance(self.values, Terms):
            return gradient_lengths(self.values)
        has_lengths = are_encoded(self.values) and self.values.shape[1] > LENGTH
        return self.values[:, LENGTH] if has_lengths else torch.ones_like(scores)


def are_encoded(values: Terms | Tensor) -> TypeGuard[Tensor]:
    """Returns True for the encoded rows of a compiled pass."""
    return isinstance(values, Tensor) and values.ndim == 2


def joined_scores(batches: list[Batch]) -> tuple[Tensor, Tensor | None]:
    """The scores of batches in their order, float32 [rows]; and all encoded rows."""
    kinds = [_kind(batch) for batch in batches]
    if len(set(kinds)) == 1:
        return _joined_by_kind(batches)
    order = sorted(range(len(batches)), key=kinds.__getitem__)
    scores, encoded = _joined_by_kind([batches[index] for index in order])
    pieces = dict(zip(order, scores.split([batches[index].rows for index in order]), strict=True))
    return torch.cat([pieces[index] for index in range(len(batches))]), encoded


def _kind(batch: Batch) -> int:
    """What batches have in common whose tensors can be joined: 0 for terms, 1 for scores, 2 for encoded rows."""
    return batch.values.ndim if isinstance(batch.values, Tensor) else 0


def _joined_by_kind(batches: list[Batch]) -> tuple[Tensor, Tensor | None]:
    """`joined_scores` of batches that are sorted by kind."""
    terms = [batch.values for batch in batches if isinstance(batch.values, Terms)]
    tensors = [batch.values for batch in batches if isinstance(batch.values, Tensor)]
    scores = [values.float() for values in tensors if values.ndim == 1]
    rows = [values for values in tensors if values.ndim == 2]
    if terms:
        scores.insert(0, alignment_scores(_joined_terms(terms)))
    encoded = torch.cat(rows) if rows else None
    if encoded is not None:
        scores.append(decode_rows(encoded))
    return torch.cat(scores) if len(scores) > 1 else scores[0], encoded


def _joined_terms(batches: list[Terms]) -> Terms:
    """The terms of all rows, with a weight norm for each row."""
    products, delta_norms, embedding_norms, weight_norms = zip(*batches, strict=True)
    norms = _by_row(weight_norms, products)
    return Terms(torch.cat(products), torch.cat(delta_norms), torch.cat(embedding_norms), norms)


def _by_row(norms: tuple[Tensor, ...], products: tuple[Tensor, ...]) -> Tensor:
    """[rows]: the weight's norm, [] or [rows] for each batch. With batches of one size, two operations instead of one each."""
    rows = products[0].shape[0]
    if all(norm.ndim == 0 for norm in norms) and all(product.shape[0] == rows for product in products):
        return torch.stack(norms)[:, None].expand(-1, rows).reshape(-1)
    return torch.cat(list(map(torch.Tensor.expand_as, norms, products)))
