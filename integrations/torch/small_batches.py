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
    """Up to 64 batches of one shape.

    Attributes:
        kind: see `Blocks`.
    """

    def __init__(self, kind: tuple[object, ...], like: Tensor) -> None:
        """Allocates a block for batches whose delta, [rows, C], is `like` this one."""
        self.kind = kind
        rows, classes = like.shape
        self._deltas, self._products = (like.new_empty(SLOTS, rows, classes) for _ in range(2))
        self._embedding_norms, self._weight_norms = like.new_empty(SLOTS, rows), like.new_empty(SLOTS)
        self._slots: list[list[Tensor]] = []
        self._used = 0
        self._ids: list[Tensor] = []
        self._predicted: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._deltas.device

    @property
    def is_full(self) -> bool:
        """Returns True if all slots are used."""
        return self._used == SLOTS

    def add(self, pending: PendingTerms, samples: TaggedBatch | None) -> None:
        """Copies a batch of its kind into the next slot."""
        if self._used == len(self._slots):
            columns = (self._deltas, self._products, self._embedding_norms, self._weight_norms)
            self._slots.append([column[self._used] for column in columns])
        torch._foreach_copy_(self._slots[self._used], pending)
        self._used += 1
        if samples is not None:
            self._ids.append(samples.ids)
            if samples.predicted is not None:
                self._predicted.append(samples.predicted)

    def take(self) -> Batch:
        """One batch with the scores of all. Empties the block."""
        used, rows = self._used, self._deltas.shape[1]
        delta, products, embedding_norms = (
            column[:used].flatten(0, 1) for column in (self._deltas, self._products, self._embedding_norms)
        )
        weight_norms = self._weight_norms[:used].repeat_interleave(rows)
        scores = alignment_scores(terms_by_products(delta, products, embedding_norms, weight_norms))
        samples = None
        if self._ids:
            samples = TaggedBatch(torch.cat(self._ids), None, torch.cat(self._predicted) if self._predicted else None)
        self._used = 0
        self._ids.clear()
        self._predicted.clear()
        return Batch(scores, used * rows, samples, 0)


class Blocks:
    """The blocks of one process. Batches belong into one block if they have the same kind: shape, device, and columns."""

    def __init__(self) -> None:
        self._kind: tuple[object, ...] = ()  # of the last batch
        self._spare: list[Block] = []

    def add(self, last: object, pending: PendingTerms, samples: TaggedBatch | None) -> Block | None:
        """Copies a batch into a block.

        Args:
            last: the block before it, if there is one.
            pending: of the batch.
            samples: the ids of its rows, if known.

        Returns:
            The block: `last` or an empty one. None if the batch before had another kind: a block for each would be a waste.
        """
        delta = pending.delta
        predicted = None if samples is None else samples.predicted
        kind = (delta.shape, delta.get_device(), samples is None, predicted is None)
        if not (isinstance(last, Block) and last.kind == kind and not last.is_full):
            before, self._kind = self._kind, kind
            if before != kind:
                return None
            fitting = [block for block in self._spare if block.kind == kind]
            last = fitting.pop() if fitting else Block(kind, delta)
            self._spare = fitting
        last.add(pending, samples)
        return last

    def give_back(self, block: Block) -> None:
        """Keeps an empty block for later."""
        if len(self._spare) < _SPARE:
            self._spare.append(block)
