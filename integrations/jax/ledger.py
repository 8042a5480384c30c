"""The per-sample ledger on the device: sums of scores by sample id."""

from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gwa_logging.integrations.jax.scores import classify_scores
from gwa_logging.ledger import UNKNOWN, Ledger, TaggedBatch


class DeviceLedger(NamedTuple):
    """The ledger on the device: arrays [num_samples + 1], whose last element counts the invalid ids.

    Attributes:
        sums: float32, sum of the scores of each sample.
        seen: float32, how often each sample had a score.
        predicted: int32, the last predicted class; None until a prediction is given.
    """

    sums: Array
    seen: Array
    predicted: Array | None = None

    @classmethod
    def empty(cls, num_samples: int) -> Self:
        """The ledger before the first step."""
        return cls(jnp.zeros(num_samples + 1, jnp.float32), jnp.zeros(num_samples + 1, jnp.float32))

    def with_predictions(self) -> "DeviceLedger":
        """The same ledger with predictions, unknown so far."""
        if self.predicted is not None:
            return self
        return self._replace(predicted=jnp.full(self.sums.shape, UNKNOWN, jnp.int32))

    @classmethod
    def from_host(cls, ledger: Ledger) -> Self:
        """The inverse of `to_host`."""
        has_predictions = bool((ledger.predicted != UNKNOWN).any())
        return cls(
            _with_last(ledger.sums, 0.0),
            _with_last(ledger.seen, ledger.invalid_ids),
            _with_last(ledger.predicted, UNKNOWN) if has_predictions else None,
        )

    def to_host(self, untagged: int) -> Ledger:
        """The ledger on the host, with the number of samples that had no id; blocks on the device."""
        sums, seen, predicted = jax.device_get(self)
        if predicted is None:
            predicted = np.full(sums.shape, UNKNOWN, np.int32)
        # copies, because JAX's arrays can be read-only
        return Ledger(
            sums[:-1].copy(),
            seen[:-1].copy(),
            predicted[:-1].copy(),
            invalid_ids=round(float(seen[-1])),
            untagged=untagged,
        )


def _with_last(array: np.ndarray, last: float) -> Array:
    return jnp.asarray(np.append(array, last).astype(array.dtype))


@partial(jax.jit, donate_argnums=0)
def add_to_ledger(ledger: DeviceLedger, samples: TaggedBatch, scores: Array) -> DeviceLedger:
    """The ledger after another batch."""
    sums, seen, predicted = ledger
    size = sums.shape[0] - 1
    ids, x = samples.ids, scores.astype(jnp.float32).ravel()
    ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # the size may be too large for a narrower type
    is_invalid = (ids < 0) | (ids >= size)
    counted = classify_scores(x)[0]
    x = jnp.where(counted, x, 0)
    shares = counted.astype(jnp.float32)
    if samples.weights is not None:
        weights = jnp.broadcast_to(jnp.asarray(samples.weights, jnp.float32), ids.shape)
        is_invalid |= ~(weights >= 0) | jnp.isinf(weights)
        shares = jnp.where(counted[:, None], jnp.where(is_invalid, 1.0, weights), 0.0)
        x = x[:, None]
    ids = jnp.where(is_invalid, size, ids)
    # A mixed input has no single class.
    if samples.predicted is not None and predicted is not None and ids.ndim == 1:
        predicted = predicted.at[jnp.where(counted, ids, size)].set(samples.predicted.astype(jnp.int32))
    return DeviceLedger(sums.at[ids].add(shares * x), seen.at[ids].add(shares), predicted)
