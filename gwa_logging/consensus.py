"""Consensus: how well a checkpoint agrees with what the model itself predicted early in the run.

After each epoch the model is evaluated on the same training inputs: a look. Each input has a consensus class, from the first
half of the epochs so far: the class that training itself predicted most often for this input, if the inputs have sample ids
(of equally frequent ones the class that was predicted later); otherwise the class with the largest sum of the softmax outputs
of the earlier looks. The statistic is, for each consensus class, the share of its inputs that the checkpoint predicts as that
class, averaged over the classes. Labels are not used. While a model learns, the share grows; when it memorises wrong labels,
its predictions for these inputs leave the consensus, which was formed before they were memorised. Since the very checkpoint is
evaluated, the statistic also shows whether this epoch's weights happen to be good.

Source: related to temporal ensembling (Laine and Aila, ICLR 2017) and early-learning regularisation (Liu et al., NeurIPS 2020).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError
from gwa_logging.statistic import Estimate

TOP_CLASSES = 16
"""Number of classes of each input that are kept per look, those with the largest outputs."""

SMALLEST_SHARE = 1e-4
"""Smaller outputs are not kept."""

LATER = 2.0**-32
"""What a vote counts more than one in the epoch before: so little that only ties are decided, for up to 90,000 epochs."""

_STATE = {"ids": np.int32, "classes": np.int32, "shares": np.float64}


class LookRows(NamedTuple):
    """What one look has seen.

    Attributes:
        ids: int64 [N], which input each row is; all different.
        classes: int64 [N, K], the classes with the largest outputs, the largest first; -1 where the outputs are undefined.
        shares: float32 [N, K], their softmax outputs; 0 where undefined.
        num_classes: number of classes of the head, at least 2.
    """

    ids: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float32]
    num_classes: int


def read_predictions(predicted: npt.NDArray[np.int32], ids: npt.NDArray[np.int64], num_classes: int) -> LookRows:
    """The classes that training predicted for some inputs, as rows of the consensus: each is one vote.

    Args:
        predicted: int [N].
        ids: int [N].
        num_classes: number of classes of the head, at least 2.
    """
    return LookRows(
        ids.astype(np.int64), predicted.astype(np.int64)[:, None], np.ones((len(ids), 1), np.float32), num_classes
    )


def read_logits(logits: npt.NDArray[Any], ids: npt.NDArray[np.int64]) -> LookRows:
    """Reduces logits to the largest softmax outputs of each row.

    Args:
        logits: float [N, classes], or [N] or [N, 1] for a head with a single logit, whose sign separates two classes. Rows
            with NaN or only infinities are undefined: they count as predicted wrongly.
        ids: int [N].
    """
    logits = logits.astype(np.float32, copy=False).reshape(len(logits), -1)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    with np.errstate(all="ignore"):
        outputs = np.exp(logits - logits.max(axis=1, keepdims=True))
        outputs /= outputs.sum(axis=1, keepdims=True)
    is_defined = np.isfinite(outputs).all(axis=1)
    outputs[~is_defined] = 0
    classes = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP_CLASSES]
    shares = np.take_along_axis(outputs, classes, axis=1)
    classes[~is_defined] = -1
    return LookRows(ids.astype(np.int64), classes, shares, logits.shape[1])


class Consensus:
    """The sums of the first half of the epochs, and the epochs that are not in them yet.

    An epoch counts with the softmax outputs of its look, or with what training predicted. Each is a pair of arrays: keys,
    id * num_classes + class, int64 in ascending order; and softmax outputs or votes, float64. An input needs at most 16 bytes
    for each kept class: those of the sums, and those of each epoch of the second half.

    Attributes:
        looks: number of looks so far.
        inputs: number of inputs of every look, if their positions are their ids; else 0.
        from_training: True if the predictions of training form the consensus, False if earlier looks do; None before the first
            look.
    """

    def __init__(self) -> None:
        self.looks = self.inputs = 0
        self.from_training: bool | None = None
        self._num_classes = 0  # unknown before the first look
        self._sums = (np.empty(0, np.int64), np.empty(0))
        self._waiting: list[_Epoch] = []

    def add(self, rows: LookRows, trained: LookRows | None = None) -> Estimate | None:
        """Adds the next look.

        Args:
            rows: what the look has seen.
            trained: what training predicted in this epoch, see `read_predictions`; None in every look or in none.

        Returns:
            Its statistic, in [0, 1], and the standard error of drawing the inputs. None if no input of this look was in one of
            the epochs that form the consensus; so without `trained` it is None for the first look.

        Raises:
            InvalidInputError: the number of classes differs from the earlier looks'. Nothing was added.
        """
        if self._num_classes not in (0, rows.num_classes):
            raise InvalidInputError(
                f"look: expected logits of {self._num_classes} classes, as in the earlier looks, found {rows.num_classes}"
            )
        self._num_classes = rows.num_classes
        self.from_training = trained is not None
        if trained is not None:
            self._wait(trained, 1 + (self.looks + 1) * LATER)
        first_half = (self.looks + 1) // 2 or 1  # of the epochs including this one, but at least one
        epochs = self.looks + self.from_training
        while self._waiting and epochs - len(self._waiting) < first_half:
            self._sums = _merge(self._sums, self._waiting.pop(0))
        found = self._compare(rows)
        if trained is None:
            self._wait(rows, 1.0)
        self.looks += 1
        return found

    def _wait(self, rows: LookRows, weight: float) -> None:
        """Keeps an epoch until it belongs to the first half."""
        is_kept = rows.shares >= SMALLEST_SHARE
        keys = (rows.ids[:, None] * rows.num_classes + rows.classes)[is_kept]
        order = np.argsort(keys)
        self._waiting.append((keys[order], weight * rows.shares[is_kept][order].astype(np.float64)))

    def classes(self) -> dict[int, int]:
        """The consensus class of each input, by id. Of equal sums the lowest class counts."""
        ids, classes = self._winners()
        return dict(zip(ids.tolist(), classes.tolist(), strict=True))

    def _winners(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns the ids in ascending order, and their consensus classes."""
        keys, sums = self._sums
        ids, classes = np.divmod(keys, max(self._num_classes, 1))
        order = np.lexsort((classes, -sums, ids))
        ids, first = np.unique(ids[order], return_index=True)
        return ids, classes[order][first]

    def _compare(self, rows: LookRows) -> Estimate | None:
        ids, classes = self._winners()
        if not len(ids):
            return None
        place = np.minimum(np.searchsorted(ids, rows.ids), len(ids) - 1)
        is_known = ids[place] == rows.ids
        if not is_known.any():
            return None
        expected = classes[place][is_known]
        agrees = rows.classes[is_known, 0] == expected
        counts = np.bincount(expected)
        present = counts > 0
        shares = np.bincount(expected, weights=agrees)[present] / counts[present]
        variance = float((shares * (1 - shares) / counts[present]).sum())
        return Estimate(float(shares.mean()), math.sqrt(variance) / len(shares))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self, to_array: Callable[[npt.NDArray[Any]], Any] = lambda array: array) -> dict[str, Any] | None:
        """The state as numbers, a list and one-dimensional arrays, which `to_array` converts; None before the first look."""
        if not self.looks:
            return None
        parts = [self._sums, *self._waiting]
        ids, classes = np.divmod(np.concatenate([keys for keys, _ in parts]), self._num_classes)
        return {
            "looks": self.looks,
            "inputs": self.inputs,
            "from_training": self.from_training,
            "num_classes": self._num_classes,
            "lengths": [len(keys) for keys, _ in parts],
            "ids": to_array(ids.astype(np.int32)),
            "classes": to_array(classes.astype(np.int32)),
            "shares": to_array(np.concatenate([shares for _, shares in parts])),
        }

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Reads what `state` returned; its arrays may be those of any framework.

        Raises:
            ValueError: it is something else, or damaged.
        """
        consensus = cls()
        if state is None:
            return consensus
        names = {"looks", "inputs", "from_training", "num_classes", "lengths", *_STATE}
        if not isinstance(state, Mapping) or set(state) != names or not isinstance(state["lengths"], list | tuple):
            raise ValueError(f"expected a dictionary with the keys {sorted(names)}")
        if not isinstance(state["from_training"], bool):
            raise ValueError("from_training: expected True or False")
        numbers = (state["looks"], state["inputs"], state["num_classes"], *state["lengths"])
        looks, inputs, num_classes, *lengths = map(_whole, numbers)
        arrays = {name: _array(state[name], dtype) for name, dtype in _STATE.items()}
        ids, classes, shares = (arrays[name] for name in _STATE)
        if any(len(array) != sum(lengths) for array in arrays.values()):
            raise ValueError(f"expected arrays of length {sum(lengths)}, the sum of lengths")
        if not 1 <= looks < 2**31 or not 2 <= num_classes < 2**31 or not 1 <= len(lengths) <= looks + 1:
            raise ValueError(f"looks={looks}, num_classes={num_classes} and {len(lengths)} lengths do not fit together")
        if (ids < 0).any() or (classes < 0).any() or (classes >= num_classes).any() or not (shares >= 0).all():
            raise ValueError("ids, classes or shares: found values out of range")
        keys = ids.astype(np.int64) * num_classes + classes
        cuts = np.cumsum(lengths)[:-1]
        parts = list(zip(np.split(keys, cuts), np.split(shares, cuts), strict=True))
        if any((np.diff(part) <= 0).any() for part, _ in parts):
            raise ValueError("ids and classes: expected ascending order within each look")
        consensus.looks, consensus.inputs, consensus._num_classes = looks, inputs, num_classes
        consensus.from_training = state["from_training"]
        consensus._sums, *consensus._waiting = parts
        return consensus


_Epoch = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def _merge(sums: _Epoch, more: _Epoch) -> _Epoch:
    """Adds up what has the same key."""
    keys, inverse = np.unique(np.concatenate([sums[0], more[0]]), return_inverse=True)
    added = np.bincount(inverse, weights=np.concatenate([sums[1], more[1]]), minlength=len(keys))
    return keys, added.astype(np.float64)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0:
        raise ValueError("looks, inputs, num_classes or lengths: expected integers of at least 0")
    return int(value)


def _array(value: Any, dtype: type) -> npt.NDArray[Any]:
    on_host = value.detach().cpu() if hasattr(value, "detach") and hasattr(value, "cpu") else value
    array = np.asarray(on_host)
    if array.ndim != 1 or (array.dtype.kind not in "iuf" and array.size):
        raise ValueError(f"expected one-dimensional arrays of numbers, found {array.dtype} of shape {array.shape}")
    return array.astype(dtype)
