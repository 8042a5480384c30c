"""Gathers scores on the device, and brings their summary to the host without waiting for it.

A step only puts a few small tensors into a list. Once in a while they are folded, on the device and in float64, into
one vector of ten numbers and a histogram, which is copied to the host in the background. Merging is done on the host, by
`AlignmentSummary.merge`, as everywhere.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from threading import Lock
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from gwa_logging.alignment import DEAD, NO_GRADIENT, NOT_FINITE, SCORE_TOLERANCE, SMALLEST
from gwa_logging.faults import Faults
from gwa_logging.histogram import BINS, EDGES
from gwa_logging.integrations.torch.tags import Tags
from gwa_logging.ledger import SAMPLE_IDS, UNKNOWN, Ledger, TaggedBatch, record_invalid_ids
from gwa_logging.summary import AlignmentSummary

FOLD_AT = 65_536
"""TaggedBatch kept on the device before they are folded: 768 KB at most."""

PASSES = 32
"""How many compiled passes may wait for one backward pass; of more of them, some have no scores."""

_NUMBERS = ("count", "mean", "m2", "m3", "m4", "minimum", "maximum", "no_gradient", "dead", "not_finite")
_PADDING = 4.0  # marks a row that is no sample; no score is above 1
_NO_GRADIENT, _NOT_FINITE, _DEAD = 64.0, 128.0, -128.0  # the marks in a gradient, where a NaN would alarm the user


class Terms(NamedTuple):
    """What the scores of a batch are made of, float32 [rows]: score = -product / (delta_norms * embedding_norms * |W|).

    Attributes:
        product: delta . (z - b), or (dL/dh) . h.
        delta_norms: |delta|.
        embedding_norms: |h|.
        weight_norm: |W|, one number [] for all rows.
    """

    product: Tensor
    delta_norms: Tensor
    embedding_norms: Tensor
    weight_norm: Tensor

    def scores(self) -> Tensor:
        """float32 [rows]; not finite where a sample has no score, by the marks of `gwa_logging.alignment`."""
        seen = self.embedding_norms * self.weight_norm
        scores = (-self.product / self.delta_norms / seen).float()
        scores = torch.where(seen == 0, DEAD, scores)
        scores = torch.where(self.delta_norms < SMALLEST, NO_GRADIENT, scores)
        return torch.where(torch.isfinite(self.product + self.delta_norms + seen), scores, NOT_FINITE)


def coded(terms: Terms, predicted: Tensor | None = None, columns: int = 2, inputs: int = 0) -> Tensor:
    """float32 [rows, 2 or 4], always finite, as it can be a gradient. Zeros after the rows are padding.

    Args:
        terms: of the rows.
        predicted: int or float [rows], the predicted classes; None if not known.
        columns: 2 for (score, 1); 4 for (score, 1, predicted class, 1 if the row is the first one of its input).
        inputs: how many inputs the rows belong to, the same number of rows each; 0 if each row is an input.
    """
    scores = torch.nan_to_num(terms.scores(), nan=_NO_GRADIENT, posinf=_NOT_FINITE, neginf=_DEAD)
    coded = [scores, torch.ones_like(scores)]
    if columns > 2:
        coded.append(torch.full_like(scores, UNKNOWN) if predicted is None else predicted.float())
        coded.append(first_rows(scores, inputs).float())
    return torch.stack(coded, dim=-1)


def first_rows(scores: Tensor, inputs: int) -> Tensor:
    """bool [rows]: which rows are the first ones of their input, if all inputs have the same number of rows."""
    starts = torch.ones_like(scores, dtype=torch.bool)
    if inputs and scores.shape[0] != inputs:
        starts = torch.arange(scores.shape[0], device=scores.device) % (scores.shape[0] // inputs) == 0
    return starts


def decoded(rows: Tensor) -> Tensor:
    """The scores of coded rows, float32 [rows]. Rows that were added to each other have none, and count as padding."""
    scores, valid = rows[:, 0], rows[:, 1]
    scores = torch.add(scores, 1 - valid, alpha=_PADDING)
    for code, mark in ((_NO_GRADIENT, NO_GRADIENT), (_NOT_FINITE, NOT_FINITE), (_DEAD, DEAD)):
        scores = torch.where(scores == code, mark, scores)
    return torch.where(valid > 1, _PADDING, scores)


def without_idle(scores: Tensor, starts: Tensor) -> Tensor:
    """The scores, with padding instead of rows that are no samples: those without a gradient, beside rows of the same input.

    A decoder's classifier runs its head on all tokens, and only one of them has a gradient. An input none of whose rows has a
    gradient keeps its first one.

    Args:
        scores: float32 [rows], with the marks.
        starts: bool [rows], True at the first row of each input.
    """
    places = torch.arange(scores.shape[0], device=scores.device)
    first = torch.cummax(torch.where(starts, places, 0), 0).values
    has_gradient = ~torch.isnan(scores)
    inputs_gradient = torch.zeros_like(scores).index_add_(0, first, (has_gradient & (scores != _PADDING)).float()) > 0
    return torch.where(has_gradient | (starts & ~inputs_gradient), scores, _PADDING)


def by_input(scores: Tensor, starts: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean score of each input's rows, and its predicted class where one row alone has a score.

    Args:
        scores: float32 [batches, rows].
        starts: bool [batches, rows], True at the first row of each input.
        predicted: [batches, rows] of the rows, or None.

    Returns:
        The same shapes: the i-th place is that of the i-th input, padding after the last one.
    """
    counted = scores.abs() <= 1 + SCORE_TOLERANCE
    owner = (starts.cumsum(1) - 1).clamp(min=0)
    sums = torch.zeros_like(scores).scatter_add_(1, owner, torch.where(counted, scores, 0.0))
    rows = torch.zeros_like(scores).scatter_add_(1, owner, counted.float())
    means = torch.where(rows > 0, sums / rows, NO_GRADIENT)
    inputs = torch.arange(scores.shape[1], device=scores.device) < starts.sum(1, keepdim=True)
    if predicted is not None:
        alone = torch.zeros_like(predicted).scatter_add_(1, owner, torch.where(counted, predicted, 0))
        predicted = torch.where(rows == 1, alone, UNKNOWN)
    return torch.where(inputs, means, _PADDING), predicted


