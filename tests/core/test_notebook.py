"""What a notebook is shown is read back as XML: its bars, lines and words against the report's own numbers."""

import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwa_logging import AlignmentSummary, EarlyStop, Monitor
from gwa_logging.faults import Faults
from gwa_logging.histogram import Histogram
from gwa_logging.recording import Recording
from gwa_logging.records import EpochReport
from gwa_logging.report.notebook import COLUMNS, WIDTH, monitor_html, report_html
from gwa_logging.settings import WatchSettings
from tests.records import stop_alert

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = """</div><script>alert(1)</script><img src=x onerror="alert(2)">' & ]]> \x00\x1b \udcff"""
ALERT = stop_alert(message="GWA says stop: it falls.", caveats=("the head is small",))


def report(epoch: int = 0, scores: Any = None, **more: Any) -> EpochReport:
    drawn = np.random.default_rng(epoch).normal(0.1, 0.05, 500)
    summary = AlignmentSummary.from_scores(drawn if scores is None else np.asarray(scores, dtype=np.float64))
    return summary.report(epoch=epoch).model_copy(update=more)


def two_humps() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(-0.2, 0.03, 400), rng.normal(0.2, 0.03, 600)])


def shown_of(history: list[EpochReport], **more: Any) -> str:
    plain = {"name": "gwa", "head": "head 'fc'", "alert": None, "journal": None, "faults": {}, "others": {}}
    return monitor_html(**{**plain, **more}, history=history)


def words(html: str) -> str:
    return " ".join("".join(ElementTree.fromstring(html).itertext()).split())


def parts(html: str, tag: str, name: str | None = None) -> list[ElementTree.Element]:
    found = ElementTree.fromstring(html).iter(SVG + tag)
    return [part for part in found if name is None or part.get("class") == name]


def number(text: str) -> float:
    return math.nan if text == "\N{EN DASH}" else float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def numbers_of(html: str) -> dict[str, float]:
    found = re.findall(r"opacity:.7\">(.*?)</span> <b>\(?([^ )<]+)", html)
    return {key: number(value) for key, value in found}


# --- a report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [None, two_humps(), [0.25], [0.0, 0.0, -0.5, 1.0]])
def test_bars_are_as_high_as_the_histogram_s_counts_and_stand_where_its_bins_are(scores):
    shown = report(3, scores)
    counts, edges = shown.histogram.to_display()
    width, bars = WIDTH / len(counts), parts(shown._repr_html_(), "rect")
    occupied = np.flatnonzero(counts)
    assert len(bars) == len(occupied)
    for bar, bin_ in zip(bars, occupied, strict=True):
        assert float(bar.get("height")) == pytest.approx(90 * counts[bin_] / counts.max(), abs=0.006)
        assert float(bar.get("x")) == pytest.approx(bin_ * width + 0.5, abs=0.06)
        assert float(bar.get("y")) + float(bar.get("height")) == pytest.approx(106, abs=0.011)
        low, high, count = re.fullmatch(r"(\S+) to (\S+): (\S+)", bar[0].text).groups()
        assert number(count) == counts[bin_]
        assert [number(low), number(high)] == pytest.approx(edges[bin_ : bin_ + 2], rel=1e-3)
    colours = [bar.get("fill") for bar in bars]
    below = sum(edges[bin_ + 1] <= 0 for bin_ in occupied)
    assert len(set(colours[:below])) <= 1
    assert not set(colours[:below]) & set(colours[below:])


def test_zero_and_the_median_stand_where_they_are_in_the_range():
    shown = report(1)
    html, limit = report_html(shown), shown.histogram.display_limit()
    (zero,), (median,) = parts(html, "line", "zero"), parts(html, "line", "median")
    assert float(zero.get("x1")) == WIDTH / 2
    wanted = WIDTH / 2 * (1 + shown.quantiles["q50"] / limit)
    assert float(median.get("x1")) == float(median.get("x2")) == pytest.approx(wanted, abs=0.06)
    labels = [label.text for label in parts(html, "text")]
    assert [number(label) for label in labels[:3]] == [-limit, 0, limit]
    assert number(labels[3].removeprefix("median ")) == pytest.approx(shown.quantiles["q50"], rel=1e-3)


