"""The device's summary against SciPy and NumPy, whatever the spread and however the scores are cut up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gwa_logging import AlignmentSummary
from gwa_logging.integrations.torch.accumulate import FOLD_AT, Accumulator, Terms
from gwa_logging.samples import Samples
from tests.heart.test_summary import assert_equals_scipy, spread_scores


@given(scores=spread_scores(), pieces=st.integers(1, 9))
def test_scores_fed_in_float32_give_scipys_moments(scores, pieces):
    accumulator = Accumulator(None)
    for piece in np.array_split(scores, pieces):
        accumulator.add_scores(torch.from_numpy(piece), None)
    summary = accumulator.snapshot().result()
    assert_equals_scipy(summary, scores)
    np.testing.assert_array_equal(summary.bins, AlignmentSummary.from_scores(scores).bins)


def test_every_kind_of_missing_score_is_counted_as_what_it_is():
    accumulator = Accumulator(None)
    accumulator.add_scores(torch.tensor([0.1, torch.nan, -torch.inf, torch.inf, 3.0, 0.2]), None)
    summary = accumulator.snapshot().result()
    assert (summary.count, summary.no_gradient, summary.dead, summary.not_finite) == (2, 1, 1, 2)


def test_padding_is_no_sample():
    accumulator = Accumulator(None)
    accumulator.add_coded(torch.tensor([[0.1, 1.0], [0.0, 0.0], [0.0, 0.0]]), None)
    assert accumulator.snapshot().result().seen == 1


def test_terms_and_scores_may_be_mixed():
    accumulator = Accumulator(None)
    accumulator.add_terms(Terms(torch.tensor([-0.5, 0.5]), torch.ones(2), torch.ones(2), torch.tensor(2.0)), None)
    accumulator.add_scores(torch.tensor([0.7]), None)
    summary = accumulator.snapshot().result()
    assert summary.count == 3
    assert summary.mean == pytest.approx(0.7 / 3)


def test_the_device_holds_a_bounded_number_of_scores():
    accumulator = Accumulator(None)
    for _ in range(10):
        accumulator.add_scores(torch.rand(FOLD_AT // 4), None)
        assert accumulator._rows < FOLD_AT
    assert accumulator.snapshot().result().count == 10 * (FOLD_AT // 4)


def test_a_snapshot_starts_anew():
    accumulator = Accumulator(None)
    accumulator.add_scores(torch.tensor([0.1]), None)
    assert accumulator.snapshot().result().count == 1
    assert accumulator.snapshot().result().count == 0


def test_the_ledger_adds_up_by_id_and_keeps_strays_apart():
    accumulator = Accumulator(4)
    accumulator.add_scores(torch.tensor([0.1, 0.2, 0.3, torch.nan]), Samples(torch.tensor([2, 0, 2, 1])))
    accumulator.add_scores(torch.tensor([0.5, 0.5]), Samples(torch.tensor([-1, 4])))
    ledger = accumulator.ledger()
    np.testing.assert_allclose(ledger.sums, [0.2, 0, 0.4, 0], rtol=1e-6)
    np.testing.assert_array_equal(ledger.seen, [1, 0, 2, 0])
    assert (ledger.strays, ledger.untagged) == (2, 0)