def joined(batches: list[Terms]) -> Terms:
    """The terms of all rows together, with a weight norm for each row."""
    products, delta_norms, embedding_norms, weight_norms = zip(*batches, strict=True)
    weight_norms = tuple(map(torch.Tensor.expand_as, weight_norms, products))
    return Terms(*map(torch.cat, (products, delta_norms, embedding_norms, weight_norms)))


class _Batch(NamedTuple):
    """One backward pass.

    Attributes:
        values: terms (eager), coded rows (compiled) or scores (from the user).
        rows: how many; of coded rows with the padding.
        samples: which samples they are, if known.
        inputs: how many inputs the rows belong to, if not each row is one; coded rows of four columns know it themselves.
    """

    values: Terms | Tensor
    rows: int
    samples: TaggedBatch | None
    inputs: int

    @property
    def is_grouped(self) -> bool:
        """Whether several rows may belong to one id."""
        knows_inputs = _is_coded(self.values) and self.values.shape[1] > 3
        return self.samples is not None and (knows_inputs or self.inputs > 0)


class _DeviceLedger(NamedTuple):
    """The ledger on the device, [num_samples + 1]; the last place is for ids that are none, where they are counted."""

    sums: Tensor
    seen: Tensor
    predicted: Tensor

    def to_host(self, untagged: int) -> Ledger:
        """Waits for the device."""
        sums, seen, predicted = (tensor.cpu().numpy().copy() for tensor in self)
        return Ledger(sums[:-1], seen[:-1], predicted[:-1], round(float(seen[-1])), untagged)