def test_numbers_are_the_report_s():
    shown = report(4, excluded=3, notes=("a note", "another"), is_best=True)
    html = report_html(shown)
    assert numbers_of(html) == pytest.approx(
        {
            "GWA": shown.gwa,
            "separation": shown.separation,
            "stable GWA": shown.stable_gwa,
            "mean": shown.mean,
            "negative": 100 * shown.negative_fraction,
            "samples": 500,
        },
        rel=1e-3,
    )
    for said in ("Epoch 4, best so far", "500 (and 3 excluded)", "a note; another"):
        assert said in words(html)


def test_gwa_beyond_its_pole_is_in_brackets_and_called_undefined():
    shown = report(scores=two_humps())
    assert not shown.gwa_defined
    said = f"({shown.gwa:.4g}) undefined".replace("-", "\N{MINUS SIGN}")
    assert said in words(report_html(shown))
    assert "undefined" not in words(report_html(report()))


def test_an_epoch_without_scores_is_shown_without_bars_and_with_dashes():
    html = report_html(report(scores=[]))
    assert parts(html, "rect") == parts(html, "line", "median") == []
    assert "no scores" in words(html)
    assert all(math.isnan(value) for key, value in numbers_of(html).items() if key != "samples")


def test_a_report_is_one_short_line_in_a_terminal():
    shown = report(5)
    assert repr(shown) == f"<EpochReport of {shown}>"
    assert "\n" not in repr(shown)
    assert len(repr(shown)) < 160


anything = st.floats(allow_nan=True, allow_infinity=True)


@given(
    values=st.lists(anything, min_size=7, max_size=7),
    counts=st.lists(st.integers(0, 10**12), max_size=512),
    notes=st.lists(st.text()),
    defined=st.booleans(),
)
def test_any_report_is_shown_and_is_well_formed(values, counts, notes, defined):
    fields = dict(zip(("mean", "std", "gwa", "stable_gwa", "separation", "negative_fraction"), values, strict=False))
    quantiles = {"q50": values[6]} if defined else {}
    more = {"histogram": Histogram(counts=tuple(counts)), "gwa_defined": defined, "notes": tuple(notes)}
    shown = report().model_copy(update={**fields, **more, "quantiles": quantiles})
    assert ElementTree.fromstring(report_html(shown)).tag == "div"
    ElementTree.fromstring(shown_of([shown, report(1), shown.model_copy(update={"epoch": 2})]))


# --- a monitor --------------------------------------------------------------------------------------------------------


def points(html: str, name: str) -> list[tuple[float, float]]:
    """All that the line of a statistic is drawn through, in order."""
    (line,) = parts(html, "g", name)
    found = []
    for part in line:
        pairs = [f"{part.get('cx')},{part.get('cy')}"] if part.tag == SVG + "circle" else part.get("points").split()
        found += [tuple(map(float, pair.split(","))) for pair in pairs]
    return found


@pytest.mark.parametrize(("name", "field"), [("separation", "separation"), ("GWA", "gwa")])
def test_lines_go_through_the_values_of_every_epoch(name, field):
    history = [report(epoch) for epoch in range(12)]
    drawn = points(shown_of(history), name)
    values = np.array([getattr(r, field) for r in history])
    assert len(drawn) == 12
    assert np.ptp(np.diff([x for x, _ in drawn])) == pytest.approx(0, abs=0.11)
    share = (values - values.min()) / np.ptp(values)
    heights = np.array([y for _, y in drawn])
    np.testing.assert_allclose((heights.max() - heights) / np.ptp(heights), share, atol=0.004)


def test_the_latest_report_is_the_one_that_is_shown():
    history = [report(epoch) for epoch in range(3)]
    assert numbers_of(shown_of(history)) == numbers_of(report_html(history[-1]))
    assert "Epoch 2" in words(shown_of(history))


def test_the_best_epoch_and_the_alert_are_marked_at_their_epochs():
    history = [report(epoch, is_best=epoch in (0, 2)) for epoch in range(10)]
    html = shown_of(history, alert=ALERT)
    xs = [x for x, _ in points(html, "separation")]
    for name, epoch in (("best", 2), ("alert", 7)):
        (mark,) = parts(html, "line", name)
        assert float(mark.get("x1")) == pytest.approx(xs[epoch], abs=0.06)
        assert f"{name}: epoch {epoch}" in [label.text for label in parts(html, "text")]
    assert "Stop alert GWA says stop: it falls." in words(html)
    assert "Caveat the head is small." in words(html)
    calm = shown_of(history)
    assert parts(calm, "line", "alert") == []
    assert "Stop alert" not in words(calm)


