"""Fused losses of other libraries: named when they hide the head, and replaced where that is possible."""

import copy
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import MethodType, ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gwa_logging
from gwa_logging import InvalidInputError, Monitor
from gwa_logging.integrations.torch import patch_fused_loss

CLASSES, WIDTH = 19, 6
STEPS = 5


class Causal(nn.Module):
    """A small language model with the parts that Hugging Face's have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Embedding(CLASSES, WIDTH)
        self.lm_head = nn.Linear(WIDTH, CLASSES, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.lm_head(self.model(ids))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def data() -> Tensor:
    return torch.randint(0, CLASSES, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def watch(tmp_path) -> Iterator[Callable[..., Monitor]]:
    with ExitStack() as monitors:
        yield lambda model, head="lm_head", **options: monitors.enter_context(
            gwa_logging.watch(model, head=head, directory=tmp_path, **options)
        )


@pytest.fixture
def module(monkeypatch) -> Callable[..., ModuleType]:
    """Makes a module that stands in for one of a library, from its source."""

    def make(name: str, source: str) -> ModuleType:
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(source, made.__dict__)
        return made

    return make


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int = STEPS) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


FUSED = """
import torch.nn.functional as F
def {loss}(
    hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **o
):
    labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    return F.cross_entropy(F.linear(hidden_states, lm_head_weight).flatten(0, -2), labels.flatten()) + 0.0 * len(o)
def {name}(self, ids, labels, **options):
    return {loss}(self.model(ids), self.lm_head.weight, labels, hidden_size=6, **options)
