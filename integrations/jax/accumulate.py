"""Gathers scores on the device in one small jitted update per step, and brings their summary to the host.

JAX computes in float32. Moments are centred on the batch, and kept relative to a pivot near the scores, so that a small
spread around a large mean loses nothing; the host goes on in float64.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gwa_logging.alignment import DEAD, SCORE_TOLERANCE
from gwa_logging.histogram import BINS, EDGES
from gwa_logging.integrations.jax.probe import FINITE_MARKS
from gwa_logging.ledger import UNKNOWN, Ledger, TaggedBatch
from gwa_logging.summary import AlignmentSummary

BEYOND = 2.0
"""The minimum of no scores, and minus their maximum: an infinity would alarm `jax_debug_infs`."""


class AlignmentState(NamedTuple):
    """A summary on the device, as a pytree of two arrays: for training loops that are one `lax.scan`.

    >>> state = AlignmentState.empty().update(jnp.array([0.1, 0.3]))
    >>> state.merge(AlignmentState.empty().update(jnp.array([0.2]))).summary().count
    3

    Give it to `monitor.update` now and then, in place of scores, and start anew from `empty()`.

    Attributes:
        numbers: float32 [7]: pivot, mean - pivot, m2, m3, m4, minimum, maximum; the last two are 2 and -2 while count is 0.
        counts: int32 [516]: count, no_gradient, dead, not_finite, and 512 bin counts.
    """

    numbers: Array
    counts: Array

    @classmethod
    def empty(cls) -> Self:
        """Of no scores."""
        with jax.transfer_guard("allow"):  # it is asked for
            numbers, counts = _nothing()
            return cls(jnp.asarray(numbers), jnp.asarray(counts))

    @classmethod
    def empty_on_host(cls) -> Self:
        """Of no scores, as NumPy: the same in every process, wherever the first scores are."""
        return cls(*_nothing())  # type: ignore[arg-type]

    def update(self, scores: Array) -> "AlignmentState":
        """With more scores, float [...]; a pure function, for use under jit and scan."""
        x = scores.astype(jnp.float32).ravel()
        valid = jnp.abs(x) <= 1 + SCORE_TOLERANCE  # False for NaN
        number = jnp.sum(valid, dtype=jnp.int32)
        share = 1 / jnp.maximum(number, 1).astype(jnp.float32)

        def mean_of(values: Array) -> Array:
            return jnp.sum(jnp.where(valid, values, 0)) * share

        pivot = jnp.where(self.counts[0] > 0, self.numbers[0], mean_of(x))
        x0 = x - pivot  # exact where the scores are near the pivot
        mean = mean_of(x0)
        c = jnp.where(valid, x0 - mean, 0)
        mean = mean + jnp.sum(c) * share
        c = jnp.where(valid, x0 - mean, 0)
        batch = jnp.stack([jnp.sum(c**2), jnp.sum(c**3), jnp.sum(c**4)])
        moments = _merge(self.counts[0], self.numbers[1], self.numbers[2:5], number, mean, batch)
        smallest = jnp.minimum(self.numbers[5], jnp.min(jnp.where(valid, x, BEYOND), initial=BEYOND))
        largest = jnp.maximum(self.numbers[6], jnp.max(jnp.where(valid, x, -BEYOND), initial=-BEYOND))
        no_gradient = jnp.isnan(x) | (x == FINITE_MARKS.no_gradient)
        dead = (x == DEAD) | (x == FINITE_MARKS.dead)
        counts = [jnp.sum(v, dtype=jnp.int32) for v in (valid, no_gradient, dead, ~(valid | no_gradient | dead))]
        index = jnp.clip(jnp.searchsorted(EDGES, x, side="right") - 1, 0, BINS - 1)
        bins = jnp.zeros(BINS, jnp.int32).at[jnp.where(valid, index, BINS)].add(1, mode="drop")
        return AlignmentState(
            jnp.concatenate([pivot[None], moments, smallest[None], largest[None]]),
            self.counts + jnp.concatenate([jnp.stack(counts), bins]),
        )

    def merge(self, other: "AlignmentState") -> "AlignmentState":
        """Of both sets of scores together; a pure function."""
        pivot = jnp.where(self.counts[0] > 0, self.numbers[0], other.numbers[0])
        means = (state.numbers[1] + (state.numbers[0] - pivot) for state in (self, other))
        moments = _merge(
            self.counts[0], next(means), self.numbers[2:5], other.counts[0], next(means), other.numbers[2:5]
        )
        smallest = jnp.minimum(self.numbers[5], other.numbers[5])
        largest = jnp.maximum(self.numbers[6], other.numbers[6])
        numbers = jnp.concatenate([pivot[None], moments, smallest[None], largest[None]])
        return AlignmentState(numbers, self.counts + other.counts)

    def reduce(self, axis_name: str) -> "AlignmentState":
        """Of all members of a mapped axis (shard_map, pmap, vmap) together, the same on each; a pure function."""
        every = jax.lax.all_gather(self, axis_name)
        first = jax.tree.map(lambda leaf: leaf[0], every)
        rest = jax.tree.map(lambda leaf: leaf[1:], every)
        merged: AlignmentState = jax.lax.scan(lambda a, b: (a.merge(b), None), first, rest)[0]
        return merged

    def summary(self) -> AlignmentSummary:
        """On the host, in float64; waits for the device."""
        numbers, counts = jax.device_get(self)
        pivot, mean, m2, m3, m4, minimum, maximum = numbers.tolist()
        return AlignmentSummary(
            count=int(counts[0]),
            mean=pivot + mean,
            m2=m2,
            m3=m3,
            m4=m4,
            minimum=minimum if counts[0] else np.inf,
            maximum=maximum if counts[0] else -np.inf,
            bins=counts[4:].astype(np.int64),
            no_gradient=int(counts[1]),
            dead=int(counts[2]),
            not_finite=int(counts[3]),
        )


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.array([0, 0, 0, 0, 0, BEYOND, -BEYOND], np.float32), np.zeros(4 + BINS, np.int32)


def _merge(count_a: Array, mean_a: Array, a: Array, count_b: Array, mean_b: Array, b: Array) -> Array:
    """float32 [4]: mean, m2, m3, m4 of both; a and b hold m2, m3, m4. As `AlignmentSummary.merge`."""
    n = jnp.maximum(count_a + count_b, 1).astype(jnp.float32)
    p, q = count_a.astype(jnp.float32) / n, count_b.astype(jnp.float32) / n
    mean_a = jnp.where(count_a > 0, mean_a, mean_b)
    d = mean_b - mean_a
    cross = d * p * q * n
    m2 = a[0] + b[0] + d * cross
    m3 = a[1] + b[1] + d * d * cross * (p - q) + 3 * d * (p * b[0] - q * a[0])
    m4 = (
        a[2]
        + b[2]
        + d**3 * cross * (p * p - p * q + q * q)
        + 6 * d * d * (p * p * b[0] + q * q * a[0])
        + 4 * d * (p * b[1] - q * a[1])
    )
    return jnp.stack([mean_a + d * q, m2, m3, m4])


@partial(jax.jit, donate_argnums=0)
def update(state: AlignmentState, scores: Array) -> AlignmentState:
    """`AlignmentState.update`, jitted; the old state's memory is used for the new one."""
    return state.update(scores)


