"""Writes `docs/study.md` and its two plots from the runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.study.archive import unpack
from benchmarks.study.criteria import CRITERIA, HELD_OUT, OURS, RIVAL, Pick, Series
from benchmarks.study.grid import DATA, NOISE, Run, grid
from benchmarks.study.shares import measure, share_rows, verdict
from benchmarks.study.train import SUSPECT_SCORES

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
CLEANLAB = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")

Floats = npt.NDArray[np.float64]


class Case(NamedTuple):
    """One cell of the grid, trained on all images and with a tenth held out."""

    run: Run
    full: Series
    held_out: Series
    folds: Series | None


def load_cases(directory: Path) -> list[Case]:
    """All cells whose runs are finished."""
    cases = []
    for run in grid():
        parts = {part: directory / f"{run._replace(part=part).name}.npz" for part in ("full", "held-out", "folds")}
        if run.part == "full" and parts["full"].exists() and parts["held-out"].exists():
            folds = _series(parts["folds"]) if parts["folds"].exists() else None
            cases.append(Case(run, _series(parts["full"]), _series(parts["held-out"]), folds))
    return cases


def _series(path: Path) -> Series:
    with np.load(path) as file:
        return dict(file)


class Verdict(NamedTuple):
    """The outcome of a criterion, by case.

    Attributes:
        regret: points of test accuracy below the best epoch of the same training.
        gain: points of test accuracy above the held-out rival in the same cell.
        share: share of the planned epochs that were trained.
        alarmed: True if the criterion ended training before 80 % of the epochs.
    """

    regret: Floats
    gain: Floats
    share: Floats
    alarmed: npt.NDArray[np.bool_]


def judge(pick: Callable[[Series], Pick], cases: list[Case], held_out: bool = False) -> Verdict:
    """Applies a criterion to all cases."""
    rows = []
    for case in cases:
        series = case.held_out if held_out else case.full
        accuracy = 100 * series["test_accuracy"]
        picked = pick(series)
        rival = 100 * case.held_out["test_accuracy"][HELD_OUT[RIVAL](case.held_out).epoch]
        share = (picked.stopped + 1) / len(accuracy)
        rows.append(
            (
                accuracy.max() - accuracy[picked.epoch],
                accuracy[picked.epoch] - rival,
                share,
                picked.alarmed and share < 0.8,
            )
        )
    regret, gain, share, alarmed = (np.array(column) for column in zip(*rows, strict=True))
    return Verdict(regret, gain, share, alarmed.astype(bool))


def interval(values: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over cells."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def verdicts(cases: list[Case]) -> dict[str, Verdict]:
    """The outcomes of all criteria, lowest mean regret first."""
    every = {name: judge(pick, cases) for name, pick in CRITERIA.items()}
    every |= {name: judge(pick, cases, held_out=True) for name, pick in HELD_OUT.items()}
    return dict(sorted(every.items(), key=lambda item: float(item[1].regret.mean())))


def is_improving(case: Case) -> bool:
    """True for clean labels with the best test accuracy in the last fifth of the epochs."""
    accuracy = case.full["test_accuracy"]
    return case.run.noise == "clean" and bool(accuracy.argmax() >= 0.8 * len(accuracy))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _bold(name: str, text: str) -> str:
    return f"**{text}**" if name == OURS else text


def regret_table(cases: list[Case]) -> str:
    """Regret and cost of each criterion."""
    improving = np.array([is_improving(case) for case in cases])
    rows = []
    for name, v in verdicts(cases).items():
        low, high = interval(v.regret)
        false = f"{100 * v.alarmed[improving].mean():.0f} %" if improving.any() else "-"
        cells = [
            name,
            f"{v.regret.mean():.2f} [{low:.2f}, {high:.2f}]",
            f"{np.percentile(v.regret, 90):.1f}",
            f"{v.regret.max():.1f}",
            f"{v.gain.mean():+.2f}",
            f"{100 * v.share.mean():.0f} %",
            false,
        ]
        rows.append([_bold(name, cell) for cell in cells])
    head = [
        "criterion",
        "mean regret [95 %]",
        "90 % below",
        "worst",
        "accuracy against held out",
        "trained",
        "false alarms",
    ]
    return table(head, rows)


def noise_table(cases: list[Case]) -> str:
    """Mean regret of each criterion by label noise."""
    noises = [noise for noise in NOISE if any(case.run.noise == noise for case in cases)]
    rows = []
    for name, v in verdicts(cases).items():
        means = [v.regret[[case.run.noise == noise for case in cases]].mean() for noise in noises]
        rows.append([_bold(name, name), *(f"{mean:.2f}" for mean in means)])
    return table(["criterion", *noises], rows)


def suspects(cases: list[Case]) -> dict[str, tuple[Floats, Floats]]:
    """AUROC and precision of each score at the end of training, on the noisy cells."""
    noisy = [case for case in cases if "auroc" in case.full]
    found = {}
    for i, name in enumerate(SUSPECT_SCORES):
        found[name] = tuple(np.array([case.full[kind][-1, i] for case in noisy]) for kind in ("auroc", "precision"))
    return found  # type: ignore[return-value]


NAMES = {"gwa": "**mean alignment score (ours)**", "aum": "AUM", "loss": "mean loss", "el2n": "EL2N, mean"} | {
    "confidence": "confidence, mean (cartography)",
    "forgetting": "forgetting events",
}


def suspect_table(cases: list[Case]) -> str:
    """AUROC and precision of each suspect score on all noisy cells."""
    rows = []
    for name, (auroc, precision) in sorted(suspects(cases).items(), key=lambda item: -float(item[1][0].mean())):
        low, high = interval(auroc)
        rows.append(
            [
                NAMES[name],
                f"{auroc.mean():.4f} [{low:.4f}, {high:.4f}]",
                f"{auroc.min():.3f}",
                f"{precision.mean():.3f}",
            ]
        )
    return table(["score", "mean AUROC [95 %]", "worst", "precision at the number of wrong labels"], rows)


def cleanlab_table(cases: list[Case]) -> str:
    """AUROC and precision on the cells with probabilities for cleanlab."""
    some = [case for case in cases if case.folds is not None and "auroc" in case.full]
    if not some:
        return "Not run."
    rows = []
    for name in ("gwa", "aum"):
        auroc, precision = suspects(some)[name]
        rows.append([NAMES[name], f"{auroc.mean():.4f}", f"{auroc.min():.3f}", f"{precision.mean():.3f}"])
    for method in CLEANLAB:
        auroc, precision = (
            np.array([float(c.folds[f"{kind}_{method}"]) for c in some if c.folds]) for kind in ("auroc", "precision")
        )
        words = method.replace("_", " ")
        rows.append([f"cleanlab, {words}", f"{auroc.mean():.4f}", f"{auroc.min():.3f}", f"{precision.mean():.3f}"])
    return table([f"score ({len(some)} cells)", "mean AUROC", "worst", "precision"], rows)


def plots(cases: list[Case], directory: Path) -> None:
    """Draws study-regret.png and study-suspects.png."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["font.size"] = 9
    every = verdicts(cases)
    figure = Figure((7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for y, (name, v) in enumerate(reversed(every.items())):
        low, high = interval(v.regret)
        colour = "#c2410c" if name == OURS else "#475569" if name not in HELD_OUT else "#0369a1"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot([v.regret.mean()], [y], "o", color=colour, markersize=6)
        axes.plot([np.percentile(v.regret, 90)], [y], "|", color=colour, markersize=9)
    axes.set_yticks(range(len(every)), list(reversed(every)))
    axes.set_xlabel(
        f"test accuracy lost against the best epoch, points; dot: mean with 95 %, bar: 90 % of {len(cases)} runs"
    )
    axes.grid(axis="x", color="#e2e8f0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / "study-regret.png", dpi=110)

    noisy = [case for case in cases if "auroc" in case.full]
    figure = Figure((7.6, 3.4), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(SUSPECT_SCORES, ("#c2410c", "#0369a1", "#64748b", "#15803d", "#a16207", "#7e22ce"), strict=True))
    noises = [noise for noise in NOISE if any(case.run.noise == noise for case in noisy)]
    for i, name in enumerate(SUSPECT_SCORES):
        for x, noise in enumerate(noises):
            values = [1 - case.full["auroc"][-1, i] for case in noisy if case.run.noise == noise]
            position = x + (i - 2.5) * 0.13
            axes.plot([position] * len(values), values, ".", color=colours[name], alpha=0.35, markersize=4)
            axes.plot([position], [np.mean(values)], "_", color=colours[name], markersize=13, markeredgewidth=2)
        axes.plot([], [], "s", color=colours[name], label=NAMES[name].strip("*"))
    axes.set_yscale("log")
    axes.set_xticks(range(len(noises)), noises)
    axes.set_ylabel("1 - AUROC (lower is better)")
    axes.set_xlabel("wrong labels")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / "study-suspects.png", dpi=110)


def write_page(runs: Path) -> Path:
    """Writes docs/study.md and returns its path."""
    unpack(runs)
    cases = load_cases(runs)
    choosing = [case for case in cases if case.run.for_choosing]
    reporting = [case for case in cases if not case.run.for_choosing]
    if not choosing or not reporting:
        raise SystemExit(
            f"{runs}: expected runs of both halves of the grid; python -m benchmarks.study train makes them"
        )
    plots(reporting, DOCS / "images")
    text = (HERE / "page.md").read_text()
    shares = [measure(case.run, case.full) for case in cases]
    wanted = len([run for run in grid() if run.part == "full"])
    values = {
        "cells": f"{len(cases)} of the {wanted} cells",
        "choosing": str(len(choosing)),
        "reporting": str(len(reporting)),
        "improving": str(sum(is_improving(case) for case in reporting)),
        "regret": regret_table(reporting),
        "noise": noise_table(reporting),
        "chosen": regret_table(choosing),
        "suspects": suspect_table(reporting),
        "noisy": str(sum("auroc" in case.full for case in reporting)),
        "cleanlab": cleanlab_table(reporting),
        "shares": table(["noise", "wrong labels", *DATA], share_rows(shares)),
        "calibration": verdict(shares),
    }
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    page = DOCS / "study.md"
    page.write_text(text)
    return page
