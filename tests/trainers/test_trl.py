"""TRL's trainers on a tiny Llama: their head is fused with the loss, and its scores equal those of float64 logits.

The oracle runs a float64 copy of the model on the batches that the trainer made, one logit gradient per token. The learning
rate is 0, so that the model stays the one that the oracle knows; one test compares real trainings instead.
"""

import copy
import gc
import json
import os
import re
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import gwa_logging
from gwa_logging import InvalidInputError, with_ids
from gwa_logging.integrations.torch.trl_head import find_fused_forward
from gwa_logging.integrations.transformers import GWACallback, IdCollator
from tests.pages import ROOT, python_blocks, run

VOCABULARY, WIDTH, ROWS = 48, 16, 12


def llama(seed: int = 0, *, kind: type = LlamaForCausalLM, spread: float = 0.3, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return kind(LlamaConfig(**sizes, **heads, **tokens, initializer_range=spread, **more))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")


def documents(rows: int = ROWS) -> Dataset:
    """Documents of 3 to 9 tokens; the first two tokens are a prompt, which is not trained."""
    rng = np.random.default_rng(1)
    tokens = [rng.integers(3, VOCABULARY, rng.integers(3, 10)).tolist() for _ in range(rows)]
    labels = [[-100, -100, *row[2:]] for row in tokens]
    return with_ids(Dataset.from_dict({"input_ids": tokens, "labels": labels, "text": ["a column"] * rows}))


def sft(model: Any, *callbacks: Any, data: Any = None, **arguments: Any) -> SFTTrainer:
    peft, loss = arguments.pop("peft_config", None), arguments.pop("compute_loss_func", None)
    settings = {
        "output_dir": "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_length": 16,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return SFTTrainer(
        model,
        args=SFTConfig(**settings | arguments),
        train_dataset=documents() if data is None else data,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft,
        compute_loss_func=loss,
    )


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """A list that gets the arguments of every training pass of the model."""
    batches: list[dict[str, Any]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            batches.append({key: value.clone() if hasattr(value, "clone") else value for key, value in kwargs.items()})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return batches


def oracle(
    model: Any, batches: list[dict[str, Any]], logits_of: Any = None, *, is_dft: bool = False
) -> tuple[np.ndarray, dict[int, float]]:
    """The scores of all trained tokens, and each document's mean weighted by the tokens' gradients, from float64 logits.

    The loss "dft" multiplies the loss of each token by its probability.
    """
    model = model.double().eval()
    head = model.get_output_embeddings()
    scores, by_document = [], {}
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with torch.no_grad():
            hidden = model.base_model(**inputs).last_hidden_state
        labels = batch.get("shift_labels")
        if labels is None:
            labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        ids = batch.get("sample_id", torch.full(labels.shape, -1))
        ids = ids if ids.ndim == 2 else ids[:, None].expand(labels.shape)
        for row, token in (labels != -100).nonzero().tolist():
            logits = head(hidden[row, token]).detach().requires_grad_()
            final = logits if logits_of is None else logits_of(logits)
            (delta,) = torch.autograd.grad(nn.functional.cross_entropy(final, labels[row, token]), logits)
            weight = head.weight.detach().numpy()
            score = gwa_logging.alignment_scores(delta.numpy()[None], hidden[row, token].numpy()[None], weight)[0]
            scores.append(score)
            factor = final.softmax(-1)[labels[row, token]].item() if is_dft else 1.0
            length = factor * delta.norm().item() * hidden[row, token].norm().item()
            by_document.setdefault(int(ids[row, token]), []).append((score, length))
    means = {}
    for key, values in by_document.items():
        own, lengths = np.transpose(values)
        means[key] = float(np.average(own, weights=lengths))
    return np.array(scores), means


def assert_scores(callback: GWACallback, scores: np.ndarray, within: float = 1e-6) -> None:
    (report,) = callback.monitor.history
    assert report.count == len(scores)
    assert report.mean == pytest.approx(scores.mean(), abs=within)
    assert report.std == pytest.approx(scores.std(), abs=within)
    assert report.negative_fraction == pytest.approx((scores < 0).mean(), abs=1.5 / len(scores))
    assert callback.monitor.faults == {}


def assert_documents(callback: GWACallback, means: dict[int, float], within: float = 1e-6) -> None:
    found = {suspect.id: suspect.mean_score for suspect in callback.monitor.suspects(len(means) + 1)}
    assert found == pytest.approx(means, abs=within)


def watching(**arguments: Any) -> GWACallback:
    return GWACallback(num_samples=ROWS, sample_ids="sample_id", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"loss_type": "dft"},
        pytest.param({"remove_unused_columns": False}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_and_documents_of_the_default_trainer_equal_the_oracle(arguments):
    callback, model = watching(), llama()
    trainer = sft(model, callback, **arguments)
    batches = recorded(trainer.model)
    trainer.train()
    scores, means = oracle(model, batches, is_dft=arguments.get("loss_type") == "dft")
    assert len(means) == ROWS
    assert_scores(callback, scores)
    assert_documents(callback, means)


def knowing(model: Any, strength: float = 0.85) -> Any:
    """Makes a model know that token i + 1 follows token i, mostly with a probability above 0.9."""
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(VOCABULARY, WIDTH) * strength)
        model.model.embed_tokens.weight.copy_(model.lm_head.weight.roll(-1, 0))
    return model


def counting(rows: int = ROWS) -> Dataset:
    """Documents that count upwards; every fourth is wrong in the middle."""
    tokens = [[3 + (start + i) % 40 for i in range(7)] for start in range(rows)]
    for wrong in tokens[::4]:
        wrong[3] = 47
    return with_ids(Dataset.from_dict({"input_ids": tokens, "labels": tokens}))


def test_tokens_that_the_model_is_sure_of_are_scored_exactly():
    """Where p_y is 0.999, the sum of the squares has lost the other classes in float32: the norm would be wrong by 10 %."""
    callback, model = watching(), knowing(llama(spread=0.02))
    trainer = sft(model, callback, data=counting())
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    with torch.no_grad():
        last = model(batches[0]["input_ids"]).logits[:, :-1].softmax(-1)
    sure = last.gather(-1, batches[0]["input_ids"][:, 1:, None])
    assert (sure > 0.999).float().mean() > 0.2
    assert_scores(callback, scores, within=2e-6)
    assert_documents(callback, means, within=1e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("padding-free", {"padding_free": True, "max_length": None}),
        ("padded to a multiple", {"pad_to_multiple_of": 8}),
        ("packed", {"packing": True, "max_length": 24}),
    ],
    ids=str,
)
def test_padding_free_and_packed_rows_count_each_trained_token(kind, more):
    callback, model = GWACallback(), llama()
    trainer = sft(model, callback, **more)
    batches = recorded(model)
    trainer.train()
    scores, _ = oracle(model, batches)
    assert_scores(callback, scores)


@pytest.mark.parametrize("adapted", [["q_proj"], ["q_proj", "lm_head saved"]], ids=["frozen head", "trained head"])
def test_lora_scores_the_gradient_of_the_head_whether_it_is_trained_or_frozen(adapted):
    from peft import LoraConfig

    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        modules_to_save=["lm_head"] if len(adapted) > 1 else None,
        task_type="CAUSAL_LM",
    )
    callback = watching()
    trainer = sft(llama(), callback, peft_config=config)
    batches = recorded(trainer.model)
    trainer.train()
    scores, means = oracle(trainer.model.get_base_model(), batches)
    assert_scores(callback, scores)
    assert_documents(callback, means)


def test_a_head_on_a_frozen_backbone_is_scored_exactly():
    callback, model = watching(), llama()
    model.model.requires_grad_(requires_grad=False)
    trainer = sft(model, callback)
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    assert_scores(callback, scores)
    assert_documents(callback, means)


def test_a_learned_prompt_shifts_the_labels():
    from peft import PromptTuningConfig

    callback = watching()
    trainer = sft(
        knowing(llama(spread=0.02)),
        callback,
        data=counting(),
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    trainer.train()
    (report,) = callback.monitor.history
    assert callback.monitor.faults == {}
    assert report.count == sum(
        len(row) for row in counting()["input_ids"]
    )  # the first token too: the prompt precedes it


def test_bfloat16_scores_are_those_of_float64_up_to_rounding():
    callback, model = watching(), llama()
    trainer = sft(model, callback, bf16=True)
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    assert_scores(callback, scores, within=3e-3)
    assert_documents(callback, means, within=1e-2)


def test_shifted_labels_belong_to_their_own_position():
    model = llama()
    trainer = sft(model)  # adds the fused head
    tokens = torch.arange(3, 23).reshape(2, 10)
    batch = {"input_ids": tokens, "shift_labels": tokens.flip(1).clone()}
    batch["shift_labels"][0, :4] = -100
    with gwa_logging.watch(model, num_samples=2) as monitor:
        model.train()
        monitor.tag(torch.tensor([1, 0]))
        model(**batch, fused_lm_head=True).loss.backward()
        report = monitor.end_epoch()
        means = {suspect.id: suspect.mean_score for suspect in monitor.suspects(2)}
    scores, expected = oracle(model, [{**batch, "sample_id": torch.tensor([1, 0])}])
    assert report.count == 16
    assert report.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert means == pytest.approx(expected, abs=1e-6)
    assert monitor.faults == {}
    del trainer


@pytest.mark.parametrize(
    ("config", "logits_of"),
    [
        ({"final_logit_softcapping": 2.0}, lambda z: 2.0 * torch.tanh(z / 2.0)),
        ({"logit_scale": -0.5}, lambda z: -0.5 * z),
        ({"logit_scale": 3.0, "final_logit_softcapping": 4.0}, lambda z: 4.0 * torch.tanh(3.0 * z / 4.0)),
    ],
    ids=["capped", "scaled", "both"],
)
def test_capped_and_scaled_logits_are_scored_exactly(config, logits_of):
    callback, model = watching(), llama()
    for name, value in config.items():
        setattr(model.config, name, value)
    trainer = sft(model, callback)
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches, logits_of)
    assert_scores(callback, scores)
    assert_documents(callback, means)


def test_a_bias_of_the_head_is_not_part_of_the_weight():
    callback, model = watching(), knowing(llama(spread=0.02))
    model.lm_head = nn.Linear(WIDTH, VOCABULARY)
    knowing(model)
    trainer = sft(model, callback, data=counting())
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    assert_scores(callback, scores, within=2e-6)
    assert_documents(callback, means, within=1e-5)


def test_a_vocabulary_of_several_tiles_is_scored_exactly(monkeypatch):
    monkeypatch.setattr("gwa_logging.integrations.torch.trl_head._TILE", (5, 7))
    test_tokens_that_the_model_is_sure_of_are_scored_exactly()


def full_logits(output: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits, labels = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def test_a_training_equals_one_with_full_logits():
    def run(**more: Any) -> tuple[list[Any], torch.Tensor, dict[str, int]]:
        callback, model = GWACallback(), llama()
        sft(model, callback, num_train_epochs=3, learning_rate=0.3, **more).train()
        return callback.monitor.history, model.lm_head.weight.detach(), callback.monitor.faults

    (fused, weight, faults), (full, full_weight, _) = run(), run(compute_loss_func=full_logits)
    assert torch.allclose(weight, full_weight, atol=1e-5)
    assert [report.count for report in fused] == [report.count for report in full]
    assert [report.excluded for report in fused] == [report.excluded for report in full]
    for ours, theirs in zip(fused, full, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-5)
        assert ours.std == pytest.approx(theirs.std, abs=1e-5)
    assert faults == {}


def test_label_smoothing_goes_through_the_full_logits_and_counts_each_token_once():
    callback, model = GWACallback(), llama()
    trainer = sft(model, callback, label_smoothing_factor=0.1)
    batches = recorded(model)
    trainer.train()
    (report,) = callback.monitor.history
    assert report.count == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches if "labels" in batch)


def test_watching_changes_neither_the_training_nor_the_model():
    def run(*callbacks: Any) -> tuple[torch.Tensor, list[dict[str, float]]]:
        model = llama()
        trainer = sft(model, *callbacks, learning_rate=0.3, logging_steps=1, eval_strategy="no")
        before = find_fused_forward(model).value("outputs")
        trainer.train()
        assert find_fused_forward(model).value("outputs") == before
        rows = [
            {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
            for row in trainer.state.log_history
        ]
        return model.lm_head.weight.detach(), rows

    (weight, rows), (bare_weight, bare_rows) = run(watching()), run()
    assert torch.equal(weight, bare_weight)
    assert rows == bare_rows


def test_evaluation_and_paused_passes_are_not_counted():
    model = llama()
    trainer = sft(model)
    batch = {"input_ids": torch.arange(3, 13)[None], "labels": torch.arange(3, 13)[None]}
    with gwa_logging.watch(model) as monitor:
        model.eval()
        model(**batch, fused_lm_head=True).loss.backward()
        model.train()
        with torch.no_grad():
            model(**batch, fused_lm_head=True)
        with monitor.paused():
            model(**batch, fused_lm_head=True).loss.backward()
        output = model(**batch, fused_lm_head=True)
        torch.autograd.grad(output.loss, model.model.embed_tokens.weight)  # reaches no weight of the head
        model(**batch, fused_lm_head=True).loss.backward()
        assert monitor.end_epoch().count == 9
        assert monitor.faults == {}
    del trainer


def test_a_loss_with_the_entropy_is_reported_and_not_scored():
    model = llama()
    trainer = sft(model)
    batch = {"input_ids": torch.arange(3, 13)[None], "labels": torch.arange(3, 13)[None]}
    with gwa_logging.watch(model) as monitor:
        model.train()
        output = model(**batch, fused_lm_head=True)
        (output.loss - 0.1 * output.entropy.mean()).backward()
        assert monitor.faults == {"entropy": 1}
        model(**batch, fused_lm_head=True).loss.backward()
        assert monitor.end_epoch().count == 9
    del trainer


@pytest.mark.slow
def test_a_resumed_training_continues_tokens_and_documents(tmp_path):
    def run(folder: str, *, resumes: bool = False) -> GWACallback:
        callback = watching(early_stop=None)
        trainer = sft(
            llama(),
            callback,
            output_dir=str(tmp_path / folder),
            num_train_epochs=3,
            learning_rate=0.1,
            save_strategy="epoch",
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-3") if resumes else None)
        return callback

    whole, resumed = run("out"), run("out", resumes=True)
    assert [report.count for report in resumed.monitor.history] == [report.count for report in whole.monitor.history]
    for ours, theirs in zip(resumed.monitor.history, whole.monitor.history, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-6)
    assert resumed.monitor.suspects(ROWS) == whole.monitor.suspects(ROWS)
    assert resumed.monitor.faults == {}


def train_on_this_rank(folder: str) -> None:
    """What each of two processes runs."""
    os.chdir(folder)
    callback = watching()
    sft(llama(), callback, per_device_train_batch_size=2).train()
    suspects = callback.monitor.suspects(ROWS)  # every rank must ask
    (report,) = callback.monitor.history
    if os.environ["RANK"] == "0":
        found = {"count": report.count, "mean": report.mean, "faults": callback.monitor.faults}
        Path("found.json").write_text(json.dumps(found | {"means": {each.id: each.mean_score for each in suspects}}))


@pytest.mark.slow
def test_two_processes_count_each_token_once(two_processes, tmp_path):
    two_processes("tests.trainers.test_trl", "train_on_this_rank", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = documents()
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "sample_id")} for row in rows]
    scores, means = oracle(llama(), batches)
    assert found["faults"] == {}
    assert found["count"] == len(scores)
    assert found["mean"] == pytest.approx(scores.mean(), abs=1e-6)
    assert {int(key): mean for key, mean in found["means"].items()} == pytest.approx(means, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_is_scored_exactly(backend):
    callback, model = watching(), llama()
    trainer = sft(model, callback, torch_compile=True, torch_compile_backend=backend)
    batches = recorded(model)
    trainer.train()
    torch.compiler.reset()
    scores, means = oracle(model, batches)
    assert_scores(callback, scores)
    assert_documents(callback, means)


@pytest.mark.parametrize(
    "more",
    [{"temperature": 0.7}, {"cast_lm_head_to_fp32": True}, {"outputs": ("log_probs", "log_sum_sq_probs")}],
    ids=str,
)
def test_any_options_of_the_fused_head_are_scored_exactly(more):
    model = llama()
    trl.trainer.utils.add_fused_lm_head(model, **more)
    tokens = torch.randint(3, VOCABULARY, (3, 8))
    before = find_fused_forward(model).value("outputs")
    with gwa_logging.watch(model) as monitor:
        model.train()
        model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss.backward()
        report = monitor.end_epoch()
        assert monitor.faults == {}
    scores, _ = oracle(model, [{"input_ids": tokens, "labels": tokens}], lambda z: z / more.get("temperature", 1.0))
    assert report.count == len(scores)
    assert report.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert find_fused_forward(model).value("outputs") == before


def test_the_rows_with_a_label_alone_are_projected_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    callback, model = watching(), llama()
    trainer = sft(model, callback)
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    assert_scores(callback, scores)
    assert_documents(callback, means)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 4),
    length=st.integers(2, 9),
    seed=st.integers(0, 99),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    factor=st.sampled_from([-65536.0, -1e-4, 1.0, 1024.0]),
)
def test_any_batch_and_any_factor_of_the_loss_gives_the_scores_of_the_oracle(rows, length, seed, ignored, factor):
    model, monitor = _fused_llama(), _fused_monitor()
    torch.manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length))
    labels = tokens.masked_fill(torch.rand(rows, length) < ignored, -100)
    model.zero_grad()
    (model(input_ids=tokens, labels=labels, fused_lm_head=True).loss * factor).backward()
    scores, _ = oracle(copy.deepcopy(model), [{"input_ids": tokens, "labels": labels}])
    monitor.update(torch.zeros(1))  # an epoch needs one observation
    report = monitor.end_epoch()
    assert report.count == len(scores) + 1
    assert report.count * report.mean == pytest.approx(np.sign(factor) * scores.sum(), abs=1e-5)
    assert monitor.faults == {}


