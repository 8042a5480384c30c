"""Writes `docs/study.md` and its plots from the archive; the text is in `page.md`."""

from collections import Counter
from pathlib import Path

from benchmarks.study.archive import ARCHIVE, load
from benchmarks.study.cases import Case, load_cases
from benchmarks.study.comparisons import comparison_table
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
    variants_table,
)

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
        "improving": str(sum(case.is_improving for case in unseen)),
        "groups": table(["group", "", "data", "cells for reporting"], of_group),
        "regret": regret_table(reporting),
        "by group": group_table([*reporting, *first]),
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
