"""The rows of the head's output: which are samples, and which input each of them belongs to.

A head sees one row per input, or several (the tokens of a text, the views of an image). A compiled backward pass can hand over
only one tensor, the gradient of a leaf, so it encodes what is known of its rows in columns. Other columns than the score's:

    VALID        1 in a row, 0 in the padding after the rows, more where several passes were added up
    PREDICTED    the predicted class, `UNKNOWN` where not known      (only for a ledger)
    FIRST        1 in the first row of each input                    (only for a ledger)
"""

import torch
from torch import Tensor

from gwa_logging.alignment import NO_GRADIENT, SCORE_TOLERANCE
from gwa_logging.integrations.torch.scores import PADDING, Terms, alignment_scores, decode_scores, encode_scores
from gwa_logging.ledger import UNKNOWN

SCORE, VALID, PREDICTED, FIRST = range(4)
COLUMNS, COLUMNS_FOR_LEDGER = 2, 4

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
        encoded.append(first_rows(scores, inputs).float())
    return torch.stack(encoded, dim=-1)


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


def mean_by_input(scores: Tensor, starts: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean score of each input's rows, and its predicted class where only one row has a score.

    Args:
        scores: float32 [batches, rows].
        starts: bool [batches, rows], True in the first row of each input.
        predicted: [batches, rows] of the rows, or None.

    Returns:
        The same shapes: element i belongs to input i, with padding after the last input.
    """
    is_scored = scores.abs() <= 1 + SCORE_TOLERANCE
    owner = (starts.cumsum(1) - 1).clamp(min=0)
    sums = torch.zeros_like(scores).scatter_add_(1, owner, torch.where(is_scored, scores, 0.0))
    rows = torch.zeros_like(scores).scatter_add_(1, owner, is_scored.float())
    means = torch.where(rows > 0, sums / rows, NO_GRADIENT)
    inputs = torch.arange(scores.shape[1], device=scores.device) < starts.sum(1, keepdim=True)
    if predicted is not None:
        of_scored = torch.zeros_like(predicted).scatter_add_(1, owner, torch.where(is_scored, predicted, 0))
        predicted = torch.where(rows == 1, of_scored, UNKNOWN)
    return torch.where(inputs, means, PADDING), predicted
