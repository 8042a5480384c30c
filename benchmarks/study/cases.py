"""The cells of the study with their series, and what a criterion makes of them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.study.criteria import CRITERIA, RIVAL, Criterion
from benchmarks.study.grid import Run, grid
from benchmarks.study.series import Series

Floats = npt.NDArray[np.float64]


class Case(NamedTuple):
    """One cell: the series of its trainings by part; "full" is always there.

    Attributes:
        run: the training on all samples.
        parts: the series of "full", "held-out" and "folds", as far as they were trained.
    """

    run: Run
    parts: dict[str, Series]

    @property
    def full(self) -> Series:
        """The series of the training on all samples."""
        return self.parts["full"]

    @property
    def is_improving(self) -> bool:
        """True for clean labels with the best test accuracy in the last fifth of the epochs."""
        accuracy = self.full["test_accuracy"]
        return self.run.noise == "clean" and bool(accuracy.argmax() >= 0.8 * len(accuracy))


def load_cases(series: dict[str, Series]) -> list[Case]:
    """All cells whose full run is finished, and the held-out run too where the cell has one."""
    cases = []
    for run in grid():
        if run.part == "full" and run.name in series:
            names = {part: run._replace(part=part).name for part in ("full", "held-out", "folds")}
            parts = {part: series[name] for part, name in names.items() if name in series}
            if "held-out" in parts or run.group == "clean":
                cases.append(Case(run, parts))
    return cases


class Verdict(NamedTuple):
    """The outcome of a criterion, by case.

    Attributes:
        cases: those that the criterion can be applied to and that have a held-out run.
        regret: points of test accuracy below the best epoch of the same training, without averaged weights.
        gain: points of test accuracy above the held-out competitor in the same cell.
        share: share of the planned epochs that were trained.
    """

    cases: list[Case]
    regret: Floats
    gain: Floats
    share: Floats


def judge(criterion: Criterion, cases: list[Case]) -> Verdict:
    """Applies a criterion to all cases where it can be."""
    chosen = [c for c in cases if criterion.needs in c.parts.get(criterion.part, {}) and "held-out" in c.parts]
    rows = []
    for case in chosen:
        series = case.parts[criterion.part]
        picked = criterion.pick(series)
        kept = series["averaged_test_accuracy" if criterion.averaged else "test_accuracy"][picked.epoch]
        best = series["test_accuracy"].max()
        rows.append(
            (100 * (best - kept), 100 * (kept - _rival(case)), (picked.stopped + 1) / len(series["test_accuracy"]))
        )
    regret, gain, share = np.array(rows).reshape(-1, 3).T
    return Verdict(chosen, regret, gain, share)


def _rival(case: Case) -> float:
    series = case.parts["held-out"]
    return float(series["test_accuracy"][CRITERIA[RIVAL].pick(series).epoch])


def false_alarms(criterion: Criterion, cases: list[Case]) -> tuple[int, int]:
    """In how many clean runs that improved to the end training was stopped before 80 % of the plan, and of how many."""
    stopped = []
    for case in cases:
        if case.is_improving and criterion.needs in case.parts.get(criterion.part, {}):
            series = case.parts[criterion.part]
            picked = criterion.pick(series)
            stopped.append(picked.alarmed and picked.stopped + 1 < 0.8 * len(series["test_accuracy"]))
    return sum(stopped), len(stopped)


def clean_gain(criterion: Criterion, cases: list[Case]) -> tuple[float, int]:
    """In clean runs, mean accuracy of the kept model minus that of the last epoch, in points; and the number of runs."""
    gains = []
    for case in cases:
        if case.run.noise == "clean" and criterion.needs in case.parts.get(criterion.part, {}):
            series = case.parts[criterion.part]
            kept = series["averaged_test_accuracy" if criterion.averaged else "test_accuracy"]
            gains.append(100 * (kept[criterion.pick(series).epoch] - series["test_accuracy"][-1]))
    return float(np.mean(gains)) if gains else 0.0, len(gains)


def interval(values: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over cells."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
