"""The tables of `docs/study.md`."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from benchmarks.study.cases import Case, Floats, Verdict, clean_gain, false_alarms, interval, judge
from benchmarks.study.criteria import AGREEMENT, AVERAGED, CRITERIA, DEFAULT, OURS, RIVAL, VARIANTS, Criterion
from benchmarks.study.grid import GROUPS, NOISE
from benchmarks.study.series import SUSPECT_SCORES

CLEANLAB = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")

MAIN = (
    OURS,
    OURS + AVERAGED,
    DEFAULT,
    DEFAULT + AVERAGED,
    AGREEMENT,
    RIVAL,
    RIVAL + AVERAGED,
    "GradStop",
    "last epoch",
)
"""The criteria of the table of groups."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def verdicts(cases: list[Case], criteria: Mapping[str, Criterion] = CRITERIA) -> dict[str, Verdict]:
    """The outcomes of the criteria, lowest mean regret first; without those that cannot be applied."""
    every = {name: judge(criterion, cases) for name, criterion in criteria.items()}
    return dict(sorted(((n, v) for n, v in every.items() if v.cases), key=lambda item: float(item[1].regret.mean())))


def _bold(name: str, text: str) -> str:
    return f"**{text}**" if name in (OURS, DEFAULT) else text


def _with_interval(values: Floats, sign: str = "") -> str:
    low, high = interval(values)
    return f"{values.mean():{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def regret_table(cases: list[Case], criteria: Mapping[str, Criterion] = CRITERIA) -> str:
    """Regret and cost of each criterion. All of them are applied to the same cells."""
    rows = []
    for name, v in verdicts(cases, criteria).items():
        cells = [
            name,
            _with_interval(v.regret),
            f"{np.percentile(v.regret, 90):.1f}",
            f"{v.regret.max():.1f}",
            _with_interval(v.gain, "+") if name != RIVAL else "0",
            f"{100 * v.share.mean():.0f} %",
        ]
        rows.append([_bold(name, cell) for cell in cells])
    return table(
        ["criterion", "mean regret [95 %]", "90 % below", "worst", "accuracy against held out [95 %]", "trained"], rows
    )


def noise_table(cases: list[Case]) -> str:
    """Mean regret of each criterion by label noise."""
    noises = [noise for noise in NOISE if any(case.run.noise == noise for case in cases)]
    rows = []
    for name, v in verdicts(cases).items():
        of_noise = [v.regret[[case.run.noise == noise for case in v.cases]] for noise in noises]
        rows.append([_bold(name, name), *(_bold(name, f"{part.mean():.2f}") for part in of_noise)])
    counts = (sum(case.run.noise == noise for case in cases) for noise in noises)
    head = [f"{noise} ({count})" for noise, count in zip(noises, counts, strict=True)]
    return table(["criterion", *head], rows)


def group_table(cases: list[Case]) -> str:
    """Mean regret, and the difference to the held-out competitor's accuracy, of the main criteria by group."""
    groups = [group for group in GROUPS if any(case.run.group == group for case in cases)]
    rows = []
    for name in MAIN:
        row = [_bold(name, name)]
        for group in groups:
            v = judge(CRITERIA[name], [case for case in cases if case.run.group == group])
            text = f"{v.regret.mean():.2f}" + ("" if name == RIVAL else f" ({v.gain.mean():+.2f})") if v.cases else "-"
            row.append(_bold(name, text) if text != "-" else text)
        rows.append(row)
    counts = (sum(case.run.group == group for case in cases) for group in groups)
    return table(["criterion", *(f"{g} ({n})" for g, n in zip(groups, counts, strict=True))], rows)


def tables_of_groups(cases: list[Case]) -> str:
    """The table of the main criteria for each group, with intervals."""
    criteria = {name: CRITERIA[name] for name in MAIN}
    parts = []
    for group, text in GROUPS.items():
        of_group = [case for case in cases if case.run.group == group]
        if of_group:
            parts.append(f"{text[0].upper()}{text[1:]}, {len(of_group)} cells:\n\n{regret_table(of_group, criteria)}")
    return "\n\n".join(parts)


def variants_table(cases: list[Case]) -> str:
    """Regret of the variants of our criterion."""
    rows = []
    for name, criterion in VARIANTS.items():
        v = judge(criterion, cases)
        stopped, improving = false_alarms(criterion, cases)
        rows.append([name, _with_interval(v.regret), f"{v.regret.max():.1f}", f"{100 * v.share.mean():.0f} %"])
        rows[-1].append(f"{stopped} of {improving}")
    return table(["variant", "mean regret [95 %]", "worst", "trained", "false alarms"], rows)


def false_alarm_table(cases: list[Case]) -> str:
    """False alarms of each criterion that uses training data alone."""
    counted = {name: false_alarms(c, cases) for name, c in CRITERIA.items() if not name.startswith("oracle")}
    rows = []
    for name, (stopped, improving) in sorted(counted.items(), key=lambda item: item[1][0] / max(item[1][1], 1)):
        if improving:
            gain, runs = clean_gain(CRITERIA[name], cases)
            cells = [name, f"{stopped} of {improving}", f"{gain:+.2f} ({runs})"]
            rows.append([_bold(name, cell) for cell in cells])
    return table(["criterion", "stopped early", "kept minus last epoch, points (clean runs)"], rows)


