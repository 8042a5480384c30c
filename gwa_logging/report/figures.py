"""The report's figures as plain dicts in plotly's schema. A colour such as "--ink" is the name of a CSS variable."""

import math
from collections.abc import Sequence
from itertools import pairwise
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
_DEFAULTS = {
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
_HEAT_COLOURS = 6  # from --heat-0 to --heat-5
_MAX_EPOCH_TICKS = 8


class _Panel(NamedTuple):
    title: str
    attribute: str  # of EpochReport
    colour: str
    number_format: str


_PANELS = (
    _Panel("GWA", "gwa", "--gwa", ".4~g"),
    _Panel("separation", "separation", "--separation", ".4~g"),
    _Panel("stable GWA", "stable_gwa", "--stable", ".4~g"),
    _Panel("mean", "mean", "--mean", ".4~g"),
    _Panel("excess kurtosis", "excess_kurtosis", "--mean", ".4~g"),
    _Panel("negative", "negative_fraction", "--negative", ".1%"),
)
_OPTIONAL_PANELS = (
    _Panel("consensus", "consensus", "--separation", ".1%"),
    _Panel("agreement", "agreement", "--separation", ".1%"),
)
_PANEL_HEIGHT = 136  # pixels, with the gap below it


# --- markers of single epochs -------------------------------------------------------------------------------------------


class EpochMarker(NamedTuple):
    """An epoch that the figures and the table highlight."""

    report: EpochReport
    label: str
    colour: str
    dash: str


def epoch_markers(history: RunHistory) -> list[EpochMarker]:
    """Returns the markers of the best epoch, of the alert and of a better epoch after the alert."""
    alert, best = history.alert, history.best_epoch
    wanted = []
    if alert:
        wanted = [(alert.best_epoch, "best", "--best", "solid"), (alert.epoch, "alert", "--alert", "dash")]
    if best is not None and (not alert or best > alert.epoch):
        wanted.append((best, "better" if alert else "best", "--best", "solid"))
    reports = {r.epoch: r for r in history.epochs}
    return [EpochMarker(reports[epoch], *style) for epoch, *style in wanted if epoch in reports]


def _marker_lines(placed: Sequence[tuple[EpochMarker, float]], middle: float, shift: int) -> dict[str, Any]:
    """Returns a vertical line for each (marker, x). Each label has its own row above the figure, so none overlap."""
    shapes, labels = [], []
    for row, (marker, x) in enumerate(reversed(placed)):
        shapes.append({"x0": x, "x1": x, "line": {"color": marker.colour, "dash": marker.dash}})
        text = {"text": f"{marker.label}: epoch {marker.report.epoch}", "font": {"color": marker.colour}}
        labels.append({"x": x, "yshift": shift + 16 * row, "xanchor": "left" if x < middle else "right", **text})
    return {"shapes": shapes, "annotations": labels}


# --- scores by step -----------------------------------------------------------------------------------------------------


def score_figure(history: RunHistory) -> dict[str, Any]:
    """Returns the heatmap of the scores over the training steps, with their median."""
    steps, edges, shares, medians = _timeline(history.intervals).heatmap(2 * DISPLAY_BINS)
    low, high, bin_width = int(steps[0]), int(steps[-1]), edges[1] - edges[0]
    digits = max(0, 1 - math.floor(math.log10(bin_width)))
    rows = [f"scores {format_number(a, digits)} to {format_number(b, digits)}" for a, b in pairwise(edges)]
    rows[0] = f"scores below {format_number(edges[1], digits)}"
    rows[-1] = f"scores from {format_number(edges[-2], digits)} up"
    heatmap = {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": edges.round(9).tolist(),
        "z": [[round(share, 4) if share else None for share in row] for row in shares.tolist()],
        "zmin": 0,
        "zmax": round(float(np.quantile(shares[shares > 0], 0.995)), 5) if shares.any() else 1,
        # Linear in the square root of the share, so that a small group is visible beside a large one.
        "colorscale": [[(i / (_HEAT_COLOURS - 1)) ** 2, f"--heat-{i}"] for i in range(_HEAT_COLOURS)],
        "showscale": False,
        "hoverongaps": False,
        "meta": [[f"steps {a:,} to {b - 1:,}" for a, b in pairwise(steps.tolist())], rows],  # page.js combines them
        "hovertemplate": "%{text}<br><b>%{z:.1%}</b> of the samples<extra></extra>",
    }
    median = {
        "mode": "lines",
        "x": ((steps[:-1] + steps[1:]) / 2).tolist(),
        "y": [_json_number(m) for m in medians.tolist()],
        "xaxis": "x2",
        "line": {"color": "--median", "width": 1.5},
        "hoverinfo": "skip",
    }
    markers = [(m, m.report.step + 1) for m in epoch_markers(history) if m.report.step < high]
    lines = _marker_lines(markers, (low + high) / 2, shift=24)
    zero_line = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y1": 0, "line": {"color": "--zero", "width": 1}}
    lines["shapes"].append(zero_line)
    epoch_axis = _epoch_axis([r for r in history.epochs if low <= r.step < high])
    layout = _layout(440, 80, xaxis=_count_axis("step", low, high), xaxis2=epoch_axis, **lines)
    # The initial range covers all scores except one in a thousand; zooming out shows the rest.
    cumulative = np.cumsum(shares.sum(axis=1))
    bottom, top = 0, len(rows) - 1
    if shares.any():
        bottom, top = np.searchsorted(cumulative, cumulative[-1] * np.array([0.0005, 0.9995]))
    visible = [min(edges[bottom], 0.0) - 2 * bin_width, max(edges[top + 1], 0.0) + 2 * bin_width]
    layout["yaxis"] = {"title": {"text": "alignment score"}, "range": visible}
    return {"data": [heatmap, median], "layout": layout}


def _timeline(intervals: Sequence[IntervalRecord]) -> Timeline:
    """Returns all intervals. A short last interval of an epoch is merged into the one before it: alone it would be noise."""
    timeline = Timeline()
    short = np.median([r.count for r in intervals]) / 4
    pending = intervals[0]
    for before, interval in pairwise(intervals):
        if 0 < interval.count < short <= before.count:
            pending = pending.merge(interval)
        else:
            timeline.add(pending)
            pending = interval
    timeline.add(pending)
    return timeline


def _epoch_axis(epochs: Sequence[EpochReport]) -> dict[str, Any]:
    """Returns a second axis, above the figure, with the ends of the epochs."""
    spacing = _tick_spacing(len(epochs))
    ticks = [r for r in epochs if r.epoch % spacing == 0]
    return {
        "overlaying": "x",
        "matches": "x",
        "side": "top",
        "tickvals": [r.step + 1 for r in ticks],
        "ticktext": [f"{'' if i else 'epoch '}{r.epoch}" for i, r in enumerate(ticks)],
    }


def _tick_spacing(epochs: int) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that leaves at most `_MAX_EPOCH_TICKS` ticks."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if _MAX_EPOCH_TICKS * factor * power >= epochs:
                return factor * power
        power *= 10


# --- statistics by epoch ------------------------------------------------------------------------------------------------


def epoch_figure(history: RunHistory) -> dict[str, Any]:
    """Returns a panel for each statistic of the epochs, one below the other, over the same x axis."""
    epochs = history.epochs
    further = (p for p in _OPTIONAL_PANELS if any(getattr(r, p.attribute) is not None for r in epochs))
    panels = (*_PANELS, *further)
    x = [r.epoch for r in epochs]
    first, last = x[0] - 0.5, x[-1] + 0.5
    lines = _marker_lines([(m, m.report.epoch) for m in epoch_markers(history)], (first + last) / 2, shift=6)
    layout = _layout(104 + _PANEL_HEIGHT * len(panels), 62, hovermode="x unified", hoversubplots="axis", **lines)
    layout["xaxis"] = {**_count_axis("epoch", first, last), "anchor": f"y{len(panels)}"}
    layout["xaxis"]["unifiedhovertitle"] = {"text": "epoch %{x}"}
    marker_size = 5 if len(epochs) <= 60 else 3
    data: list[dict[str, Any]] = []
    for i, panel in enumerate(panels):
        values = [defined_number(r, panel.attribute) for r in epochs]
        if panel.attribute == "gwa":
            values = [r.gwa if r.gwa_defined else math.nan for r in epochs]
        trace: dict[str, Any] = {"mode": "lines+markers", "x": x, "y": [_json_number(v) for v in values]}
        trace |= {"yaxis": f"y{i + 1}", "line": {"color": panel.colour}, "marker": {"size": marker_size}}
        data.append({**trace, "hovertemplate": f"{panel.title} <b>%{{y:{panel.number_format}}}</b><extra></extra>"})
        top = 1 - i * 1.04 / len(panels)
        axis = {"title": {"text": panel.title}, "domain": [max(top - 0.88 / len(panels), 0), top], "nticks": 5}
        layout[f"yaxis{i + 1}"] = axis | ({"tickformat": ".0%"} if "%" in panel.number_format else {})
    # An undefined GWA can have any magnitude: the range fits the defined values, and the others are drawn at its edge.
    defined = [y for y in data[0]["y"] if y is not None] or [0.0]
    low, high = min(defined), max(defined)
    margin = 0.15 * (high - low) or abs(high) or 1.0
    layout["yaxis1"]["range"] = [low - margin, high + margin]
    undefined = [r for r in epochs if not r.gwa_defined and math.isfinite(r.gwa)]
    hollow: dict[str, Any] = {"mode": "markers", "x": [r.epoch for r in undefined]}
    hollow["y"] = [_json_number(min(max(r.gwa, low - 0.7 * margin), high + 0.7 * margin)) for r in undefined]
    hollow["customdata"] = [_json_number(r.gwa) for r in undefined]
    hollow["marker"] = {"symbol": "circle-open", "color": "--gwa", "size": marker_size + 2}
    data.insert(1, {**hollow, "hovertemplate": "GWA %{customdata:.4~g}, undefined<extra></extra>"})
    layout["shapes"] += [
        {"type": "rect", "x0": a - 0.5, "x1": b + 0.5, "yref": "y domain", "fillcolor": "--shade", "layer": "below"}
        | {"line": {"width": 0}}
        for a, b in _consecutive([r.epoch for r in epochs if not r.gwa_defined])
    ]
    return {"data": data, "layout": layout}


def _consecutive(epochs: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the first and last epoch of each gap-free sequence in ascending epochs."""
    sequences: list[tuple[int, int]] = []
    for epoch in epochs:
        if sequences and epoch == sequences[-1][1] + 1:
            sequences[-1] = (sequences[-1][0], epoch)
        else:
            sequences.append((epoch, epoch))
    return sequences


# --- layout and numbers -------------------------------------------------------------------------------------------------


def _layout(height: int, top: int, **more: Any) -> dict[str, Any]:
    margin = {"l": 56, "r": 12, "t": top, "b": 44}
    return {"template": {"layout": _DEFAULTS}, "height": height, "margin": margin, **more}


def _count_axis(title: str, low: float, high: float) -> dict[str, Any]:
    """Returns an axis of whole numbers."""
    every_number = {"dtick": 1} if high - low <= 12 else {}
    return {"title": {"text": title}, "range": [low, high], "tickformat": ",d", "tickangle": 0, **every_number}


def defined_number(report: EpochReport, attribute: str) -> float:
    """Returns a number of a report; NaN if it is None."""
    value: float | None = getattr(report, attribute)
    return math.nan if value is None else value


def _json_number(value: float) -> float | None:
    """Returns six significant digits; None for what JSON cannot represent."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def format_number(value: float, digits: int) -> str:
    """Formats a number with a minus sign; a dash if it is undefined, and three significant digits if it is huge."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return (f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")
