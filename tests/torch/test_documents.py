"""Documents in the ledger: samples of which the head sees several rows, such as the tokens of a text."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gwa_logging
from gwa_logging import InvalidInputError, alignment_scores
from gwa_logging.document_details import unpack
from gwa_logging.integrations.torch import document_ids
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.ledger import DeviceLedger, TaggedScores
from gwa_logging.integrations.torch.rows import pack_details
from gwa_logging.ledger import LedgerPart, TaggedBatch
from tests.documents import check_documents, documents
from tests.torch.tiers import tiered

B, T, N = 5, 12, 40
WIDTH = {"by logits": (16, 5), "by embeddings": (4, 9)}
RUN = ["eager", "compiled"]
SLOW_RUN = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]


class Tokens(nn.Module):
    """A language model without attention: each position has its own logits.

    Args:
        width: of `WIDTH`.
        cut: the last position is cut off before the head.
        flat: the head sees [batch * positions, features].
    """

    def __init__(self, width: str = "by logits", *, cut: bool = False, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        features, classes = WIDTH[width]
        self.body, self.head = nn.Sequential(nn.Linear(8, features), nn.Tanh()), nn.Linear(features, classes)
        self.cut, self.flat = cut, flat

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = h[:, :-1] if self.cut else h
        return self.head(h.flatten(0, 1)) if self.flat else self.head(h)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum")


def batch(number: int, rows: int = B, positions: int = T) -> tuple[Tensor, Tensor]:
    """Inputs and labels, of which a third is ignored."""
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 5, (rows, positions), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = -100
    return torch.randn(rows, positions, 8, generator=generator), y


def scores_of(model: Tokens, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The oracle, [rows, positions] each: the float64 score of each token by its own gradient, and that gradient's norm."""
    h = model.body(x).detach()
    h = (h[:, :-1] if model.cut else h).double()
    weight = model.head.weight.detach().double()
    logits = (h @ weight.T + model.head.bias.detach().double()).requires_grad_()
    loss_of(logits, y).backward()
    scores = alignment_scores(logits.grad.numpy(), h.numpy(), weight.numpy())
    return scores, (logits.grad.norm(dim=-1) * h.norm(dim=-1)).numpy()


