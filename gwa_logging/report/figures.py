"""The report's figures: plain dicts in plotly's schema. "--ink" and the like stand for the value of that CSS variable."""

import math
from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np

from gwa_logging.histogram import DISPLAY_BINS
from gwa_logging.records import EpochReport, IntervalRecord
from gwa_logging.report.heatmap import Timeline
from gwa_logging.report.run_history import RunHistory

_AXIS = {
    "gridcolor": "--grid",
    "linecolor": "--rule",
    "tickcolor": "--rule",
    "ticks": "outside",
    "ticklen": 4,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8},
}
_LOOKS = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12.5, "color": "--muted"},
    "hoverlabel": {"bgcolor": "--card", "bordercolor": "--rule", "font": {"color": "--ink"}, "align": "left"},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "--rule", "activecolor": "--ink"},
    "showlegend": False,
    "xaxis": {**_AXIS, "showgrid": False, "spikecolor": "--rule", "spikethickness": 1, "spikedash": "solid"},
    "yaxis": _AXIS,
    "annotationdefaults": {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False},
    "shapedefaults": {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1.5}},
}
_HEAT = 6  # colours of the heatmap, from --heat-0 to --heat-5
_PANELS = (
    ("GWA", "gwa", "--gwa", ".4~g"),
    ("separation", "separation", "--separation", ".4~g"),
    ("stable GWA", "stable_gwa", "--stable", ".4~g"),
    ("mean", "mean", "--mean", ".4~g"),
    ("excess kurtosis", "excess_kurtosis", "--mean", ".4~g"),
    ("negative", "negative_fraction", "--negative", ".1%"),
)


def _layout(height: int, top: int, **more: Any) -> dict[str, Any]:
    return {"template": {"layout": _LOOKS}, "height": height, "margin": {"l": 56, "r": 12, "t": top, "b": 44}, **more}


def _whole_numbers(title: str, low: float, high: float) -> dict[str, Any]:
    """The axis of what is counted."""
    few = {"dtick": 1} if high - low <= 12 else {}
    return {"title": {"text": title}, "range": [low, high], "tickformat": ",d", "tickangle": 0, **few}


class Mark(NamedTuple):
    """An epoch that the figures and the table point out."""

    report: EpochReport
    word: str
    colour: str
    dash: str


def marks(story: RunHistory) -> list[Mark]:
    wanted = []
    if story.alert:
        wanted = [(story.alert.best_epoch, "best", "--best", "solid"), (story.alert.epoch, "alert", "--alert", "dash")]
    if story.best is not None and (not story.alert or story.best > story.alert.epoch):
        wanted.append((story.best, "better since" if story.alert else "best", "--best", "solid"))
    reports = {r.epoch: r for r in story.epochs}
    return [Mark(reports[epoch], *look) for epoch, *look in wanted if epoch in reports]


def _mark_lines(marked: Sequence[tuple[Mark, float]], middle: float, above: int) -> dict[str, list[dict[str, Any]]]:
    """Vertical lines, each with its label in a row of its own above the figure, so that no two collide."""
    shapes, labels = [], []
    for row, (mark, x) in enumerate(reversed(marked)):
        shapes.append({"x0": x, "x1": x, "line": {"color": mark.colour, "dash": mark.dash}})
        text = {"text": f"{mark.word}: epoch {mark.report.epoch}", "font": {"color": mark.colour}}
        labels.append({"x": x, "yshift": above + 16 * row, "xanchor": "left" if x < middle else "right", **text})
    return {"shapes": shapes, "annotations": labels}


def _timeline(intervals: Sequence[IntervalRecord]) -> Timeline:
    """All intervals. The last few samples of an epoch go with those before: a column of their own would be noise."""
    timeline, few = Timeline(), np.median([r.count for r in intervals]) / 4
    held = intervals[0]
    for before, interval in pairwise(intervals):
        if 0 < interval.count < few <= before.count:
            held = held.merge(interval)
        else:
            timeline.add(held)
            held = interval
    timeline.add(held)
    return timeline


