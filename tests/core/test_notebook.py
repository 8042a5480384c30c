"""The HTML for notebooks, parsed as XML: its bars and text agree with the report's own numbers."""

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gwa_logging
from gwa_logging import AlignmentSummary, EarlyStop, StopAlert
from gwa_logging.histogram import Histogram
from gwa_logging.records import EpochReport
from gwa_logging.report.notebook import WIDTH, monitor_html, report_html
from tests.records import stop_alert

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = """</div><script>alert(1)</script><img src=x onerror="alert(2)">' & ]]> \x00\x1b \udcff"""
ALERT = stop_alert(message="GWA says stop: it falls.", caveats=("the head is small",))


def report(epoch: int = 0, scores: Any = None, **more: Any) -> EpochReport:
    default = np.random.default_rng(epoch).normal(0.1, 0.05, 500)
    summary = AlignmentSummary.from_scores(default if scores is None else np.asarray(scores, dtype=np.float64))
    return summary.report(epoch=epoch).model_copy(update=more)


def two_groups() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(-0.2, 0.03, 400), rng.normal(0.2, 0.03, 600)])


def html_of(history: list[EpochReport], **more: Any) -> str:
    plain = {"name": "gwa", "head": "head 'fc'", "alert": None, "journal": None, "faults": {}, "others": {}}
    return monitor_html(**{**plain, **more}, history=history)


def text_of(html: str) -> str:
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


@pytest.mark.parametrize("scores", [None, two_groups(), [0.25], [0.0, 0.0, -0.5, 1.0]])
def test_bars_have_the_heights_and_positions_of_the_histogram_s_bins(scores):
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


def test_zero_and_the_median_are_drawn_at_their_positions():
    shown = report(1)
    html, limit = report_html(shown), shown.histogram.display_limit()
    (zero,), (median,) = parts(html, "line", "zero"), parts(html, "line", "median")
    assert float(zero.get("x1")) == WIDTH / 2
    wanted = WIDTH / 2 * (1 + shown.quantiles["q50"] / limit)
    assert float(median.get("x1")) == float(median.get("x2")) == pytest.approx(wanted, abs=0.06)
    labels = [label.text for label in parts(html, "text")]
    assert [number(label) for label in labels[:3]] == [-limit, 0, limit]
    assert number(labels[3].removeprefix("median ")) == pytest.approx(shown.quantiles["q50"], rel=1e-3)


def test_numbers_are_those_of_the_report():
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
    for text in ("Epoch 4, best so far", "500 (and 3 excluded)", "a note; another"):
        assert text in text_of(html)


def test_the_consensus_is_shown_if_there_is_one():
    assert numbers_of(report_html(report(4, consensus=0.625)))["consensus"] == 0.625
    assert "consensus" not in text_of(report_html(report(4)))
    assert numbers_of(report_html(report(4, agreement=0.9)))["agreement"] == 0.9


def test_undefined_gwa_is_in_brackets_and_called_undefined():
    shown = report(scores=two_groups())
    assert not shown.gwa_defined
    expected = f"({shown.gwa:.4g}) undefined".replace("-", "\N{MINUS SIGN}")
    assert expected in text_of(report_html(shown))
    assert "undefined" not in text_of(report_html(report()))


def test_an_epoch_without_scores_is_shown_without_bars_and_with_dashes():
    html = report_html(report(scores=[]))
    assert parts(html, "rect") == parts(html, "line", "median") == []
    assert "no scores" in text_of(html)
    assert all(math.isnan(value) for key, value in numbers_of(html).items() if key != "samples")


def test_repr_of_a_report_is_one_short_line():
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
def test_html_of_any_report_is_well_formed(values, counts, notes, defined):
    fields = dict(zip(("mean", "std", "gwa", "stable_gwa", "separation", "negative_fraction"), values, strict=False))
    quantiles = {"q50": values[6]} if defined else {}
    more = {"histogram": Histogram(counts=tuple(counts)), "gwa_defined": defined, "notes": tuple(notes)}
    shown = report().model_copy(update={**fields, **more, "quantiles": quantiles})
    assert ElementTree.fromstring(report_html(shown)).tag == "div"
    ElementTree.fromstring(html_of([shown, report(1), shown.model_copy(update={"epoch": 2})]))


