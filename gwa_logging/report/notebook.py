"""The HTML that represents a report and a monitor in a notebook: text and one SVG histogram, without scripts or style sheets.

Text and lines use the notebook's own colour (currentColor) and nothing has a background, so both light and dark themes
work. The markup is well-formed XML.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gwa_logging.histogram import Histogram

if TYPE_CHECKING:  # records.py imports this module
    from gwa_logging.records import EpochReport, StopAlert

WIDTH = 520
"""Width of the output in pixels; less if the notebook is narrower."""

_BAR_HEIGHT, _LABEL_HEIGHT = 90, 16
_NEGATIVE, _POSITIVE, _ALERT = "#b0451f", "#3f7fc1", "#c22a2a"  # --negative, --heat-3 and --alert of page.css

# Characters that XML cannot represent even if escaped: control characters, and lone surrogates (possible in file names).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def report_html(report: "EpochReport") -> str:
    """Returns the histogram of an epoch's scores and the main statistics."""
    return _framed([_report(report)])


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
    """Returns the state of a run: its latest report, the best epoch, the alert, and where to find the journal.

    Args:
        name: prefix of the metric keys.
        head: the chosen head and the reason for the choice.
        history: the reports of all epochs.
        alert: the stop alert, or None.
        journal: the path of the journal, or None.
        faults: the number of occurrences by kind of fault.
        others: one line on each further head, by path.
    """
    parts = [_paragraph(name, head)]
    if alert:
        caveats = (_paragraph("Caveat", f"{caveat}.") for caveat in alert.caveats)
        text = "".join([_paragraph("Stop alert", alert.message), *caveats])
        parts.append(f'<div style="padding-left:8px;border-left:3px solid {_ALERT}">{text}</div>')
    if history:
        parts.append(_report(history[-1]))
        best = max((r.epoch for r in history if r.is_best), default=None)
        parts.append(_paragraph("Epochs", f"{len(history):,}" + ("" if best is None else f", best: epoch {best:,}")))
    else:
        parts.append("<div>No epoch yet.</div>")
    parts += [_paragraph(f"Head {path!r}", line) for path, line in others.items()]
    if faults:
        parts.append(_paragraph("Faults", ", ".join(f"{kind} ({times:,})" for kind, times in faults.items())))
    if journal:
        parts.append(_paragraph("Journal", journal))
    return _framed(parts)


def _framed(parts: Sequence[str]) -> str:
    return f'<div style="max-width:{WIDTH}px">{"".join(parts)}</div>'


def _report(report: "EpochReport") -> str:
    gwa = _format(report.gwa) if report.gwa_defined else f"({_format(report.gwa)}) undefined"
    negative = _format(100 * report.negative_fraction)
    numbers = {
        "GWA": gwa,
        "separation": _format(report.separation),
        "stable GWA": _format(report.stable_gwa),
        "mean": _format(report.mean),
        "negative": f"{negative} %" if math.isfinite(report.negative_fraction) else negative,
        **({} if report.consensus is None else {"consensus": _format(report.consensus)}),
        **({} if report.agreement is None else {"agreement": _format(report.agreement)}),
        "samples": f"{report.count:,}" + (f" (and {report.excluded:,} excluded)" if report.excluded else ""),
    }
    statistics = " ".join(
        f'<span style="display:inline-block;margin-right:1.4em"><span style="opacity:.7">{key}</span> <b>{value}</b></span>'
        for key, value in numbers.items()
    )
    title = f"<div><b>Epoch {report.epoch:,}</b>{', best so far' if report.is_best else ''}</div>"
    notes = f"<div>{_escape('; '.join(report.notes))}</div>" if report.notes else ""
    histogram = _histogram(report.histogram, report.quantiles.get("q50", math.nan))
    return f"{title}{histogram}<div>{statistics}</div>{notes}"


def _paragraph(heading: str, text: object) -> str:
    return f"<div><b>{_escape(heading)}</b> {_escape(text)}</div>"


def _escape(text: object) -> str:
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def _format(value: float) -> str:
    """Formats a number with four significant digits and a minus sign; a dash if it is undefined."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "\N{EN DASH}"


# --- the histogram ------------------------------------------------------------------------------------------------------


def _histogram(histogram: Histogram, median: float) -> str:
    height = _LABEL_HEIGHT + _BAR_HEIGHT + _LABEL_HEIGHT
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Histogram of the alignment scores" '
        f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'style="max-width:100%;height:auto;display:block;margin:4px 0" fill="currentColor" font-size="11">'
        f"{''.join(_shapes(histogram, median))}</svg>"
    )


def _shapes(histogram: Histogram, median: float) -> Iterator[str]:
    counts, edges = histogram.to_display()
    limit, largest, bar_width = float(edges[-1]), int(counts.max()), WIDTH / len(counts)
    bottom = _LABEL_HEIGHT + _BAR_HEIGHT
    for i, count in enumerate(counts.tolist()):
        if count:
            height = _BAR_HEIGHT * count / largest
            yield (
                f'<rect x="{i * bar_width + 0.5:.1f}" y="{bottom - height:.2f}" width="{bar_width - 1:.1f}" '
                f'height="{height:.2f}" fill="{_NEGATIVE if edges[i + 1] <= 0 else _POSITIVE}">'
                f"<title>{_format(edges[i])} to {_format(edges[i + 1])}: {count:,}</title></rect>"
            )
    if not largest:
        yield _label(WIDTH / 4, _LABEL_HEIGHT + _BAR_HEIGHT / 2, "no scores", "middle")
    yield f'<path d="M0,{bottom}H{WIDTH}" stroke="currentColor" opacity=".5"/>'
    yield _vertical_line("zero", WIDTH / 2, _LABEL_HEIGHT, bottom, ' stroke-dasharray="2 3"')
    for x, score, anchor in ((0, -limit, "start"), (WIDTH / 2, 0.0, "middle"), (WIDTH, limit, "end")):
        yield _label(x, bottom + 13, _format(score), anchor)
    if math.isfinite(median):
        x = WIDTH / 2 * (1 + min(max(median / limit, -1), 1))
        yield _vertical_line("median", x, _LABEL_HEIGHT - 3, bottom)
        anchor = "start" if x < WIDTH / 4 else "end" if x > WIDTH * 3 / 4 else "middle"
        yield _label(x, 10, f"median {_format(median)}", anchor)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _vertical_line(name: str, x: float, top: float, bottom: float, dashes: str = "") -> str:
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"'
    return f'<line class="{name}" {ends} stroke="currentColor" stroke-width="1.5"{dashes}/>'