@cache
def _fused_llama() -> Any:
    model = llama()
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs",))
    return model.train()


@cache
def _fused_monitor() -> gwa_logging.Monitor:
    return gwa_logging.watch(_fused_llama(), early_stop=None)


def test_a_pass_keeps_nothing_alive_and_a_watch_not_the_model():
    model = llama()
    trainer = sft(model)
    monitor = gwa_logging.watch(model)
    gc.collect()
    gc.disable()
    try:
        model.train()
        batch = {"input_ids": torch.arange(3, 13)[None], "labels": torch.arange(3, 13)[None]}
        output = model(**batch, fused_lm_head=True)
        node = weakref.ref(output.log_probs)
        del output
        assert node() is None
        model(**batch, fused_lm_head=True).loss.backward()
        assert monitor.end_epoch().count == 9
    finally:
        gc.enable()
    watched = weakref.ref(model)
    del model, trainer
    gc.collect()
    assert watched() is None
    monitor.close()


def test_a_watch_before_the_trainer_finds_the_fused_head_and_says_what_it_missed(caplog):
    model = llama()
    with gwa_logging.watch(model) as monitor:
        sft(model, learning_rate=0.1, per_device_train_batch_size=1).train()
        assert "5 optimizer steps before this were not observed: call watch() after the trainer is made" in caplog.text
        assert monitor.end_epoch().count > 0
        assert "silence" not in monitor.faults