class Accumulator:
    """Scores since the last snapshot, and the per-sample ledger.

    Attributes:
        keeps_samples: whether there is a ledger.
        tags: the ids that wait for a pass.
    """

    def __init__(self, num_samples: int | None, faults: Faults | None = None) -> None:
        self.tags = Tags()
        self._faults = faults or Faults()
        self._batches: list[_Batch] = []
        self._rows = 0
        self._arriving = TorchSnapshot(self._lost)
        self._edges: dict[torch.device, Tensor] = {}
        self._num_samples = num_samples
        self.keeps_samples = num_samples is not None
        self._ledger: _DeviceLedger | None = None
        self._untagged = 0
        self._untagged_coded: Tensor | int = (
            0  # of compiled passes, whose rows only the device can distinguish from padding
        )
        self._misfits = (
            0  # ids that were not as many as their samples; those on the device are the ledger's invalid_ids
        )
        self._lock = Lock()  # DataParallel's replicas run their backward passes in threads

    def tag(self, samples: TaggedBatch) -> None:
        """Keeps the ids of the next batch."""
        self.tags.put(samples)

    def add_terms(self, terms: Terms, samples: TaggedBatch | None, inputs: int = 0) -> None:
        """Adds the terms of an eager backward pass.

        Args:
            terms: of the rows.
            samples: which samples they are, if known: as many ids as there are rows, or inputs.
            inputs: how many inputs there are, the same number of rows each, in their order; 0 if that is not known.
        """
        rows = terms.product.numel()
        if samples is None or (given := samples.ids.shape[0]) == rows:
            self._add(terms, rows, samples)
        elif given == inputs:
            self._add(terms, rows, samples, inputs)
        else:
            self._misfit(given, rows)
            self._add(terms, rows, None, misfit=True)

    def _misfit(self, ids: int, rows: int) -> None:
        lost = min(ids, rows)
        self._misfits += lost
        self._faults.record(
            SAMPLE_IDS,
            f"{lost} ids were left out: a forward pass was tagged with {ids} ids, but the head saw {rows} rows in it",
            lost,
        )

    def add_coded(self, rows: Tensor, samples: TaggedBatch | None) -> None:
        """Adds the coded rows of a compiled backward pass, which may be overwritten after this."""
        rows = rows.clone()
        if samples is not None and rows.shape[1] > 2:
            samples = samples._replace(predicted=rows[:, 2])
        self._add(rows, rows.shape[0], samples)

    def add_scores(self, scores: Tensor, samples: TaggedBatch | None) -> None:
        """Adds scores from the user, float [...], which may be overwritten after this."""
        self._add(scores.flatten().clone(), scores.numel(), samples)

    def _add(
        self, values: Terms | Tensor, rows: int, samples: TaggedBatch | None, inputs: int = 0, *, misfit: bool = False
    ) -> None:
        if not rows:
            return
        with self._lock:
            self._batches.append(_Batch(values, rows, samples, inputs))
            self._rows += rows
            if samples is None and self.keeps_samples and not misfit and not _is_coded(values):
                self._untagged += rows
            if self._rows >= FOLD_AT:
                self._fold()

    def snapshot(self) -> "TorchSnapshot":
        """Everything since the last one, on its way to the host."""
        with self._lock:
            self._fold()
            snapshot, self._arriving = self._arriving, TorchSnapshot(self._lost)
            return snapshot

    def _lost(self, overlaid: int, invalid_ids: int) -> None:
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
            by_device[_device_of(batch.values)].append(batch)
        by_device.pop(torch.device("meta"), None)  # no numbers, no samples
        for device, group in by_device.items():
            group.sort(key=lambda batch: batch.values.ndim if isinstance(batch.values, Tensor) else 0)
            tensors = [batch.values for batch in group if isinstance(batch.values, Tensor)]
            terms = [batch.values for batch in group if isinstance(batch.values, Terms)]
            pieces = [values.float() for values in tensors if values.ndim == 1]
            rows = [values for values in tensors if values.ndim == 2]
            if terms:
                pieces.insert(0, joined(terms).scores())
            coded = torch.cat(rows) if rows else None
            if coded is not None:
                pieces.append(decoded(coded))
            scores = torch.cat(pieces)
            sizes = [batch.rows for batch in group]
            starts: Sequence[Tensor | None] = [None] * len(group)
            if any(batch.is_grouped for batch in group):
                starts = begins = [
                    _starts(batch, piece) for batch, piece in zip(group, scores.split(sizes), strict=True)
                ]
                scores = without_idle(scores, torch.cat(begins))
            vector = fold(scores, self._edges_on(device))
            if self.keeps_samples:
                untagged = [batch.values for batch in group if batch.samples is None and _is_coded(batch.values)]
                if untagged:
                    count = (torch.cat([values[:, 1] for values in untagged]) > 0).sum()
                    self._untagged_coded += _moved(count, self._ledger_on(device).sums.device)
                tagged = [
                    (batch.samples, piece, start if batch.is_grouped else None)
                    for batch, piece, start in zip(group, scores.split(sizes), starts, strict=True)
                    if batch.samples is not None
                ]
                for _, alike in groupby(tagged, key=_form):  # in their order, so that sums are the same to the bit
                    self._enter(*zip(*alike, strict=True))
            self._arriving.add(self._with_losses(vector, coded))

    def _with_losses(self, vector: Tensor, coded: Tensor | None) -> Tensor:
        """A folded vector, and after it how many samples were lost: in encoded rows added to each other, and invalid ids."""
        overlaid = torch.zeros(1, dtype=vector.dtype, device=vector.device)
        if coded is not None:
            valid = coded[:, 1]
            overlaid += _moved(torch.where(valid > 1, valid, 0.0).sum(), vector.device)
        invalid_ids = torch.full_like(overlaid, self._misfits)
        if self._ledger is not None:
            invalid_ids += _moved(self._ledger.seen[-1:], vector.device)
        return torch.cat([vector, overlaid, invalid_ids])

    def _edges_on(self, device: torch.device) -> Tensor:
        if device not in self._edges:
            self._edges[device] = torch.from_numpy(EDGES.copy()).to(_fold_device(device))
        return self._edges[device]

    def _enter(self, batches: Sequence[TaggedBatch], scores: Sequence[Tensor], starts: Sequence[Tensor | None]) -> None:
        """Enters the scores of n batches of one form into the ledger."""
        sums, seen, predicted = self._ledger_on(scores[0].device)
        device, size = sums.device, sums.shape[0] - 1
        ids, weights, known = (_stacked(column, device) for column in zip(*batches, strict=True))
        score = _stacked(scores, device)  # [n, rows]
        assert ids is not None
        assert score is not None
        begins = _stacked(starts, device)
        if begins is not None:
            score, known = by_input(score, begins, known)
        ids, rows = ids.to(torch.int64), min(score.shape[1], ids.shape[1])
        real = score != _PADDING
        misfit = real.sum(1, keepdim=True) != ids.shape[1]
        stray = (ids < 0) | (ids >= size) | misfit.reshape(-1, *[1] * (ids.ndim - 1))
        score, ids, stray, real = score[:, :rows], ids[:, :rows], stray[:, :rows], real[:, :rows]
        counted = score.abs() <= 1 + SCORE_TOLERANCE
        score = torch.where(counted, score, 0.0)
        counted |= misfit & real  # whose id is lost, whether it has a score or not
        if weights is None:
            shares = counted.float()
        else:
            weights = (weights[:, None] if weights.ndim == 2 else weights[:, :rows]).float().expand(ids.shape)
            stray |= ~(weights >= 0) | torch.isinf(weights)
            shares = torch.where(counted[..., None], torch.where(stray, 1.0, weights), 0.0)
            score = score[..., None]
        ids = torch.where(stray, size, ids)
        sums.index_add_(0, ids.flatten(), (shares * score).flatten())
        seen.index_add_(0, ids.flatten(), shares.flatten())
        if known is not None and ids.ndim == 2:  # a mixed input's prediction is nobody's
            places, order = _latest(torch.where(counted, ids, size).flatten(), size)
            predicted.index_copy_(0, places, known[:, :rows].flatten()[order].to(torch.int32))

    def _ledger_on(self, device: torch.device) -> _DeviceLedger:
        if self._ledger is None:
            size = (self._num_samples or 0) + 1
            self._ledger = _DeviceLedger(
                torch.zeros(size, device=device),
                torch.zeros(size, device=device),
                torch.full((size,), UNKNOWN, dtype=torch.int32, device=device),
            )
        return self._ledger

    def ledger(self) -> Ledger:
        """The ledger, brought to the host: waits for the device."""
        with self._lock:
            self._fold()
            ledger = self._ledger_on(torch.device("cpu")).to_host(self._untagged + int(self._untagged_coded))
            return ledger._replace(invalid_ids=ledger.invalid_ids + self._misfits)

    def load_ledger(self, ledger: Ledger, device: torch.device) -> None:
        """Puts back what `ledger` gave."""
        with self._lock:
            rest = (0.0, ledger.invalid_ids, UNKNOWN)
            arrays = (np.append(array, end).astype(array.dtype) for array, end in zip(ledger[:3], rest, strict=True))
            self._ledger = _DeviceLedger(*(torch.from_numpy(array).to(device) for array in arrays))
            self._untagged, self._untagged_coded, self._misfits = ledger.untagged, 0, 0


