"""Writes the census as a page, docs/census.md, from its results alone."""

from collections import Counter
from typing import Any

Row = dict[str, Any]

JUDGED = {
    "transformers/BrosSpadeEEForTokenClassification": "two tasks, a linear layer for the first token of a field and a bilinear "
    "product for the others: two outputs, as the refusal says",
}
"""Refusals that are correct although the library has a single layer of that width, with the reason."""

COLUMNS = ("right", "several", "refused, true", "refused, false", "wrong", "error", "no classifier", "not built")


def outcome(key: str, row: Row) -> str:
    """The column in which a family is counted."""
    if row["outcome"] == "refused":
        return "refused, true" if key in JUDGED else "refused, false"
    return str(row["outcome"])


def summary(rows: dict[str, Row]) -> list[str]:
    """The counts as lines of a Markdown table."""
    lines = ["| library | families | one head | right of these | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    for library in ("timm/", "torchvision/", "transformers/", ""):
        counts = Counter(outcome(key, row) for key, row in rows.items() if key.startswith(library) and "outcome" in row)
        one = counts["right"] + counts["refused, false"] + counts["wrong"] + counts["error"]
        share = f"{counts['right'] / one:.1%}" if one else "-"
        cells = [library.strip("/") or "all", counts.total(), one, share, *(counts[column] for column in COLUMNS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def document(rows: dict[str, Row], versions: dict[str, str]) -> str:
    """The text of docs/census.md, without its part on JAX."""
    ways = Counter(row["how"] for row in rows.values() if row.get("outcome") == "right")
    slowest = max(row.get("watch_seconds", 0) for row in rows.values())
    worst = max(row.get("difference", 0) for row in rows.values() if row.get("outcome") in ("right", "several"))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# Census: is the head found, and are its scores right?",
        f"Tested with {named}: the smallest model of every class and kind of classifier in timm, of every class that "
        "classifies images or videos in torchvision, and every class "
        "`...For{Sequence,Token,Image,Audio,AudioFrame,Video}Classification` of transformers, with random weights, seven "
        "classes and a tiny input of four samples. Each model is watched with `gwa_logging.watch(model)` and trained for one "
        "step. The count, mean and deviation of the scores, and the individual scores where a row is a sample, are compared "
        "with autograd in float64 on the layer that the library itself declares to be the classifier. This page is written by:",
        "```bash\npip install torch torchvision timm transformers\n"
        "python -m benchmarks.census --json benchmarks/census.json --docs docs/census.md\n```",
        "\n".join(summary(rows)),
        "\n".join(
            [
                "- **right**: the right layer was found automatically, and every score is within 1e-5 of the oracle's.",
                "- **several**: several heads produce the output (distilled, averaged, auxiliary). The model is refused with "
                "the list to pass as `head=[...]`; with that list, the scores of each head are right.",
                "- **refused**: no head was taken, for a reason that is true or false.",
                "- **wrong**: a layer other than the library's was taken, or the scores differ. **error**: none of these; the "
                "reason is given below.",
                "- **no classifier**: an encoder that is built without a classifier, so it has no head.",
                "- **not built**: could not be run here, for the reason given below; not counted among the families with one "
                "head.",
            ]
        ),
        f"The largest difference from the oracle is {worst:.0e}, and `watch()` took at most {slowest:.1f} s. How the right "
        "heads were found: " + "; ".join(f"{how} ({n})" for how, n in ways.most_common()) + ".",
        "## Everything except the right ones",
        _table(
            ("family", "model", "outcome", "what was said"),
            [
                (key, row["model"], outcome(key, row), _message(key, row))
                for key, row in rows.items()
                if row["outcome"] != "right"
            ],
        ),
        "## The right ones",
        _table(
            ("family", "model", "head", "found", "rows", "difference"),
            [
                (
                    key,
                    row["model"],
                    f"`{row['head']}`: {row['kind']}",
                    row["how"],
                    row["rows"],
                    f"{row['difference']:.0e}",
                )
                for key, row in rows.items()
                if row["outcome"] == "right"
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _message(key: str, row: Row) -> str:
    message = " ".join(str(row.get("reason") or f"{row.get('how', '')}: `{row.get('head', '')}`").split())
    message = message if len(message) < 400 else message[:400] + "..."
    return f"{message} ({JUDGED[key]})" if key in JUDGED else message


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells)
