"""Documents in JAX's ledger: scores [inputs, positions] with an id for each input or each position."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import gwa_logging
from gwa_logging import InvalidInputError, Monitor
from gwa_logging.document_details import unpack
from gwa_logging.integrations.jax.documents import Documents
from gwa_logging.integrations.jax.ledger import DeviceLedger, add_steps_to_ledger
from gwa_logging.integrations.jax.pending_steps import side_by_side
from gwa_logging.ledger import TaggedBatch
from tests.documents import check_documents, documents

B, T, N = 4, 23, 30
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(-1, 6, (B, T)).astype(np.int32)


def scores_of(seed: int, shape: tuple[int, ...] = (B, T)) -> np.ndarray:
    random = np.random.default_rng(seed)
    scores = random.uniform(-0.4, 0.5, shape).astype(np.float32)
    scores[random.uniform(size=shape) < 0.2] = np.nan
    return scores


def watched() -> Monitor:
    return gwa_logging.watch(linen.Dense(3), num_samples=N)


def per_input(ids: np.ndarray, positions: int = T) -> np.ndarray:
    return np.repeat(ids[:, None], positions, 1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint32])
def test_an_id_for_each_input_gives_the_mean_and_the_details_of_its_scores(dtype):
    ids = np.array([7, 2, 29, 0], dtype)
    with watched() as monitor:
        for seed in range(3):
            monitor.update(jnp.asarray(scores_of(seed)), jnp.asarray(ids))
        check_documents(monitor, [documents(scores_of(seed), per_input(ids.astype(int))) for seed in range(3)])
        assert monitor.faults == {}


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_an_id_for_each_position_gives_one_mean_for_each_document(flat, on_device):
    with watched() as monitor:
        for seed in range(3):
            scores = jnp.asarray(scores_of(seed))
            monitor.update(scores.ravel() if flat else scores, jnp.asarray(IDS) if on_device else IDS)
        check_documents(monitor, [documents(scores_of(seed), IDS) for seed in range(3)])
        assert monitor.faults == {}


def test_the_ids_of_the_last_positions_are_dropped_if_the_model_cuts_them_off():
    scores = scores_of(0, (B, T - 1))
    with watched() as monitor:
        monitor.update(jnp.asarray(scores), IDS)
        check_documents(monitor, [documents(scores, IDS[:, :-1])])
        assert monitor.faults == {}


def test_documents_without_a_score_are_not_seen_and_unsigned_ids_have_no_document():
    scores = scores_of(0)
    scores[IDS == 3] = np.inf
    ids = np.where(IDS == -1, 2**32 - 1, IDS).astype(np.uint32)
    with watched() as monitor:
        monitor.update(jnp.full((B, T), jnp.nan), IDS)
        assert monitor.suspects(N) == []
        monitor.update(jnp.asarray(scores), jnp.asarray(ids))
        check_documents(monitor, [documents(scores, IDS)])
        assert 3 not in {s.id for s in monitor.suspects(N)}
        assert monitor.faults == {}


def test_ids_out_of_range_are_counted_once_for_each_document():
    ids = np.where(IDS == 4, N, np.where(IDS == 5, -9, IDS))
    with watched() as monitor:
        monitor.update(jnp.asarray(scores_of(0)), jnp.asarray(ids))
        check_documents(monitor, [documents(scores_of(0), np.where(ids == N, -1, ids))])
        assert monitor.faults == {"sample ids": 2}


def test_a_languages_models_scores_arrive_in_documents():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            return linen.Dense(9)(linen.Embed(9, 6)(tokens))

    model, tokens = Net(), jnp.asarray(RANDOM.integers(0, 9, (B, T)))
    params = model.init(jax.random.key(0), tokens)

    def loss(params, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, tokens)[:, :-1], tokens[:, 1:]
        ).mean()

    with gwa_logging.watch(model, num_samples=N) as monitor:
        step = jax.jit(monitor.value_and_grad(loss))
        (_, scores), _ = step(params, tokens)
        assert scores.shape == (B, T)
        monitor.update(scores, IDS)
        check_documents(monitor, [documents(np.asarray(scores), IDS)])
        assert {s.tokens for s in monitor.suspects(N)} != {None}


@pytest.mark.parametrize("shape", [(B, T + 2), (T, B), (B + 1,)], ids=str)
def test_ids_of_another_shape_are_refused_with_the_shapes_that_would_do(shape):
    with (
        watched() as monitor,
        pytest.raises(
            InvalidInputError, match=r"\[92\], one for each score, or \[4\], .*, or \[4, 23\], one for each p"
        ),
    ):
        monitor.update(jnp.asarray(scores_of(0)), np.zeros(shape, np.int32))


def test_predictions_go_with_an_id_for_each_input_only():
    with watched() as monitor:
        with pytest.raises(InvalidInputError, match=r"predicted: not with sample_ids \[batch, positions\]"):
            monitor.update(jnp.asarray(scores_of(0)), IDS, predicted=np.zeros(B, np.int32))
        monitor.update(jnp.asarray(scores_of(0)), np.arange(B), predicted=np.arange(B))
        assert {s.id: s.predicted for s in monitor.suspects(N)} == {i: i for i in range(B)}


def test_details_survive_a_checkpoint():
    with watched() as monitor:
        monitor.update(jnp.asarray(scores_of(0)), IDS)
        state, suspects = monitor.state_dict(), monitor.suspects(N)
    with watched() as other:
        other.load_state_dict(state)
        other.update(jnp.asarray(scores_of(1)), IDS)
        check_documents(other, [documents(scores_of(seed), IDS) for seed in range(2)])
    assert suspects[0].tokens is not None


@pytest.mark.slow
def test_scores_on_several_devices_have_the_same_documents():
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",))
    scores = scores_of(0, (len(devices) * 2, T))
    ids = np.random.default_rng(1).integers(-1, 6, scores.shape).astype(np.int32)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with watched() as monitor:
        monitor.update(jax.device_put(scores, sharding), jax.device_put(ids, sharding))
        monitor.update(jax.device_put(scores, sharding), np.arange(len(scores)))
        check_documents(
            monitor, [documents(scores, ids), documents(scores, per_input(np.arange(len(scores))))], tolerance=1e-6
        )


def test_nothing_in_a_ledger_of_documents_is_flagged_by_jaxs_checks_for_nan_and_infinity():
    jax.config.update("jax_debug_nans", True)
    jax.config.update("jax_debug_infs", True)
    try:
        scores = np.nan_to_num(scores_of(0), nan=64.0)
        scores[0] = 0.0
        with watched() as monitor:
            monitor.update(jnp.asarray(scores), IDS)
            monitor.update(jnp.asarray(scores), np.arange(B))
            assert monitor.suspects(N)
    finally:
        jax.config.update("jax_debug_nans", False)
        jax.config.update("jax_debug_infs", False)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_any_ids_and_scores_agree_with_a_loop_over_the_documents(seed):
    random = np.random.default_rng(seed)
    shape = ((1, 1), (1, 40), (3, 11), (4, 1))[seed % 4]  # few shapes, since each is compiled
    scores = random.choice([0.3, -1e-9, 0.0, np.nan, np.inf, *random.uniform(-1, 1, 20)], shape).astype(np.float32)
    ids = random.integers(-1, 6, shape).astype(np.int32)
    samples = TaggedBatch(jnp.asarray(ids))
    ledger = DeviceLedger.empty(6).prepared_for(samples, scores.shape)
    found = add_steps_to_ledger(ledger, side_by_side([samples]), [jnp.asarray(scores)], np.int32(1))
    expected = documents(scores, ids)
    tokens, share, lowest = unpack(np.asarray(found.details)[:6])
    assert {i: n for i, n in enumerate(tokens) if n} == {i: each.tokens for i, each in expected.items()}
    for document, each in expected.items():
        assert float(found.sums[document]) == pytest.approx(each.mean, abs=1e-6)
        assert float(found.seen[document]) == 1
        assert share[document] == pytest.approx(each.negative_share, abs=0.005)
        assert lowest[document] == pytest.approx(each.lowest_tenth, rel=0.04, abs=2.2e-8)
    assert float(found.seen[6]) == 0


def test_ten_million_documents_take_12_bytes_each():
    samples = TaggedBatch(jnp.zeros((2, 3), jnp.int32))

    def after_a_batch(scores):
        ledger = DeviceLedger.empty(10_000_000).prepared_for(samples, scores.shape)
        return add_steps_to_ledger(ledger, side_by_side([samples]), [scores], np.int32(1))

    ledger = jax.eval_shape(after_a_batch, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(ledger)) == 12 * 10_000_001


@pytest.mark.parametrize(("tokens", "stored"), [(1, 1), (65_535, 65_535), (70_000, 65_535)])
def test_the_number_of_tokens_saturates(tokens, stored):
    one = jnp.array([tokens])
    found = unpack(np.asarray(Documents(one, one, jnp.ones(1), one // 2, jnp.array([-0.25])).details()))
    assert found.tokens.item() == stored
    assert found.negative_share.item() == pytest.approx(tokens // 2 / tokens, abs=0.005)
    assert found.lowest_tenth.item() == pytest.approx(-0.25, rel=0.04)