def test_all_labels_ignored_and_empty_documents_count_nothing():
    data = documents().to_dict()
    data["labels"][3] = [-100] * len(data["labels"][3])
    data["labels"][5] = [
        data["input_ids"][5][0],
        *[-100] * (len(data["labels"][5]) - 1),
    ]  # no position predicts the first
    callback, model = watching(), llama()
    trainer = sft(
        model,
        callback,
        data=Dataset.from_dict(data),
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=1,
    )
    batches = recorded(model)
    trainer.train()
    scores, means = oracle(model, batches)
    assert len(means) == ROWS - 2
    assert_scores(callback, scores)
    assert_documents(callback, means)


def test_text_is_tokenized_with_its_ids():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, 6)) for _ in range(ROWS)]
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    callback, model = watching(), llama()
    trainer = sft(model, callback, data=with_ids(Dataset.from_dict({"text": texts})))
    batches = recorded(model)
    trainer.train()
    _, means = oracle(model, batches)
    assert sorted(means) == list(range(ROWS))
    assert_documents(callback, means)


def test_packing_that_drops_the_ids_is_refused_when_training_starts():
    with pytest.raises(InvalidInputError, match="TRL's packing drops it: pack the data set before"):
        sft(llama(), watching(), packing=True).train()


def test_ids_per_token_are_placed_like_the_tokens():
    rows = [{"input_ids": [5, 6, 7], "id": [0, 0, 1]}, {"input_ids": [8], "id": [2]}]

    def right(features: list[Any]) -> dict[str, torch.Tensor]:
        assert all("id" not in feature for feature in features)
        return {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]])}

    def left(features: list[Any]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[5, 6, 7], [0, 0, 8]]),
            "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        }

    def joined(features: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[5, 6, 7, 8, 0]])}

    def ids(collate: Any, features: Any = rows) -> Any:
        return IdCollator(collate, "id", is_hidden=True)(features)["id"].tolist()

    assert ids(right) == [[0, 0, 1], [2, -1, -1]]
    assert ids(left) == [[0, 0, 1], [-1, -1, 2]]
    assert ids(joined) == [[0, 0, 1, 2, -1]]
    whole = [{**row, "id": number} for number, row in enumerate(rows)]
    assert ids(right, whole) == [0, 1]
    assert ids(joined, whole) == [[0, 0, 0, 1, -1]]
    with pytest.raises(
        InvalidInputError, match=r"expected one id per row, or per token, which are \[3, 1\], found \[2, 1\]"
    ):
        ids(right, [{**rows[0], "id": [0, 1]}, rows[1]])
    with pytest.raises(InvalidInputError, match="cannot be assigned"):
        ids(right, [*rows, {"input_ids": [9], "id": [3]}])


