"""The PyTorch probe against a loop over single samples and the published numbers, and on models that users copy or compile."""

import copy
import io
import pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import gwa_logging
from gwa_logging import AlignmentSummary, InvalidInputError, alignment_scores
from gwa_logging.integrations.torch.adapter import TorchAdapter
from tests.torch.tiers import tiered

CASES = ("hard10", "smooth10", "mixup100", "hard1000", "confident")


class Recorder:
    """Watches a model and keeps every score, by reading the ledger of a run in which each sample is seen once."""

    def __init__(self, model: nn.Module, samples: int, **options) -> None:
        self.monitor = gwa_logging.watch(model, num_samples=samples, **options)
        self.monitor.tag(torch.arange(samples))

    def scores(self) -> np.ndarray:
        adapter = self.monitor._adapter
        assert isinstance(adapter, TorchAdapter)
        ledger = adapter.ledger().ledger
        assert (ledger.seen <= 1).all()
        self.monitor.close()
        return np.where(ledger.seen == 1, ledger.sums, np.nan)


def one_at_a_time(model: nn.Module, head: nn.Linear, loss, x, y) -> np.ndarray:
    """The oracle: each sample's own gradient of the head's weight, by autograd, in float64."""
    model, wide = copy.deepcopy(model).double(), x.double()
    head = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == head.weight.shape)
    y = y.double() if y.is_floating_point() else y
    scores = []
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(loss(model(wide[i : i + 1]), y[i : i + 1]), head.weight)
        scores.append(-(gradient * head.weight).sum() / gradient.norm() / head.weight.norm())
    return torch.stack(scores).detach().numpy()


def net(features: int = 12, classes: int = 5, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, features), nn.Tanh(), nn.Linear(features, classes, bias=bias))


def soft(n: int, classes: int) -> torch.Tensor:
    return torch.softmax(2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(1)), -1)


class_weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
LOSSES = {
    "cross-entropy": lambda z, y: F.cross_entropy(z, y),
    "cross-entropy, sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=class_weights.to(z.dtype)),
    "soft labels": lambda z, y: F.cross_entropy(z, F.one_hot(y, 5) * 0.7 + 0.06),
    "BCE with logits": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).to(z.dtype)),
    "a custom loss": lambda z, y: (torch.tanh(z).gather(1, y[:, None]) - 1).square().mean(),
}


NUMERATORS = {"by logits": (12, 5), "by embeddings": (4, 5)}


@tiered("loss, numerator, how", LOSSES, NUMERATORS, ["eager", "compiled"])
def test_scores_equal_a_loop_over_single_samples(loss, numerator, how):
    model = net(*NUMERATORS[numerator])
    x, y = torch.randn(24, 8), torch.randint(0, 5, (24,))
    want = one_at_a_time(model, model[2], LOSSES[loss], x, y)
    recorder = Recorder(model, 24)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    LOSSES[loss](run(x), y).backward()
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_watched_linear_layer_has_the_published_scores(published, case):
    w, b, h, y = (torch.from_numpy(published[f"{case}/{k}"]) for k in ("weight", "bias", "embeddings", "labels"))
    model = nn.Linear(w.shape[1], w.shape[0])
    with torch.no_grad():
        model.weight.copy_(w)
        model.bias.copy_(b)
    recorder = Recorder(model, len(h))
    # The gradient as in the published code, softmax - labels. Of saturated samples only rounding errors are left.
    logits = model(h)
    logits.backward(torch.softmax(logits.detach(), -1) - y)
    np.testing.assert_allclose(recorder.scores(), published[f"{case}/scores"], atol=1e-6)


def test_a_head_without_a_bias_is_scored():
    model = net(bias=False)
    x, y = torch.randn(10, 8), torch.randint(0, 5, (10,))
    want = one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y)
    recorder = Recorder(model, 10)
    LOSSES["cross-entropy"](model(x), y).backward()
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


def test_a_single_logit_for_two_classes_scores_the_signed_cosine():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    x, y = torch.randn(9, 6), torch.randint(0, 2, (9,)).float()
    recorder = Recorder(model, 9)
    F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
    delta = torch.sigmoid(model(x)[:, 0]) - y
    want = -torch.sign(delta) * F.cosine_similarity(x, model.weight, dim=1)
    np.testing.assert_allclose(recorder.scores(), want.detach().numpy(), atol=1e-6)


def test_every_position_of_a_sequence_is_a_sample_and_ignored_ones_drop_out():
    model = net(classes=5)
    x, y = torch.randn(3, 7, 8), torch.randint(0, 5, (3, 7))
    y[0, 4:] = -100
    monitor = gwa_logging.watch(model)
    logits = model(x)
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    report = monitor.end_epoch()
    delta = torch.softmax(logits, -1) - F.one_hot(y.clamp(min=0), 5)
    scores = alignment_scores(*(t.detach().numpy() for t in (delta, model[:2](x), model[2].weight)))[y.numpy() >= 0]
    assert (report.count, report.excluded) == (18, 3)
    assert report.mean == pytest.approx(scores.mean(), abs=1e-6)


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_a_loss_scale_cancels(loss_scale):
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    recorder = Recorder(model, 16)
    (loss_scale * F.cross_entropy(model(x), y)).backward()
    want = one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y)
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


