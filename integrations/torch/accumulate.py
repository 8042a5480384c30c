"""Accumulates scores on the device, and copies their summary to the host in the background.

A step only appends a few small tensors to a list. From time to time they are folded, on the device and in float64, into one
vector in the order of `AlignmentSummary.to_vector`. Vectors are merged on the host.
"""

from collections import defaultdict
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from gwa_logging.faults import Faults
from gwa_logging.histogram import EDGES
from gwa_logging.integrations.torch.distributed import full_tensor, is_first_owner, is_split
from gwa_logging.integrations.torch.fold import fold, fold_device
from gwa_logging.integrations.torch.ledger import DeviceLedger, TaggedScores, moved
from gwa_logging.integrations.torch.ledger_entries import nothing
from gwa_logging.integrations.torch.rows import (
    COLUMNS,
    FIRST,
    LENGTH,
    PASSES,
    PREDICTED,
    VALID,
    decode_rows,
    drop_idle_rows,
    first_rows,
    gradient_lengths,
    sort_by_document,
)
from gwa_logging.integrations.torch.scores import Terms, alignment_scores
from gwa_logging.integrations.torch.tags import Tags
from gwa_logging.ledger import SAMPLE_IDS, Ledger, LedgerPart, TaggedBatch, mismatch, record_invalid_ids
from gwa_logging.ranks import Attendance, Identity, RankSelection
from gwa_logging.summary import AlignmentSummary

FOLD_AT = 65_536
"""Number of rows at which they are folded: 768 KB at most are kept on the device."""


class _Batch(NamedTuple):
    """One backward pass.

    Attributes:
        values: terms (eager), encoded rows (compiled), or scores (from the user).
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
        has_starts = _are_encoded(self.values) and self.values.shape[1] > FIRST
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
            if _are_encoded(self.values):
                rows = self.values[:, VALID] > 0
                inputs = (self.values[:, FIRST] > 0).sum() if self.values.shape[1] > FIRST else None
            return sort_by_document(scores, lengths, rows, moved(self.samples.ids, scores.device), inputs)
        if self.samples is not None and _are_encoded(self.values) and self.is_grouped:
            rows, starts = self.values[:, VALID] > 0, self.values[:, FIRST] > 0
            return scores, torch.where(rows.sum() == self.samples.ids.shape[0], rows, starts), lengths, None
        return scores, first_rows(scores, self.inputs), lengths, None

    def _lengths(self, scores: Tensor) -> Tensor:
        """float32 [rows]: the lengths of the rows' gradients; ones where they are not known."""
        if isinstance(self.values, Terms):
            return gradient_lengths(self.values)
        return (
            self.values[:, LENGTH]
            if self.values.ndim == 2 and self.values.shape[1] > LENGTH
            else torch.ones_like(scores)
        )