def test_ids_of_a_data_set_survive_what_datasets_do_to_it():
    data = with_ids(Dataset.from_dict({"x": [5, 6, 7]}))
    assert data.shuffle(seed=0).filter(lambda row: row["x"] != 6).sort("x")["sample_id"][:] == [0, 2]
    with pytest.raises(InvalidInputError, match="it has a column 'sample_id' already"):
        with_ids(data)


def preferences(kind: str) -> Dataset:
    """The data set of a trainer of preferences or rewards."""
    prompts = [f"w5 w{6 + i}" for i in range(8)]
    if kind == "KTO":
        answers = [f"w{20 + i} w11" for i in range(8)]
        return Dataset.from_dict({"prompt": prompts, "completion": answers, "label": [i % 2 == 0 for i in range(8)]})
    if kind in ("DPO", "Reward"):
        return Dataset.from_dict(
            {"prompt": prompts, "chosen": ["w7 w8 w9"] * 8, "rejected": [f"w{20 + i} w11" for i in range(8)]}
        )
    return Dataset.from_dict({"prompt": prompts})


def other_trainer(kind: str, folder: Path, *callbacks: Any) -> Any:
    """One of TRL's other trainers, ready to train for one epoch."""
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "bf16": False,
        "use_cpu": True,
    }
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}
    more: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        settings |= {"num_generations": 2, "max_completion_length": 5, "temperature": 0.7}
        more["reward_funcs"] = lambda completions, **_: [len(each) % 3 + 0.1 * i for i, each in enumerate(completions)]
    if kind == "Distillation":
        settings |= {"max_completion_length": 5}
        more["teacher_model"] = llama(1)
    if kind == "Reward":
        model: Any = llama(kind=LlamaForSequenceClassification, num_labels=1)
    else:  # some of them load the reference model from the model's folder
        llama().save_pretrained(folder / "model")
        model = LlamaForCausalLM.from_pretrained(folder / "model")
    config = getattr(trl, f"{kind}Config")(str(folder / "out"), **settings)
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=preferences(kind),
        processing_class=words,
        callbacks=list(callbacks),
        **more,
    )


