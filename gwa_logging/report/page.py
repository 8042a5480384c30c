"""The report: one HTML page about a run, made from its journal alone, that works without a network.

The page's template, style sheet and script are page.html, page.css and page.js beside this module; the page includes all
three and the compressed source of plotly, which draws the figures. The figures are JSON in which a colour is the name of a CSS
variable, so one style sheet sets the colours of page and figures: light, dark and on paper. Texts that users choose (run,
head, notes, settings) are escaped and never enter the figures.
"""

import base64
import gzip
import json
import math
import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.journal import FILE_NAME
from gwa_logging.records import OPTIONAL_KEYS
from gwa_logging.report.figures import defined_number, epoch_figure, epoch_markers, format_number, score_figure
from gwa_logging.report.run_history import RunHistory, read_run_history
from gwa_logging.report.tables import decimals, html_table, suspects_section

REPORT_NAME = "report.html"

_EPOCH_COLUMNS = {
    "GWA": "gwa",
    "separation": "separation",
    "stable GWA": "stable_gwa",
    "mean": "mean",
    "std": "std",
    "excess kurtosis": "excess_kurtosis",
}


def write_report(directory: Path) -> Path:
    """Writes the report of a run next to its journal. An older report is replaced in one step.

    Args:
        directory: the run's own folder, which contains journal.jsonl. The run may be unfinished.

    Returns:
        The path of report.html.

    Raises:
        InvalidInputError: the journal is missing or has no record, or the page cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    page = _render(read_run_history(directory / FILE_NAME), directory.resolve().name)
    draft = directory / f".{REPORT_NAME}.{secrets.token_hex(4)}"
    try:
        draft.write_text(page, encoding="utf-8")
        return draft.replace(directory / REPORT_NAME)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidInputError(
            f"directory={str(directory)!r}: cannot write {REPORT_NAME} ({error.strerror}); copy {FILE_NAME} to a writable "
            "folder and make the report there"
        ) from error


def _render(history: RunHistory, folder: str) -> str:
    """Returns the page as HTML."""
    figures = {}
    scores = epochs = numbers = "<p>No data yet.</p>"
    suspects = ""
    if history.intervals:
        figures["scores"] = score_figure(history)
        scores = _score_section(largest_share=figures["scores"]["data"][0]["zmax"])
    if history.epochs:
        figures["epochs"] = epoch_figure(history)
        epochs = _epoch_section(history)
        numbers = _epoch_table(history)
    if history.suspects and history.suspects.suspects:
        suspects = suspects_section(history.suspects, history.epochs)
    headline = _headline(history)
    return Template(_source("page.html")).substitute(
        title=escape(f"{history.run.name if history.run else folder}: {headline}"),
        status="alert" if history.alert else "calm",
        headline=escape(headline),
        remarks="".join(f"<p>{escape(remark)}</p>" for remark in _remarks(history)),
        facts=_description_list(_facts(history, folder)),
        scores=scores,
        epochs=epochs,
        numbers=numbers,
        suspects=suspects,
        settings=_description_list(_flatten(history.run.settings if history.run else {})),
        faults=_faults(history),
        # "<" is escaped because "</script" would end the script element.
        figures=json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        css=_source("page.css"),
        script=_source("page.js"),
        plotly=_packed_plotly(),
    )


@cache
def _source(name: str) -> str:
    return files("gwa_logging.report").joinpath(name).read_text(encoding="utf-8").strip()


@cache  # compressing takes 0.06 s; level 9 takes twice that and saves 0.08 MB
def _packed_plotly() -> str:
    """Returns plotly.js, compressed, in base64: 2 MB instead of 5."""
    try:
        source = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise MissingDependencyError("plotly", "report") from error
    return base64.b64encode(gzip.compress(source, compresslevel=4, mtime=0)).decode()


# --- the header ---------------------------------------------------------------------------------------------------------


def _headline(history: RunHistory) -> str:
    alert, best = history.alert, history.best_epoch
    if not history.epochs:
        return "No epoch has been completed yet"
    if alert:
        later = f"; later epoch {best} was better" if best is not None and best > alert.epoch else ""
        return f"Stop alert in epoch {alert.epoch}; best epoch {alert.best_epoch}{later}"
    has_rule = history.run is None or history.run.settings.get("early_stop") is not None
    status = "No alert" if has_rule else "No alert: no stop rule was set"
    return status if best is None else f"{status}; best epoch {best}"


def _remarks(history: RunHistory) -> Iterator[str]:
    """Yields what readers must know to interpret the page correctly."""
    if history.alert:
        yield history.alert.message
        yield from (f"Caveat: {caveat}." for caveat in history.alert.caveats)
    if not history.closed:
        yield "The journal was not closed: the run is still in progress, or it ended abruptly."
    if history.epochs and history.epochs[0].epoch:
        yield f"The run was resumed: an earlier journal has the epochs before epoch {history.epochs[0].epoch}."
    if history.skipped:
        yield f"Skipped lines of the journal (incomplete or unknown): {history.skipped:,}."
    if history.unfinished:
        yield "The last line of the journal is incomplete and was left out."


def _facts(history: RunHistory, folder: str) -> Iterator[tuple[str, str]]:
    if history.run:
        yield "Run", history.run.name
        try:
            yield "Started", f"{datetime.fromisoformat(history.run.created):%d %B %Y, %H:%M %Z}".strip()
        except ValueError:
            yield "Started", history.run.created
    yield "Length", f"{len(history.epochs):,} epochs, {history.steps:,} steps"
    yield "Folder", folder
    if history.run:
        yield "Head", history.run.head
        for tracker, run_ref in history.run.places.items():
            if run_ref.url or run_ref.run:
                yield f"Run in {tracker}", _Link(run_ref.url or run_ref.run)


class _Link(str):
    """A text that the page shows as a link if it is a web address."""


def _description_list(pairs: Iterable[tuple[str, object]]) -> str:
    def shown(value: object) -> str:
        text = escape(str(value))
        is_link = isinstance(value, _Link) and value.startswith(("http://", "https://"))
        return f'<a href="{text}" rel="noreferrer">{text}</a>' if is_link else text

    return "<dl>" + "".join(f"<div><dt>{escape(k)}<dd>{shown(v)}</div>" for k, v in pairs) + "</dl>"


# --- the sections -------------------------------------------------------------------------------------------------------


def _score_section(largest_share: float) -> str:
    return f"""