# --- a monitor --------------------------------------------------------------------------------------------------------


def test_the_latest_report_is_the_one_that_is_shown():
    history = [report(epoch) for epoch in range(3)]
    assert numbers_of(html_of(history)) == numbers_of(report_html(history[-1]))
    assert "Epoch 2" in text_of(html_of(history))


def test_the_best_epoch_is_the_last_one_that_was_best():
    history = [report(epoch, is_best=epoch in (0, 2)) for epoch in range(10)]
    assert "Epochs 10, best: epoch 2" in text_of(html_of(history))
    assert "best" not in text_of(html_of([report(0)]))


def test_an_alert_is_shown_with_its_caveats():
    history = [report(epoch) for epoch in range(10)]
    text = text_of(html_of(history, alert=ALERT))
    assert "Stop alert GWA says stop: it falls." in text
    assert "Caveat the head is small." in text
    assert "Stop alert" not in text_of(html_of(history))


def test_a_monitor_without_an_epoch_has_no_histogram():
    html = html_of([])
    assert "No epoch yet." in text_of(html)
    assert parts(html, "svg") == []


@pytest.mark.parametrize("scores", [None, [], [0.1, 0.1]])
def test_a_single_epoch_has_a_histogram(scores):
    html = html_of([report(scores=scores, is_best=True)])
    assert len(parts(html, "svg")) == 1
    assert "nan" not in html


def test_the_size_does_not_grow_with_the_run():
    history = [report(is_best=True)] * 100_000
    assert len(html_of(history, alert=ALERT).encode()) < len(html_of(history[:1], alert=ALERT).encode()) + 50


def test_hostile_names_are_shown_as_text():
    shown = report(notes=(HOSTILE,))
    html = html_of(
        [shown],
        name=HOSTILE,
        head=HOSTILE,
        alert=ALERT.model_copy(update={"message": HOSTILE, "caveats": (HOSTILE,)}),
        journal=Path(HOSTILE),
        faults={HOSTILE: 2},
        others={"aux": HOSTILE},
    )
    html.encode()  # fails if a lone surrogate is left
    own_tags = ["div", "span", "b", "svg", "rect", "title", "path", "line", "text"]
    assert {part.tag.removeprefix(SVG) for part in ElementTree.fromstring(html).iter()} <= set(own_tags)
    expected = HOSTILE.replace("\x00\x1b \udcff", "\N{REPLACEMENT CHARACTER}" * 2 + " \N{REPLACEMENT CHARACTER}")
    assert text_of(html).count(expected) == 8


def test_nothing_has_a_background_and_text_has_the_notebook_s_colour():
    html = html_of([report(i, is_best=True) for i in range(9)], alert=ALERT)
    assert "background" not in html
    assert {svg.get("fill") for svg in parts(html, "svg")} == {"currentColor"}
    assert not [label for label in parts(html, "text") if label.get("fill")]


def test_a_monitor_shows_its_name_heads_history_alert_faults_and_journal(tmp_path):
    import torch
    from torch import nn

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.fc(x), self.aux(x)

    def failing(alert: StopAlert) -> None:
        raise RuntimeError("no connection")

    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(32, 8)
    rule = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)  # fires in the second epoch
    options = {"name": "mine", "head": ["fc", "aux"], "early_stop": rule, "on_alert": failing, "directory": tmp_path}
    with gwa_logging.watch(model, **options) as monitor:
        for _ in range(2):
            for logits in model(x):
                nn.functional.cross_entropy(logits, torch.arange(32) % 3).backward()
            monitor.end_epoch()
        text = text_of(monitor._repr_html_())
    assert monitor.faults
    for part in (
        "mine head 'fc' (Linear 8 -> 3)",
        "Epoch 1",
        f"Head 'aux' {monitor.heads['aux'].history[-1]}",
        *(f"{kind} ({times})" for kind, times in monitor.faults.items()),
        f"Journal {monitor.journal}",
        f"Stop alert {' '.join(monitor.alert.message.split())}",
    ):
        assert part in text
