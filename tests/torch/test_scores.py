"""The formula and its encodings against the float64 reference, for any numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gwa_logging import alignment_scores as reference
from gwa_logging.alignment import DEAD, NO_GRADIENT, NOT_FINITE
from gwa_logging.integrations.torch.rows import COLUMNS, COLUMNS_FOR_LEDGER, decode_rows, encode_rows
from gwa_logging.integrations.torch.scores import (
    PADDING,
    Terms,
    alignment_scores,
    decode_scores,
    encode_scores,
    frobenius_norm,
    row_norms,
    terms_by_embeddings,
    terms_by_logits,
)

WITHOUT_SCORE = torch.tensor([NO_GRADIENT, DEAD, NOT_FINITE])


def tensors(rows: int, features: int, classes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + features + classes)
    shapes = [(rows, classes), (rows, features), (classes, features), (classes,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_both_numerators_give_the_scores_of_the_reference(rows, features, classes, dtype):
    delta, h, weight, bias = tensors(rows, features, classes, dtype)
    want = reference(delta.numpy(), h.numpy(), weight.numpy())
    norm = frobenius_norm(weight)
    by_logits = terms_by_logits(delta, h @ weight.T + bias, h, bias, norm)
    by_embeddings = terms_by_embeddings(row_norms(delta), delta @ weight, h, norm)
    for terms in (by_logits, by_embeddings):
        np.testing.assert_allclose(alignment_scores(terms), want, atol=2e-5)


def test_narrow_dtypes_are_computed_in_float32():
    delta, h, weight, _ = tensors(5, 6, 4, torch.bfloat16)
    terms = terms_by_logits(delta, (h.float() @ weight.float().T), h, None, frobenius_norm(weight))
    assert {term.dtype for term in terms} == {torch.float32}
    want = reference(*(tensor.float().numpy() for tensor in (delta, h, weight)))
    np.testing.assert_allclose(alignment_scores(terms), want, atol=1e-5)


@pytest.mark.parametrize(
    ("term", "value", "marker"),
    [("delta_norms", 0.0, NO_GRADIENT), ("embedding_norms", 0.0, DEAD), ("product", torch.nan, NOT_FINITE)],
)
def test_a_sample_without_a_score_gets_the_marker_of_its_reason(term, value, marker):
    terms = Terms(*torch.ones(3, 1), torch.tensor(1.0))._replace(**{term: torch.tensor([value])})
    np.testing.assert_array_equal(alignment_scores(terms), [marker])


@given(st.lists(st.floats(-1, 1, width=32), max_size=8))
def test_decoding_is_the_inverse_of_encoding_and_encoded_scores_are_finite(scores):
    column = torch.cat([torch.tensor(scores, dtype=torch.float32), WITHOUT_SCORE])
    encoded = encode_scores(column)
    assert torch.isfinite(encoded).all()
    np.testing.assert_array_equal(decode_scores(encoded), column)


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS_FOR_LEDGER])
def test_rows_that_are_zero_or_were_added_up_become_padding(columns):
    terms = Terms(*torch.tensor([[-0.5, 0.25], [1.0, 1.0], [1.0, 1.0]]), torch.tensor(1.0))
    rows = encode_rows(terms, None, columns, inputs=0)
    rows = torch.cat([rows, torch.zeros(1, columns), rows[:1] + rows[1:]])
    np.testing.assert_array_equal(decode_rows(rows), [0.5, -0.25, PADDING, PADDING])