def _is_coded(values: Terms | Tensor) -> TypeGuard[Tensor]:
    """Whether these are the rows of a compiled pass."""
    return isinstance(values, Tensor) and values.ndim == 2


def _starts(batch: _Batch, scores: Tensor) -> Tensor:
    """bool [rows]: at which rows of a batch an input begins; at all of them, unless several rows belong to one id."""
    if batch.samples is not None and _is_coded(batch.values) and batch.is_grouped:
        rows, starts = batch.values[:, 1] > 0, batch.values[:, 3] > 0
        return torch.where(rows.sum() == batch.samples.ids.shape[0], rows, starts)
    return first_rows(scores, batch.inputs)


def _form(entry: tuple[TaggedBatch, Tensor, Tensor | None]) -> object:
    """What must be the same of batches that are entered together."""
    samples, *others = entry
    return [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in (*samples, *others)]


def _stacked(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """[n, ...] on a device, of n tensors of one form; None if there are none."""
    known = [tensor for tensor in tensors if tensor is not None]
    return _moved(torch.stack(known), device) if known else None


def _latest(ids: Tensor, nowhere: int) -> tuple[Tensor, Tensor]:
    """Where entries go that overwrite each other: int64 [entries], and the order that they must be brought into.

    The last one of each id goes to its id, the others `nowhere`: a device may write to one place in any order.
    """
    ids, order = torch.sort(ids, stable=True)
    overwritten = torch.zeros_like(ids, dtype=torch.bool)
    overwritten[:-1] = ids[1:] == ids[:-1]
    return torch.where(overwritten, nowhere, ids), order


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; without waiting, but on the host, where it could be read before it has come."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def _device_of(values: Terms | Tensor) -> torch.device:
    return values.device if isinstance(values, Tensor) else values.product.device


def _fold_device(device: torch.device) -> torch.device:
    """Where to fold: on the device if it has float64."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def fold(scores: Tensor, edges: Tensor) -> Tensor:
    """Summarises scores on their device, without waiting for it.

    Args:
        scores: float32 [rows], not finite where a sample has no score.
        edges: float32 [513], the edges of the histogram.

    Returns:
        float64 [522]: the numbers of `_NUMBERS`, and 512 bin counts.
    """
    scores = scores.to(edges.device)
    x = scores.double()
    valid = x.abs() <= 1 + SCORE_TOLERANCE  # False for NaN
    count = valid.sum().double()
    mean = torch.where(valid, x, 0.0).sum() / count.clamp(min=1)
    c = torch.where(valid, x - mean, 0.0)
    correction = c.sum() / count.clamp(min=1)
    c = torch.where(valid, c - correction, 0.0)
    square = c * c
    padding = x == _PADDING
    no_gradient, dead = torch.isnan(x), x == DEAD
    numbers = torch.stack(
        [
            count,
            mean + correction,
            square.sum(),
            (square * c).sum(),
            (square * square).sum(),
            torch.where(valid, x, torch.inf).min(),
            torch.where(valid, x, -torch.inf).max(),
            no_gradient.sum().double(),
            dead.sum().double(),
            (~(valid | padding | no_gradient | dead)).sum().double(),
        ]
    )
    index = (torch.searchsorted(edges, scores, right=True) - 1).clamp(0, BINS - 1)
    bins = torch.zeros(BINS + 1, dtype=torch.float64, device=edges.device)
    bins.index_add_(0, torch.where(valid, index, BINS), torch.ones_like(x))
    return torch.cat([numbers, bins[:BINS]])


class TorchSnapshot:
    """Folded vectors on their way to the host."""

    def __init__(self, lost: Callable[[int, int], None]) -> None:
        """Calls `lost(overlaid, invalid_ids)` with the last two numbers of each vector, once they have come."""
        self._lost = lost
        self._vectors: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._merged = AlignmentSummary()

    def add(self, vector: Tensor) -> None:
        """Starts copying a folded vector; merges those that have come."""
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
            vector = self._vectors.pop(0)[0]
            self._merged = self._merged.merge(unpack(vector[:-2]))
            self._lost(*map(int, vector[-2:].tolist()))

    def ready(self) -> bool:
        """Whether everything has come."""
        self._merge_arrived()
        return not self._vectors

    def result(self) -> AlignmentSummary:
        """The summary; waits for what is still under way."""
        for _, event in self._vectors:
            if event is not None:
                event.synchronize()
        self._merge_arrived()
        return self._merged


def pack(summary: AlignmentSummary) -> Tensor:
    """float64 [522] of a summary, as `fold` makes it, on the host."""
    numbers = [getattr(summary, name) for name in _NUMBERS]
    return torch.cat([torch.tensor(numbers, dtype=torch.float64), torch.from_numpy(summary.bins).double()])


def unpack(vector: Tensor) -> AlignmentSummary:
    """The summary of a vector on the host."""
    values = vector.numpy()
    numbers = {name: float(value) for name, value in zip(_NUMBERS, values[:-BINS], strict=True)}
    counts = {name: int(numbers[name]) for name in ("count", "no_gradient", "dead", "not_finite")}
    return AlignmentSummary(**{**numbers, **counts}, bins=values[-BINS:].astype(np.int64))  # type: ignore[arg-type]