"""
LIGER = FUSED.format(loss="LigerForCausalLMLoss", name="lce_forward")


# --- naming the culprit -----------------------------------------------------------------------------------------------

STAND_INS = {
    "liger_kernel.transformers.model.llama": (
        "LigerForCausalLMLoss",
        "lce_forward",
        r"Liger computes.*patch_fused_loss",
    ),
    "trl.trainer.sft_trainer": ("loss", "_chunked_ce_forward", r"TRL computes the loss of Causal.*loss_type='nll'"),
    "unsloth.models.llama": ("loss", "_CausalLM_fast_forward", r"Unsloth computes.*UNSLOTH_RETURN_LOGITS=1"),
    "cut_cross_entropy.transformers.llama": (
        "loss",
        "cce_forward",
        r"cut-cross-entropy computes.*linear_cross_entropy",
    ),
}


@pytest.mark.parametrize("library", STAND_INS)
@pytest.mark.parametrize("of", ["instance", "class", "wrapped"])
def test_silence_names_the_library_that_has_replaced_the_loss(watch, module, caplog, library, of):
    loss, name, message = STAND_INS[library]
    forward = getattr(module(library, FUSED.format(loss=loss, name=name)), name)

    class Patched(Causal):
        __qualname__ = "Causal"

    model = Patched()
    if of == "class":
        Patched.forward = forward
    elif of == "instance":
        model.forward = MethodType(forward, model)
    else:
        model.forward = torch.autocast("cpu", torch.bfloat16)(MethodType(forward, model))
    Patched.__name__ = "Causal"
    monitor, ids = watch(model), data()
    with caplog.at_level(logging.WARNING):
        train(model, lambda: model(ids, ids))
    assert monitor.faults == {"silence": 1}
    assert any("no observation" in text and re.search(message, text) for text in caplog.messages)


@pytest.mark.parametrize("kernel", [F.linear, lambda h, w: h @ w.T], ids=["F.linear", "a product"])
def test_silence_tells_that_the_weight_is_used_without_the_head_and_what_to_call(watch, caplog, kernel):
    model, ids = Causal(), data()
    monitor = watch(model)
    train(model, lambda: F.cross_entropy(kernel(model.model(ids), model.lm_head.weight).flatten(0, 1), ids.flatten()))
    assert monitor.faults == {"silence": 1}
    assert any(
        "weight gets a gradient, but the head was never called" in text
        and "linear_cross_entropy(hidden, head.weight" in text
        for text in caplog.messages
    )


@pytest.mark.parametrize("why", ["the embedding has the weight", "the head is called", "the head is not trained"])
def test_nothing_is_claimed_about_the_weight_if_its_gradient_proves_nothing(watch, caplog, why):
    model, ids = Causal(), data()
    if why == "the embedding has the weight":
        model.lm_head.weight = model.model.weight
    monitor = watch(model)
    with monitor.paused():  # the passes are not counted
        if why == "the head is called":
            model(ids, ids).backward()
    train(model, lambda: model.model(ids).square().mean())
    assert monitor.faults == {"silence": 1}
    assert not any("never called" in text for text in caplog.messages)


# --- replacing the loss -----------------------------------------------------------------------------------------------


def assert_as_if_unfused(watch, fused: nn.Module, plain: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """The loss, the gradients and the scores of documents are those of the model that calls its head."""
    found, expected = watch(fused, num_samples=4), watch(plain, num_samples=4)
    for model, monitor in ((fused, found), (plain, expected)):
        monitor.tag(torch.arange(4))
        loss(model).backward()
    assert torch.allclose(loss(fused), loss(plain), atol=1e-6)
    assert torch.allclose(fused.lm_head.weight.grad, plain.lm_head.weight.grad, atol=1e-6)
    reports = found.end_epoch(), expected.end_epoch()
    assert reports[0].count == reports[1].count > 0
    assert reports[0].mean == pytest.approx(reports[1].mean, abs=1e-6)
    scores = [{each.id: each.mean_score for each in monitor.suspects(4)} for monitor in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert found.faults == {}


def test_the_loss_of_liger_is_replaced_for_the_patched_model_only_until_it_is_removed(watch, module, caplog):
    liger = module("liger_kernel.transformers.model.llama", LIGER)
    original = liger.LigerForCausalLMLoss
    fused, other, plain, ids = Causal(), Causal(), Causal(), data()
    for model in (fused, other):
        model.forward = MethodType(liger.lce_forward, model)
    others = watch(other)
    with patch_fused_loss(fused) as patch:
        assert_as_if_unfused(watch, fused, plain, lambda model: model(ids, ids))
        train(other, lambda: other(ids, ids))
        assert others.faults == {"silence": 1}
        again = patch_fused_loss(other)
        other(ids, ids).backward()
        assert others.end_epoch().count == 4 * 6
        patch.remove()
        assert liger.LigerForCausalLMLoss is not original
        again.remove()
    assert liger.LigerForCausalLMLoss is original


def test_a_loss_of_liger_is_reported_at_watch_unless_it_has_been_replaced(watch, module, caplog):
    liger = module("liger_kernel.transformers.model.llama", LIGER)
    for is_patched in (False, True):
        caplog.clear()
        model = Causal()
        model.forward = MethodType(liger.lce_forward, model)
        if is_patched:
            patch_fused_loss(model)
        watch(model)
        assert any("Liger computes the loss of Causal" in text for text in caplog.messages) is not is_patched


def test_calls_with_options_that_only_liger_has_still_go_to_liger(watch, module):
    liger = module("liger_kernel.transformers.model.llama", LIGER)
    model, ids = Causal(), data()
    model.forward = MethodType(liger.lce_forward, model)
    monitor = watch(model)
    with patch_fused_loss(model):
        model(ids, ids, return_token_accuracy=True).backward()
        model(ids, ids, num_items_in_batch=3).backward()
    assert monitor.end_epoch().count == 4 * 6


@pytest.mark.slow
def test_the_real_liger_kernel_is_replaced_in_a_llama(watch):
    transformers = pytest.importorskip("transformers")
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=CLASSES, hidden_size=8, **sizes)).train()
    fused, ids = copy.deepcopy(plain), data()
    liger.apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=fused)
    with patch_fused_loss(fused):
        assert_as_if_unfused(watch, fused, plain, lambda model: model(input_ids=ids, labels=ids).loss)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no nn.LinearCrossEntropyLoss")
def test_the_loss_module_of_pytorch_is_reported_at_watch_and_replaced_until_it_is_removed(watch, caplog):
    class Model(Causal):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.LinearCrossEntropyLoss(WIDTH, CLASSES, label_smoothing=0.1)
            self.criterion.linear.weight = self.lm_head.weight
            del self.lm_head

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return self.criterion(self.model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model, plain, ids = Model(), Causal(), data()
    expected = watch(plain)
    logits = plain.lm_head(plain.model(ids))[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1).backward()
    before = model(ids, ids)
    found = watch(model, head="criterion.linear")
    assert any("nn.LinearCrossEntropyLoss computes the loss of LinearCrossEntropyLoss" in t for t in caplog.messages)
    with patch_fused_loss(model):
        loss = model(ids, ids)
        loss.backward()
    assert torch.allclose(loss, before, atol=1e-6)
    assert torch.allclose(model.criterion.linear.weight.grad, plain.lm_head.weight.grad, atol=1e-6)
    report, other = found.end_epoch(), expected.end_epoch()
    assert (report.count, report.mean) == (other.count, pytest.approx(other.mean, abs=1e-6))
    assert "forward" not in model.criterion.__dict__


def test_a_model_without_a_fused_loss_is_refused_with_the_remedy():
    with pytest.raises(InvalidInputError, match=r"model: Causal has no loss.*call linear_cross_entropy there"):
        patch_fused_loss(Causal())


def test_soft_capping_is_refused_by_name(module):
    liger = module("liger_kernel.transformers.model.gemma2", LIGER)
    model = Causal()
    model.forward = MethodType(liger.lce_forward, model)
    model.config = type("Config", (), {"final_logit_softcapping": 30.0})()
    with pytest.raises(
        InvalidInputError, match=r"caps its logits \(final_logit_softcapping=30.0\).*fused_linear_cross"
    ):
        patch_fused_loss(model)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no nn.LinearCrossEntropyLoss")
def test_class_weights_are_refused_by_name():
    model = nn.Sequential(nn.LinearCrossEntropyLoss(WIDTH, CLASSES, weight=torch.ones(CLASSES)))
    with pytest.raises(InvalidInputError, match="class weights"):
        patch_fused_loss(model)