def test_bfloat16_autocast_is_scored_in_float32():
    model, x, y = net(), torch.randn(64, 8), torch.randint(0, 5, (64,))
    recorder = Recorder(model, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    want = one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y)
    np.testing.assert_allclose(recorder.scores(), want, atol=2e-2)


@pytest.mark.parametrize("shape", [(12, 5), (4, 5)], ids=["by logits", "by embeddings"])
def test_gradients_and_updates_are_bit_identical_with_and_without_the_probe(shape):
    x, y = torch.randn(32, 8), torch.randint(0, 5, (32,))

    def trained(watched: bool) -> list[torch.Tensor]:
        model = net(*shape)
        optimizer = torch.optim.Adam(model.parameters())
        monitor = gwa_logging.watch(model) if watched else None
        for _ in range(5):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            assert monitor.end_epoch().count == 160
        return list(model.parameters())

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


def test_logits_changed_in_place_after_the_head_have_the_right_scores():
    class Scaled(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 5, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.head(torch.tanh(self.body(x)))
            z.div_(2.0)
            z[:, 0].masked_fill_(x[:, 0] > 2, -1e4)
            return z

    for compiled, bias in product((False, True), (False, True)):
        torch.manual_seed(0)
        model, x, y = Scaled(bias), torch.randn(12, 8), torch.randint(1, 5, (12,))
        want = one_at_a_time(model, model.head, LOSSES["cross-entropy"], x, y)
        recorder = Recorder(model, 12, head="head")
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        F.cross_entropy(run(x), y).backward()
        np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


def test_a_hook_of_the_user_that_changes_the_gradient_in_place_leaves_the_score_alone():
    torch.manual_seed(0)
    model, x, y = net(), torch.randn(12, 8), torch.randint(0, 5, (12,))
    want = one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y)
    recorder = Recorder(model, 12)
    z = model(x)
    z.register_hook(lambda delta: delta.clamp_(-1e-3, 1e-3))
    handle = z.register_hook(lambda delta: pytest.fail("it was removed"))
    handle.remove()
    F.cross_entropy(z, y).backward()
    assert model[2].bias.grad.abs().max() <= 12e-3  # the hook of the user ran
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


def test_only_training_passes_count():
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model(x)  # a forward pass without a backward pass
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == 16


def test_several_forwards_before_one_backward_all_count():
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model)
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(x[:5]), y[:5])).backward()
    assert monitor.end_epoch().count == 21