merge = jax.jit(AlignmentState.merge)

copied = jax.jit(partial(jax.tree.map, jnp.copy))
"""A copy of a pytree, on the same devices, which may be donated."""


@lru_cache(maxsize=8)
def global_update(mesh: Mesh) -> Callable[[AlignmentState, Array], AlignmentState]:
    """`update` of scores that live in several processes: every process gets the state of them all."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.jit(AlignmentState.update, donate_argnums=0, out_shardings=everywhere)


class DeviceLedger(NamedTuple):
    """The ledger on the device, [num_samples + 1]; the last place is for ids that are none, where they are counted.

    Attributes:
        sums, seen: float32.
        predicted: int32; None until a prediction is given.
    """

    sums: Array
    seen: Array
    predicted: Array | None = None

    @classmethod
    def empty(cls, num_samples: int) -> Self:
        """Of no samples."""
        return cls(jnp.zeros(num_samples + 1, jnp.float32), jnp.zeros(num_samples + 1, jnp.float32))

    def with_predictions(self) -> "DeviceLedger":
        """With a place for predictions."""
        if self.predicted is not None:
            return self
        return self._replace(predicted=jnp.full(self.sums.shape, UNKNOWN, jnp.int32))

    @classmethod
    def from_host(cls, ledger: Ledger) -> Self:
        """What `to_host` gave."""
        rest = (0.0, ledger.invalid_ids, UNKNOWN)
        arrays = [jnp.asarray(np.append(a, end).astype(a.dtype)) for a, end in zip(ledger[:3], rest, strict=True)]
        return cls(*arrays) if (ledger.predicted != UNKNOWN).any() else cls(*arrays[:2])

    def to_host(self, untagged: int) -> Ledger:
        """Waits for the device."""
        sums, seen, predicted = jax.device_get(self)
        known = np.full(sums.shape, UNKNOWN, np.int32) if predicted is None else predicted
        own = [np.array(array[:-1]) for array in (sums, seen, known)]  # what JAX returns can be read-only
        return Ledger(own[0], own[1], own[2], round(float(seen[-1])), untagged)


@partial(jax.jit, donate_argnums=0)
def enter(ledger: DeviceLedger, samples: TaggedBatch, scores: Array) -> DeviceLedger:
    """Enters the scores of a batch into the ledger."""
    sums, seen, predicted = ledger
    size = sums.shape[0] - 1
    ids, x = samples.ids, scores.astype(jnp.float32).ravel()
    ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # which might not hold the size
    stray = (ids < 0) | (ids >= size)
    counted = jnp.abs(x) <= 1 + SCORE_TOLERANCE
    x = jnp.where(counted, x, 0)
    shares = counted.astype(jnp.float32)
    if samples.weights is not None:
        weights = jnp.broadcast_to(jnp.asarray(samples.weights, jnp.float32), ids.shape)
        stray |= ~(weights >= 0) | jnp.isinf(weights)
        shares = jnp.where(counted[:, None], jnp.where(stray, 1.0, weights), 0.0)
        x = x[:, None]
    ids = jnp.where(stray, size, ids)
    if samples.predicted is not None and predicted is not None and ids.ndim == 1:  # a mixed input's is nobody's
        predicted = predicted.at[jnp.where(counted, ids, size)].set(samples.predicted.astype(jnp.int32))
    return DeviceLedger(sums.at[ids].add(shares * x), seen.at[ids].add(shares), predicted)


class JaxSnapshot:
    """A state on its way to the host."""

    def __init__(self, state: AlignmentState) -> None:
        self._state = state
        for array in state:
            array.copy_to_host_async()

    def ready(self) -> bool:
        """Whether it has come."""
        return all(array.is_ready() for array in self._state)  # type: ignore[attr-defined]  # not in the stubs

    def result(self) -> AlignmentSummary:
        """The summary; waits for it."""
        return self._state.summary()
