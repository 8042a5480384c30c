"""The scores of an interval on their way to the host: first they are folded, a slice per training step, then copied."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from gwa_logging.summary import AlignmentSummary

Slice = Callable[[], Sequence["Slice"] | None]
"""A part of some work. Returns the parts that follow it, if only it knows them."""


class SlicedWork:
    """Work that training steps do little by little, so that none of them becomes much longer than the others.

    It consists of functions and not of a generator: the garbage collector closes a generator of a dropped monitor, even
    before the monitor is closed, and its scores would be lost.

    Attributes:
        owner: what the work is done for; None if all is done.
    """

    def __init__(self, lock: Lock) -> None:
        """`lock` is held while a slice is done."""
        self.owner: object = None
        self._lock = lock
        self._slices: deque[Slice] = deque()

    def begin(self, owner: object, slices: Sequence[Slice]) -> None:
        """Begins further work, after the rest of the earlier work. The caller holds the lock."""
        try:
            self.end()
        finally:  # an error in the earlier work must not lose this one
            self._slices.extend(slices)
            self.owner = owner if slices else None

    def advance(self) -> None:
        """Does one slice."""
        with self._lock:
            self._do_one()

    def finish(self) -> None:
        """Does the rest."""
        with self._lock:
            self.end()

    def end(self) -> None:
        """Does the rest. The caller holds the lock."""
        while self._slices:
            self._do_one()

    def _do_one(self) -> None:
        try:
            following = self._slices.popleft()() if self._slices else None
            self._slices.extendleft(reversed(following or ()))
        except BaseException:
            self._slices.clear()  # they need what this slice should have computed
            raise
        finally:
            if not self._slices:
                self.owner = None


class TorchSnapshot:
    """The summary of an interval. See `gwa_logging.protocols.Snapshot`."""

    def __init__(self, record_losses: Callable[[int, int], None], folding: SlicedWork) -> None:
        """Prepares an empty summary.

        Args:
            record_losses: called with (overlaid, invalid_ids), the last two numbers of each vector, once it has arrived.
            folding: folds the scores of this snapshot, as long as it is its owner.
        """
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
        if self._folding.owner is self:
            self._folding.advance()
            return False
        self._merge_arrived()
        return not self._vectors

    def result(self) -> AlignmentSummary:
        """The summary. Blocks until everything has arrived."""
        if self._folding.owner is self:
            self._folding.finish()
        for _, event in self._vectors:
            if event is not None:
                event.synchronize()
        self._merge_arrived()
        return self._merged
