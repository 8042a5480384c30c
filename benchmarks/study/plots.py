"""The plots of `docs/study.md`."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.cases import Case, interval
from benchmarks.study.criteria import CRITERIA, DEFAULT, OURS
from benchmarks.study.grid import NOISE
from benchmarks.study.series import SUSPECT_SCORES
from benchmarks.study.tables import NAMES, suspects, verdicts

mpl.rcParams["font.size"] = 9

_COLOURS = ("#c2410c", "#0369a1", "#64748b", "#15803d", "#a16207", "#7e22ce", "#0f766e")


def draw_regret(cases: list[Case], path: Path) -> None:
    """The mean regret of every criterion, with its interval and the 90th percentile."""
    every = verdicts(cases)
    figure = Figure((7.6, 5.6), layout="constrained")
    axes = figure.subplots()
    for y, (name, v) in enumerate(reversed(every.items())):
        low, high = interval(v.regret)
        held_out = CRITERIA[name].part == "held-out"
        colour = "#c2410c" if name.startswith((OURS, DEFAULT)) else "#0369a1" if held_out else "#475569"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot([v.regret.mean()], [y], "o", color=colour, markersize=6)
        axes.plot([np.percentile(v.regret, 90)], [y], "|", color=colour, markersize=9)
    axes.set_yticks(range(len(every)), list(reversed(every)))
    axes.set_xlabel(
        f"points of test accuracy below the best epoch\ndot: mean with 95 %; bar: 90 % of {len(cases)} cells"
    )
    axes.axvline(0, color="#94a3b8", linewidth=0.8)
    axes.grid(axis="x", color="#e2e8f0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_suspects(cases: list[Case], path: Path) -> None:
    """One minus the AUROC of every suspect score at the alert, by noise."""
    noisy = [case for case in cases if "auroc" in case.full]
    found = suspects(noisy)
    noises = [noise for noise in NOISE if any(case.run.noise == noise for case in noisy)]
    figure = Figure((7.6, 3.4), layout="constrained")
    axes = figure.subplots()
    names = [name for name in SUSPECT_SCORES if name in found]
    for i, name in enumerate(names):
        for x, noise in enumerate(noises):
            of_noise = np.array([case.run.noise == noise for case in noisy])
            values = np.maximum(1 - found[name][0][of_noise], 1e-5)
            position = x + (i - (len(names) - 1) / 2) * 0.12
            axes.plot([position] * len(values), values, ".", color=_COLOURS[i], alpha=0.35, markersize=4)
            axes.plot([position], [np.mean(values)], "_", color=_COLOURS[i], markersize=12, markeredgewidth=2)
        axes.plot([], [], "s", color=_COLOURS[i], label=NAMES[name])
    axes.set_yscale("log")
    axes.set_xticks(range(len(noises)), [n.replace(" by", "\nby").replace("human ", "human\n") for n in noises])
    axes.set_ylabel("1 - AUROC (lower is better)")
    axes.set_xlabel("wrong labels")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
