"""What the scores say of a language model's documents: a small Llama on completions of which a fifth is wrong.

    python -m benchmarks.language_study clinc150.json     # trains all cells: an hour on one core for each seed
    python -m benchmarks.language_study                   # the page, from the runs in the repository

A document is a question and the name of its intent (CLINC150: 150 intents, 40 questions of each), such as "what is my balance =
balance". In a fifth of the documents the intent is another one. Three ways of training: from scratch on the completions, from
scratch on all tokens, and LoRA on top of a model that has read the questions only.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gwa_logging

RUNS = Path(__file__).with_name("language_study.json")
PAGE = Path(__file__).parents[1] / "docs/study-language-models.md"

EPOCHS = 12
WRONG = 0.2
PER_INTENT = 40
VOCABULARY = 3000
BATCH = 64
WAYS = ("completions", "all tokens", "LoRA")
IGNORED = -100
PAD, UNKNOWN_WORD, EQUALS, END = range(4)


class Documents(NamedTuple):
    """Token ids and labels, int64 [documents, length], and whether the completion is wrong, bool [documents]."""

    tokens: Tensor
    labels: Tensor
    is_wrong: np.ndarray


def documents(pairs: list[list[str]], words: dict[str, int], wrong: float, seed: int, *, all_tokens: bool) -> Documents:
    """Makes documents of (question, intent) pairs. With `all_tokens` the question is a target too."""
    rng = np.random.default_rng(seed)
    intents = sorted({intent for _, intent in pairs})
    is_wrong = rng.random(len(pairs)) < wrong
    rows, labels = [], []
    for (question, intent), swap in zip(pairs, is_wrong, strict=True):
        name = rng.choice([other for other in intents if other != intent]) if swap else intent
        prompt = [words.get(word, UNKNOWN_WORD) for word in question.split()] + [EQUALS]
        completion = [words.get(word, UNKNOWN_WORD) for word in str(name).split("_")] + [END]
        rows.append(prompt + completion)
        labels.append((prompt if all_tokens else [IGNORED] * len(prompt)) + completion)
    longest = max(map(len, rows))
    return Documents(
        torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]),
        torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
        is_wrong,
    )


def token_losses(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the margin of each token, and whether it is a target: [documents, length - 1] each."""
    logits = model(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits[:, :-1]
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    with torch.no_grad():
        chosen = targets.clamp(min=0)[..., None]
        others = logits.scatter(2, chosen, -torch.inf).amax(2)
        margins = logits.gather(2, chosen)[..., 0] - others
    return losses, margins, targets != IGNORED


def held_out(model: nn.Module, test: Documents) -> tuple[float, float]:
    """Mean loss of a token of the correct completions, and the share of documents whose tokens all have a positive margin."""
    model.eval()
    losses, right, tokens = 0.0, 0, 0
    with torch.no_grad():
        for rows in torch.arange(len(test.tokens)).split(256):
            loss, margins, counted = token_losses(model, test.tokens[rows], test.labels[rows])
            losses += float(loss[counted].sum())
            tokens += int(counted.sum())
            right += int(((margins > 0) | ~counted).all(1).sum())
    model.train()
    return losses / tokens, right / len(test.tokens)


def auroc(values: np.ndarray, is_wrong: np.ndarray) -> float:
    """The probability that a wrong document has a lower value than a right one."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
    wrong = int(is_wrong.sum())
    above = ranks[~is_wrong].sum() - (len(values) - wrong) * (len(values) - wrong + 1) / 2
    return float(above / (wrong * (len(values) - wrong)))


def train(way: str, wrong: float, seed: int, data: dict[str, list[list[str]]]) -> dict[str, Any]:
    """Trains one cell, and returns what was seen in each epoch."""
    torch.manual_seed(seed)
    counts = Counter(word for question, intent in data["train"] for word in (*question.split(), *intent.split("_")))
    words = {word: index + 4 for index, (word, _) in enumerate(counts.most_common(VOCABULARY - 4))}
    by_intent = Counter[str]()
    pairs = []
    for question, intent in data["train"]:
        by_intent[intent] += 1
        if by_intent[intent] <= PER_INTENT:
            pairs.append([question, intent])
    docs = documents(pairs, words, wrong, seed, all_tokens=way == "all tokens")
    test = documents(data["test"][::3], words, 0.0, seed, all_tokens=False)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    if way == "LoRA":
        questions = documents(pairs, words, 0.0, seed, all_tokens=True)
        questions.labels[(questions.tokens == EQUALS).cumsum(1) > 0] = IGNORED  # the names of the intents are not read
        fit(model, questions, epochs=6, rate=1e-3, monitor=None, after_epoch=lambda *_: None)
        model = get_peft_model(
            model,
            LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
        )
    history: list[dict[str, Any]] = []
    with gwa_logging.watch(model, num_samples=len(pairs), early_stop=gwa_logging.EarlyStop()) as monitor:
        monitor.plan(EPOCHS)

        def after_epoch(sums: dict[str, np.ndarray], train_loss: float) -> None:
            report = monitor.end_epoch()
            loss, accuracy = held_out(model, test)
            row = report.model_dump(
                include={"epoch", "count", "mean", "std", "excess_kurtosis", "negative_fraction", "gwa"}
            )
            row |= {"separation": report.separation, "stable": report.stable_gwa, "alert": monitor.alert is not None}
            row |= {"train_loss": train_loss, "loss": loss, "accuracy": accuracy}
            if wrong:
                scores = {"alignment": monitor.suspects_table().mean_score, **sums}
                row["auroc"] = {name: auroc(values, docs.is_wrong) for name, values in scores.items()}
            history.append(row)

        fit(model, docs, epochs=EPOCHS, rate=2e-3 if way == "LoRA" else 1e-3, monitor=monitor, after_epoch=after_epoch)
        fired = [record.epoch for record in [monitor.alert] if record is not None]
    return {"way": way, "wrong": wrong, "seed": seed, "documents": len(pairs), "alert": fired, "epochs": history}


def fit(model: nn.Module, docs: Documents, *, epochs: int, rate: float, monitor: Any, after_epoch: Any) -> None:
    """Trains with AdamW at a constant rate, and adds up what is known of each document."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.01)
    size = len(docs.tokens)
    sums = {name: np.zeros(size) for name in ("mean loss", "mean margin")}
    model.train()
    for _ in range(epochs):
        last, total = np.zeros(size), 0.0
        for rows in torch.randperm(size).split(BATCH):
            if monitor is not None:
                monitor.tag(rows)
            losses, margins, counted = token_losses(model, docs.tokens[rows], docs.labels[rows])
            loss = losses[counted].mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            number = counted.sum(1).clamp(min=1)
            last[rows] = -(losses.detach() * counted).sum(1) / number
            sums["mean loss"][rows] += last[rows]
            sums["mean margin"][rows] += ((margins * counted).sum(1) / number).numpy()
            total += float(loss.detach()) * len(rows)
        after_epoch({**sums, "loss of the last epoch": last}, total / size)


def main() -> None:
    """Trains all cells that are missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="clinc150.json; without it the page is written")
    data = parser.parse_args().data
    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.exists() else []
    if data is None:
        from benchmarks.language_study_page import page

        PAGE.write_text(page(runs), encoding="utf-8")
        return
    torch.set_num_threads(1)
    texts = json.loads(data.read_text())
    done = {(run["way"], run["wrong"], run["seed"]) for run in runs}
    for seed in range(3):
        for way in WAYS:
            for wrong in (WRONG, 0.0):
                if (way, wrong, seed) not in done:
                    runs.append(train(way, wrong, seed, texts))
                    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
                    print(way, wrong, seed, runs[-1]["alert"], runs[-1]["epochs"][-1], flush=True)


if __name__ == "__main__":
    main()
