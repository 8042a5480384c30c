"""The rows of the head's output: which are samples, and which input each of them belongs to.

A head sees one row per input, or several (the tokens of a text, the views of an image). A compiled backward pass can hand over
only one tensor, the gradient of a leaf, so it encodes what is known of its rows in columns. Other columns than the score's:

    VALID        1 in a row, 0 in the padding after the rows, more where several passes were added up
    PREDICTED    the predicted class, `UNKNOWN` where not known      (only for a ledger)
    LENGTH       |delta| |h|, the norm of the row's gradient         (only for a ledger)
    FIRST        1 in the first row of each input                    (only for a ledger)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gwa_logging.alignment import NO_GRADIENT, SCORE_TOLERANCE
from gwa_logging.document_details import (
    MAX_ROWS,
    SHARE_SHIFT,
    SHARE_STEPS,
    SIGN_SHIFT,
    SIZE_SHIFT,
    SIZE_STEPS,
    SIZES_PER_OCTAVE,
)
from gwa_logging.integrations.torch.scores import PADDING, Terms, alignment_scores, decode_scores, encode_scores
from gwa_logging.ledger import NO_DOCUMENT, UNKNOWN, cut_ids

SCORE, VALID, PREDICTED, LENGTH, FIRST = range(5)
COLUMNS, COLUMNS_FOR_LEDGER = 2, 5

PASSES = 32
"""How many compiled forward passes may wait for one backward pass. The rows of further ones are added up, and lost."""


def encode_rows(terms: Terms, predicted: Tensor | None, columns: int, inputs: int) -> Tensor:
    """float32 [rows, columns], always finite, as a gradient may hold it.

    Args:
        terms: of the rows.
        predicted: int or float [rows], the predicted classes; None if not known.
        columns: `COLUMNS` or `COLUMNS_FOR_LEDGER`.
        inputs: number of inputs that the rows belong to, the same number of rows each; 0 if each row is an input.
    """
    scores = encode_scores(alignment_scores(terms))
    encoded = [scores, torch.ones_like(scores)]
    if columns == COLUMNS_FOR_LEDGER:
        encoded.append(torch.full_like(scores, UNKNOWN) if predicted is None else predicted.float())
        lengths = gradient_lengths(terms)
        encoded.append(torch.where(lengths.isfinite(), lengths, 0.0))
        encoded.append(first_rows(scores, inputs).float())
    return torch.stack(encoded, dim=-1)


def gradient_lengths(terms: Terms) -> Tensor:
    """float32 [rows]: |delta| |h|, the norm of each row's gradient."""
    return (terms.delta_norms * terms.embedding_norms).float()


def decode_rows(rows: Tensor) -> Tensor:
    """float32 [rows]: the scores of encoded rows. Rows that several passes were added up in have none: they become padding."""
    return torch.where(rows[:, VALID] == 1, decode_scores(rows[:, SCORE]), PADDING)


