"""The page of the study of language models, from its runs."""

from typing import Any

import numpy as np

from benchmarks.language_study import EPOCHS, WAYS, WRONG

Run = dict[str, Any]


def page(runs: list[Run]) -> str:
    """The page in Markdown."""
    noisy = [run for run in runs if run["wrong"]]
    return TEXT.format(
        seeds=_seeds(len({run["seed"] for run in runs})),
        documents=runs[0]["documents"],
        wrong=round(100 * WRONG),
        epochs=EPOCHS,
        stopping=_table(
            [
                "training",
                "wrong",
                "held-out loss lowest in epoch",
                "accuracy: best",
                "last",
                "alert in epoch",
                "at the alert",
            ],
            [_stopping(runs, way, wrong) for wrong in (WRONG, 0.0) for way in WAYS if _cells(runs, way, wrong)],
        ),
        auroc=_table(
            ["training", "epoch", *NAMES],
            [_auroc(noisy, way, epoch) for way in WAYS for epoch in (2, 5, 8, EPOCHS - 1)],
        ),
        statistics=_table(
            ["training", "wrong", "epoch", "tokens", "mean", "std", "excess kurtosis", "negative", "separation"],
            [
                _statistics(runs, way, wrong, epoch)
                for way in WAYS
                for wrong in (WRONG, 0.0)
                for epoch in (0, EPOCHS - 1)
            ],
        ),
    )


NAMES = {
    "alignment": "mean alignment",
    "mean loss": "mean loss",
    "loss of the last epoch": "last epoch's loss",
    "mean margin": "mean margin",
}


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _cells(runs: list[Run], way: str, wrong: float) -> list[Run]:
    return [run for run in runs if (run["way"], run["wrong"]) == (way, wrong)]


def _spread(values: list[float], digits: int = 2) -> str:
    low, high = min(values), max(values)
    middle = f"{np.mean(values):.{digits}f}"
    return (
        middle if f"{low:.{digits}f}" == f"{high:.{digits}f}" else f"{middle} ({low:.{digits}f} to {high:.{digits}f})"
    )


def _stopping(runs: list[Run], way: str, wrong: float) -> list[str]:
    cells = _cells(runs, way, wrong)
    lowest = [float(np.argmin([row["loss"] for row in run["epochs"]])) for run in cells]
    accuracies = [[100 * row["accuracy"] for row in run["epochs"]] for run in cells]
    fired = [next((row["epoch"] for row in run["epochs"] if row["alert"]), None) for run in cells]
    at_alert = [values[epoch] for values, epoch in zip(accuracies, fired, strict=True) if epoch is not None]
    return [
        way,
        f"{100 * wrong:.0f} %",
        _spread(lowest, 0),
        _spread([max(values) for values in accuracies], 1),
        _spread([values[-1] for values in accuracies], 1),
        ", ".join("none" if epoch is None else str(epoch) for epoch in fired),
        _spread(at_alert, 1) if at_alert else "",
    ]


def _auroc(runs: list[Run], way: str, epoch: int) -> list[str]:
    rows = [run["epochs"][epoch]["auroc"] for run in _cells(runs, way, WRONG)]
    return [way, str(epoch), *(_spread([row[name] for row in rows], 3) for name in NAMES)]


def _statistics(runs: list[Run], way: str, wrong: float, epoch: int) -> list[str]:
    rows = [run["epochs"][epoch] for run in _cells(runs, way, wrong)]
    numbers = ("mean", "std", "excess_kurtosis", "negative_fraction", "separation")
    return [
        way,
        f"{100 * wrong:.0f} %",
        str(epoch),
        f"{rows[0]['count']:,}",
        *(f"{np.mean([row[name] for row in rows]):.3f}" for name in numbers),
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """# What the scores say of a language model

A study of small Llamas: 2 layers, 128 features, a vocabulary of 3,000 words, {documents:,} documents, {seeds}. A
document is a question of CLINC150 and the name of its intent, such as "what is my balance = balance". In {wrong} % of
the documents the intent is a wrong one. Three ways of training for {epochs} epochs: from scratch on the names of the
intents, from scratch on all tokens, and LoRA on top of a model that has read the questions alone. Held-out loss and
accuracy are those of the correct names on other questions; an answer is correct if all its tokens are.

    python -m benchmarks.language_study clinc150.json     # trains: an hour on one core per seed
    python -m benchmarks.language_study                   # this page, from the runs in the repository

These models are a thousand times smaller than those in use. Check on runs of your own before you rely on any of it.

## For practitioners

**Use the list of documents, and read it early.** The mean alignment of a document finds wrong completions better than
its mean loss, above all in the first epochs and with LoRA. Once the completions are memorised, both get worse. The loss
of a single epoch is about as good in the best epoch, and far worse later. If all tokens are trained, no statistic sees
much of a wrong completion, because most tokens are those of the question.

**Do not use the stop alert.** Where a fifth of the completions was wrong, the alert did not fire, although the held-out
loss turned: the separation falls at the beginning and then hardly moves. So a language model of transformers has no
alert unless you pass `early_stop=EarlyStop()`.

**Do not compare the numbers with those of classifiers.** A score is a cosine between matrices of 3,000 x 128 numbers,
so it is small: the standard deviation over the tokens is about 0.01 or less.

## Which documents are wrong

AUROC of the wrong documents, by what was collected up to this epoch:

{auroc}

"Mean margin": the logit of the token minus the largest other logit, averaged over tokens and epochs.

## When to stop

{stopping}

Accuracy in %. "At the alert": the accuracy of the epoch in which the alert fired.

## The statistics

{statistics}
"""
