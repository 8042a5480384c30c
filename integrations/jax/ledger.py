"""The per-sample ledger on the device: sums of scores by sample id."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gwa_logging.integrations.jax.documents import Documents, by_input, by_position
from gwa_logging.integrations.jax.pending_steps import stacked
from gwa_logging.integrations.jax.scores import classify_scores
from gwa_logging.ledger import UNKNOWN, Ledger, TaggedBatch


class DeviceLedger(NamedTuple):
    """The ledger on the device: arrays [num_samples + 1], whose last element counts the invalid ids.

    Attributes:
        sums: float32, sum of the scores of each sample.
        seen: float32, how often each sample had a score.
        predicted: int32, the last predicted class; None until a prediction is given.
        details: int32, see `gwa_logging.document_details`; None until a sample has several rows.
    """

    sums: Array
    seen: Array
    predicted: Array | None = None
    details: Array | None = None

    @classmethod
    def empty(cls, num_samples: int) -> Self:
        """The ledger before the first step."""
        return cls(jnp.zeros(num_samples + 1, jnp.float32), jnp.zeros(num_samples + 1, jnp.float32))

    def prepared_for(self, samples: TaggedBatch, scores: tuple[int, ...]) -> "DeviceLedger":
        """The same ledger with all arrays that a batch needs, unknown so far.

        Args:
            samples: the batch.
            scores: shape of its scores.
        """
        ledger = self
        if samples.predicted is not None and ledger.predicted is None:
            ledger = ledger._replace(predicted=jnp.full(self.sums.shape, UNKNOWN, jnp.int32))
        if _has_documents(samples, scores) and samples.weights is None and ledger.details is None:
            ledger = ledger._replace(details=jnp.zeros(self.sums.shape, jnp.int32))
        return ledger

    @classmethod
    def from_host(cls, ledger: Ledger) -> Self:
        """The inverse of `to_host`."""
        return cls(
            _with_last(ledger.sums, 0.0),
            _with_last(ledger.seen, ledger.invalid_ids),
            None if ledger.predicted is None else _with_last(ledger.predicted, UNKNOWN),
            None if ledger.details is None else _with_last(ledger.details, 0),
        )

    def to_host(self, untagged: int) -> Ledger:
        """The ledger on the host, with the number of samples that had no id; blocks on the device."""
        sums, seen, predicted, details = jax.device_get(self)
        # copies, because JAX's arrays can be read-only
        return Ledger(
            sums[:-1].copy(),
            seen[:-1].copy(),
            None if predicted is None else predicted[:-1].copy(),
            invalid_ids=round(float(seen[-1])),
            untagged=untagged,
            details=None if details is None else details[:-1].copy(),
        )


def _with_last(array: np.ndarray, last: float) -> Array:
    return jnp.asarray(np.append(array, last).astype(array.dtype))


def _has_documents(samples: TaggedBatch, scores: tuple[int, ...]) -> bool:
    """Returns True if several scores may belong to one id."""
    return samples.is_by_position or samples.ids.shape[0] != np.prod(scores)


class _Entries(NamedTuple):
    """What batches add to the ledger. Entries that are left out have the id that the last element of the arrays has.

    Attributes:
        ids: int [...].
        sums, shares: float32 [...], what is added to the sums and to the times that a sample was seen.
        targets: int [...], the ids to which predictions and details belong.
        predicted, details: int32 [...]; None if there are none.
    """

    ids: Array
    sums: Array
    shares: Array
    targets: Array
    predicted: Array | None
    details: Array | None


def _entries(samples: TaggedBatch, scores: Array, is_present: Array, *, size: int) -> _Entries:
    """The entries of one batch, none if it is not present, bool []; `size` is the number of samples in the ledger."""
    ids = samples.ids
    ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # the size may be too large for a narrower type
    documents: Documents | None = None
    if samples.is_by_position:
        documents = by_position(scores, ids)
    elif _has_documents(samples, scores.shape):
        documents = by_input(scores, ids)
    if documents is None:
        x = scores.astype(jnp.float32).ravel()
        counted = classify_scores(x)[0]
        x = jnp.where(counted, x, 0)
    else:
        ids, x, counted = documents.ids, documents.means, documents.counts > 0
    counted &= is_present
    is_invalid = (ids < 0) | (ids >= size)
    shares = counted.astype(jnp.float32)
    if samples.weights is not None:
        weights = jnp.broadcast_to(jnp.asarray(samples.weights, jnp.float32), ids.shape)
        is_invalid |= ~(weights >= 0) | jnp.isinf(weights)
        shares = jnp.where(counted[:, None], jnp.where(is_invalid, 1.0, weights), 0.0)
        x = x[:, None]
    ids = jnp.where(is_invalid, size, ids)
    if samples.weights is not None:  # A mixed input has no single class, and its rows belong to no single sample.
        return _Entries(ids, shares * x, shares, ids, None, None)
    predicted = None if samples.predicted is None else samples.predicted.astype(jnp.int32)
    details = None if documents is None else documents.details()
    return _Entries(ids, shares * x, shares, jnp.where(counted, ids, size), predicted, details)


@partial(jax.jit, donate_argnums=0)
def add_steps_to_ledger(ledger: DeviceLedger, samples: Any, steps: Sequence[Array], number: Array) -> DeviceLedger:
    """The ledger after the first `number` of some steps. It must be `prepared_for` them.

    Args:
        ledger: the ledger before. The new one takes its memory.
        samples: of all steps, from `pending_steps.side_by_side`.
        steps: the scores of each step.
        number: int [], at most the number of steps.
    """
    samples = stacked(samples)
    present = jnp.arange(len(steps)) < number
    entries = jax.vmap(partial(_entries, size=ledger.sums.shape[0] - 1))(samples, jnp.stack(steps), present)
    return DeviceLedger(
        ledger.sums.at[entries.ids].add(entries.sums),
        ledger.seen.at[entries.ids].add(entries.shares),
        _after(ledger.predicted, entries.targets, entries.predicted),
        _after(ledger.details, entries.targets, entries.details),
    )


def _after(kept: Array | None, targets: Array, values: Array | None) -> Array | None:
    """What is kept of each sample after the values [steps, ...], of which the last one stays."""
    if kept is None or values is None:
        return kept
    # Step by step: of several writes to one element, a single operation may keep any.
    return jax.lax.scan(lambda kept, step: (kept.at[step[0]].set(step[1]), None), kept, (targets, values))[0]