def test_a_rejected_token_of_dpo_has_the_negative_score_of_its_likelihood(tmp_path):
    callback = GWACallback(early_stop=None)
    trainer = other_trainer("DPO", tmp_path, callback)
    batches = recorded(trainer.model)
    trainer.train()
    want = []
    for batch in batches:
        chosen, rejected = (
            {key: batch[key][half] for key in ("input_ids", "labels", "attention_mask")}
            for half in (slice(0, 4), slice(4, 8))
        )
        want += [oracle(trainer.model, [chosen])[0], -oracle(trainer.model, [rejected])[0]]
    assert_scores(callback, np.concatenate(want))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("KTO", 40), ("GRPO", 80), ("RLOO", 80), ("Reward", 16), ("Distillation", 0)]
)
def test_the_other_trainers_do_what_the_page_on_language_models_says(kind, count, tmp_path):
    callback = GWACallback(early_stop=None)
    other_trainer(kind, tmp_path, callback).train()
    assert sum(report.count for report in callback.monitor.history) == count
    assert (callback.monitor.faults == {}) == (count > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO", "Reward", "Distillation"])
def test_trainers_whose_rows_are_not_those_of_the_data_set_refuse_ids(kind, tmp_path):
    with pytest.raises(InvalidInputError, match=f"TRL's {kind}Trainer makes several rows of a batch from one row"):
        other_trainer(kind, tmp_path, watching())


@pytest.mark.slow
@pytest.mark.parametrize("example", ["trl_sft.py", "llama_finetune.py"])
def test_the_examples_find_the_wrong_completions(example, tmp_path):
    command = [sys.executable, ROOT / "examples" / example, "--noise", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"suspects, (\d+)% do have a wrong completion", done.stdout)[1]) > 60


