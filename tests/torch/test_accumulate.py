"""The device's summary against SciPy and NumPy, for any spread and any division of the scores into batches."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gwa_logging
from gwa_logging import AlignmentSummary
from gwa_logging._closer import closer
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import FOLD_AT, PENDING_NUMBERS, Accumulator
from gwa_logging.integrations.torch.batches import Batch
from gwa_logging.integrations.torch.scores import PendingTerms, Terms, terms_by_products
from gwa_logging.integrations.torch.small_batches import SLOTS, Block
from gwa_logging.journal import read_journal
from gwa_logging.ledger import TaggedBatch
from tests.core.test_summary import assert_equals_scipy, spread_scores


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


def test_padding_does_not_count():
    accumulator = Accumulator(None)
    accumulator.add_rows(torch.tensor([[0.1, 1.0], [0.0, 0.0], [0.0, 0.0]]), None)
    assert accumulator.snapshot().result().seen == 1


def test_terms_and_scores_may_be_mixed():
    accumulator = Accumulator(None)
    accumulator.add_terms(Terms(torch.tensor([-0.5, 0.5]), torch.ones(2), torch.ones(2), torch.tensor(2.0)), None)
    accumulator.add_scores(torch.tensor([0.7]), None)
    summary = accumulator.snapshot().result()
    assert summary.count == 3
    assert summary.mean == pytest.approx(0.7 / 3)


def test_batches_of_every_kind_keep_their_order_and_add_up():
    rng = np.random.default_rng(0)
    accumulator, scores, predicted = Accumulator(4), [], np.full(4, -1)
    few5, few3, many, user = ("few", 5), ("few", 3), ("many", 3), ("user", 0)
    for number, (kind, classes) in enumerate([few5, few5, few5, few3, few5, few5, many, user, few3, few3, user, few3]):
        delta, products, h = (
            torch.from_numpy(rng.normal(size=(3, n)).astype(np.float32)) for n in (classes, classes, 6)
        )
        pending = PendingTerms(delta, products, torch.linalg.vector_norm(h, dim=1), torch.tensor(2.0))
        delta, products, h = (x.double().numpy() for x in (delta, products, h))
        ids = rng.permutation(4)[:3]
        samples = TaggedBatch(torch.from_numpy(ids), None, torch.full((3,), number))
        predicted[ids] = number
        if kind == "user":
            scores.append((ids, np.array([0.25, -0.5, 0.0])))
            accumulator.add_scores(torch.tensor([0.25, -0.5, 0.0]), samples)
            continue
        expected = -(delta * products).sum(1) / np.linalg.norm(delta, axis=1) / np.linalg.norm(h, axis=1) / 2
        scores.append((ids, expected.clip(-0.9, 0.9)))
        if np.abs(expected).max() > 0.9:  # products are not those of a weight: keep the scores in range
            accumulator.add_scores(torch.from_numpy(expected.clip(-0.9, 0.9)).float(), samples)
            continue
        accumulator.add_terms(pending if kind == "few" else terms_by_products(*pending), samples)
    summary, ledger = accumulator.snapshot().result(), accumulator.ledger()
    assert summary.count == 36
    assert summary.mean == pytest.approx(np.mean([each for _, each in scores]), abs=1e-7)
    sums = np.zeros(4)
    for ids, each in scores:
        np.add.at(sums, ids, each)
    np.testing.assert_allclose(ledger.sums, sums, atol=1e-6)
    np.testing.assert_array_equal(ledger.predicted, predicted)


def test_many_logits_are_folded_before_they_fill_the_memory():
    accumulator, rows = Accumulator(None), PENDING_NUMBERS // 64 // 8
    logits = torch.ones(rows, 64)
    pending = PendingTerms(logits, -logits, torch.ones(rows), torch.tensor(64.0))
    for _ in range(9):
        accumulator.add_terms(pending, None)
    assert not accumulator._batches  # the first of a shape has no block; 8 others had one
    accumulator.add_terms(pending, None)
    assert [type(batch) for batch in accumulator._batches] == [Block]
    summary = accumulator.snapshot().result()
    assert (summary.count, summary.mean) == (10 * rows, 0.125)


def small(rows, classes=4):
    """A small batch with the scores 1/2."""
    delta = torch.full((rows, classes), -2.0)
    return PendingTerms(delta, -delta, torch.full((rows,), 2.0), torch.tensor(2.0 * classes**0.5))


def test_blocks_are_used_again_and_batches_of_changing_shapes_have_none():
    accumulator, blocks = Accumulator(None), set()
    for _ in range(5):
        for _ in range(SLOTS + 6):
            accumulator.add_terms(small(7), None)
        blocks |= {id(batch) for batch in accumulator._batches if isinstance(batch, Block)}
        summary = accumulator.snapshot().result()
        assert (summary.count, summary.mean, summary.minimum, summary.maximum) == (7 * (SLOTS + 6), 0.5, 0.5, 0.5)
    assert len(blocks) == 2
    for _ in range(5):
        for rows in (8, 7, 9):
            accumulator.add_terms(small(rows), None)
    assert not any(isinstance(batch, Block) for batch in accumulator._batches)
    assert accumulator.snapshot().result().count == 5 * 24
    for _ in range(5):
        for rows in (8, 8, 8, 7, 7):
            accumulator.add_terms(small(rows), None)
    assert sum(isinstance(batch, Block) for batch in accumulator._batches) == 1  # two blocks are never half empty
    assert accumulator.snapshot().result().count == 5 * 38


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_holds_gradients_of_16_bits(dtype):
    accumulator = Accumulator(None)
    for _ in range(3):
        pending = small(5)
        accumulator.add_terms(pending._replace(delta=pending.delta.to(dtype)), None)
    assert [type(batch) for batch in accumulator._batches] == [Batch, Block]
    summary = accumulator.snapshot().result()
    assert (summary.count, summary.minimum, summary.maximum) == (15, 0.5, 0.5)


def test_a_block_holds_batches_with_the_same_columns():
    accumulator, ids = Accumulator(9), torch.arange(4)
    plain, with_classes = TaggedBatch(ids), TaggedBatch(ids, None, ids)
    for samples in (None, None, plain, plain, with_classes, with_classes, None):
        accumulator.add_terms(small(4), samples)
    mixed = TaggedBatch(ids[:, None].expand(4, 2), torch.tensor([0.25, 0.75]))
    accumulator.add_terms(small(4), mixed)
    summary, ledger = accumulator.snapshot().result(), accumulator.ledger()
    assert (summary.count, summary.mean, ledger.untagged) == (32, 0.5, 12)
    np.testing.assert_array_equal(ledger.seen, [5] * 4 + [0] * 5)
    np.testing.assert_array_equal(ledger.sums, [2.5] * 4 + [0] * 5)
    np.testing.assert_array_equal(ledger.predicted, [0, 1, 2, 3] + [-1] * 5)


def test_the_device_holds_a_bounded_number_of_scores():
    accumulator = Accumulator(None)
    for _ in range(10):
        accumulator.add_scores(torch.rand(FOLD_AT // 4), None)
        assert accumulator._rows < FOLD_AT
    assert accumulator.snapshot().result().count == 10 * (FOLD_AT // 4)


def test_a_snapshot_starts_an_empty_summary():
    accumulator = Accumulator(None)
    accumulator.add_scores(torch.tensor([0.1]), None)
    assert accumulator.snapshot().result().count == 1
    assert accumulator.snapshot().result().count == 0


def test_the_ledger_sums_by_id_and_counts_invalid_ids_separately():
    accumulator = Accumulator(4)
    accumulator.add_scores(torch.tensor([0.1, 0.2, 0.3, torch.nan]), TaggedBatch(torch.tensor([2, 0, 2, 1])))
    accumulator.add_scores(torch.tensor([0.5, 0.5]), TaggedBatch(torch.tensor([-1, 4])))
    ledger = accumulator.ledger()
    np.testing.assert_allclose(ledger.sums, [0.2, 0, 0.4, 0], rtol=1e-6)
    np.testing.assert_array_equal(ledger.seen, [1, 0, 2, 0])
    assert (ledger.invalid_ids, ledger.untagged) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_may_have_a_dtype_that_cannot_hold_the_size_of_the_ledger(dtype):
    accumulator = Accumulator(70_000)
    accumulator.add_scores(torch.tensor([0.5]), TaggedBatch(torch.tensor([3], dtype=dtype)))
    ledger = accumulator.ledger()
    assert (ledger.seen[3], ledger.seen.sum(), ledger.invalid_ids) == (1, 1, 0)


def test_batches_that_are_added_together_are_added_in_their_order():
    accumulator = Accumulator(5)
    rng = np.random.default_rng(0)
    sums, seen, predicted = np.zeros(5, np.float32), np.zeros(5), np.full(5, -1)
    for size in (3, 3, 2, 3, 7, 7):  # repeated ids, within a batch too
        ids, classes = rng.integers(0, 5, size), rng.integers(0, 9, size)
        scores = rng.uniform(-1, 1, size).astype(np.float32)
        accumulator.add_scores(
            torch.from_numpy(scores), TaggedBatch(torch.from_numpy(ids), None, torch.from_numpy(classes))
        )
        for sample, score, class_ in zip(ids, scores, classes, strict=True):
            sums[sample] += score
            seen[sample] += 1
            predicted[sample] = class_
    ledger = accumulator.ledger()
    np.testing.assert_array_equal(ledger.sums, sums)
    np.testing.assert_array_equal(ledger.seen, seen)
    np.testing.assert_array_equal(ledger.predicted, predicted)


def test_a_prediction_without_a_score_does_not_replace_one_with_a_score():
    accumulator = Accumulator(2)
    for score, class_ in ((0.5, 7), (torch.nan, 8)):
        accumulator.add_scores(torch.tensor([score]), TaggedBatch(torch.tensor([1]), None, torch.tensor([class_])))
    np.testing.assert_array_equal(accumulator.ledger().predicted, [-1, 7])


def test_batches_with_another_number_of_ids_do_not_affect_valid_ones():
    accumulator = Accumulator(4)
    for score in (0.25, 0.5):
        accumulator.add_scores(torch.tensor([score, score]), TaggedBatch(torch.tensor([0, 1])))
        accumulator.add_scores(torch.tensor([score, score]), TaggedBatch(torch.tensor([0, 1, 2])))
    ledger = accumulator.ledger()
    np.testing.assert_array_equal(ledger.sums, [0.75, 0.75, 0, 0])
    assert ledger.invalid_ids == 4


@pytest.mark.parametrize("encoded", [False, True])
def test_what_was_added_may_be_overwritten(encoded):
    accumulator = Accumulator(None)
    scores = torch.tensor([0.25, 0.5])
    rows = torch.stack([scores, torch.ones(2)], dim=1)
    if encoded:
        accumulator.add_rows(rows, None)
    else:
        accumulator.add_scores(scores, None)
    scores.zero_()
    rows.zero_()
    assert accumulator.snapshot().result().mean == 0.375


def filled(sliced, between=lambda accumulator: None):
    """Three snapshots of scores with ids; `between` is called after each step."""
    accumulator, rng, snapshots = Accumulator(50, sliced=sliced), np.random.default_rng(0), []
    for step in range(120):
        size = 7 if step % 3 else 5
        terms = (torch.from_numpy(rng.uniform(0.1, 1, size).astype(np.float32)) for _ in range(3))
        ids = TaggedBatch(torch.from_numpy(rng.integers(-1, 50, size)))
        accumulator.add_terms(Terms(*terms, torch.tensor(2.0)), ids)
        if step % 40 == 39:
            snapshots.append(accumulator.snapshot())
        between(snapshots)
    return accumulator, snapshots


@pytest.mark.parametrize("polls", [0, 1, 2, 50])
def test_slices_give_the_same_sums_to_the_last_bit_however_often_they_are_asked_for(polls):
    def poll(snapshots):
        for _ in range(polls if snapshots else 0):
            snapshots[-1].ready()

    (accumulator, snapshots), (whole, wanted) = filled(True, poll), filled(False)
    for snapshot, want in zip(snapshots, wanted, strict=True):
        np.testing.assert_array_equal(snapshot.result().to_vector(), want.result().to_vector())
    for name in ("sums", "seen"):
        np.testing.assert_array_equal(getattr(accumulator.ledger(), name), getattr(whole.ledger(), name))
    assert accumulator.ledger().invalid_ids == whole.ledger().invalid_ids > 0


def test_a_sliced_snapshot_is_ready_after_a_few_steps_and_a_whole_one_at_once():
    _, (*_, last) = filled(True)
    answers = [last.ready() for _ in range(7)]
    assert answers == [False] * 6 + [True]  # join, three slices of the ledger, fold, release
    assert filled(False)[1][-1].ready()


def test_the_ledger_contains_an_interval_whose_slices_are_not_done():
    accumulator, (*_, last) = filled(True)
    assert not last.ready()
    np.testing.assert_array_equal(accumulator.ledger().seen, filled(False)[0].ledger().seen)


def test_an_error_in_a_slice_loses_its_interval_alone(monkeypatch):
    faults = Faults()
    accumulator = Accumulator(None, faults, sliced=True)
    accumulator.add_scores(torch.tensor([0.1]), None)
    broken = accumulator.snapshot()

    def fail(scores):
        raise MemoryError("no memory for the vector")

    with monkeypatch.context() as patch:
        patch.setattr("gwa_logging.integrations.torch.accumulate.fold_on_host", fail)
        assert not broken.ready()
        accumulator.add_scores(torch.tensor([0.2, 0.3]), None)
        following = accumulator.snapshot()
    assert broken.ready()
    assert broken.result().count == 0
    assert following.result().count == 2
    assert faults.counts == {"scores": 1}
    accumulator.add_scores(torch.tensor([0.4]), None)
    assert accumulator.snapshot().result().count == 1


@pytest.mark.parametrize("ndims", [(0, 0), (0, 1), (1, 1)])
def test_weight_norms_for_a_batch_and_for_each_row_may_be_mixed(ndims):
    accumulator = Accumulator(None)
    for norm, ndim in zip((2.0, 4.0), ndims, strict=True):
        weight = torch.full((3,), norm) if ndim else torch.tensor(norm)
        accumulator.add_terms(Terms(torch.full((3,), -1.0), torch.ones(3), torch.ones(3), weight), None)
    assert accumulator.snapshot().result().mean == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_a_dropped_monitor_has_reported_the_scores_whose_slices_were_not_done(tmp_path):
    """The garbage collector must not end the slices before the monitor is closed."""

    def run():
        model = torch.nn.Linear(4, 3)
        monitor = gwa_logging.watch(model, directory=tmp_path, log_every_n_steps=1)
        model(torch.ones(2, 4)).sum().backward()
        return monitor.journal

    journal = run()
    gc.collect()
    assert closer.wait(60)
    assert [record.count for record in read_journal(journal)[0] if record.kind == "epoch"] == [2]
