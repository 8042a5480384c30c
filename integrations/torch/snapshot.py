"""The scores of an interval on their way to the host: first they are folded, a slice per training step, then copied."""

from collections.abc import Callable, Iterator
from threading import Lock

import torch
from torch import Tensor

from gwa_logging.summary import AlignmentSummary


class SlicedWork:
    """Work that training steps do little by little, so that none of them becomes much longer than the others."""

    def __init__(self, lock: Lock) -> None:
        """`lock` is held while a slice is done."""
        self._lock = lock
        self._slices: Iterator[None] = iter(())

    def begin(self, slices: Iterator[None]) -> None:
        """Begins further work, after the rest of the earlier work. The caller holds the lock."""
        try:
            self.end()
        finally:  # an error in the earlier work must not lose this one
            self._slices = slices

    def advance(self) -> None:
        """Does one slice."""
        with self._lock:
            next(self._slices, None)

    def finish(self) -> None:
        """Does the rest."""
        with self._lock:
            self.end()

    def end(self) -> None:
        """Does the rest. The caller holds the lock."""
        for _ in self._slices:
            pass


class TorchSnapshot:
    """The summary of an interval. See `gwa_logging.protocols.Snapshot`.

    Attributes:
        is_folded: False while there are scores that have not been folded. Only that of the latest snapshot may be False.
    """

    def __init__(self, record_losses: Callable[[int, int], None], folding: SlicedWork) -> None:
        """Prepares an empty summary.

        Args:
            record_losses: called with (overlaid, invalid_ids), the last two numbers of each vector, once it has arrived.
            folding: what remains to be done while `is_folded` is False.
        """
        self.is_folded = True
        self._record_losses = record_losses
        self._folding = folding
        self._vectors: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._merged = AlignmentSummary()

    def add(self, vector: Tensor) -> None:
        """Starts copying a folded vector to the host, and merges those that have arrived."""
        self._merge_arrived()
        if vector.device.type == "cuda":
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(vector.device))
            self._vectors.append((host, event))
        else:
            self._vectors.append((vector, None))

    def _merge_arrived(self) -> None:
        while self._vectors and (self._vectors[0][1] is None or self._vectors[0][1].query()):
            vector = self._vectors.pop(0)[0].numpy()
            self._merged = self._merged.merge(AlignmentSummary.from_vector(vector[:-2]))
            self._record_losses(*map(int, vector[-2:].tolist()))

    def ready(self) -> bool:
        """Returns True if everything has arrived. Otherwise folds a slice of what is left: call it once per training step."""
        if not self.is_folded:
            self._folding.advance()
            return False
        self._merge_arrived()
        return not self._vectors

    def result(self) -> AlignmentSummary:
        """The summary. Blocks until everything has arrived."""
        if not self.is_folded:
            self._folding.finish()
        for _, event in self._vectors:
            if event is not None:
                event.synchronize()
        self._merge_arrived()
        return self._merged
