"""Accumulates scores on the device, and copies their summary to the host in the background.

A step only appends a few small tensors to a list. From time to time they are folded, on the device and in float64, into one
vector in the order of `AlignmentSummary.to_vector`. Vectors are merged on the host.
"""

from collections import defaultdict
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from gwa_logging.faults import Faults
from gwa_logging.histogram import EDGES
from gwa_logging.integrations.torch.batches import Batch, are_encoded, joined_scores
from gwa_logging.integrations.torch.distributed import forget_finished, full_tensor, is_first_owner, is_split
from gwa_logging.integrations.torch.fold import fold, fold_device, fold_on_host
from gwa_logging.integrations.torch.ledger import DeviceLedger, TaggedScores, moved
from gwa_logging.integrations.torch.ledger_entries import nothing
from gwa_logging.integrations.torch.rows import (
    COLUMNS,
    PASSES,
    PREDICTED,
    VALID,
    drop_idle_rows,
)
from gwa_logging.integrations.torch.scores import PendingTerms, Terms, terms_by_products
from gwa_logging.integrations.torch.small_batches import Block, Blocks
from gwa_logging.integrations.torch.snapshot import Slice, SlicedWork, TorchSnapshot
from gwa_logging.integrations.torch.tags import Tags
from gwa_logging.ledger import SAMPLE_IDS, Ledger, LedgerPart, TaggedBatch, mismatch, record_invalid_ids
from gwa_logging.ranks import Attendance, Identity, RankSelection

FOLD_AT = 65_536
"""Number of rows at which they are folded: 768 KB of terms at most are kept on the device."""

PENDING_NUMBERS = 2**20
"""Number of logits of `PendingTerms` at which all rows are folded: 8 MB at most are kept on the device."""

LEDGER_SLICE = 16
LEDGER_ROWS = 8192
"""Number of batches, and of rows, that a training step adds to the ledger when an interval has ended."""


