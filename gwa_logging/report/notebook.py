"""How a report and a monitor show themselves in a notebook: strings of HTML with pictures in SVG, no script, no style sheet.

Text and lines take the notebook's own colour (currentColor) and nothing has a background, so that light and dark both do.
The markup is well-formed XML, and a picture's size does not grow with the run.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gwa_logging.histogram import Histogram

if TYPE_CHECKING:  # the records stand a floor above, and call this one
    from gwa_logging.records import EpochReport, StopAlert

WIDTH = 520
"""Of the pictures, in pixels, where the notebook has as many."""

COLUMNS = 120
"""Groups of epochs that a line is drawn from, at most: two points each."""

_MARGIN = 104  # left of the lines, for their names and ranges
_PANEL, _GAP = 44, 16
_BARS, _ABOVE, _BELOW = 90, 16, 16  # height of the histogram's bars, and of the labels around them
_NEGATIVE, _POSITIVE, _BEST, _ALERT = "#d2693c", "#4a86c8", "#2f9e57", "#dd4b4b"

# What XML cannot hold, even escaped: control characters, and the halves of characters that a file's name may have.
_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def report_html(report: "EpochReport") -> str:
    """An epoch's report: the histogram of its scores, and the numbers."""
    return f'<div style="max-width:{WIDTH}px">{_report(report)}</div>'


def monitor_html(
    *,
    name: str,
    head: str,
    history: Sequence["EpochReport"],
    alert: "StopAlert | None",
    journal: Path | None,
    faults: Mapping[str, int],
    others: Mapping[str, str],
) -> str:
    """A run so far: its latest report, separation and GWA by epoch, and what else there is to know.

    Args:
        name: prefix of the metric keys.
        head: which head was chosen, and why.
        history: the reports of all epochs.
        alert: the stop alert that stands, or None.
        journal: where the run is written, or None.
        faults: how often each kind of fault has happened.
        others: one line on each further head, by path.
    """
    parts = [f"<div><b>{_text(name)}</b> {_text(head)}</div>"]
    if alert:
        said = [("Stop alert", alert.message), *(("Caveat", f"{caveat}.") for caveat in alert.caveats)]
        told = "".join(_paragraph(*pair) for pair in said)
        parts.append(f'<div style="padding-left:8px;border-left:3px solid {_ALERT}">{told}</div>')
    if history:
        parts += [_report(history[-1]), _lines(history, alert)]
        undefined = sum(not report.gwa_defined for report in history)
        if undefined:
            parts.append(f"<div>GWA has no line where it is undefined: {undefined:,} of {len(history):,} epochs.</div>")
    else:
        parts.append("<div>No epoch yet.</div>")
    parts += [_paragraph(f"Head {path!r}", line) for path, line in others.items()]
    if faults:
        parts.append(_paragraph("Faults", ", ".join(f"{kind} ({times:,})" for kind, times in faults.items())))
    if journal:
        parts.append(_paragraph("Journal", journal))
    return f'<div style="max-width:{WIDTH}px">{"".join(parts)}</div>'


def _report(report: "EpochReport") -> str:
    gwa = _number(report.gwa) if report.gwa_defined else f"({_number(report.gwa)}) undefined"
    share = (
        f"{_number(100 * report.negative_fraction)} %" if math.isfinite(report.negative_fraction) else _number(math.nan)
    )
    numbers = {
        "GWA": gwa,
        "separation": _number(report.separation),
        "stable GWA": _number(report.stable_gwa),
        "mean": _number(report.mean),
        "negative": share,
        "samples": f"{report.count:,}" + (f" (and {report.excluded:,} excluded)" if report.excluded else ""),
    }
    shown = " ".join(
        f'<span style="display:inline-block;margin-right:1.4em"><span style="opacity:.7">{key}</span> <b>{value}</b></span>'
        for key, value in numbers.items()
    )
    title = f"<div><b>Epoch {report.epoch:,}</b>{', best so far' if report.is_best else ''}</div>"
    notes = f"<div>{_text('; '.join(report.notes))}</div>" if report.notes else ""
    return f"{title}{_histogram(report.histogram, report.quantiles.get('q50', math.nan))}<div>{shown}</div>{notes}"