def score_figure(story: RunHistory) -> dict[str, Any]:
    """The distribution of the scores, over the steps."""
    steps, edges, shares, medians = _timeline(story.intervals).heatmap(2 * DISPLAY_BINS)
    low, high, width = int(steps[0]), int(steps[-1]), edges[1] - edges[0]
    digits = max(0, 1 - math.floor(math.log10(width)))
    rows = [f"scores {number(a, digits)} to {number(b, digits)}" for a, b in pairwise(edges)]
    rows[0], rows[-1] = f"scores below {number(edges[1], digits)}", f"scores from {number(edges[-2], digits)} up"
    heatmap = {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": edges.round(9).tolist(),
        "z": [[round(share, 4) if share else None for share in row] for row in shares.tolist()],
        "zmin": 0,
        "zmax": round(float(np.quantile(shares[shares > 0], 0.995)), 5) if shares.any() else 1,
        # Even in the square root of the share, so that a hump of few samples is seen beside a hump of many.
        "colorscale": [[(i / (_HEAT - 1)) ** 2, f"--heat-{i}"] for i in range(_HEAT)],
        "showscale": False,
        "hoverongaps": False,
        "meta": [[f"steps {a:,} to {b - 1:,}" for a, b in pairwise(steps.tolist())], rows],  # becomes text in the page
        "hovertemplate": "%{text}<br><b>%{z:.1%}</b> of the samples<extra></extra>",
    }
    median = {
        "mode": "lines",
        "x": ((steps[:-1] + steps[1:]) / 2).tolist(),
        "y": [_rounded(m) for m in medians.tolist()],
        "xaxis": "x2",
        "line": {"color": "--median", "width": 1.5},
        "hoverinfo": "skip",
    }
    ends = [r for r in story.epochs if low <= r.step < high]
    every = next(n * 10**k for k in count() for n in (1, 2, 5) if 8 * n * 10**k >= len(ends))
    ends = [r for r in ends if r.epoch % every == 0]
    epoch_axis = {
        "overlaying": "x",
        "matches": "x",
        "side": "top",
        "tickvals": [r.step + 1 for r in ends],
        "ticktext": [f"{'' if i else 'epoch '}{r.epoch}" for i, r in enumerate(ends)],
    }
    # All but one sample in a thousand are in sight; zooming out shows the rest.
    mass = np.cumsum(shares.sum(axis=1))
    bottom, top = np.searchsorted(mass, mass[-1] * np.array([0.0005, 0.9995])) if shares.any() else (0, len(rows) - 1)
    sight = [min(edges[bottom], 0.0) - 2 * width, max(edges[top + 1], 0.0) + 2 * width]
    lines = _mark_lines([(m, m.report.step + 1) for m in marks(story) if m.report.step < high], (low + high) / 2, 24)
    zero = {"color": "--zero", "width": 1}
    lines["shapes"].append({"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y1": 0, "line": zero})
    layout = _layout(440, 80, xaxis=_whole_numbers("step", low, high), xaxis2=epoch_axis, **lines)
    layout["yaxis"] = {"title": {"text": "alignment score"}, "range": sight}
    return {"data": [heatmap, median], "layout": layout}


def epoch_figure(story: RunHistory) -> dict[str, Any]:
    """A panel each for GWA, what it is made of, and what else tells how training goes, over the same epochs."""
    epochs = story.epochs
    x = [r.epoch for r in epochs]
    first, last = x[0] - 0.5, x[-1] + 0.5
    lines = _mark_lines([(m, m.report.epoch) for m in marks(story)], (first + last) / 2, 6)
    layout = _layout(920, 62, hovermode="x unified", hoversubplots="axis", **lines)
    layout["xaxis"] = {**_whole_numbers("epoch", first, last), "anchor": f"y{len(_PANELS)}"}
    layout["xaxis"]["unifiedhovertitle"] = {"text": "epoch %{x}"}
    size = 5 if len(epochs) <= 60 else 3
    data: list[dict[str, Any]] = []
    for i, (title, field, colour, form) in enumerate(_PANELS):
        values = [getattr(r, field) if field != "gwa" or r.gwa_defined else math.nan for r in epochs]
        trace: dict[str, Any] = {"mode": "lines+markers", "x": x, "y": [_rounded(v) for v in values]}
        trace |= {"yaxis": f"y{i + 1}", "line": {"color": colour}, "marker": {"size": size}}
        data.append({**trace, "hovertemplate": f"{title} <b>%{{y:{form}}}</b><extra></extra>"})
        top = 1 - i * 1.04 / len(_PANELS)
        axis = {"title": {"text": title}, "domain": [max(top - 0.88 / len(_PANELS), 0), top], "nticks": 5}
        layout[f"yaxis{i + 1}"] = axis | ({"tickformat": ".0%"} if "%" in form else {})
    # Beyond its pole GWA can be of any size: the panel is made for the rest, and such points are kept at its edge.
    believed = [y for y in data[0]["y"] if y is not None] or [0.0]
    low, high = min(believed), max(believed)
    room = 0.15 * (high - low) or abs(high) or 1.0
    layout["yaxis1"]["range"] = [low - room, high + room]
    beyond = [r for r in epochs if not r.gwa_defined and math.isfinite(r.gwa)]
    kept = [_rounded(min(max(r.gwa, low - 0.7 * room), high + 0.7 * room)) for r in beyond]
    hollow: dict[str, Any] = {"mode": "markers", "x": [r.epoch for r in beyond], "y": kept}
    hollow["customdata"] = [_rounded(r.gwa) for r in beyond]
    hollow["marker"] = {"symbol": "circle-open", "color": "--gwa", "size": size + 2}
    data.insert(1, {**hollow, "hovertemplate": "GWA %{customdata:.4~g}, undefined<extra></extra>"})
    layout["shapes"] += [
        {"type": "rect", "x0": a - 0.5, "x1": b + 0.5, "yref": "y domain", "fillcolor": "--shade", "layer": "below"}
        | {"line": {"width": 0}}
        for a, b in _stretches([r.epoch for r in epochs if not r.gwa_defined])
    ]
    return {"data": data, "layout": layout}


def _stretches(epochs: Sequence[int]) -> list[tuple[int, int]]:
    """The first and last of each stretch of ascending epochs that follow each other without a gap."""
    stretches: list[tuple[int, int]] = []
    for epoch in epochs:
        if stretches and epoch == stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], epoch)
        else:
            stretches.append((epoch, epoch))
    return stretches


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def number(value: float, digits: int) -> str:
    """A number for people: a true minus sign, a dash for what is undefined, short where digits would run away."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return (f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")
