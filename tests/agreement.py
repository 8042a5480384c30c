"""Epochs of scores with sample ids, and their agreement by a loop in float64. Imports no framework."""

from collections import defaultdict

import numpy as np

N = 40
"""Number of samples."""

Batch = tuple[np.ndarray, np.ndarray]
"""Scores and the ids of their samples."""


def by_loop(epochs: list[list[Batch]]) -> list[float | None]:
    """The agreement of each epoch; None without a sample that was seen before."""
    past: dict[int, float] = {}
    found: list[float | None] = []
    for batches in epochs:
        now: dict[int, float] = defaultdict(float)
        for scores, ids in batches:
            for score, sample in zip(scores.astype(np.float64), ids.tolist(), strict=True):
                now[sample] += float(np.mean(score))  # of an input with several rows, the mean
        both = now.keys() & past.keys()
        found.append(sum(np.sign(now[i]) == np.sign(past[i]) for i in both) / len(both) if both else None)
        for sample, total in now.items():
            past[sample] = past.get(sample, 0.0) + total
    return found


def random_epochs(seed: int, count: int = 6, rows: int = 0) -> list[list[Batch]]:
    """Epochs that miss some samples and repeat others. The scores are multiples of 1/64, so that float32 adds them exactly."""
    rng = np.random.default_rng(seed)
    offsets = rng.integers(-8, 9, N)
    epochs = []
    for _ in range(count):
        ids = rng.integers(0, N, 50)
        shape = (50, rows) if rows else (50,)
        scores = (offsets[ids].reshape(-1, *[1] * bool(rows)) + rng.integers(-12, 13, shape)) / 64
        epochs.append(
            [(part.astype(np.float32), own) for part, own in zip(np.split(scores, 5), np.split(ids, 5), strict=True)]
        )
    return epochs