def first_rows(scores: Tensor, inputs: int) -> Tensor:
    """bool [rows]: True in the first row of each input, if all inputs have the same number of rows."""
    starts = torch.ones_like(scores, dtype=torch.bool)
    if inputs and scores.shape[0] != inputs:
        starts = torch.arange(scores.shape[0], device=scores.device) % (scores.shape[0] // inputs) == 0
    return starts


def drop_idle_rows(scores: Tensor, starts: Tensor) -> Tensor:
    """Replaces rows without a gradient by padding if another row of the same input has one.

    A decoder's classifier runs its head on all tokens, and only one of them has a gradient. If no row of an input has one, its
    first row is kept.

    Args:
        scores: float32 [rows], with markers.
        starts: bool [rows], True in the first row of each input.
    """
    positions = torch.arange(scores.shape[0], device=scores.device)
    first = torch.cummax(torch.where(starts, positions, 0), 0).values
    has_gradient = ~torch.isnan(scores)
    inputs_gradient = torch.zeros_like(scores).index_add_(0, first, (has_gradient & (scores != PADDING)).float()) > 0
    return torch.where(has_gradient | (starts & ~inputs_gradient), scores, PADDING)


class Inputs(NamedTuple):
    """What is known of the inputs of several batches: element i of each row belongs to input i of that batch.

    Attributes:
        scores: float32 [batches, rows], mean score of each input's rows, weighted by the lengths of their gradients; padding
            after the last input.
        predicted: [batches, rows], the predicted class of inputs of which only one row has a score; None if unknown.
        details: int32 [batches, rows], see `gwa_logging.document_details`.
    """

    scores: Tensor
    predicted: Tensor | None
    details: Tensor


def group_by_input(scores: Tensor, starts: Tensor, lengths: Tensor, predicted: Tensor | None) -> Inputs:
    """Summarises the rows of each input.

    The mean is weighted, because a document has many tokens that are learned already, whose gradients are short. In a plain
    mean they would hide the few that are not.

    Args:
        scores: float32 [batches, rows].
        starts: bool [batches, rows], True in the first row of each input.
        lengths: float32 [batches, rows], of the rows' gradients; any positive multiple of them within an input.
        predicted: [batches, rows] of the rows, or None.
    """
    is_scored = scores.abs() <= 1 + SCORE_TOLERANCE
    owner = owners(starts)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(values).scatter_add_(1, owner, values)

    counts = total(is_scored.to(torch.int64))
    largest = torch.zeros_like(lengths).scatter_reduce_(1, owner, torch.where(is_scored, lengths, 0.0), "amax")
    weights = torch.where(is_scored, lengths / largest.gather(1, owner), 0.0)  # at most 1: no sum over- or underflows
    means = torch.where(counts > 0, total(torch.where(is_scored, scores, 0.0) * weights) / total(weights), NO_GRADIENT)
    negatives = total((is_scored & (scores < 0)).to(torch.int64))
    details = pack_details(counts, negatives, _lowest_tenths(scores, is_scored, owner, counts))
    inputs = torch.arange(scores.shape[1], device=scores.device) < starts.sum(1, keepdim=True)
    if predicted is not None:
        predicted = torch.where(counts == 1, total(torch.where(is_scored, predicted, 0)), UNKNOWN)
    return Inputs(torch.where(inputs, means, PADDING), predicted, details)


def owners(starts: Tensor) -> Tensor:
    """int64 [batches, rows]: the input that each row belongs to, given the first row of each input."""
    return (starts.cumsum(1) - 1).clamp(min=0)


def _lowest_tenths(scores: Tensor, is_scored: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """float32 [batches, rows]: the score of each input at place ceil(n / 10) of its n scores; arbitrary where n is 0."""
    scores = torch.where(is_scored, scores, torch.inf)
    order = scores.argsort(1)
    order = order.gather(1, owner.gather(1, order).argsort(dim=1, stable=True))  # by input, then by score
    sizes = torch.zeros_like(owner).scatter_add_(1, owner, torch.ones_like(owner))
    places = sizes.cumsum(1) - sizes + (counts + 9) // 10 - 1
    return scores.gather(1, order).gather(1, places.clamp(0, scores.shape[1] - 1))


def pack_details(counts: Tensor, negatives: Tensor, lowest_tenths: Tensor) -> Tensor:
    """int32 [...]: packed as `gwa_logging.document_details` describes; 0 where there is no scored row.

    Args:
        counts: int64 [...], number of scored rows.
        negatives: int64 [...], number of them with a negative score.
        lowest_tenths: float32 [...].
    """
    shares = (negatives * SHARE_STEPS + counts // 2) // counts.clamp(min=1)
    sizes = (SIZE_STEPS + SIZES_PER_OCTAVE * lowest_tenths.abs().log2()).round().clamp(0, SIZE_STEPS).to(torch.int64)
    words = counts.clamp(max=MAX_ROWS) | shares << SHARE_SHIFT | sizes << SIZE_SHIFT
    words = torch.where(lowest_tenths < 0, words - (1 << SIGN_SHIFT), words)  # the sign bit of 32
    return torch.where(counts > 0, words, 0).to(torch.int32)


LOST = -2
"""Stands for an id that cannot be assigned to a row, because there are not as many ids as rows."""


def sort_by_document(
    scores: Tensor, lengths: Tensor, is_row: Tensor, ids: Tensor, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Brings the rows of each document together.

    Rows without a gradient and without a document become padding, so that they are not counted as samples without a score.

    Args:
        scores: float32 [rows], with markers.
        lengths: float32 [rows], of the rows' gradients.
        is_row: bool [rows], False in the padding after the rows.
        ids: int [batch, positions], see `gwa_logging.ledger.mismatch` for the numbers of rows that fit.
        inputs: int [], number of inputs that the rows belong to; None if the rows do not show it.

    Returns:
        float32 [rows]: the sorted scores; bool [rows]: True in the first row of each document; float32 [rows]: the sorted
        lengths; int64 [rows]: the sorted ids, `NO_DOCUMENT` in padding and `LOST` in as many rows as there are ids if the
        numbers do not fit.
    """
    ids, count = ids.to(torch.int64), is_row.sum()
    rows, whole, cut = scores.shape[0], ids.flatten(), ids[:, : cut_ids(tuple(ids.shape))[1]].flatten()
    if inputs is not None:
        count = torch.where(inputs == ids.shape[0], count, -1)
    of_rows = torch.where(
        count == whole.shape[0],
        _resized(whole, rows),
        torch.where(count == cut.shape[0], _resized(cut, rows), LOST),
    )
    lost = _resized(torch.full_like(whole, LOST), rows)  # no more of them than there are ids
    of_rows = torch.where(is_row, torch.where(of_rows == LOST, lost, of_rows), NO_DOCUMENT)
    scores = torch.where((of_rows == NO_DOCUMENT) & torch.isnan(scores), PADDING, scores)
    of_rows, order = torch.sort(of_rows, stable=True)
    starts = torch.ones_like(is_row)
    starts[1:] = (of_rows[1:] != of_rows[:-1]) | (of_rows[1:] == LOST)
    return scores[order], starts, lengths[order], of_rows


def _resized(ids: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the first ids, or all of them and `NO_DOCUMENT` after them."""
    return torch.nn.functional.pad(ids[:rows], (0, max(0, rows - ids.shape[0])), value=NO_DOCUMENT)