class Accumulator:
    """Scores since the last snapshot, and the per-sample ledger, of one process.

    Processes that share a split head (tensor parallelism) all see the same samples. They compute the terms together, and the
    first of them counts the samples. If one of them does not watch, the terms cannot be completed, and nothing is counted.

    Attributes:
        keeps_samples: True if there is a ledger.
        tags: sample ids that wait for a pass.
    """

    def __init__(
        self, num_samples: int | None, faults: Faults | None = None, attendance: Attendance | None = None
    ) -> None:
        self.tags = Tags()
        self.keeps_samples = num_samples is not None
        self._faults = faults or Faults()
        self._attendance = attendance
        self._batches: list[_Batch] = []
        self._rows = 0
        self._arriving = TorchSnapshot(self._record_losses)
        self._edges: dict[torch.device, Tensor] = {}
        self._num_samples = num_samples
        self._ledger = DeviceLedger(num_samples or 0)
        self._lock = Lock()  # DataParallel's replicas run their backward passes in threads

    def add_terms(self, terms: Terms, samples: TaggedBatch | None, inputs: int = 0) -> None:
        """Adds the terms of an eager backward pass.

        Args:
            terms: of the rows.
            samples: their ids, if known: for each row, each input, or each position; see `gwa_logging.ledger.mismatch`.
            inputs: number of inputs, in order and with the same number of rows each; 0 if unknown.
        """
        if is_split(terms.product):
            complete = self._complete(*terms)
            if complete is None:
                return
            terms = Terms(*complete)
        rows = terms.product.numel()
        fitting = self._fitting(samples, rows, inputs)
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

    def _fitting(self, samples: TaggedBatch | None, rows: int, inputs: int) -> TaggedBatch | None:
        """The samples if their ids fit the rows; otherwise None, and the ids are counted as lost."""
        if samples is None:
            return None
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
            self._batches.append(_Batch(values, rows, samples, inputs))
            self._rows += rows
            if samples is None and self.keeps_samples and not mismatched and not _are_encoded(values):
                self._ledger.untagged += rows
            if self._rows >= FOLD_AT:
                self._fold()

    def snapshot(self) -> "TorchSnapshot":
        """Returns everything since the last snapshot, on its way to the host."""
        with self._lock:
            self._fold()
            snapshot, self._arriving = self._arriving, TorchSnapshot(self._record_losses)
            return snapshot

    def _record_losses(self, overlaid: int, invalid_ids: int) -> None:
        """Records the samples that were lost on the device, once a folded vector has arrived on the host."""
        if overlaid:
            self._faults.record(
                "compiled passes",
                f"{overlaid} samples have no score: more than {PASSES} compiled forward passes waited for one backward pass",
                overlaid,
            )
        record_invalid_ids(self._faults, invalid_ids, self._num_samples)

    def _fold(self) -> None:
        batches, self._batches, self._rows = self._batches, [], 0
        by_device: dict[torch.device, list[_Batch]] = defaultdict(list)
        for batch in batches:
            by_device[batch.device].append(batch)
        by_device.pop(torch.device("meta"), None)  # tensors without numbers
        for device, group in by_device.items():
            self._fold_group(group, device)

    def _fold_group(self, group: list[_Batch], device: torch.device) -> None:
        """Folds the batches on one device, and adds those with ids to the ledger."""
        group.sort(key=lambda batch: batch.values.ndim if isinstance(batch.values, Tensor) else 0)
        scores, encoded = _joined_scores(group)
        sizes = [batch.rows for batch in group]
        grouped: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        if any(batch.is_grouped for batch in group):
            grouped = [batch.grouped(piece) for batch, piece in zip(group, scores.split(sizes), strict=True)]
            scores = torch.cat([piece for piece, *_ in grouped])
            scores = drop_idle_rows(scores, torch.cat([starts for _, starts, *_ in grouped]))
        vector = fold(scores, self._edges_on(device))
        if self.keeps_samples:
            untagged = [batch.values for batch in group if batch.samples is None and _are_encoded(batch.values)]
            if untagged:
                self._ledger.add_untagged((torch.cat([rows[:, VALID] for rows in untagged]) > 0).sum())
            self._ledger.add(
                [
                    TaggedScores(
                        batch.samples, piece, *(grouped[index][1:] if batch.is_grouped else (None, None, None))
                    )
                    for index, (batch, piece) in enumerate(zip(group, scores.split(sizes), strict=True))
                    if batch.samples is not None
                ]
            )
        self._arriving.add(torch.cat([vector, self._losses(vector, encoded)]))

    def _losses(self, vector: Tensor, encoded: Tensor | None) -> Tensor:
        """[2], like a folded vector: how many samples were lost in rows added to each other, and how many ids are invalid."""
        overlaid = torch.zeros(1, dtype=vector.dtype, device=vector.device)
        if encoded is not None:
            valid = encoded[:, VALID]
            overlaid += moved(torch.where(valid > 1, valid, 0.0).sum(), vector.device)
        return torch.cat([overlaid, self._ledger.invalid_ids(like=overlaid)])

    def _edges_on(self, device: torch.device) -> Tensor:
        if device not in self._edges:
            self._edges[device] = torch.from_numpy(EDGES.copy()).to(fold_device(device))
        return self._edges[device]

    def ledger(self) -> Ledger:
        """Returns the ledger of this process alone, on the host. Blocks on the device."""
        with self._lock:
            self._fold()
            self._ledger.keep_all()
            return self._ledger.to_host()

    def meet(self, identity: Identity, device: torch.device) -> tuple[list[int], RankSelection]:
        """Brings the ledger's entries to the ranks that keep them (a collective); see `DeviceLedger.meet`.

        An error before that is a fault, since the other ranks would wait for this one.
        """
        with self._lock:
            try:
                self._fold()
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
            self._ledger.load(part, device)


def _is_by_input(samples: TaggedBatch | None, rows: int) -> bool:
    """Returns True if there is an id for each input, and inputs have several rows."""
    return samples is not None and not samples.is_by_position and samples.ids.shape[0] != rows


def _are_encoded(values: Terms | Tensor) -> TypeGuard[Tensor]:
    """Returns True for the encoded rows of a compiled pass."""
    return isinstance(values, Tensor) and values.ndim == 2


def _joined_scores(batches: list[_Batch]) -> tuple[Tensor, Tensor | None]:
    """The scores of batches that are sorted into terms, scores and encoded rows: float32 [rows]; and all encoded rows."""
    terms = [batch.values for batch in batches if isinstance(batch.values, Terms)]
    tensors = [batch.values for batch in batches if isinstance(batch.values, Tensor)]
    scores = [values.float() for values in tensors if values.ndim == 1]
    rows = [values for values in tensors if values.ndim == 2]
    if terms:
        scores.insert(0, alignment_scores(_joined_terms(terms)))
    encoded = torch.cat(rows) if rows else None
    if encoded is not None:
        scores.append(decode_rows(encoded))
    return torch.cat(scores), encoded


def _joined_terms(batches: list[Terms]) -> Terms:
    """The terms of all rows, with a weight norm for each row."""
    products, delta_norms, embedding_norms, weight_norms = zip(*batches, strict=True)
    weight_norms = tuple(map(torch.Tensor.expand_as, weight_norms, products))
    return Terms(*map(torch.cat, (products, delta_norms, embedding_norms, weight_norms)))


class TorchSnapshot:
    """Folded vectors on their way to the host."""

    def __init__(self, record_losses: Callable[[int, int], None]) -> None:
        """Calls `record_losses(overlaid, invalid_ids)` with the last two numbers of each vector once it has arrived."""
        self._record_losses = record_losses
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
        """Returns True if everything has arrived."""
        self._merge_arrived()
        return not self._vectors

    def result(self) -> AlignmentSummary:
        """The summary. Blocks until everything has arrived."""
        for _, event in self._vectors:
            if event is not None:
                event.synchronize()
        self._merge_arrived()
        return self._merged
