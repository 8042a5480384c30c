"""The report: one HTML page of a run, made from its journal alone, that works without a network.

Plotly draws; its code is put into the page once. The figures lie in the page as JSON in which every colour is the name
of a CSS variable, so that one style sheet dresses page and figures: light, dark and on paper. Nothing that people can
name (run, head, notes, settings) goes into the figures; in the page it is escaped.
"""

import json
import math
import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.journal import FILE_NAME
from gwa_logging.records import SuspectsRecord
from gwa_logging.report.figures import epoch_figure, marks, number, score_figure
from gwa_logging.report.run_history import RunHistory, read_run_history

REPORT_NAME = "report.html"


def write_report(directory: Path) -> Path:
    """Writes the report of a run next to its journal; an older one is replaced once the new one is complete.

    Args:
        directory: the run's own folder, with journal.jsonl in it. The run may still be going on.

    Returns:
        The path of report.html.

    Raises:
        InvalidInputError: there is no journal with a record in it, or the page cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    page = _page(read_run_history(directory / FILE_NAME), directory.resolve().name)
    draft = directory / f".{REPORT_NAME}.{secrets.token_hex(4)}"
    try:
        draft.write_text(page, encoding="utf-8")
        return draft.replace(directory / REPORT_NAME)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidInputError(
            f"directory={str(directory)!r}: {REPORT_NAME} cannot be written ({error.strerror}); copy {FILE_NAME} to a "
            "folder that can be written, and report on that"
        ) from error


# --- words and numbers ------------------------------------------------------------------------------------------------


def _digits(values: Iterable[float]) -> int:
    """Decimals that give a column's typical value four significant digits."""
    sizes = [abs(v) for v in values if math.isfinite(v) and v]
    return min(max(3 - math.floor(math.log10(sorted(sizes)[len(sizes) // 2])), 0), 9) if sizes else 3


def _headline(story: RunHistory) -> str:
    alert, best = story.alert, story.best
    if not story.epochs:
        return "No epoch has been completed yet"
    if alert:
        since = f"; epoch {best} was better since" if best is not None and best > alert.epoch else ""
        return f"Stop alert in epoch {alert.epoch}; best epoch {alert.best_epoch}{since}"
    ruled = story.run is None or story.run.settings.get("early_stop") is not None
    return ("No alert" if ruled else "No alert: no stop rule was set") + (
        "" if best is None else f"; best epoch {best}"
    )


def _remarks(story: RunHistory) -> Iterator[str]:
    """What to know before believing the page."""
    if story.alert:
        yield story.alert.message
        yield from (f"Caveat: {caveat}." for caveat in story.alert.caveats)
    if not story.closed:
        yield "The journal was not closed: the run is still going on, or it ended abruptly."
    if story.epochs and story.epochs[0].epoch:
        yield f"The run was resumed: what came before epoch {story.epochs[0].epoch} is in an earlier journal."
    if story.skipped:
        yield f"Lines of the journal that were torn or foreign and have been skipped: {story.skipped:,}."
    if story.unfinished:
        yield "The last line of the journal is unfinished and has been left out."


def _facts(story: RunHistory, folder: str) -> Iterator[tuple[str, str]]:
    steps = story.closed.steps if story.closed else story.intervals[-1].step + 1 if story.intervals else 0
    if story.run:
        yield "Run", story.run.name
        try:
            yield "Started", f"{datetime.fromisoformat(story.run.created):%d %B %Y, %H:%M %Z}".strip()
        except ValueError:
            yield "Started", story.run.created
    yield "Length", f"{len(story.epochs):,} epochs, {steps:,} steps"
    yield "Folder", folder
    if story.run:
        yield "Head", story.run.head
        for tracker, place in story.run.places.items():
            if place.url or place.run:
                yield f"Run in {tracker}", _Link(place.url or place.run)


def _plain(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings with dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _plain(value, f"{prefix}{key}.")
        else:
            plain = "none" if value is None else value
            yield prefix + key, plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


class _Link(str):
    """An address, which the page makes a link if it is one of the web."""


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    def shown(value: object) -> str:
        text = escape(str(value))
        is_link = isinstance(value, _Link) and value.startswith(("http://", "https://"))
        return f'<a href="{text}" rel="noreferrer">{text}</a>' if is_link else text

    return "<dl>" + "".join(f"<div><dt>{escape(k)}<dd>{shown(v)}</div>" for k, v in pairs) + "</dl>"


_COLUMNS = {
    "GWA": "gwa",
    "separation": "separation",
    "stable GWA": "stable_gwa",
    "mean": "mean",
    "std": "std",
    "excess kurtosis": "excess_kurtosis",
}


def _table(story: RunHistory) -> str:
    digits = {name: _digits(getattr(r, name) for r in story.epochs) for name in _COLUMNS.values()}
    tags = {m.report.epoch: f'<b style="color:var({m.colour})">{m.word}</b> ' for m in marks(story)}
    rows = []
    for r in story.epochs:
        cells = [number(getattr(r, name), places) for name, places in digits.items()]
        if not r.gwa_defined:
            cells[0] = f'<i title="undefined">({cells[0]})</i>'
        share = f"{number(100 * r.negative_fraction, 1)} %" if r.count else number(math.nan, 0)
        numbers = "".join(f"<td>{cell}" for cell in (*cells, share, f"{r.count:,}", f"{r.excluded:,}"))
        notes = escape("; ".join(r.notes))
        said = f'<td class="notes" tabindex="0" title="{notes}"><div>{tags.get(r.epoch, "")}{notes}</div>'
        rows.append(f'<tr><th scope="row">{r.epoch}{numbers}{said}')
    heads = "".join(f'<th scope="col">{head}' for head in ("epoch", *_COLUMNS, "negative", "samples", "excluded"))
    head = f'<thead><tr>{heads}<th scope="col" class="notes">notes</thead>'
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _suspects(record: SuspectsRecord) -> str:
    """The most suspect samples, with their pictures if there are any."""
    digits = _digits(suspect.mean_score for suspect in record.suspects)
    shown = any(suspect.thumbnail for suspect in record.suspects)
    rows = []
    for suspect, (_, _, seen, *classes) in zip(record.suspects, record.rows(), strict=True):
        cells = [number(suspect.mean_score, digits), f"{seen:,.4g}", *("" if c is None else f"{c}" for c in classes)]
        picture = f'<img src="data:image/png;base64,{escape(suspect.thumbnail)}" alt="">' if suspect.thumbnail else ""
        end = f'<td class="picture">{picture}' if shown else ""
        rows.append(f'<tr><th scope="row">{suspect.id}{"".join(f"<td>{cell}" for cell in cells)}{end}')
    names = ("sample", "mean score", "times seen", "label", "predicted", *(["picture"] if shown else []))
    heads = "".join(f'<th scope="col">{name}' for name in names)
    table = f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    where = f"in epoch {record.epoch}, after step {record.step:,}; {record.samples:,} samples had been scored"
    return f"<p>Lowest mean score over the run first: {where}.</p>{table}"


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(story: RunHistory, folder: str) -> str:
    plotly = _plotly_source()
    figures = {}
    scores = gwa = numbers = "<p>Nothing has been recorded yet.</p>"
    if story.intervals:
        figures["scores"] = score_figure(story)
        strongest = 100 * figures["scores"]["data"][0]["zmax"]
        scores = _SCORES.format(strongest=number(strongest, 1))
    if story.epochs:
        figures["epochs"] = epoch_figure(story)
        undefined = sum(not r.gwa_defined for r in story.epochs)
        gwa = _GWA.format(undefined=_UNDEFINED.format(undefined, len(story.epochs)) if undefined else "")
        numbers = _table(story)
    suspects = ""
    if story.suspects and story.suspects.suspects:
        title = "Samples that are probably mislabelled"
        suspects = f"<section><h2>{title}</h2>{_suspects(story.suspects)}</section>\n"
    headline, name = _headline(story), story.run.name if story.run else folder
    if story.closed:
        faults = _pairs(story.closed.faults.items()) if story.closed.faults else "<p>None.</p>"
    else:
        faults = "<p>Not known: they are written down when the run is closed.</p>"
    # Inside of a script element nothing may look like the end of it.
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}: {escape(headline)}</title>
<style>{_CSS}</style>
<main>
<header class="{"alert" if story.alert else "calm"}">
<p class="eyebrow">Gradient-weight alignment</p>
<h1>{escape(headline)}</h1>
{"".join(f"<p>{escape(remark)}</p>" for remark in _remarks(story))}
{_pairs(_facts(story, folder))}
</header>
<section><h2>Alignment scores over time</h2>{scores}</section>
<section><h2>GWA by epoch</h2>{gwa}</section>
<section class="prose"><h2>How to read this</h2>{_HOW_TO_READ}</section>
<section><h2>The numbers</h2>{numbers}</section>
{suspects}<section><h2>Settings</h2>{_pairs(_plain(story.run.settings if story.run else {}))}</section>
<section><h2>Faults</h2>{faults}</section>
</main>
<script type="application/json" id="figures">{data}</script>
<script>{plotly}</script>
<script>{_SCRIPT}</script>
</html>
"""


def _plotly_source() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise MissingDependencyError("plotly", "report") from error
    return str(get_plotlyjs())


# With this the browser itself refuses to load anything from anywhere.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)

_SCORES = """
<figure><figcaption><span>share of the samples: 0<i class="ramp"></i>{strongest} % and more</span>
<span><i style="--c:var(--median)"></i>median</span></figcaption>
<div id="scores" role="img" aria-label="Distribution of alignment scores over training steps"></div></figure>
<noscript>The figures need JavaScript; the numbers below do not.</noscript>"""

_GWA = """
<figure><figcaption>{undefined}</figcaption>
<div id="epochs" role="img"
aria-label="GWA, separation, stable GWA, mean score, excess kurtosis and share of negative scores by epoch"></div></figure>"""

_UNDEFINED = """
<span><i class="hollow"></i>GWA is undefined here: {:,} of {:,} epochs (shaded; where out of range, at the edge)</span>"""

_HOW_TO_READ = """
<p>Each training sample has a score from &minus;1 to 1: the cosine between the step that its gradient asks for and the
weight of the classifier head. Above zero, the sample wants more of what the head has learned; below zero, it pulls the
other way.</p>
<p><strong>Healthy training</strong> moves the mass right of zero (up, in the first figure) and narrows it.
<strong>Noise in the labels</strong> makes two humps: the one below zero is made of samples whose labels disagree with
what the rest teaches, and often they are wrong. While the network memorises them, the humps draw together.</p>
<p>GWA is the mean score divided by (excess kurtosis + 1.2). Two humps take that denominator to zero and below; then GWA
is undefined (in brackets in the table) and says nothing. Stable GWA divides by (excess kurtosis + 3), which is never
below 1. Separation is how well the scores fall into two groups, the largest share of their variance that lies between the
two sides of a threshold: it rises while the samples that disagree stand out, and falls while they are memorised. The size
of the scores depends on the number of classes, so compare within a run. Epochs and steps count from 0.</p>"""

_CSS = """
:root { --page:#fbfbf9; --card:#fff; --ink:#1b1f24; --muted:#5a626c; --rule:#c6cbd1; --grid:#e9eaea; --zero:#1b1f2477;
  --shade:#6d4fc416; --heat-0:#f1f5fa; --heat-1:#c5d8ed; --heat-2:#83afdb; --heat-3:#3f7fc1; --heat-4:#174f8f;
  --heat-5:#082347; --median:#e8630a; --gwa:#6d4fc4; --stable:#0b6fb8; --separation:#0b7a6f; --mean:#8b929b; --negative:#b0451f;
  --best:#1e7d3c; --alert:#c22a2a; }
@media screen and (prefers-color-scheme: dark) { :root:not(.paper) { --page:#14171b; --card:#1e232a; --ink:#e8e8e4;
  --muted:#a0a8b2; --rule:#4a525d; --grid:#272c34; --zero:#e8e8e477; --shade:#b39dff20; --heat-0:#192633;
  --heat-1:#1d4468; --heat-2:#2a6ea8; --heat-3:#57a0dd; --heat-4:#a5d0f4; --heat-5:#f5fbff; --median:#ff9d4d;
  --gwa:#b39dff; --stable:#5db4f5; --separation:#4fcfc0; --mean:#8d959f; --negative:#f0926b; --best:#63cf82;
  --alert:#ff8080; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1160px; margin:0 auto; padding:40px 24px 72px }
header { border-left:4px solid var(--best); padding-left:20px } header.alert { border-color:var(--alert) }
p { margin:8px 0 } header p, .prose p { max-width:72ch } .eyebrow { color:var(--muted); font-size:14px; margin:0 }
h1 { font-size:clamp(24px,4vw,34px); line-height:1.2; margin:2px 0 12px; letter-spacing:-.01em; text-wrap:balance }
h2 { font-size:20px; line-height:1.3; margin:44px 0 8px }
a { color:var(--stable) } figure { margin:0 } figure > div { height:440px } #epochs { height:920px }
figcaption { display:flex; flex-wrap:wrap; gap:4px 22px; color:var(--muted); font-size:14px }
figcaption i { display:inline-block; width:20px; height:3px; margin-right:7px; vertical-align:middle; background:var(--c) }
.hollow { width:9px; height:9px; border:1.5px solid var(--gwa); border-radius:50% }
.ramp { width:clamp(64px,16vw,120px); height:10px; margin:0 7px; background:linear-gradient(to right, var(--heat-0),
  var(--heat-1), var(--heat-2), var(--heat-3), var(--heat-4), var(--heat-5)) }
dl { display:grid; grid-template-columns:repeat(auto-fill,minmax(200px,1fr)); gap:8px 28px; margin:14px 0 0 }
header dl { display:flex; flex-wrap:wrap } dt { color:var(--muted); font-size:13.5px } dd { margin:0; overflow-wrap:anywhere }
.scroll { overflow:auto; max-height:80vh; border-block:1px solid var(--rule) }
table { border-collapse:separate; border-spacing:0; width:100%; font-size:14px; font-variant-numeric:tabular-nums }
th, td { padding:5px 9px; text-align:right; white-space:nowrap; font-weight:400; border-bottom:1px solid var(--grid) }
thead th { position:sticky; top:0; background:var(--page); color:var(--muted); border-color:var(--rule) }
thead th:first-child, tbody th { position:sticky; left:0; z-index:1; background:var(--page) }
thead th:first-child { z-index:2 } td i { color:var(--muted); font-style:normal }
.notes { text-align:left; width:99% } td.notes { color:var(--muted) }
td.notes div { width:0; min-width:100%; overflow:hidden; text-overflow:ellipsis } td.notes:focus div { white-space:normal }
.picture img { height:40px; image-rendering:pixelated; vertical-align:middle }
@media (max-width:640px) { main { padding:20px 16px 48px } header { padding-left:14px } td.notes div { min-width:44ch } }
@media print { main { padding:0 } body { font-size:13px; --page:#fff } .modebar-container { display:none }
  .prose, figure, tr { break-inside:avoid } h2 { break-after:avoid } .scroll { overflow:visible; max-height:none }
  table { font-size:10.5px } th, td { padding:3px 5px } td.notes div { white-space:normal }
  :root { print-color-adjust:exact } }"""

_SCRIPT = """
const root = document.documentElement, style = getComputedStyle(root);
const figures = JSON.parse(document.getElementById("figures").textContent);
const dressed = v => Array.isArray(v) ? v.map(dressed)
  : v && typeof v === "object" ? Object.fromEntries(Object.entries(v).map(([k, w]) => [k, dressed(w)]))
  : typeof v === "string" && v.startsWith("--") ? style.getPropertyValue(v).trim() : v;
const touch = matchMedia("(pointer: coarse)").matches;
const config = { displaylogo: false, responsive: true, showSendToCloud: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
for (const { data } of Object.values(figures)) for (const t of data)
  if (t.meta) t.text = t.meta[1].map(row => t.meta[0].map(column => column + "<br>" + row));
function draw(width) {
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout } = dressed(figure);
    Plotly.react(id, data, { ...layout, width, dragmode: touch ? false : "zoom" }, config);
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
addEventListener("beforeprint", () => { root.classList.add("paper"); draw(680); });
addEventListener("afterprint", () => {
  root.classList.remove("paper"); draw(); Object.keys(figures).forEach(Plotly.Plots.resize);
});"""