def compiled_if(how: str, model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model


def run(model: Tokens, how: str, ids: Tensor, passes: int = 2, size: int = N, **sizes: int) -> tuple[Any, list[Any]]:
    """Trains with these ids and returns the monitor and the expected documents of each pass."""
    monitor = gwa_logging.watch(model, num_samples=size, head="head")
    step, expected = compiled_if(how, model), []
    for number in range(passes):
        x, y = batch(number, **sizes)
        y = y[:, :-1] if model.cut else y
        scores, lengths = scores_of(model, x, y)
        if ids.ndim == 2:
            of_positions = ids[:, : scores.shape[1]].numpy()
        else:
            of_positions = np.broadcast_to(ids.numpy()[:, None], scores.shape)
        expected.append(documents(scores, of_positions, lengths))
        monitor.tag(ids)
        loss_of(step(x), y).backward()
    return monitor, expected


# --- one id for each input ----------------------------------------------------------------------------------------------


@tiered("width, how", WIDTH, RUN)
def test_an_id_for_each_input_gives_the_mean_and_the_details_of_its_tokens(width, how):
    ids = torch.tensor([3, 0, 39, 7, 8])
    monitor, expected = run(Tokens(width), how, ids)
    check_documents(monitor, expected)
    assert monitor.faults == {}
    monitor.close()


# --- an id for each position --------------------------------------------------------------------------------------------


def packed() -> Tensor:
    """Ids of packed rows: documents of all lengths, some in pieces or in two rows, and positions without a document."""
    ids = torch.full((B, T), -1)
    ids[0, :5], ids[0, 5:9], ids[0, 9:] = 4, 2, 4
    ids[1, :] = 11
    ids[2, :3], ids[2, 3:] = 11, 30  # 11 is in two rows
    ids[3, 1::2], ids[3, ::2] = 1, 0
    ids[4, 4] = 9
    return ids


@tiered("width, how", WIDTH, RUN, odd=True)
def test_an_id_for_each_position_gives_one_mean_for_each_document_wherever_its_positions_are(width, how):
    monitor, expected = run(Tokens(width), how, packed(), passes=3)
    check_documents(monitor, expected)
    assert {s.id: s.times_seen for s in monitor.suspects(N)}[11] == 3  # not six times
    assert monitor.faults == {}
    monitor.close()


@tiered("how, flat", RUN, [False, True])
def test_the_ids_of_the_last_positions_are_dropped_if_the_model_cuts_them_off(how, flat):
    monitor, expected = run(Tokens(cut=True, flat=flat), how, packed())
    check_documents(monitor, expected)
    assert monitor.faults == {}
    monitor.close()


@tiered("how, rows", RUN, [1, B])
def test_rows_that_are_flattened_before_the_head_and_padding_free_batches_take_an_id_for_each_position(how, rows):
    ids = packed() if rows > 1 else packed()[2:4].reshape(1, -1)
    monitor, expected = run(Tokens(flat=True), how, ids, rows=rows, positions=ids.shape[1])
    check_documents(monitor, expected)
    assert monitor.faults == {}
    monitor.close()


@pytest.mark.parametrize("how", SLOW_RUN)
def test_the_report_counts_trained_tokens_and_excludes_only_documents_without_any(how):
    model, (x, y) = Tokens(), batch(0)
    ids = packed()
    y[ids == 0] = -100  # no token of this document is trained
    y[(ids == -1)] = torch.where(torch.rand(B, T)[ids == -1] < 0.5, -100, 1)
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(ids)
        loss_of(compiled_if(how, model)(x), y).backward()
        report = monitor.end_epoch()
        scores, lengths = scores_of(model, x, y)
        expected = documents(scores, ids.numpy(), lengths)
        assert (report.count, report.excluded) == ((y != -100).sum(), 7 - len(expected))
        assert report.mean == pytest.approx(np.nanmean(scores), abs=1e-6)
        assert 0 not in {s.id for s in monitor.suspects(N)}
        check_documents(monitor, [expected])
        assert monitor.faults == {}


@pytest.mark.parametrize("by", ["input", "position"])
def test_a_batch_whose_labels_are_all_ignored_sees_no_document(by):
    model, (x, y) = Tokens(), batch(0)
    y[:] = -100
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(packed() if by == "position" else torch.arange(B))
        loss_of(model(x), y).backward()
        report = monitor.end_epoch()
        assert (report.count, report.excluded) == (0, 7 if by == "position" else B)
        assert monitor.suspects(N) == []
        assert monitor.faults == {}


def test_a_document_in_two_passes_of_an_accumulated_step_is_seen_twice():
    model, expected = Tokens(), []
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        losses = []
        for number, ids in enumerate((torch.full((B, T), 6), torch.arange(6, 6 + B))):
            x, y = batch(number)
            monitor.tag(ids)
            losses.append(loss_of(model(x), y))
            of_positions = ids.numpy() if ids.ndim == 2 else np.repeat(ids.numpy()[:, None], T, 1)
            scores, lengths = scores_of(model, x, y)
            expected.append(documents(scores, of_positions, lengths))
        for loss in losses:
            loss.backward()
        check_documents(monitor, expected)
        assert {s.id: s.times_seen for s in monitor.suspects(N)}[6] == 2


def test_a_document_of_one_trained_token_has_details_and_a_classifiers_samples_have_none():
    model, (x, y) = Tokens(), batch(0)
    y[:] = -100
    y[:, 3] = 1
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(torch.arange(B))  # as a decoder that classifies by one token
        loss_of(model(x), y).backward()
        assert {(s.tokens, s.negative_share, s.lowest_tenth) for s in monitor.suspects(N)} == {(None, None, None)}
        assert {s.predicted for s in monitor.suspects(N)} <= set(range(5))
        y[0, 4] = 1
        monitor.tag(torch.arange(B))
        loss_of(model(x), y).backward()
        assert {s.id: s.tokens for s in monitor.suspects(N)} == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("packed_rows", [False, True])
def test_a_language_model_of_transformers_has_the_documents_of_its_shifted_labels(packed_rows):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
    tokens = torch.randint(0, 40, (3, 10))
    labels, positions, ids = tokens.clone(), torch.arange(10).expand(3, 10), torch.tensor([4, 8, 2])
    labels[0, :6] = -100  # a prompt
    if packed_rows:
        positions = torch.cat([torch.arange(4), torch.arange(6)]).expand(3, 10)
        labels[:, [0, 4]] = -100  # the first token of each document
        ids = document_ids([4, 8, 2, 4, 1, 0], positions)
    with torch.no_grad():
        h = model(tokens, position_ids=positions, output_hidden_states=True).hidden_states[-1][:, :-1].double()
    weight = model.lm_head.weight.detach().double()
    delta = torch.softmax(h @ weight.T, -1) - F.one_hot(labels[:, 1:].clamp(min=0), 40)
    delta[labels[:, 1:] == -100] = 0
    scores = alignment_scores(delta.numpy(), h.numpy(), weight.numpy())
    lengths = (delta.norm(dim=-1) * h.norm(dim=-1)).numpy()
    of_positions = ids[:, :-1].numpy() if packed_rows else np.repeat(ids.numpy()[:, None], 9, 1)
    with gwa_logging.watch(model, num_samples=N) as monitor:
        monitor.tag(ids)
        model(tokens, position_ids=positions, labels=labels).loss.backward()
        check_documents(monitor, [documents(scores, of_positions, lengths)], tolerance=1e-5)
        assert monitor.end_epoch().count == (labels[:, 1:] != -100).sum()
        assert monitor.faults == {}


# --- bad input ----------------------------------------------------------------------------------------------------------


@tiered("shape, how", [(T, B), (B, T + 2), (B, T - 1), (B + 1, T)], RUN, odd=True)
def test_ids_of_another_shape_are_left_out_with_the_shapes_that_would_do(shape, how, caplog):
    model, (x, y) = Tokens(), batch(0)
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(torch.zeros(shape, dtype=torch.int64))
        loss_of(compiled_if(how, model)(x), y).backward()
        assert monitor.suspects(N) == []
        assert monitor.faults == {"sample ids": min(math.prod(shape), B * T)}
        assert monitor.end_epoch().count == (y != -100).sum()
    if how == "eager":
        assert (
            f"tagged with {math.prod(shape)} ids, but the head saw 60 rows in it: expected [60], one for each score, or [5], "
            f"one for each input, or [5, 12], one for each position; found {list(shape)}; if these are the ids of mixed"
        ) in caplog.text


@pytest.mark.parametrize("how", SLOW_RUN)
def test_an_id_that_is_out_of_range_is_counted_once_for_each_document_and_pass(how, caplog):
    model, (x, y) = Tokens(), batch(0)
    y[y == -100] = 0
    ids = torch.full((B, T), -1)
    ids[0], ids[1], ids[2], ids[3, :4] = N, -7, 2, 2**33
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(ids)
        loss_of(compiled_if(how, model)(x), y).backward()
        scores, lengths = scores_of(model, x, y)
        check_documents(monitor, [documents(scores[2:3], ids[2:3].numpy(), lengths[2:3])])
        assert monitor.faults == {"sample ids": 3}
    assert "3 ids were not in [0, 40)" in caplog.text


def test_own_scores_of_documents_are_taken_with_either_kind_of_ids_and_refused_with_others():
    scores = np.random.default_rng(0).uniform(-0.5, 0.5, (B, T))
    scores[1, :] = np.nan
    with gwa_logging.watch(Tokens(), num_samples=N, head="head") as monitor:
        for shape in ((B, T + 2), (T, B), (B + 1,)):
            with pytest.raises(
                InvalidInputError, match=r"\[60\], one for each score, or \[5\], .*\[5, 12\], one for each p"
            ):
                monitor.update(torch.from_numpy(scores), torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(InvalidInputError, match=r"predicted: not with sample_ids \[batch, positions\]"):
            monitor.update(torch.from_numpy(scores), packed(), predicted=torch.zeros(B, dtype=torch.int64))
        monitor.update(torch.from_numpy(scores), packed())
        monitor.update(torch.from_numpy(scores), torch.arange(B))
        per_input = np.repeat(np.arange(B)[:, None], T, 1)
        check_documents(monitor, [documents(scores, packed().numpy()), documents(scores, per_input)])


# --- any batch ----------------------------------------------------------------------------------------------------------

values = st.one_of(st.floats(-1, 1, width=32), st.just(math.nan), st.just(math.inf), st.sampled_from([0.0, -0.0, 1e-9]))


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores [rows, positions] and ids, as passes of the same shape or of different shapes."""
    passes = []
    for _ in range(draw(st.integers(1, 3))):
        rows, positions = draw(st.integers(1, 4)), draw(st.integers(1, 14))
        scores = draw(st.lists(values, min_size=rows * positions, max_size=rows * positions))
        ids = draw(st.lists(st.integers(-1, 5), min_size=rows * positions, max_size=rows * positions))
        passes.append((np.array(scores, np.float32).reshape(rows, -1), np.array(ids).reshape(rows, -1)))
    return passes


@settings(deadline=None, max_examples=60)
@given(batches())
def test_any_ids_and_scores_agree_with_a_loop_over_the_documents(passes):
    accumulator = Accumulator(6)
    expected = []
    for scores, ids in passes:
        accumulator.add_scores(torch.from_numpy(scores), TaggedBatch(torch.from_numpy(ids)))
        expected.append(documents(scores, ids))
    ledger, summary = LedgerPart(accumulator.ledger()).checked().ledger, accumulator.snapshot().result()
    last = {document: each for found in expected for document, each in found.items()}
    several = any(each.tokens > 1 for each in last.values())
    assert (ledger.details is not None) == several
    for document in range(6):
        own = [each[document] for each in expected if document in each]
        assert ledger.seen[document] == len(own)
        assert ledger.sums[document] == pytest.approx(sum(each.mean for each in own), abs=1e-5)
        if own and several:
            tokens, share, lowest = (column[document] for column in unpack(ledger.details))
            assert tokens == own[-1].tokens
            assert share == pytest.approx(own[-1].negative_share, abs=0.005)
            assert lowest == pytest.approx(own[-1].lowest_tenth, rel=0.04, abs=2.2e-8)
    assert summary.count == sum(np.isfinite(scores).sum() for scores, _ in passes)
    assert ledger.invalid_ids == 0


@pytest.mark.parametrize(("tokens", "stored"), [(1, 1), (65_534, 65_534), (65_535, 65_535), (70_000, 65_535)])
def test_the_number_of_tokens_saturates(tokens, stored):
    packed = pack_details(torch.tensor([tokens]), torch.tensor([tokens // 2]), torch.tensor([-0.25]))
    found = unpack(packed.numpy())
    assert found.tokens.item() == stored
    assert found.negative_share.item() == pytest.approx(tokens // 2 / tokens, abs=0.005)
    assert found.lowest_tenth.item() == pytest.approx(-0.25, rel=0.04)


# --- memory -------------------------------------------------------------------------------------------------------------


def test_a_document_takes_12_bytes_and_16_with_predictions():
    scores, documents_ = torch.rand(64), TaggedBatch(torch.zeros(8, 8, dtype=torch.int64))
    starts = torch.arange(64) == 0
    size = 10_000
    ledger = DeviceLedger(size)
    ledger.add([TaggedScores(TaggedBatch(torch.arange(64)), scores, None)])
    assert ledger.nbytes == 8 * (size + 1)
    ledger.add([TaggedScores(documents_, scores, starts, torch.ones(64), torch.zeros(64, dtype=torch.int64))])
    assert ledger.nbytes == 12 * (size + 1)  # 120 MB for ten million documents
    ledger.add([TaggedScores(TaggedBatch(torch.arange(64), None, torch.zeros(64)), scores, None)])
    assert ledger.nbytes == 16 * (size + 1)


@pytest.mark.parametrize("by", ["input", "position"])
def test_a_language_models_ledger_has_the_size_that_the_documentation_states(by):
    model, (x, y) = Tokens(), batch(0)
    with gwa_logging.watch(model, num_samples=N, head="head") as monitor:
        monitor.tag(packed() if by == "position" else torch.arange(B))
        loss_of(model(x), y).backward()
        monitor.suspects()
        assert monitor._adapter._accumulator._ledger.nbytes == (12 if by == "position" else 16) * (N + 1)


# --- the state ----------------------------------------------------------------------------------------------------------


def test_details_survive_a_checkpoint_and_a_state_of_version_3_is_read():
    model = Tokens()
    monitor, expected = run(model, "eager", packed())
    state, suspects = monitor.state_dict(), monitor.suspects(N)
    assert state["version"] == 5
    assert state["ledger"]["predicted"] is None
    other = gwa_logging.watch(model, num_samples=N, head="head")
    other.load_state_dict(state)
    assert other.suspects(N) == suspects
    check_documents(other, expected)

    old = {**state, "version": 3, "ledger": {k: v for k, v in state["ledger"].items() if k != "details"}}
    old["ledger"]["predicted"] = torch.full((N,), -1)
    another = gwa_logging.watch(model, num_samples=N, head="head")
    another.load_state_dict(old)
    assert [(s.id, s.mean_score, s.times_seen) for s in another.suspects(N)] == [
        (s.id, s.mean_score, s.times_seen) for s in suspects
    ]
    assert {s.tokens for s in another.suspects(N)} == {None}
    another.close()


# --- packed rows with position ids --------------------------------------------------------------------------------------


def test_document_ids_follow_the_position_ids():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = document_ids([5, 6, 7, 7, 8], positions, mask)
    assert found.tolist() == [[5, 5, 5, 6, 6, 7], [7, 7, 8, -1, -1, -1]]
    assert found.dtype == torch.int64
    left = document_ids(
        torch.tensor([2, 3]), torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    )
    assert left.tolist() == [[-1, -1, 2, 2], [3, 3, 3, 3]]
    assert document_ids([], torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)).tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([1], torch.tensor([[0, 1, 0]])),
            "ids: expected 2, one for each document that begins in position_ids, found 1",
        ),
        (([1], torch.tensor([0, 1])), r"position_ids: expected integers \[batch, positions\], found .* shape \(2,\)"),
        (([1.5], torch.tensor([[0, 1]])), r"ids: expected integers \[documents\], found torch.float32"),
        (
            ([1], torch.tensor([[0, 1]]), torch.ones(2, 1)),
            r"attention_mask: expected the shape of position_ids, \(1, 2\)",
        ),
    ],
)
def test_document_ids_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        document_ids(*arguments)
