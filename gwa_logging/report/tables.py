"""The report's tables, and its section on suspects: pictures, class pairs and the list."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from gwa_logging.class_pairs import class_pairs
from gwa_logging.records import EpochReport, Suspect, SuspectsRecord
from gwa_logging.report.figures import format_number

_MAX_PAIRS = 10
_SCROLLS_FROM = 16
"""A table with more rows than this may be cut off on a laptop's screen."""


def html_table(names: Iterable[str], rows: Sequence[str], last_name: str = "") -> str:
    """Returns a table that scrolls if it is long, with a line that says so.

    Args:
        names: the names of the columns.
        rows: each one the HTML of a row.
        last_name: the HTML of one more header cell.
    """
    head = "".join(f'<th scope="col">{name}' for name in names) + last_name
    body = "".join(rows)
    hint = f'<p class="hint">{len(rows):,} rows; scroll the table to see all.</p>' if len(rows) > _SCROLLS_FROM else ""
    return f'{hint}<div class="scroll" tabindex="0"><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>'


def decimals(values: Iterable[float]) -> int:
    """Returns the number of decimals that give a column's median magnitude four significant digits."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v) and v)
    return min(max(3 - math.floor(math.log10(sizes[len(sizes) // 2])), 0), 9) if sizes else 3


def suspects_section(record: SuspectsRecord, epochs: Sequence[EpochReport]) -> str:
    """Returns the section on the suspects of a run with these epochs."""
    places = decimals(suspect.mean_score for suspect in record.suspects)
    scored = f"{record.samples:,} samples had been scored"
    until = record.until_epoch
    frozen = (
        ""
        if until is None
        else f" Only the scores up to the stop alert of epoch {until} count: later ones show what the model has memorised."
    )
    return (
        "<section><h2>Samples that are probably mislabelled</h2>"
        f"<p>Lowest mean score first. Recorded {_moment(record, epochs)}, when {scored}.{frozen}</p>"
        f"{_gallery(record.suspects, places)}{_pairs(record.suspects)}{_list(record, places)}</section>"
    )


def _moment(record: SuspectsRecord, epochs: Sequence[EpochReport]) -> str:
    """Returns when the list was made: after an epoch, or in the middle of one."""
    ended = [report.epoch for report in epochs if report.step == record.step]
    return f"{f'after epoch {ended[-1]}' if ended else f'in epoch {record.epoch}'} (step {record.step:,})"


def _gallery(suspects: Sequence[Suspect], places: int) -> str:
    """Returns the pictures of the suspects with their labels; empty without pictures."""
    tiles = [_tile(suspect, places) for suspect in suspects if suspect.thumbnail]
    if not tiles:
        return ""
    hint = f'<p class="hint">{len(tiles):,} pictures; scroll them to see all.</p>' if len(tiles) > _SCROLLS_FROM else ""
    return f'{hint}<div class="gallery scroll" tabindex="0">{"".join(tiles)}</div>'


def _tile(suspect: Suspect, places: int) -> str:
    """Returns a picture with its labels. Hovering over it shows the score."""
    kind = "agrees" if suspect.label in (None, suspect.predicted) else "differs"
    lines = [f"label <b>{suspect.label}</b>"] if suspect.label is not None else []
    if suspect.predicted is not None:
        lines.append(f'predicted <b class="{kind}">{suspect.predicted}</b>')
    lines.append(f"sample {suspect.id}")
    score = f"mean score {format_number(suspect.mean_score, places)}, seen {suspect.times_seen:,.4g} times"
    picture = f'<img src="data:image/png;base64,{escape(suspect.thumbnail or "")}" alt="sample {suspect.id}">'
    return f'<figure title="{score}">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _pairs(suspects: Sequence[Suspect]) -> str:
    """Returns which class is taken for which; empty if labels or predictions are unknown."""
    pairs = class_pairs(suspects)
    if not pairs:
        return ""
    total = sum(pair.suspects for pair in pairs)
    rows = []
    for pair in pairs[:_MAX_PAIRS]:
        share = format_number(100 * pair.suspects / total, 0)
        rows.append(f'<tr><th scope="row">{pair.label}<td>{pair.predicted}<td>{pair.suspects}<td>{share} %')
    more = f" The {_MAX_PAIRS} most frequent of {len(pairs)} pairs:" if len(pairs) > _MAX_PAIRS else ""
    return (
        f"<h3>Which class is taken for which</h3><p>{total} of the suspects have a label that differs from the model's "
        f'prediction.{more}</p><div class="compact">{html_table(["label", "predicted", "suspects", "share"], rows)}</div>'
        "<h3>The list</h3>"
    )


def _list(record: SuspectsRecord, places: int) -> str:
    """Returns the table of the suspects. Columns without any value are left out."""
    names = ["sample", "mean score", "times seen", "label", "predicted", "tokens", "negative", "lowest tenth"]
    columns = [
        [str(suspect.id) for suspect in record.suspects],
        [format_number(suspect.mean_score, places) for suspect in record.suspects],
        [f"{suspect.times_seen:,.4g}" for suspect in record.suspects],
        ["" if suspect.label is None else str(suspect.label) for suspect in record.suspects],
        ["" if suspect.predicted is None else str(suspect.predicted) for suspect in record.suspects],
        ["" if suspect.tokens is None else f"{suspect.tokens:,}" for suspect in record.suspects],
        ["" if suspect.negative_share is None else f"{suspect.negative_share:.0%}" for suspect in record.suspects],
        [
            "" if suspect.lowest_tenth is None else f"{suspect.lowest_tenth:.2g}".replace("-", "\N{MINUS SIGN}")
            for suspect in record.suspects
        ],
    ]
    shown = [(name, column) for name, column in zip(names, columns, strict=True) if any(column)]
    rows = [
        f'<tr><th scope="row">{sample}{"".join(f"<td>{cell}" for cell in cells)}'
        for sample, *cells in zip(*(column for _, column in shown), strict=True)
    ]
    return f'<div class="compact">{html_table([name for name, _ in shown], rows)}</div>'
