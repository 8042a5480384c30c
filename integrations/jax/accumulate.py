"""Accumulates scores on the device, in one small jitted update for many steps, and copies their summary to the host.

JAX computes in float32. The moments are centred and kept relative to a pivot near the scores, so that a small spread around a
large mean keeps its precision. The host continues in float64.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gwa_logging.histogram import BINS, EDGES
from gwa_logging.integrations.jax.scores import classify_scores
from gwa_logging.summary import AlignmentSummary

_BEYOND = 2.0
"""The minimum of no scores, and minus their maximum. `jax_debug_infs` would stop at an infinity."""


class AlignmentState(NamedTuple):
    """A summary on the device, as a pytree of two arrays: for training loops that are one `lax.scan`.

    >>> state = AlignmentState.empty().update(jnp.array([0.1, 0.3]))
    >>> state.merge(AlignmentState.empty().update(jnp.array([0.2]))).summary().count
    3

    Pass it to `monitor.update` instead of scores, and continue with a new `empty()`.

    Attributes:
        numbers: float32 [7]: pivot, mean - pivot, m2, m3, m4, minimum, maximum; the last two are 2 and -2 while count is 0.
        counts: int32 [516]: count, no_gradient, dead, not_finite, and 512 bin counts.
    """

    numbers: Array
    counts: Array

    @classmethod
    def empty(cls) -> Self:
        """The state of no scores."""
        with jax.transfer_guard("allow"):  # it is deliberate
            numbers, counts = _empty_arrays()
            return cls(jnp.asarray(numbers), jnp.asarray(counts))

    @classmethod
    def empty_on_host(cls) -> Self:
        """The state of no scores, as NumPy arrays: the same in every process, on whichever devices the first scores are."""
        return cls(*_empty_arrays())  # type: ignore[arg-type]

    def update(self, scores: Array) -> "AlignmentState":
        """The state after more scores, float [...]; a pure function, for use in jit and scan."""
        return self._update(scores)

    def _update(self, scores: Array, is_present: Array | None = None) -> "AlignmentState":
        """`update` with those scores that are present, bool [...]."""
        x = scores.astype(jnp.float32).ravel()
        kinds = classify_scores(x)
        if is_present is not None:
            kinds = tuple(kind & is_present.ravel() for kind in kinds)  # type: ignore[assignment]
        valid = kinds[0]
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
        smallest = jnp.minimum(self.numbers[5], jnp.min(jnp.where(valid, x, _BEYOND), initial=_BEYOND))
        largest = jnp.maximum(self.numbers[6], jnp.max(jnp.where(valid, x, -_BEYOND), initial=-_BEYOND))
        counts = [jnp.sum(kind, dtype=jnp.int32) for kind in kinds]
        index = jnp.clip(jnp.searchsorted(EDGES, x, side="right") - 1, 0, BINS - 1)
        bins = jnp.zeros(BINS, jnp.int32).at[jnp.where(valid, index, BINS)].add(1, mode="drop")
        return AlignmentState(
            jnp.concatenate([pivot[None], moments, smallest[None], largest[None]]),
            self.counts + jnp.concatenate([jnp.stack(counts), bins]),
        )

    def merge(self, other: "AlignmentState") -> "AlignmentState":
        """The state of both sets of scores together; a pure function."""
        pivot = jnp.where(self.counts[0] > 0, self.numbers[0], other.numbers[0])
        mean_a, mean_b = (state.numbers[1] + (state.numbers[0] - pivot) for state in (self, other))
        moments = _merge(self.counts[0], mean_a, self.numbers[2:5], other.counts[0], mean_b, other.numbers[2:5])
        smallest = jnp.minimum(self.numbers[5], other.numbers[5])
        largest = jnp.maximum(self.numbers[6], other.numbers[6])
        numbers = jnp.concatenate([pivot[None], moments, smallest[None], largest[None]])
        return AlignmentState(numbers, self.counts + other.counts)

    def reduce(self, axis_name: str) -> "AlignmentState":
        """The state of all members of a mapped axis (shard_map, pmap, vmap) together, the same on each; a pure function."""
        every = jax.lax.all_gather(self, axis_name)
        first = jax.tree.map(lambda leaf: leaf[0], every)
        rest = jax.tree.map(lambda leaf: leaf[1:], every)
        merged: AlignmentState = jax.lax.scan(lambda a, b: (a.merge(b), None), first, rest)[0]
        return merged

    def summary(self) -> AlignmentSummary:
        """The summary on the host, in float64; blocks on the device."""
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


def _empty_arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.array([0, 0, 0, 0, 0, _BEYOND, -_BEYOND], np.float32), np.zeros(4 + BINS, np.int32)


def _merge(count_a: Array, mean_a: Array, a: Array, count_b: Array, mean_b: Array, b: Array) -> Array:
    """float32 [4]: mean, m2, m3, m4 of both; a and b are m2, m3, m4. As `AlignmentSummary.merge`."""
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
def update_state(state: AlignmentState, scores: Array) -> AlignmentState:
    """`AlignmentState.update`, jitted; the new state takes the memory of the old one."""
    return state.update(scores)


@partial(jax.jit, donate_argnums=0)
def update_state_with_steps(state: AlignmentState, steps: Sequence[Array], number: Array) -> AlignmentState:
    """`update_state` with the scores of the first `number` of some steps. All steps have the same shape.

    The number is an argument, so that JAX compiles one program for the steps of a full list and of one that is not full.
    """
    scores = jnp.stack(steps)
    place = jnp.arange(len(steps)).reshape(-1, *(1,) * (scores.ndim - 1))
    return state._update(scores, jnp.broadcast_to(place < number, scores.shape))


merge_states = jax.jit(AlignmentState.merge)

copy_state = jax.jit(partial(jax.tree.map, jnp.copy))
"""A copy on the same devices, which may be donated."""


@lru_cache(maxsize=8)
def global_update(mesh: Mesh) -> Callable[[AlignmentState, Array], AlignmentState]:
    """`update_state` for scores that are distributed over processes: every process gets the state of all of them."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.jit(AlignmentState.update, donate_argnums=0, out_shardings=everywhere)


class JaxSnapshot:
    """A state that is being copied to the host. See `gwa_logging.protocols.Snapshot`."""

    def __init__(self, state: AlignmentState) -> None:
        self._state = state
        for array in state:
            array.copy_to_host_async()

    def ready(self) -> bool:
        """Returns True if the copy has arrived."""
        return all(array.is_ready() for array in self._state)  # type: ignore[attr-defined]  # not in the stubs

    def result(self) -> AlignmentSummary:
        """The summary; blocks until the copy has arrived."""
        return self._state.summary()


def transfers_allowed() -> AbstractContextManager[Any]:
    """Exempts what runs inside from `jax.transfer_guard`: it copies between host and device on purpose."""
    config: Any = jax.config
    guards = {
        config.jax_transfer_guard_host_to_device,
        config.jax_transfer_guard_device_to_device,
        config.jax_transfer_guard_device_to_host,
    }
    return jax.transfer_guard("allow") if guards - {None, "allow"} else nullcontext()
