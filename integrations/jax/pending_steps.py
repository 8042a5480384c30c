"""Training steps whose scores wait on the device until they are added to the summary and the ledger, many at once.

One call for a dozen steps costs little more than one for a single step. Nothing here blocks on the device.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gwa_logging.errors import InvalidInputError
from gwa_logging.ledger import TaggedBatch

MOST_STEPS = 16
"""The most steps in a list. With more, a single step becomes noticeably longer than the others."""

MOST_SCORES = 2**18
"""The most scores in a list: 1 MB in float32. More than that take longer to add up than a call takes."""


class Step(NamedTuple):
    """One training step.

    Attributes:
        scores: float [...] on the device.
        samples: its ids; None without a ledger or ids.
    """

    scores: jax.Array
    samples: TaggedBatch | None


class PendingSteps:
    """A list of training steps of the same kind, that is, of the same shapes, dtypes and devices."""

    def __init__(self, every: int) -> None:
        """Makes an empty list for intervals of `every` steps: full lists of equal length end with the interval."""
        self._length = math.ceil(every / math.ceil(every / MOST_STEPS))
        self._steps: list[Step] = []
        self._kind: object = None
        self._capacity = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Returns True if the steps should be added up."""
        return len(self._steps) >= self._capacity

    def accepts(self, step: Step) -> bool:
        """Returns True if the list is empty or the step is of the same kind as its steps."""
        return not self._steps or _kind(step) == self._kind

    def append(self, step: Step) -> None:
        """Appends a step, which the list accepts."""
        if not self._steps:
            self._kind = _kind(step)
            self._capacity = min(self._length, max(1, MOST_SCORES // max(1, step.scores.size)))
        self._steps.append(step)

    def take(self) -> tuple[list[Step], int]:
        """Empties the list. Returns its steps, and the number of steps in a full list of this kind."""
        steps, self._steps = self._steps, []
        return steps, self._capacity

    def add_at_once(self) -> None:
        """Makes every further list full with its first step."""
        self._length = 1


def _kind(step: Step) -> object:
    """Two steps are of the same kind if this is equal."""
    scores, samples = step
    own = (scores.shape, scores.dtype, scores.sharding)
    if samples is None:
        return own
    leaves, structure = jax.tree.flatten(samples)
    return own, structure, [(np.shape(leaf), leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves]


def is_deleted(arrays: Any) -> bool:
    """Returns True if an array of a pytree was deleted or donated."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(arrays))


def owned(samples: TaggedBatch) -> TaggedBatch:
    """The samples with copies of all arrays on the host, which the user may change before they are added.

    Raises:
        InvalidInputError: an array is a tracer.
    """
    return jax.tree.map(_owned, samples)  # type: ignore[no-any-return]


def _owned(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        raise InvalidInputError(
            "sample_ids: found a tracer; return the ids from the jitted step and call update outside"
        )
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.array(leaf)
    if array.dtype.kind in "iu":
        # -1 is invalid, and stands for integers that do not fit: JAX would cut off their upper bits.
        return np.where((array < 0) | (array >= 2**31), -1, array).astype(np.int32)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


class Parts(NamedTuple):
    """Arrays of several steps on the device, for `stacked`."""

    arrays: tuple[jax.Array, ...]


def side_by_side(steps: list[TaggedBatch]) -> Any:
    """The samples of several steps as one `TaggedBatch`: arrays on the host are stacked [steps, ...], others become `Parts`."""
    return jax.tree.map(lambda *leaves: Parts(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves), *steps)


def stacked(samples: Any) -> TaggedBatch:
    """The samples from `side_by_side`, with arrays [steps, ...] only; for use in jit."""
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda part: jnp.stack(part.arrays) if isinstance(part, Parts) else part,
        samples,
        is_leaf=lambda part: isinstance(part, Parts),
    )
