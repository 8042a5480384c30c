"""What the statistics may be compared between: two epochs of one run, or two recipes."""

from itertools import combinations

import numpy as np

from benchmarks.study.cases import Case
from benchmarks.study.criteria import CRITERIA, DEFAULT
from benchmarks.study.tables import table
from gwa_logging.alignment import GWA_BETA

POINTS = 0.5
"""Pairs whose test accuracies differ by less are left out."""

_STATISTICS = ("separation", "stable GWA", "GWA as published")


def _values(case: Case) -> list[np.ndarray]:
    full = case.full
    published = full["mean"] / (full["excess_kurtosis"] + GWA_BETA)
    return [full["separation_value"], full["stable_value"], published]


def epochs_of_one_run(case: Case) -> list[list[bool]]:
    """For each pair of epochs that differ, after the first tenth: whether the better has the higher value, by statistic."""
    accuracy = 100 * case.full["test_accuracy"]
    start = int(np.ceil(len(accuracy) / 10))
    found = []
    for a, b in combinations(range(start, len(accuracy)), 2):
        if abs(accuracy[a] - accuracy[b]) > POINTS:
            found.append([bool((v[a] - v[b]) * (accuracy[a] - accuracy[b]) > 0) for v in _values(case)])
    return found


def recipes(cases: list[Case]) -> list[list[bool]]:
    """For each pair of recipes in the same cell whose kept models differ: whether the better has the higher value."""
    found = []
    for one, other in combinations(cases, 2):
        if one.run._replace(recipe="") == other.run._replace(recipe=""):
            picks = [CRITERIA[DEFAULT].pick(case.full).epoch for case in (one, other)]
            accuracy = [100 * case.full["test_accuracy"][e] for case, e in zip((one, other), picks, strict=True)]
            if abs(accuracy[0] - accuracy[1]) > POINTS:
                values = ([v[e] for v in _values(c)] for c, e in zip((one, other), picks, strict=True))
                pairs = zip(*values, strict=True)
                found.append([bool((a - b) * (accuracy[0] - accuracy[1]) > 0) for a, b in pairs])
    return found


def comparison_table(cases: list[Case]) -> str:
    """How often the better of two has the higher value."""
    clean, noisy = ([c for c in cases if (c.run.noise == "clean") == is_clean] for is_clean in (True, False))
    rows = []
    for name, some in (("noisy labels", noisy), ("clean labels", clean)):
        within = np.array([np.mean(pairs, axis=0) for c in some if (pairs := epochs_of_one_run(c))]).mean(0)
        between = np.array(recipes(some))
        rows.append([f"two epochs of one run, {name}", str(len(some)) + " runs", *(f"{100 * v:.0f} %" for v in within)])
        rows.append([f"two recipes, {name}", f"{len(between)} pairs", *(f"{100 * v:.0f} %" for v in between.mean(0))])
    return table(["the better one of", "", *_STATISTICS], rows)
