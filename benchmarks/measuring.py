"""Interleaved timing in one process: the steps take turns in a new random order each round."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Step = Callable[[], None]


class Group(NamedTuple):
    """Steps that are compared with each other.

    Attributes:
        steps: by name; "bare" and "again" are the same step, so their difference is the noise of the machine.
        check: closes what the steps opened; fails if one of them did not do its work.
        missing: the reason for each step that could not be built, by name.
        head: samples, features and classes: B, D, C.
    """

    steps: dict[str, Step]
    check: Callable[[], None]
    missing: dict[str, str]
    head: tuple[int, int, int]


QUICK = 0.02
"""Seconds. A faster step runs three times per turn and its first run is not counted, so the caches are those that the same step
has left, as in training. Three, not two: the work at every 50th step must fall on counted and uncounted runs alike."""


def measure(steps: dict[str, Step], seconds: float, warm_up: int = 5, least: int = 10) -> dict[str, np.ndarray]:
    """Seconds of each step, float [rounds]."""
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
    """Per cent over the bare step, by name of the step.

    `median` over the rounds, with its 95 % bootstrap interval, `low` to `high`; and `mean`, which includes the work of every
    n-th step. It leaves out rounds in which a bare step took more than three times its median: the machine was busy.
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