PRESUMED = """
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w3"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")
"""


@pytest.mark.slow
def test_the_code_of_the_page_runs_from_top_to_bottom(tmp_path):
    code = "\n".join([PRESUMED, *python_blocks(ROOT / "docs" / "language-models.md")])
    run(code.replace('SFTConfig("output"', 'SFTConfig("output", use_cpu=True, bf16=False'), tmp_path)


@pytest.mark.parametrize("strategy", ["padding-free", "bfd", "bfd_split", "wrapped"])
def test_documents_of_packed_rows_equal_the_oracle(strategy):
    data, more = documents(), {"padding_free": True, "max_length": None}
    if strategy != "padding-free":
        whole = data.map(lambda row: {"sample_id": [row["sample_id"]] * len(row["input_ids"])})
        data = trl.pack_dataset(
            whole.select_columns(["input_ids", "labels", "sample_id"]), seq_length=20, strategy=strategy
        )
        more["dataset_kwargs"] = {"skip_prepare_dataset": True}
    callback, model = watching(), llama()
    trainer = sft(model, callback, data=data, per_device_train_batch_size=2, **more)
    batches = recorded(model)
    trainer.train()
    scores, _ = oracle(model, batches)
    assert_scores(callback, scores)
    sums: dict[int, list[float]] = {}
    for batch in batches:  # the mean of a document within each batch, and over the batches that it is in
        for key, mean in oracle(model, [batch])[1].items():
            sums.setdefault(key, []).append(mean)
    assert_documents(callback, {key: float(np.mean(means)) for key, means in sums.items()})
