"""The per-sample ledger: the sum of each sample's scores, and how often it was seen.

The adapters add these up on the device, by sample id. This is the form in which the host reads them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gwa_logging.document_details import MAX_ROWS
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults

UNKNOWN = -1
"""Stands for a predicted class that is not known."""


class TaggedBatch(NamedTuple):
    """The samples in a batch; arrays of any framework.

    Attributes:
        ids: int [batch]; int [batch, positions], the document of each position of the head's input, `NO_DOCUMENT` where there
            is none; or, with weights, int [batch, m] if each input is a mix of m samples (mixup, CutMix).
        weights: float [m] or [batch, m], the share of each sample in the mix, at least 0; None if nothing is mixed.
        predicted: int [batch], the classes that the model predicts; None if unknown.
    """

    ids: Any
    weights: Any = None
    predicted: Any = None

    @property
    def is_by_position(self) -> bool:
        """Returns True if each position of the head's input has its own id."""
        return self.weights is None and len(self.ids.shape) == 2

    def check(self, scores: tuple[int, ...] | None, num_samples: int | None) -> None:
        """Checks dtypes and shapes. Does not wait for the device, so the values are not checked.

        Args:
            scores: shape of the batch's scores; None if not known yet.
            num_samples: size of the ledger; None if there is none.

        Raises:
            InvalidInputError: there is no ledger, or an array has a wrong dtype or shape.
        """
        if num_samples is None:
            raise InvalidInputError(
                "sample_ids were given, but there is no ledger: watch(..., num_samples=<size of the training set>)"
            )
        dtype, shape = _dtype_and_shape(self.ids)
        mixed = self.weights is not None
        if "int" not in dtype or shape is None or len(shape) not in ((2,) if mixed else (1, 2)):
            wanted = (
                "[batch, m] with weights"
                if mixed
                else "[batch]; [batch, positions] for documents; or [batch, m] and weights for mixed samples"
            )
            raise InvalidInputError(f"sample_ids: expected an integer array {wanted}, found {dtype} of shape {shape}")
        if scores is not None and (problem := mismatch(shape, scores, mixed=mixed)):
            raise InvalidInputError(f"sample_ids: {problem}")
        if mixed:
            found = (
                np.shape(self.weights) if isinstance(self.weights, list | tuple) else _dtype_and_shape(self.weights)[1]
            )
            if found not in (shape, shape[1:]):
                raise InvalidInputError(
                    f"weights: expected {shape[1:]}, the same for every sample, or {shape}, as sample_ids, found {found}"
                )
        if self.predicted is None:
            return
        dtype, found = _dtype_and_shape(self.predicted)
        if self.is_by_position:
            raise InvalidInputError("predicted: not with sample_ids [batch, positions]: a document has no single class")
        if "int" not in dtype or found != shape[:1]:
            raise InvalidInputError(f"predicted: expected integers {shape[:1]}, found {dtype} of shape {found}")


NO_DOCUMENT = -1
"""The id of a position that belongs to no document, such as padding."""


def mismatch(ids: tuple[int, ...], scores: tuple[int, ...], *, mixed: bool = False) -> str | None:
    """Returns what is wrong with the shape of ids for scores of a shape; None if they fit.

    There may be one id for each score; one for each input of scores [batch, positions, ...]; or one for each position. In the
    last case the ids may have one position more than the scores, since some models cut off the last position, which predicts
    nothing: then the last ids of all inputs are dropped. Not if that leaves one position, because [batch, 2] for a score each
    would rather be the ids of mixed samples whose weights were forgotten.
    """
    rows = math.prod(scores)
    inputs = scores[0] if len(scores) > 1 else 0
    if mixed or len(ids) == 1:
        fits = ids[0] in (rows, inputs or rows)
    else:
        fits = rows in (math.prod(ids), math.prod(cut_ids(ids))) and ids[0] == (inputs or ids[0])
    if fits:
        return None
    tail, others, remedy = ", m" if mixed else "", "", ""
    if inputs:
        others = f", or [{inputs}{tail}], one for each input"
    if not mixed:
        positions = f"[{inputs}, {rows // inputs}]" if inputs else f"[batch, positions] with {rows} positions in total"
        others += f", or {positions}, one for each position"
        if len(ids) == 2:
            remedy = "; if these are the ids of mixed samples, [batch, m], pass their weights"
    return f"expected [{rows}{tail}], one for each score{others}; found {list(ids)}{remedy}"


