"""Shared by the examples: scikit-learn's digits with wrong labels, the command line, and the summary at the end."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gwa_logging


class Digits(NamedTuple):
    """Images float32 [N, 8, 8] in [0, 1] and labels int64 [N]; `flipped` bool [N] is True where the training label is wrong."""

    x: np.ndarray
    y: np.ndarray
    flipped: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def arguments(description: str) -> argparse.Namespace:
    """Parses the command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", default="local", help="mlflow, wandb, local, or several: mlflow,wandb")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.3, help="share of the training labels that are flipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="end training at the stop alert")
    return parser.parse_args()


def load(noise: float, seed: int) -> Digits:
    """Loads the data set and replaces each training label by another class with probability `noise`."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, data.target, test_size=0.4, random_state=0, stratify=data.target)
    rng = np.random.default_rng(seed)
    flipped = rng.random(len(y)) < noise
    y = np.where(flipped, (y + rng.integers(1, 10, len(y))) % 10, y)
    return Digits(x, y, flipped, x_test, y_test)


def batches(n: int, size: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
    """Indices of the shuffled batches of an epoch; the last batch may be shorter."""
    order = rng.permutation(n)
    return [order[i : i + size] for i in range(0, n, size)]


def summary(monitor: gwa_logging.Monitor, accuracies: Sequence[float], flipped: np.ndarray) -> None:
    """Prints the outcome; to be called after `monitor.close()`."""
    marked = [report.epoch for report in monitor.history if report.is_best]
    by_gwa = marked[-1] if marked else len(accuracies) - 1
    by_test = int(np.argmax(accuracies))
    rows = [
        ("stop alert", monitor.alert.epoch if monitor.alert else None),
        ("best epoch by GWA (no held-out data)", by_gwa),
        ("last epoch", len(accuracies) - 1),
        ("best epoch by test accuracy (hindsight)", by_test),
    ]
    print(f"\n{'':40} {'epoch':>5}  test accuracy")
    for name, epoch in rows:
        print(f"{name:40} {'none':>5}" if epoch is None else f"{name:40} {epoch:>5}  {accuracies[epoch]:>13.1%}")
    wrong = int(flipped.sum())
    if wrong:
        found = [suspect.id for suspect in monitor.suspects(wrong)]
        print(f"\nOf the {wrong} most suspect training samples, {flipped[found].mean():.0%} do have a flipped label.")
    folder = Path(monitor.journal).parent
    report = folder / "report.html"
    print(f"\nJournal: {monitor.journal}")
    print(f"Report:  {report}" if report.exists() else f"Report:  gwa-logging report {folder}   (then open {report})")
