"""Writes `docs/study.md` and its plots from the archive; the text is in `page.md`."""

from collections import Counter
from pathlib import Path

from benchmarks.study.archive import ARCHIVE, load
from benchmarks.study.cases import Case, Verdict, false_alarms, interval, load_cases
from benchmarks.study.comparisons import comparison_table
from benchmarks.study.criteria import BLINDED, CRITERIA, DEFAULT, ORACLE, OURS, RIVAL
from benchmarks.study.grid import DATA, GROUPS
from benchmarks.study.shares import columns, measure, share_rows, verdict
from benchmarks.study.tables import (
    cleanlab_table,
    false_alarm_table,
    freezing_table,
    group_table,
    jitter_table,
    noise_table,
    regret_table,
    suspect_table,
    table,
    tables_of_groups,
    typical_table,
    variants_table,
    verdicts,
)
from gwa_logging.early_stop import TYPICAL_LOSS

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"


def parts_of(cases: list[Case]) -> dict[str, list[Case]]:
    """The cases by what they are for: "choosing" and "reporting" (with a look), "first" and "first choosing" (without)."""
    with_look = [case for case in cases if case.run.group not in ("first", "clean")]
    first = [case for case in cases if case.run.group == "first"]
    return {
        "choosing": [case for case in with_look if case.run.for_choosing],
        "reporting": [case for case in with_look if not case.run.for_choosing],
        "first choosing": [case for case in first if case.run.for_choosing],
        "first": [case for case in first if not case.run.for_choosing],
    }


def fill(cases: list[Case]) -> dict[str, str]:
    """The values of the fields of `page.md`."""
    parts = parts_of(cases)
    choosing, reporting, first = parts["choosing"], parts["reporting"], parts["first"]
    unseen = [case for case in cases if not case.run.for_choosing]
    shares = [measure(case.run, case.full) for case in cases if case.run.group in ("first", "grid")]
    counts = Counter(case.run.group for case in reporting)
    of_group = [
        [group, text, _data(cases, group), str(len(first) if group == "first" else counts[group])]
        for group, text in GROUPS.items()
    ]
    return {
        "cells": str(len(cases)),
        "choosing": str(len(choosing)),
        "reporting": str(len(reporting)),
        "first": str(len(first)),
        "first choosing": str(len(parts["first choosing"])),
        "groups": table(["group", "question", "data", "cells for reporting"], of_group),
        "regret": regret_table(reporting),
        "by group": group_table([*reporting, *first]),
        "groups one by one": tables_of_groups(reporting),
        "by noise": noise_table(reporting),
        "first regret": regret_table(first),
        "chosen": regret_table(choosing),
        "variants": variants_table(choosing),
        "variants reported": variants_table(reporting),
        "false alarms": false_alarm_table(unseen),
        "jitter": jitter_table(unseen),
        "suspects": suspect_table(reporting),
        "first suspects": suspect_table(first),
        "freezing": freezing_table([*reporting, *first]),
        "noisy": str(sum("auroc" in case.full for case in reporting)),
        "first noisy": str(sum("auroc" in case.full for case in first)),
        "cleanlab": cleanlab_table(first),
        "shares": table(["noise", "wrong labels", *columns(shares)], share_rows(shares)),
        "calibration": verdict(shares),
        "comparisons": comparison_table([case for case in cases if case.run.group == "first"]),
        "typical": typical_table(cases),
        **_numbers(reporting, first, unseen),
    }


def _numbers(reporting: list[Case], first: list[Case], unseen: list[Case]) -> dict[str, str]:
    """Single figures of the text."""
    found, of_first = verdicts(reporting), verdicts(first)
    ours, rival = found[OURS], found[RIVAL]

    def gain(verdict: Verdict) -> str:
        low, high = interval(verdict.gain)
        return f"{verdict.gain.mean():.1f} [{low:+.1f}, {high:+.1f}]"

    def of(counts: tuple[int, int]) -> str:
        return f"{counts[0]} of {counts[1]}"

    by_noise = {
        noise: [v.regret[[c.run.noise == noise for c in v.cases]].mean() for v in (ours, rival)]
        for noise in dict.fromkeys(case.run.noise for case in ours.cases)
    }
    above = sorted(noise for noise, (a, b) in by_noise.items() if a > b)
    return {
        "ours": f"{ours.regret.mean():.1f}",
        "ours gain": gain(ours),
        "ours alarms": of(false_alarms(CRITERIA[OURS], unseen)),
        "default alarms": of(false_alarms(CRITERIA[DEFAULT], unseen)),
        "rival alarms": of(false_alarms(CRITERIA[RIVAL], unseen)),
        "oracle": f"{found[ORACLE].regret.mean():.1f}",
        "first rival": f"{of_first[RIVAL].regret.mean():.2f}",
        "first blinded": f"{of_first[BLINDED].regret.mean():.2f}",
        "first default": f"{of_first[DEFAULT].regret.mean():.2f}",
        "targets": f"Reached by the rule with a look: mean {ours.regret.mean():.1f}, worst {ours.regret.max():.1f}, "
        f"{of(false_alarms(CRITERIA[OURS], unseen))} improving clean runs stopped early, {gain(ours)} points more than "
        "held-out data; "
        f"its regret is above that of held-out data for {', '.join(above) or 'no noise'}.",
        "typical text": " ".join(f'"{sentence}"' for sentence in TYPICAL_LOSS.values()),
    }


def _data(cases: list[Case], group: str) -> str:
    return ", ".join(data for data in DATA if any(c.run.group == group and c.run.data == data for c in cases))


def write_page(archive: Path = ARCHIVE) -> Path:
    """Writes docs/study.md and returns its path."""
    from benchmarks.study.plots import draw_regret, draw_suspects

    cases = load_cases(load(archive))
    parts = parts_of(cases)
    if not all(parts.values()):
        raise SystemExit(
            f"{archive}: expected runs of all groups and halves; python -m benchmarks.study train makes them"
        )
    draw_regret(parts["reporting"], DOCS / "images" / "study-regret.png")
    draw_suspects([*parts["reporting"], *parts["first"]], DOCS / "images" / "study-suspects.png")
    text = (HERE / "page.md").read_text()
    for key, value in fill(cases).items():
        text = text.replace("{{" + key + "}}", value)
    page = DOCS / "study.md"
    page.write_text(text)
    return page