def test_a_model_with_a_frozen_backbone_is_scored():
    model, x, y = net(4, 5), torch.randn(16, 8), torch.randint(0, 5, (16,))
    model[0].requires_grad_(False)
    want = one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y)
    recorder = Recorder(model, 16)
    F.cross_entropy(model(x), y).backward()
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_each_sample_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    model, x, y = net(), torch.randn(16, 8, requires_grad=True), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model)
    F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y).backward()
    assert monitor.end_epoch().count == 16


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=pytest.mark.slow)])
def test_a_compiled_model_is_observed_in_one_graph_with_ragged_batches(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = net()
    monitor = gwa_logging.watch(model, log_every_n_steps=2)
    fast = torch.compile(model, fullgraph=True, mode=mode)
    seen = []
    for n in (32, 32, 7, 32, 7, 32):
        x, y = torch.randn(n, 8), torch.randint(0, 5, (n,))
        F.cross_entropy(fast(x), y).backward()
        seen.append(one_at_a_time(model, model[2], LOSSES["cross-entropy"], x, y))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report = monitor.end_epoch()
    want = AlignmentSummary.from_scores(np.concatenate(seen))
    assert graphs <= 2
    assert report.count == want.count
    assert report.mean == pytest.approx(want.mean, abs=1e-6)
    assert report.std == pytest.approx(want.std, abs=1e-6)


def test_watching_a_compiled_model_before_its_first_call_works():
    model = torch.compile(net(), fullgraph=True, backend="aot_eager")
    monitor = gwa_logging.watch(model)
    F.cross_entropy(model(torch.randn(9, 8)), torch.randint(0, 5, (9,))).backward()
    assert monitor.end_epoch().count == 9


def step(run, n: int = 9) -> None:
    F.cross_entropy(run(torch.randn(n, 8)), torch.randint(0, 5, (n,))).backward()


def test_watching_a_compiled_model_after_its_first_call_works():
    torch._dynamo.reset()
    model = net()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(run)
    monitor = gwa_logging.watch(model)
    step(run)
    assert monitor.end_epoch().count == 9
    monitor.close()
    step(run)


def test_compiled_models_of_the_same_class_are_kept_apart():
    torch._dynamo.reset()
    bare, first, second = net(), net(), net()
    monitors = [gwa_logging.watch(first), gwa_logging.watch(second)]
    runs = [torch.compile(model, fullgraph=True, backend="aot_eager") for model in (bare, first, second)]
    for n, run in zip((3, 9, 5, 3, 9, 5), 2 * runs, strict=True):
        step(run, n)
    assert [monitor.end_epoch().count for monitor in monitors] == [18, 10]


def test_a_compiled_module_whose_forward_was_replaced_is_observed():
    torch._dynamo.reset()
    model = net()
    original = model[2].forward
    model[2].forward = lambda x: original(2 * x)
    replaced = model[2].forward
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(run)
    monitor = gwa_logging.watch(model, head="2")
    step(run)
    assert monitor.end_epoch().count == 9
    monitor.close()
    assert model[2].forward is replaced


def test_watching_changes_neither_state_nor_structure_of_the_model():
    model = net()
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    monitor = gwa_logging.watch(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert len(list(model.buffers())) == 0
    monitor.close()
    assert not model[2]._forward_hooks
    assert not model[2]._forward_pre_hooks


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of the head": lambda model: nn.Sequential(*model[:2], copy.deepcopy(model[2])),
    "copy of the head": lambda model: nn.Sequential(*model[:2], copy.copy(model[2])),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_watched_model_is_not_watched_and_has_no_attributes_of_the_probe(how):
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    plain = set(model[2].__dict__)
    monitor = gwa_logging.watch(model)
    twin = COPIES[how](model)
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == 16
    assert set(twin[2].__dict__) == plain
    assert not twin[2]._forward_hooks
    assert torch.equal(twin[2].weight, model[2].weight)


def test_the_pickle_of_a_watched_model_is_byte_identical():
    model = net()
    before = pickle.dumps(model)
    with gwa_logging.watch(model):
        assert pickle.dumps(model) == before
    assert pickle.dumps(model) == before


def test_the_users_own_hooks_are_copied():
    model = net()
    with gwa_logging.watch(model):
        model[2].register_forward_hook(max)
        assert list(copy.deepcopy(model)[2]._forward_hooks.values()) == [max]


def test_a_replica_of_data_parallel_counts_and_runs_its_own_weights():
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model)
    replica = model[2]._replicate_for_data_parallel()
    assert "forward" not in replica.__dict__
    replica.weight = torch.zeros_like(model[2].weight)
    replica.bias = torch.ones(5, requires_grad=True)
    logits = replica(model[:2](x))
    assert (logits == 1).all()
    F.cross_entropy(logits, y).backward()
    assert monitor.end_epoch().excluded == 16  # its weight is zero


def test_watching_again_replaces_the_first_watch():
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    first = gwa_logging.watch(model)
    second = gwa_logging.watch(model)
    F.cross_entropy(model(x), y).backward()
    assert second.end_epoch().count == 16
    with pytest.raises(InvalidInputError, match="this monitor is closed"):
        first.end_epoch()


def test_nothing_is_observed_after_close_even_by_a_pass_under_way():
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model, num_samples=16)
    monitor.tag(torch.arange(16))
    loss = F.cross_entropy(model(x), y)
    monitor.close()
    loss.backward()
    assert not monitor._adapter.ledger().ledger.seen.any()


def test_nan_and_infinite_logits_are_excluded_and_training_goes_on(caplog):
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    x[3], x[5] = torch.nan, torch.inf
    monitor = gwa_logging.watch(model)
    for _ in range(3):
        F.cross_entropy(model(x), y, reduction="none").sum().backward()
        monitor.flush()
    report = monitor.end_epoch()
    assert report.count + report.excluded == 48
    assert report.excluded >= 3
    assert sum("not finite" in message for message in caplog.messages) == 1
    assert monitor.faults["samples that are not finite"] == report.excluded


def test_a_zero_embedding_is_excluded_as_dead():
    model = nn.Linear(4, 3)
    monitor = gwa_logging.watch(model)
    x = torch.randn(6, 4)
    x[2] = 0
    F.cross_entropy(model(x), torch.randint(0, 3, (6,))).backward()
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (5, 1)
    assert any("zero embedding" in note for note in report.notes)


def test_a_fault_inside_the_probe_never_reaches_training(monkeypatch, caplog):
    model, x, y = net(), torch.randn(16, 8), torch.randint(0, 5, (16,))
    monitor = gwa_logging.watch(model)

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("gwa_logging.integrations.torch.eager_pass.row_norms", broken)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
    assert monitor.faults == {"probe": 3}
    assert sum("broken on purpose" in message for message in caplog.messages) == 1
    assert model[0].weight.grad is not None


def test_one_token_of_all_keeps_the_others_no_longer_than_without_us():
    """In mixed precision the head saves a small copy of its input, so what that is a part of can be freed."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            h = x * 2.0
            self.all_tokens = StorageWeakRef(h.untyped_storage())
            return self.head(h[:, 0])

    model, x, y = Tokens(), torch.randn(6, 40, 8, requires_grad=True), torch.randint(0, 3, (6,))
    with gwa_logging.watch(model, head="head") as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        assert model.all_tokens.expired()
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x).detach().float()
        delta = z.softmax(1) - F.one_hot(y, 3)
        report = monitor.end_epoch()
    expected = alignment_scores(delta.numpy(), (2 * x[:, 0]).detach().numpy(), model.head.weight.detach().numpy())
    assert report.count == 6
    assert report.mean == pytest.approx(expected.mean(), abs=0.01)
