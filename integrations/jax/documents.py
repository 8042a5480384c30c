"""Documents: samples of which the head sees several rows, such as the tokens of a text. All functions can be jitted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.document_details import (
    MAX_ROWS,
    SHARE_SHIFT,
    SHARE_STEPS,
    SIGN_SHIFT,
    SIZE_SHIFT,
    SIZE_STEPS,
    SIZES_PER_OCTAVE,
)
from gwa_logging.integrations.jax.scores import classify_scores
from gwa_logging.ledger import NO_DOCUMENT


class Documents(NamedTuple):
    """The scores of a batch, by document: arrays [documents].

    Attributes:
        ids: int.
        counts: int32, number of scored rows.
        means: float32, their mean score; 0 where there are none.
        negatives: int32, number of rows with a negative score.
        lowest_tenths: float32, the score at place ceil(count / 10) in ascending order; arbitrary where count is 0.
    """

    ids: Array
    counts: Array
    means: Array
    negatives: Array
    lowest_tenths: Array

    def details(self) -> Array:
        """int32 [documents]: packed as `gwa_logging.document_details` describes; 0 where there is no scored row."""
        counts, negatives = self.counts.astype(jnp.uint32), self.negatives.astype(jnp.float32)
        shares = jnp.round(negatives / jnp.maximum(self.counts, 1) * SHARE_STEPS).astype(jnp.uint32)
        smallest = 2.0 ** (-2 * SIZE_STEPS / SIZES_PER_OCTAVE)  # avoids the logarithm of zero
        logarithms = SIZES_PER_OCTAVE * jnp.log2(jnp.maximum(jnp.abs(self.lowest_tenths), smallest))
        sizes = jnp.clip(jnp.round(SIZE_STEPS + logarithms), 0, SIZE_STEPS).astype(jnp.uint32)
        signs = (self.lowest_tenths < 0).astype(jnp.uint32)
        words = jnp.minimum(counts, MAX_ROWS) | shares << SHARE_SHIFT | sizes << SIZE_SHIFT | signs << SIGN_SHIFT
        return jax.lax.bitcast_convert_type(jnp.where(counts > 0, words, 0), jnp.int32)


def by_input(scores: Array, ids: Array) -> Documents:
    """The documents of scores [inputs, ...], of which each input is one.

    Args:
        scores: float [inputs, ...].
        ids: int [inputs], or [inputs, m] of mixed samples.
    """
    x = scores.astype(jnp.float32).reshape(scores.shape[0], -1)
    is_scored = classify_scores(x)[0]
    counts = is_scored.sum(1, dtype=jnp.int32)
    total = jnp.where(is_scored, x, 0).sum(1)
    ordered = jnp.sort(jnp.where(is_scored, x, 2.0), axis=1)  # every score is lower
    places = jnp.clip((counts + 9) // 10 - 1, 0, x.shape[1] - 1)
    return Documents(
        ids,
        counts,
        total / jnp.maximum(counts, 1),
        (is_scored & (x < 0)).sum(1, dtype=jnp.int32),
        jnp.take_along_axis(ordered, places[:, None], axis=1)[:, 0],
    )


def by_position(scores: Array, ids: Array) -> Documents:
    """The documents of rows that each have an id. A document's rows may be anywhere in the batch.

    Args:
        scores: float [...], one for each position.
        ids: int [batch, positions]; `NO_DOCUMENT` where there is none. It may have one position more than the scores.

    Returns:
        As many documents as there are scores: those after the last one, and `NO_DOCUMENT`, have no rows.
    """
    x = scores.astype(jnp.float32).ravel()
    rows = x.shape[0]
    if rows != ids.size:
        ids = ids[:, :-1]
    ids = ids.ravel().astype(jnp.int32) if ids.dtype == jnp.uint32 else ids.ravel()  # NO_DOCUMENT is negative
    x = jnp.where(classify_scores(x)[0] & (ids != NO_DOCUMENT), x, 2.0)  # every score is lower
    ids, x = jax.lax.sort((ids, x), num_keys=2)
    is_scored = x < 2.0
    starts = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    owner = jnp.cumsum(starts, dtype=jnp.int32) - 1

    def total(values: Array) -> Array:
        return jax.ops.segment_sum(values, owner, rows, indices_are_sorted=True)

    counts = total(is_scored.astype(jnp.int32))
    sizes = total(jnp.ones(rows, jnp.int32))
    places = jnp.cumsum(sizes, dtype=jnp.int32) - sizes + (counts + 9) // 10 - 1
    return Documents(
        jnp.full(rows, NO_DOCUMENT, ids.dtype).at[owner].set(ids),
        counts,
        total(jnp.where(is_scored, x, 0)) / jnp.maximum(counts, 1),
        total((is_scored & (x < 0)).astype(jnp.int32)),
        x[jnp.clip(places, 0, rows - 1)],
    )