def cut_ids(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ids [batch, positions] for a model that cuts off the last position."""
    return (ids[0], ids[1] - 1) if ids[1] > 2 else ids


def _dtype_and_shape(array: Any) -> tuple[str, tuple[int, ...] | None]:
    shape = getattr(array, "shape", None)
    return str(getattr(array, "dtype", type(array).__name__)), None if shape is None else tuple(shape)


SAMPLE_IDS = "sample ids"
"""Fault: ids that were left out of the ledger."""


def record_invalid_ids(faults: Faults, invalid_ids: int, num_samples: int | None) -> None:
    """Records the ids that were left out of the ledger since the last call.

    Args:
        faults: where to record them.
        invalid_ids: how many there have been in the whole run.
        num_samples: size of the ledger.
    """
    new = invalid_ids - faults.counts.get(SAMPLE_IDS, 0)
    if new > 0:
        faults.record(
            SAMPLE_IDS,
            f"{new} ids were not in [0, {num_samples}), did not match the number of samples, or had a negative or NaN weight; "
            "they were left out",
            new,
        )


class Ledger(NamedTuple):
    """The ledger's contents, on the host.

    Attributes:
        sums: float32 [num_samples], sum of each sample's scores; of a document with several rows, of their means.
        seen: float32 [num_samples], how often each sample was scored; for mixed samples, the sum of its shares.
        predicted: int32 [num_samples], the class predicted when the sample was last seen, `UNKNOWN` where not known; None if
            none is known.
        invalid_ids: number of scores left out, because an id was out of range, the number of ids differed from that of the
            samples, or a weight was negative or NaN.
        untagged: number of samples without an id.
        details: int32 [num_samples], see `document_details`; None if no sample was seen with several scored rows.
    """

    sums: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32] | None = None
    invalid_ids: int = 0
    untagged: int = 0
    details: npt.NDArray[np.int32] | None = None

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """float64 [num_samples]: mean score of each sample; NaN if it was never seen."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.sums.astype(np.float64) / self.seen
        return np.where(self.seen > 0, means, np.nan)

    def map(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> "Ledger":
        """The ledger with each known array changed, in the order of the attributes."""
        return self._replace(
            sums=change(self.sums),
            seen=change(self.seen),
            predicted=None if self.predicted is None else change(self.predicted),
            details=None if self.details is None else change(self.details),
        )

    def merge(self, other: "Ledger") -> "Ledger":
        """The ledger of two processes together. Where both know a prediction or details, the other's win."""
        return Ledger(
            self.sums + other.sums,
            self.seen + other.seen,
            _latest(self.predicted, other.predicted, UNKNOWN),
            self.invalid_ids + other.invalid_ids,
            self.untagged + other.untagged,
            _latest(self.details, other.details, 0),
        )


def _alone(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values of all processes, if this process has all of them."""
    return values


class LedgerPart(NamedTuple):
    """What one process keeps of the ledger of all processes: the samples first, first + 1, ...

    A process keeps all samples if there is only one, or if each of them has the whole ledger.

    Attributes:
        ledger: the samples of this process. Its `invalid_ids` and `untagged` are those of all processes.
        first: id of the first of them.
        gather: joins an array [n] of each process, of one dtype, in the order of the samples; the result is the same in every
            process. Every process must call it.
    """

    ledger: Ledger
    first: int = 0
    gather: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = _alone

    @classmethod
    def of(cls, ledger: Ledger, samples: range, gather: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Self:
        """The part of a whole ledger with these samples."""
        return cls(ledger.map(lambda column: column[samples.start : samples.stop]), samples.start, gather)

    def fitted(self, samples: range) -> Self:
        """The part with these samples: itself, or, if the other processes can no longer be reached, with unknown ones added."""
        ledger = self.ledger
        if samples == range(self.first, self.first + len(ledger.sums)):
            return self

        def placed(column: npt.NDArray[Any], unknown: int = 0) -> npt.NDArray[Any]:
            whole = np.full(max(samples.stop, self.first + len(column)), unknown, column.dtype)
            whole[self.first : self.first + len(column)] = column
            return whole[samples.start : samples.stop]

        predicted = None if ledger.predicted is None else placed(ledger.predicted, UNKNOWN)
        return self._replace(ledger=ledger.map(placed)._replace(predicted=predicted), first=samples.start)

    def whole(self) -> Ledger:
        """The ledger of all samples. In a distributed run every process must call this."""
        return self.ledger.map(self.gather)

    def checked(self) -> Self:
        """The part without details if no sample of any process has several scored rows. Every process must call this."""
        details = self.ledger.details
        if details is None or self.total(int(bool(((details & MAX_ROWS) > 1).any()))):
            return self
        return self._replace(ledger=self.ledger._replace(details=None))

    def own(self, of_all: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What belongs to the samples of this process, of an array [num_samples]."""
        return of_all[self.first : self.first + len(self.ledger.sums)]

    def total(self, count: int | np.integer[Any]) -> int:
        """The sum of a number over all processes. Every process must call this."""
        return int(self.gather(np.array([count], np.int64)).sum())


class FrozenLedger(NamedTuple):
    """The ledger at a stop alert, on the host.

    Attributes:
        part: what this process keeps of it.
        epoch: the epoch after which the alert fired.
    """

    part: LedgerPart
    epoch: int


def _latest(
    own: npt.NDArray[np.int32] | None, other: npt.NDArray[np.int32] | None, unknown: int
) -> npt.NDArray[np.int32] | None:
    if own is None or other is None:
        return other if own is None else own
    return np.where(other == unknown, own, other)


def check_number(k: int) -> None:
    """Checks how many suspects a user asks for.

    Raises:
        InvalidInputError: k is less than 1.
    """
    if k < 1:
        raise InvalidInputError(f"k={k}: expected at least 1, the number of suspects wanted")


def lowest(means: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.intp]:
    """Indices of the k lowest means, lowest first, ties by index; NaN is omitted."""
    seen = np.flatnonzero(~np.isnan(means))
    if k < seen.size:  # avoids sorting ten million samples
        bound = np.partition(means[seen], k - 1)[k - 1]
        seen = seen[means[seen] <= bound]
    return seen[np.argsort(means[seen], kind="stable")[:k]]