def jitter_table(cases: list[Case]) -> str:
    """How much the accuracy of single epochs fluctuates, by noise: the standard deviation around the mean of five epochs."""
    rows = []
    for noise in NOISE:
        spreads: dict[str, list[float]] = {"test_accuracy": [], "averaged_test_accuracy": []}
        for case in cases:
            if case.run.noise == noise and "averaged_test_accuracy" in case.full:
                for name, found in spreads.items():
                    accuracy = 100 * case.full[name].astype(np.float64)
                    mean = np.convolve(accuracy, np.ones(5) / 5, mode="valid")
                    found.append(float((accuracy[2:-2] - mean).std()))
        if spreads["test_accuracy"]:
            means = [float(np.mean(found)) for found in spreads.values()]
            rows.append([noise, str(len(spreads["test_accuracy"])), *(f"{mean:.2f}" for mean in means)])
    return table(["noise", "runs", "weights in training", "averaged weights"], rows)


def typical_loss(cases: list[Case], name: str) -> tuple[float, float]:
    """Median and 90 % quantile of a criterion's regret over all cells, in points."""
    half, most = np.percentile(judge(CRITERIA[name], cases).regret, [50, 90])
    return float(half), float(most)


def typical_table(cases: list[Case]) -> str:
    """Median and 90 % quantile of the regret, by the share of negative scores at the picked epoch."""
    rows = []
    edges = (0, 0.1, 0.25, 0.4, 1.01)
    for name in (OURS, DEFAULT):
        v = judge(CRITERIA[name], cases)
        negative = np.array([c.full["negative"][CRITERIA[name].pick(c.full).epoch] for c in v.cases])
        row = [name, "{:.1f}, {:.1f}".format(*typical_loss(cases, name))]
        for low, high in pairwise(edges):
            part = v.regret[(negative >= low) & (negative < high)]
            row.append("{:.1f}, {:.1f} ({})".format(*np.percentile(part, [50, 90]), len(part)) if len(part) else "-")
        rows.append(row)
    return table(["rule", "all", "below 10 % (cells)", "10 to 25 %", "25 to 40 %", "above 40 %"], rows)


# --- suspects ---------------------------------------------------------------------------------------------------------

NAMES = {
    "gwa": "mean alignment score (ours)",
    "gwa x size": "alignment score x size of the gradient",
    "aum": "AUM",
    "loss": "mean loss",
    "el2n": "EL2N, mean",
    "confidence": "confidence, mean (cartography)",
    "forgetting": "forgetting events",
}


def _at(case: Case, when: str) -> int:
    """The epoch whose ranking counts: the last, that of the default rule's alert, or twice the best epoch until then."""
    last = len(case.full["test_accuracy"]) - 1
    if when == "end":
        return last
    picked = CRITERIA[DEFAULT].pick(case.full)
    return picked.stopped if when == "alert" else min(last, 2 * picked.epoch + 1)


def suspects(cases: list[Case], when: str = "alert") -> dict[str, tuple[Floats, Floats]]:
    """AUROC and precision of each score on the noisy cells; see `_at`."""
    noisy = [case for case in cases if "auroc" in case.full]
    found = {}
    for i, name in enumerate(SUSPECT_SCORES):
        auroc, precision = (np.array([c.full[kind][_at(c, when), i] for c in noisy]) for kind in ("auroc", "precision"))
        if np.isfinite(auroc).all():
            found[name] = (auroc, precision)
    return found


def suspect_table(cases: list[Case], when: str = "alert") -> str:
    """AUROC and precision of each suspect score on all noisy cells, and the paired difference to ours."""
    found = suspects(cases, when)
    rows = []
    for name, (auroc, precision) in sorted(found.items(), key=lambda item: -float(item[1][0].mean())):
        low, high = interval(auroc - found["gwa"][0])
        ours = name == "gwa"
        cells = [
            NAMES[name],
            f"{auroc.mean():.4f}",
            "" if ours else f"[{low:+.4f}, {high:+.4f}]",
            f"{auroc.min():.3f}",
            f"{precision.mean():.3f}",
        ]
        rows.append([f"**{cell}**" if ours and cell else cell for cell in cells])
    head = ["score", "mean AUROC", "minus ours [95 %]", "worst", "precision at the number of wrong labels"]
    return table(head, rows)


def freezing_table(cases: list[Case]) -> str:
    """Mean AUROC and precision by the time at which the ranking is made."""
    by_time = {when: suspects(cases, when) for when in ("end", "alert", "twice")}
    rows = []
    for name in SUSPECT_SCORES:
        if all(name in found for found in by_time.values()):
            pairs = [found[name] for found in by_time.values()]
            rows.append([NAMES[name], *(f"{auroc.mean():.4f} / {precision.mean():.3f}" for auroc, precision in pairs)])
    return table(["score: AUROC / precision", "whole run", "until the alert", "until twice the best epoch"], rows)


def cleanlab_table(cases: list[Case]) -> str:
    """AUROC and precision on the cells with probabilities for cleanlab."""
    some = [case for case in cases if "folds" in case.parts and "auroc" in case.full]
    if not some:
        return "Not run."
    rows = []
    for name in ("gwa", "aum"):
        auroc, precision = suspects(some)[name]
        rows.append([NAMES[name], f"{auroc.mean():.4f}", f"{auroc.min():.3f}", f"{precision.mean():.3f}"])
    for method in CLEANLAB:
        auroc, precision = (
            np.array([float(c.parts["folds"][f"{kind}_{method}"]) for c in some]) for kind in ("auroc", "precision")
        )
        words = method.replace("_", " ")
        rows.append([f"cleanlab, {words}", f"{auroc.mean():.4f}", f"{auroc.min():.3f}", f"{precision.mean():.3f}"])
    return table([f"score ({len(some)} cells)", "mean AUROC", "worst", "precision"], rows)