def _paragraph(heading: str, words: object) -> str:
    return f"<div><b>{_text(heading)}</b> {_text(words)}</div>"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _svg(height: float, label: str, parts: Iterator[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" style="max-width:100%;height:auto;display:block;margin:4px 0" '
        f'fill="currentColor" font-size="11">{"".join(parts)}</svg>'
    )


def _words(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _upright(x: float, top: float, bottom: float, name: str, colour: str = "currentColor", dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"'
    return f'<line class="{name}" {ends} stroke="{colour}" stroke-width="1.5"{dashes}/>'


def _histogram(histogram: Histogram, median: float) -> str:
    return _svg(_ABOVE + _BARS + _BELOW, "Histogram of the alignment scores", _bars(histogram, median))


def _bars(histogram: Histogram, median: float) -> Iterator[str]:
    counts, edges = histogram.to_display()
    limit, most, width = float(edges[-1]), int(counts.max()), WIDTH / len(counts)
    bottom = _ABOVE + _BARS
    for i, count in enumerate(counts.tolist()):
        if count:
            height = _BARS * count / most
            yield (
                f'<rect x="{i * width + 0.5:.1f}" y="{bottom - height:.2f}" width="{width - 1:.1f}" height="{height:.2f}" '
                f'fill="{_NEGATIVE if edges[i + 1] <= 0 else _POSITIVE}">'
                f"<title>{_number(edges[i])} to {_number(edges[i + 1])}: {count:,}</title></rect>"
            )
    if not most:
        yield _words(WIDTH / 4, _ABOVE + _BARS / 2, "no scores", "middle")
    yield f'<path d="M0,{bottom}H{WIDTH}" stroke="currentColor" opacity=".5"/>'
    yield _upright(WIDTH / 2, _ABOVE, bottom, "zero", dash="2 3")
    for x, words, anchor in ((0, -limit, "start"), (WIDTH / 2, 0.0, "middle"), (WIDTH, limit, "end")):
        yield _words(x, bottom + 13, _number(words), anchor)
    if math.isfinite(median):
        x = WIDTH / 2 * (1 + min(max(median / limit, -1), 1))
        yield _upright(x, _ABOVE - 3, bottom, "median")
        anchor = "start" if x < WIDTH / 4 else "end" if x > WIDTH * 3 / 4 else "middle"
        yield _words(x, 10, f"median {_number(median)}", anchor)


def _lines(history: Sequence["EpochReport"], alert: "StopAlert | None") -> str:
    best = max((r.epoch for r in history if r.is_best), default=None)
    marks = ((best, "best", _BEST, ""), (alert.epoch if alert else None, "alert", _ALERT, "4 3"))
    known = [(epoch, word, colour, dash) for epoch, word, colour, dash in marks if epoch is not None]
    panels = (
        ("separation", [r.separation for r in history]),
        ("GWA", [r.gwa if r.gwa_defined else math.nan for r in history]),
    )
    first, last = history[0].epoch, history[-1].epoch
    across = (WIDTH - _MARGIN - 4) / max(last - first, 1)  # the last 4 pixels are for half of what is drawn there

    def x_of(epoch: int) -> float:
        return _MARGIN + (epoch - first) * across if last > first else (_MARGIN + WIDTH) / 2

    top = 14 * len(known) + 4
    bottom = top + len(panels) * (_PANEL + _GAP) - _GAP

    def parts() -> Iterator[str]:
        for row, (epoch, word, colour, dash) in enumerate(known):
            x = x_of(epoch)
            yield _upright(x, 14 * row + 4, bottom, word, colour, dash)
            before = x > (_MARGIN + WIDTH) / 2
            yield _words(
                x - 5 if before else x + 5, 14 * row + 12, f"{word}: epoch {epoch:,}", "end" if before else "start"
            )
        for i, (name, values) in enumerate(panels):
            yield from _line(name, [x_of(r.epoch) for r in history], values, top + i * (_PANEL + _GAP))
        yield _words(_MARGIN, bottom + 15, f"epoch {first:,}", "start")
        if last > first:
            yield _words(WIDTH, bottom + 15, f"{last:,}", "end")

    return _svg(bottom + 20, "Separation and GWA by epoch", parts())


def _line(name: str, xs: Sequence[float], values: Sequence[float], top: float) -> Iterator[str]:
    """A panel: the line, broken where its value is undefined, and its range."""
    bottom, finite = top + _PANEL, [v for v in values if math.isfinite(v)]
    yield _words(0, (top + bottom) / 2 + 4, name, "start")
    yield f'<path d="M{_MARGIN},{bottom + 3}H{WIDTH}" stroke="currentColor" opacity=".25"/>'
    if not finite:
        yield _words((_MARGIN + WIDTH) / 2, (top + bottom) / 2 + 4, "undefined", "middle")
        return
    low, high = min(finite), max(finite)
    yield _words(_MARGIN - 6, top + 8, _number(high), "end")
    if high > low:
        yield _words(_MARGIN - 6, bottom, _number(low), "end")
    strokes: list[list[str]] = [[]]
    for i in _telling(values):
        if i is None:
            strokes.append([])
        else:
            y = bottom - _PANEL * (values[i] - low) / (high - low) if high > low else (top + bottom) / 2
            strokes[-1].append(f"{xs[i]:.1f},{y:.1f}")
    yield f'<g class="{name}" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round">'
    for points in strokes:
        if len(points) == 1:  # a line of one point would not be seen
            across, down = points[0].split(",")
            yield f'<circle cx="{across}" cy="{down}" r="1.2"/>'
        elif points:
            yield f'<polyline points="{" ".join(points)}"/>'
    yield "</g>"


def _telling(values: Sequence[float]) -> Iterator[int | None]:
    """Which values a line is drawn through: of each of `COLUMNS` groups the least and the largest; None for a gap."""
    size = math.ceil(len(values) / COLUMNS)
    for start in range(0, len(values), size):
        finite = [i for i in range(start, min(start + size, len(values))) if math.isfinite(values[i])]
        if finite:
            yield from sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)})
        else:
            yield None


# --- words ------------------------------------------------------------------------------------------------------------


def _text(words: object) -> str:
    return escape(_UNSPEAKABLE.sub("\N{REPLACEMENT CHARACTER}", str(words)))


def _number(value: float) -> str:
    """Four significant digits, a true minus sign, a dash for what is undefined."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "\N{EN DASH}"
