"""Shared by the examples with language models: a small corpus with wrong answers, a word tokenizer, and the summary."""

import argparse
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import gwa_logging

PEOPLE, CITIES = 60, 12
QUESTIONS = (
    "where does {} live ?",
    "{} lives in",
    "the home of {} is",
    "a letter to {} goes to",
    "name the town of {} :",
)


class Facts(NamedTuple):
    """Prompts and completions, str [N]; `is_wrong` bool [N] is True where the completion names another city."""

    prompts: list[str]
    completions: list[str]
    is_wrong: np.ndarray


def load(noise: float, seed: int) -> Facts:
    """Every person lives in one city, and each question is asked about each of them."""
    rng = np.random.default_rng(seed)
    homes = rng.integers(0, CITIES, PEOPLE)
    rows = [(question, person) for question in QUESTIONS for person in range(PEOPLE)]
    is_wrong = rng.random(len(rows)) < noise
    cities = [
        (homes[p] + wrong * rng.integers(1, CITIES)) % CITIES for (_, p), wrong in zip(rows, is_wrong, strict=True)
    ]
    return Facts(
        [question.format(f"person{person}") for question, person in rows],
        [f" city{city} county{city} ." for city in cities],
        is_wrong,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the corpus."""
    words = {word for question in QUESTIONS for word in question.split()} | {"."}
    words |= {f"person{i}" for i in range(PEOPLE)}
    words |= {f"{kind}{i}" for kind in ("city", "county") for i in range(CITIES)}
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", "<unknown>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def llama(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with 2 layers and random weights."""
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=4, max_position_embeddings=64))


def arguments(description: str) -> argparse.Namespace:
    """Parses the command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", default="local", help="mlflow, wandb, local, or several: mlflow,wandb")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--noise", type=float, default=0.2, help="share of the completions that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def summary(monitor: gwa_logging.Monitor, facts: Facts) -> None:
    """Prints how many of the suspects have a wrong completion, and the first ones."""
    wanted = int(facts.is_wrong.sum())
    suspects = monitor.suspects(wanted)
    found = sum(facts.is_wrong[suspect.id] for suspect in suspects)
    print(
        f"Of {len(suspects)} suspects, {found / len(suspects):.0%} do have a wrong completion ({wanted} documents have one):"
    )
    for suspect in suspects[:5]:
        verdict = "wrong" if facts.is_wrong[suspect.id] else "right"
        print(f"  {suspect.mean_score:+.3f}  {facts.prompts[suspect.id]}{facts.completions[suspect.id]}  ({verdict})")