<figure><figcaption><span>share of the samples: 0<i class="ramp"></i>{format_number(100 * largest_share, 1)} % and more</span>
<span><i style="--c:var(--median)"></i>median</span></figcaption>
<div id="scores" role="img" aria-label="Distribution of alignment scores over training steps"></div></figure>
<noscript>The figures need JavaScript; the numbers below do not.</noscript>"""


def _epoch_section(history: RunHistory) -> str:
    undefined = sum(not r.gwa_defined for r in history.epochs)
    legend = (
        '<span><i class="hollow"></i>GWA is undefined: '
        f"{undefined:,} of {len(history.epochs):,} epochs (shaded; values outside the range are drawn at the edge)</span>"
    )
    return f"""
<figure><figcaption>{legend if undefined else ""}</figcaption>
<div id="epochs" role="img"
aria-label="GWA, separation, stable GWA, mean score, excess kurtosis and share of negative scores by epoch"></div></figure>"""


def _epoch_table(history: RunHistory) -> str:
    optional = [name for name in OPTIONAL_KEYS.values() if any(getattr(r, name) is not None for r in history.epochs)]
    columns = _EPOCH_COLUMNS | {name: name for name in optional}
    digits = {name: decimals(defined_number(r, name) for r in history.epochs) for name in columns.values()}
    labels = {m.report.epoch: f'<b style="color:var({m.colour})">{m.label}</b> ' for m in epoch_markers(history)}
    rows = []
    for r in history.epochs:
        cells = [format_number(defined_number(r, name), places) for name, places in digits.items()]
        if not r.gwa_defined:
            cells[0] = f'<i title="undefined">({cells[0]})</i>'
        share = f"{format_number(100 * r.negative_fraction, 1)} %" if r.count else format_number(math.nan, 0)
        numbers = "".join(f"<td>{cell}" for cell in (*cells, share, f"{r.count:,}", f"{r.excluded:,}"))
        notes = escape("; ".join(r.notes))
        last = f'<td class="notes" tabindex="0" title="{notes}"><div>{labels.get(r.epoch, "")}{notes}</div>'
        rows.append(f'<tr><th scope="row">{r.epoch}{numbers}{last}')
    return html_table(
        ["epoch", *columns, "negative", "samples", "excluded"], rows, '<th scope="col" class="notes">notes'
    )


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields settings under dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = "none" if value is None else value
            yield prefix + key, text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def _faults(history: RunHistory) -> str:
    if history.closed is None:
        return "<p>Unknown: the journal lists the faults when the run is closed.</p>"
    return _description_list(history.closed.faults.items()) if history.closed.faults else "<p>None.</p>"