class Accumulator:
    """Scores since the last snapshot, and the per-sample ledger, of one process.

    Processes that share a split head (tensor parallelism) all see the same samples. They compute the terms together, and the
    first of them counts the samples. If one of them does not watch, the terms cannot be completed, and nothing is counted.

    Attributes:
        keeps_samples: True if there is a ledger.
        tags: sample ids that wait for a pass.
    """

    def __init__(
        self,
        num_samples: int | None,
        faults: Faults | None = None,
        attendance: Attendance | None = None,
        *,
        sliced: bool = False,
    ) -> None:
        """With `sliced`, each call of a snapshot's `ready` folds a slice of it.

        Not for windows (`samples_per_epoch`): they end with the step that fills them, which only a folded snapshot shows.
        """
        self.tags = Tags()
        self.keeps_samples = num_samples is not None
        self._faults = faults or Faults()
        self._attendance = attendance
        self._batches: list[Batch | Block] = []
        self._blocks = Blocks()
        self._rows = self._pending_numbers = 0
        self._sliced = sliced
        self._edges: dict[torch.device, Tensor] = {}
        fold_on_host(torch.zeros(1))  # builds its table now and not in a training step
        self._num_samples = num_samples
        self._ledger = DeviceLedger(num_samples or 0)
        self._lock = Lock()  # DataParallel's replicas run their backward passes in threads
        self._folding = SlicedWork(self._lock)
        self._arriving = self._new_snapshot()

    def add_terms(self, terms: PendingTerms | Terms, samples: TaggedBatch | None, inputs: int = 0) -> None:
        """Adds the terms of an eager backward pass.

        Args:
            terms: of the rows.
            samples: their ids, if known: for each row, each input, or each position; see `gwa_logging.ledger.mismatch`.
            inputs: number of inputs, in order and with the same number of rows each; 0 if unknown.
        """
        rows = terms[0].shape[0]
        if isinstance(terms, PendingTerms):
            has_plain_ids = samples is None or (samples.weights is None and samples.ids.shape == (rows,))
            if has_plain_ids and self._add_small(terms, rows, samples):
                return
            terms = terms_by_products(*terms)
        elif is_split(terms.product):
            complete = self._complete(*terms)
            if complete is None:
                return
            terms = Terms(*complete)
            rows = terms.product.shape[0]
        fitting = None if samples is None else self._fitting(samples, rows, inputs)
        self._add(terms, rows, fitting, inputs if _is_by_input(fitting, rows) else 0, mismatched=fitting is not samples)

    def add_rows(self, rows: Tensor, samples: TaggedBatch | None) -> None:
        """Adds the encoded rows of a compiled backward pass. They may be overwritten after this call."""
        if is_split(rows):
            complete = self._complete(rows)
            if complete is None:
                return
            rows = complete[0][:, :COLUMNS]  # no rank has all logits, so the largest is unknown
        rows = rows.clone()
        if samples is not None and rows.shape[1] > PREDICTED and not samples.is_by_position:
            samples = samples._replace(predicted=rows[:, PREDICTED])
        self._add(rows, rows.shape[0], samples)

    def add_scores(self, scores: Tensor, samples: TaggedBatch | None) -> None:
        """Adds scores from the user, float [...]. They may be overwritten after this call."""
        if is_split(scores):
            complete = self._complete(scores)
            if complete is None:
                return
            (scores,) = complete
        rows = scores.numel()
        inputs = scores.shape[0] if _is_by_input(samples, rows) else 0
        self._add(scores.flatten().clone(), rows, samples, inputs)

    def _fitting(self, samples: TaggedBatch, rows: int, inputs: int) -> TaggedBatch | None:
        """The samples if their ids fit the rows; otherwise None, and the ids are counted as lost."""
        shape = (inputs, rows // inputs) if inputs else (rows,)
        problem = mismatch(tuple(samples.ids.shape), shape, mixed=samples.weights is not None)
        if problem is None:
            return samples
        ids = samples.ids.numel() if samples.is_by_position else samples.ids.shape[0]
        lost = min(ids, rows)
        self._ledger.mismatched += lost
        self._faults.record(
            SAMPLE_IDS,
            f"{lost} ids were left out: a forward pass was tagged with {ids} ids, but the head saw {rows} rows in it: "
            f"{problem}",
            lost,
        )
        return None

    def _complete(self, *parts: Tensor) -> tuple[Tensor, ...] | None:
        """The whole tensors of which every rank has a part (a collective); None if this rank does not count them."""
        if self._attendance is not None and self._attendance.missing():
            return None
        whole = tuple(map(full_tensor, parts))
        return whole if is_first_owner(parts[0]) else None

    def _add(
        self,
        values: Terms | Tensor,
        rows: int,
        samples: TaggedBatch | None,
        inputs: int = 0,
        *,
        mismatched: bool = False,
    ) -> None:
        if not rows:
            return
        with self._lock:
            self._batches.append(Batch(values, rows, samples, inputs))
            self._rows += rows
            if samples is None and self.keeps_samples and not mismatched and not are_encoded(values):
                self._ledger.untagged += rows
            if self._rows >= FOLD_AT:
                self._fold_all()

    def _add_small(self, pending: PendingTerms, rows: int, samples: TaggedBatch | None) -> bool:
        """`_add` for a small batch, with an id for each row or without ids. Returns False if it has to be added alone."""
        with self._lock:
            last = self._batches[-1] if self._batches else None
            if not (isinstance(last, Block) and last.add(pending, samples)):
                block = self._blocks.begin(pending, samples) if rows else None
                if block is None:
                    return False
                self._batches.append(block)
            self._rows += rows
            self._pending_numbers += pending.delta.numel()
            if samples is None and self.keeps_samples:
                self._ledger.untagged += rows
            if self._rows >= FOLD_AT or self._pending_numbers >= PENDING_NUMBERS:
                self._fold_all()
            return True

    def snapshot(self) -> TorchSnapshot:
        """Returns everything since the last snapshot, on its way to the host."""
        forget_finished()
        with self._lock:
            self._end_folding()
            snapshot, self._arriving = self._arriving, self._new_snapshot()
            self._folding.begin(snapshot, self._fold(snapshot))
            if not self._sliced:
                self._folding.end()
            return snapshot

    def _end_folding(self) -> None:
        """Does what is left of the interval before. An error there must not lose the next one. The caller holds the lock."""
        try:
            self._folding.end()
        except Exception as error:  # noqa: BLE001 - whatever it is, it concerns the interval before
            self._faults.record("scores", f"scores of an interval were lost: {type(error).__name__}: {error}")

    def _new_snapshot(self) -> TorchSnapshot:
        return TorchSnapshot(self._record_losses, self._folding)

    def _record_losses(self, overlaid: int, invalid_ids: int) -> None:
        """Records the samples that were lost on the device, once a folded vector has arrived on the host."""
        if overlaid:
            self._faults.record(
                "compiled passes",
                f"{overlaid} samples have no score: more than {PASSES} compiled forward passes waited for one backward pass",
                overlaid,
            )
        record_invalid_ids(self._faults, invalid_ids, self._num_samples)

    def _fold_all(self) -> None:
        """Folds all batches at once into the next snapshot. The caller holds the lock."""
        self._end_folding()
        self._folding.begin(self._arriving, self._fold(self._arriving))
        self._folding.end()

    def _fold(self, snapshot: TorchSnapshot) -> list[Slice]:
        """Takes all batches, and returns the work of folding them into the snapshot."""
        batches, self._batches = self._batches, []
        self._blocks.end()
        self._rows = self._pending_numbers = 0
        by_device: dict[torch.device, list[Batch | Block]] = defaultdict(list)
        for batch in batches:
            by_device[batch.device].append(batch)
        by_device.pop(torch.device("meta"), None)  # tensors without numbers
        return [partial(self._join, group, device, snapshot) for device, group in by_device.items()]

    def _join(self, parts: list[Batch | Block], device: torch.device, snapshot: TorchSnapshot) -> list[Slice]:
        """Joins the batches on one device. The following slices enter them in the ledger, fold them and release them."""
        group = [part.take() if isinstance(part, Block) else part for part in parts]
        for part in parts:
            if isinstance(part, Block):
                self._blocks.give_back(part)
        scores, encoded = joined_scores(group)
        sizes = [batch.rows for batch in group]
        grouped: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        if any(batch.is_grouped for batch in group):
            grouped = [batch.grouped(piece) for batch, piece in zip(group, scores.split(sizes), strict=True)]
            scores = torch.cat([piece for piece, *_ in grouped])
            scores = drop_idle_rows(scores, torch.cat([starts for _, starts, *_ in grouped]))
        slices: list[Slice] = []
        if self.keeps_samples:
            untagged = [batch.values for batch in group if batch.samples is None and are_encoded(batch.values)]
            if untagged:
                self._ledger.add_untagged((torch.cat([rows[:, VALID] for rows in untagged]) > 0).sum())
            tagged = [
                TaggedScores(batch.samples, piece, *(grouped[index][1:] if batch.is_grouped else (None, None, None)))
                for index, (batch, piece) in enumerate(zip(group, scores.split(sizes), strict=True))
                if batch.samples is not None
            ]
            slices += [partial(self._ledger.add, part) for part in _parted(tagged)]
        return [*slices, partial(self._fold_scores, scores, encoded, device, snapshot), parts.clear]

    def _fold_scores(
        self, scores: Tensor, encoded: Tensor | None, device: torch.device, snapshot: TorchSnapshot
    ) -> None:
        is_on_host = fold_device(device).type == "cpu"
        vector = fold_on_host(scores) if is_on_host else fold(scores, self._edges_on(device))
        snapshot.add(torch.cat([vector, self._losses(vector, encoded)]))

    def _losses(self, vector: Tensor, encoded: Tensor | None) -> Tensor:
        """[2], like a folded vector: how many samples were lost in rows added to each other, and how many ids are invalid."""
        if encoded is None and not self.keeps_samples:
            return torch.zeros(2, dtype=vector.dtype, device=vector.device)
        overlaid = torch.zeros(1, dtype=vector.dtype, device=vector.device)
        if encoded is not None:
            valid = encoded[:, VALID]
            overlaid += moved(torch.where(valid > 1, valid, 0.0).sum(), vector.device)
        return torch.cat([overlaid, self._ledger.invalid_ids(like=overlaid)])

    def _edges_on(self, device: torch.device) -> Tensor:
        if device not in self._edges:
            self._edges[device] = torch.from_numpy(EDGES.copy()).to(device)
        return self._edges[device]

    def ledger(self) -> Ledger:
        """Returns the ledger of this process alone, on the host. Blocks on the device."""
        with self._lock:
            self._fold_all()
            self._ledger.keep_all()
            return self._ledger.to_host()

    def meet(self, identity: Identity, device: torch.device) -> tuple[list[int], RankSelection]:
        """Brings the ledger's entries to the ranks that keep them (a collective); see `DeviceLedger.meet`.

        An error before that is a fault, since the other ranks would wait for this one.
        """
        with self._lock:
            try:
                self._fold_all()
                own = self._ledger.collect(device)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait
                self._faults.record("ledger", f"the scores of an epoch were lost: {type(error).__name__}: {error}")
                own = nothing(device)
            return self._ledger.meet(own, identity)

    def own_ledger(self) -> Ledger:
        """Returns the samples of the ledger that this process keeps, on the host. Blocks on the device."""
        with self._lock:
            return self._ledger.to_host()

    def load_ledger(self, part: LedgerPart, device: torch.device) -> None:
        """Restores a part of the ledger."""
        with self._lock:
            self._folding.end()
            self._ledger.load(part, device)


def _is_by_input(samples: TaggedBatch | None, rows: int) -> bool:
    """Returns True if there is an id for each input, and inputs have several rows."""
    return samples is not None and not samples.is_by_position and samples.ids.shape[0] != rows


def _parted(tagged: list[TaggedScores]) -> list[list[TaggedScores]]:
    """The batches in their order, in parts that end with `LEDGER_SLICE` batches or `LEDGER_ROWS` rows."""
    parts: list[list[TaggedScores]] = []
    rows = LEDGER_ROWS
    for batch in tagged:
        if rows >= LEDGER_ROWS or len(parts[-1]) == LEDGER_SLICE:
            parts.append([])
            rows = 0
        parts[-1].append(batch)
        rows += len(batch.scores)
    return parts