def test_gwa_has_no_line_where_it_is_undefined_and_a_lone_epoch_is_a_dot():
    history = [report(epoch, gwa_defined=epoch not in (3, 5)) for epoch in range(9)]
    html = shown_of(history)
    (line,) = parts(html, "g", "GWA")
    assert [part.tag.removeprefix(SVG) for part in line] == ["polyline", "circle", "polyline"]
    assert [len(part.get("points", "1").split()) for part in line] == [3, 1, 3]
    assert "undefined: 2 of 9 epochs" in words(html)
    assert len(points(html, "separation")) == 9


def test_a_monitor_without_an_epoch_says_so():
    html = shown_of([])
    assert "No epoch yet." in words(html)
    assert parts(html, "svg") == []


@pytest.mark.parametrize("scores", [None, [], [0.1, 0.1]])
def test_one_epoch_is_shown(scores):
    html = shown_of([report(scores=scores, is_best=True)])
    assert len(parts(html, "svg")) == 2
    assert len(parts(html, "line", "best")) == 1
    assert "nan" not in html


def test_a_thousand_epochs_take_less_than_20_kb_and_keep_their_extremes():
    rng = np.random.default_rng(0)
    values, gaps = rng.random(1000), np.arange(1000) // 9 % 2 == 0  # as many gaps as there can be groups of epochs
    history = [
        report().model_copy(
            update={"epoch": i, "separation": v, "gwa": math.nan if gap else v, "gwa_defined": not gap, "is_best": True}
        )
        for i, (v, gap) in enumerate(zip(values.tolist(), gaps, strict=True))
    ]
    html = shown_of(history, alert=ALERT, journal=Path("runs/journal.jsonl"), faults={"wandb": 3})
    assert len(html.encode()) < 20_000
    drawn = points(html, "separation")
    assert len(drawn) <= 2 * COLUMNS
    assert all(a < b for (a, _), (b, _) in pairwise(drawn))
    highest = min(drawn, key=lambda point: point[1])
    (best,) = parts(html, "line", "best")
    left, right = drawn[0][0], float(best.get("x1"))
    assert (highest[0] - left) / (right - left) == pytest.approx(values.argmax() / 999, abs=0.01)


def test_names_are_shown_as_text_whatever_is_in_them():
    shown = report(notes=(HOSTILE,))
    html = shown_of(
        [shown],
        name=HOSTILE,
        head=HOSTILE,
        alert=ALERT.model_copy(update={"message": HOSTILE, "caveats": (HOSTILE,)}),
        journal=Path(HOSTILE),
        faults={HOSTILE: 2},
        others={"aux": HOSTILE},
    )
    html.encode()  # no half of a character is left
    ours = ["div", "span", "b", "svg", "rect", "title", "path", "line", "text", "g", "circle", "polyline"]
    assert {part.tag.removeprefix(SVG) for part in ElementTree.fromstring(html).iter()} <= set(ours)
    said = HOSTILE.replace("\x00\x1b \udcff", "\N{REPLACEMENT CHARACTER}" * 2 + " \N{REPLACEMENT CHARACTER}")
    assert words(html).count(said) == 8


def test_nothing_has_a_background_and_words_take_the_notebook_s_colour():
    html = shown_of([report(i, is_best=True) for i in range(9)], alert=ALERT)
    assert "background" not in html
    assert {svg.get("fill") for svg in parts(html, "svg")} == {"currentColor"}
    assert not [label for label in parts(html, "text") if label.get("fill")]


def test_a_monitor_shows_its_own_name_head_history_journal_and_faults():
    faults = Faults()
    settings = WatchSettings(name="mine", early_stop=EarlyStop())
    adapter = SimpleNamespace(head="head 'fc' (Linear 16 -> 3)", path="fc", close=lambda: None)
    monitor, other = (Monitor(Recording(settings, name="mine", adapter=adapter, faults=faults)) for _ in range(2))
    monitor.history.extend([report(0), report(1)])
    monitor._recording.journal = SimpleNamespace(path=Path("gwa_runs/one/journal.jsonl"))
    monitor._recording.alert = ALERT
    other.history.append(report(1))
    monitor.heads = {"aux": other}
    faults.record("wandb", "gone", times=3)
    html = monitor._repr_html_()
    for said in (
        "mine head 'fc' (Linear 16 -> 3)",
        "Epoch 1",
        f"Head 'aux' {report(1)}",
        "Faults wandb (3)",
        f"Journal {monitor.journal}",
        ALERT.message,
    ):
        assert said in words(html)
