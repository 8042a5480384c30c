"""Interleaved timing: steps take turns, in another order each round, in one process."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Step = Callable[[], None]


class Group(NamedTuple):
    """Steps that are compared with each other.

    Attributes:
        steps: by name; "bare" and "again" are the same step, which shows the noise of the machine.
        check: ends what the steps began; fails if one of them did not do what it says.
        missing: why a step is not there, by name.
        head: B, D and C.
    """

    steps: dict[str, Step]
    check: Callable[[], None]
    missing: dict[str, str]
    head: tuple[int, int, int]


QUICK = 0.02
"""Seconds. A step that is quicker runs three times in its turn, and the first time is not counted: so it finds the caches as a
step of its own kind has left them, as in training. Three, since what comes at every 50th step must be met in both places."""


def measure(steps: dict[str, Step], seconds: float, warm_up: int = 5, least: int = 10) -> dict[str, np.ndarray]:
    """Seconds, float [rounds], of each step."""
    rng = np.random.default_rng(0)
    bare = []
    for _ in range(warm_up):
        for step in steps.values():
            step()
        bare.append(_timed(steps["bare"]))
    quick = np.median(bare) < QUICK
    taken: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["bare"]) < least:
        for name in rng.permutation(list(steps)):
            if quick:
                steps[name]()
                taken[name].append(_timed(steps[name]))
            taken[name].append(_timed(steps[name]))
    return {name: np.array(column) for name, column in taken.items()}


def _timed(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def overheads(times: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Per cent over the bare step, by step.

    `median` over rounds, `low` and `high` of its 95 % interval by bootstrap; and `mean`, in which what happens at every n-th
    step shows: over the rounds in which the machine was not elsewhere, that is, in which no bare step took three times its
    median.
    """
    rng = np.random.default_rng(0)
    level = np.median(times["bare"])
    calm = np.logical_and(*(times[name] < 3 * np.median(times[name]) for name in ("bare", "again")))
    rows = {}
    for name in (name for name in times if name != "bare"):
        bare = times["bare"] if name == "again" else (times["bare"] + times["again"]) / 2
        percent = 100 * (times[name] - bare) / level
        medians = np.median(rng.choice(percent, (500, len(percent))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        mean = float(percent[calm].mean() if calm.any() else percent.mean())
        rows[name] = {"median": float(np.median(percent)), "low": float(low), "high": float(high), "mean": mean}
    return rows
