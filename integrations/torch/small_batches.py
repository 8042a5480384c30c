"""Small batches whose scores are computed together, since calling operations on each alone would take most of their time.

What the scores are computed from is copied into the slots of a block, which is used again and again. Many small tensors
that live until the interval ends would have to be joined and freed then, which takes longer than the arithmetic.
"""

import torch
from torch import Tensor

from gwa_logging.integrations.torch.batches import Batch
from gwa_logging.integrations.torch.scores import PendingTerms, alignment_scores, terms_by_products
from gwa_logging.ledger import TaggedBatch

FEW_LOGITS = 2**13
"""Size of the logits of a small batch, at most."""

SLOTS = 64
"""Number of batches in a block, which takes up to 4 MB."""

_SPARE = 2
"""Number of blocks that are kept for later: one is filled while another one is scored."""


class Block:
    """Up to 64 batches of one shape, all of them with the same columns and on the same devices."""

    def __init__(self, first: PendingTerms, samples: TaggedBatch | None) -> None:
        """Allocates a block for batches like this one."""
        like = first.products
        self._shape, self._device = like.shape, like.get_device()
        self._ids_device = None if samples is None else samples.ids.get_device()
        self._has_predicted = samples is not None and samples.predicted is not None
        rows, classes = like.shape
        self._columns = PendingTerms(
            delta=like.new_empty(SLOTS, rows, classes),
            products=like.new_empty(SLOTS, rows, classes),
            embedding_norms=like.new_empty(SLOTS, rows),
            weight_norm=like.new_empty(SLOTS),
        )
        self._slots: list[list[Tensor]] = []
        self._used = 0
        self._ids: list[Tensor] = []
        self._predicted: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._columns.delta.device

    @property
    def is_full(self) -> bool:
        """Returns True if all slots are used."""
        return self._used == SLOTS

    def add(self, batch: PendingTerms, samples: TaggedBatch | None) -> bool:
        """Copies a batch into the next slot. Returns False if it does not fit, or there is no slot."""
        used, delta = self._used, batch.delta
        if used == SLOTS or delta.shape != self._shape or delta.get_device() != self._device:
            return False
        if (None if samples is None else samples.ids.get_device()) != self._ids_device:
            return False
        if samples is not None and (samples.predicted is not None) is not self._has_predicted:
            return False
        if used == len(self._slots):
            self._slots.append([column[used] for column in self._columns])
        torch._foreach_copy_(self._slots[used], batch)
        self._used = used + 1
        if samples is not None:
            self._ids.append(samples.ids)
            if self._has_predicted:
                self._predicted.append(samples.predicted)
        return True

    def take(self) -> Batch:
        """One batch with the scores of all. Empties the block."""
        used, rows = self._used, self._shape[0]
        delta, products, embedding_norms = (column[:used].flatten(0, 1) for column in self._columns[:3])
        weight_norms = self._columns.weight_norm[:used].repeat_interleave(rows)
        scores = alignment_scores(terms_by_products(delta, products, embedding_norms, weight_norms))
        samples = None
        if self._ids:
            samples = TaggedBatch(torch.cat(self._ids), None, torch.cat(self._predicted) if self._predicted else None)
        self._used = 0
        self._ids.clear()
        self._predicted.clear()
        return Batch(scores, used * rows, samples, 0)


class Blocks:
    """Allocates blocks, and keeps empty ones for later. All but the latest block are full, so little memory is wasted."""

    def __init__(self) -> None:
        self._latest: Block | None = None
        self._last_shape: torch.Size | None = None
        self._spare: list[Block] = []

    def begin(self, batch: PendingTerms, samples: TaggedBatch | None) -> Block | None:
        """A block with this batch alone. None if batches change: after another shape, or if the latest block is not full."""
        before, self._last_shape = self._last_shape, batch.delta.shape
        if before != self._last_shape or (self._latest is not None and not self._latest.is_full):
            return None
        self._latest = self._empty(batch, samples)
        return self._latest

    def _empty(self, batch: PendingTerms, samples: TaggedBatch | None) -> Block:
        while self._spare:
            block = self._spare.pop()
            if block.add(batch, samples):
                return block
        block = Block(batch, samples)
        block.add(batch, samples)
        return block

    def end(self) -> None:
        """Lets the next batch begin a block: those so far are about to be scored."""
        self._latest = None

    def give_back(self, block: Block) -> None:
        """Keeps an empty block for later."""
        if len(self._spare) < _SPARE:
            self._spare.append(block)
