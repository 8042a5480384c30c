"""How many labels are wrong: can the distribution of the scores at the chosen epoch tell?

The share of samples with a negative score is the natural estimate. `left_out_errors` measures how far off it is after a
calibration on other data sets, as a user's data set would be.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.study.criteria import by_rule
from benchmarks.study.grid import DATA, NOISE, Run
from benchmarks.study.series import Series

Floats = npt.NDArray[np.float64]


class Cell(NamedTuple):
    """One run.

    Attributes:
        run: the run.
        wrong: the expected share of wrong labels, in [0, 1].
        negative: the share of samples with a negative score at the epoch that the rule picks.
        separation: the separation at this epoch.
    """

    run: Run
    wrong: float
    negative: float
    separation: float


def measure(run: Run, series: Series) -> Cell:
    """Measures a run."""
    noise = NOISE[run.noise]
    epoch = by_rule(series).epoch
    wrong = noise.share / 2 if noise.by_class else noise.share
    return Cell(run, wrong, float(series["negative"][epoch]), float(series["separation_value"][epoch]))


def left_out_errors(cells: Sequence[Cell]) -> Floats:
    """Errors of a linear calibration on negative share and separation, each in a data set that it was not fitted on.

    Returns:
        float64 [cells], estimate minus truth; empty with a single data set.
    """
    data = np.array([c.run.data for c in cells])
    if len(set(data)) < 2:
        return np.zeros(0)
    inputs = np.array([[1.0, c.negative, c.separation] for c in cells])
    wrong = np.array([c.wrong for c in cells])
    errors = np.zeros(len(cells))
    for left_out in set(data):
        rest = data != left_out
        weights = np.linalg.lstsq(inputs[rest], wrong[rest])[0]
        errors[~rest] = np.clip(inputs[~rest] @ weights, 0, 1) - wrong[~rest]
    return errors


def share_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The mean share of negative scores for each noise (rows) and data set (columns, those of `columns`)."""
    rows = []
    for noise in NOISE:
        chosen = [c for c in cells if c.run.noise == noise]
        if chosen:
            means = [[c.negative for c in chosen if c.run.data == data] for data in columns(cells)]
            rows.append([noise, _percent(chosen[0].wrong), *(_percent(np.mean(c)) if c else "-" for c in means)])
    return rows


def columns(cells: Sequence[Cell]) -> list[str]:
    """The data sets of the cells."""
    return [data for data in DATA if any(c.run.data == data for c in cells)]


def verdict(cells: Sequence[Cell]) -> str:
    """One sentence on the calibration."""
    errors = left_out_errors(cells)
    if not len(errors):
        return "Not run: it needs several data sets."
    size = 100 * np.abs(errors)
    clean = (
        100 * errors[np.array([c.run.noise == "clean" for c in cells])]
    )  # the truth is 0, so these are the estimates
    return (
        f"it is off by {size.mean():.1f} points on average and by more than {np.percentile(size, 90):.0f} in a tenth of the "
        f"cells, and it finds more than 5 % wrong labels in {100 * (clean > 5).mean():.0f} % of the clean cells"
    )


def _percent(share: Any) -> str:
    return f"{100 * share:.0f} %"
