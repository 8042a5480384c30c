"""The page of the study of language models, from its runs."""

from typing import Any

import numpy as np

from benchmarks.language_study import EPOCHS, WAYS, WRONG

Run = dict[str, Any]


def page(runs: list[Run]) -> str:
    """The page in Markdown."""
    noisy = [run for run in runs if run["wrong"]]
    return TEXT.format(
        seeds=len({run["seed"] for run in runs}),
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
            [_stopping(runs, way, wrong) for wrong in (WRONG, 0.0) for way in WAYS],
        ),
        auroc=_table(
            ["training", "epoch", *NAMES],
            [_auroc(noisy, way, epoch) for way in WAYS for epoch in (2, 5, EPOCHS - 1)],
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


TEXT = """
"""
