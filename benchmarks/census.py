"""The census: watches a model of every family of timm, torchvision and transformers, trains one step, checks every score.

    python benchmarks/census.py --json benchmarks/census.json --docs docs/census.md

needs timm, torchvision and transformers. Every family has random weights, a tiny input and a process of its own. What has
been written to the JSON is not done again, unless `--again PATTERN` names it. The oracle shares no code with what it judges:
the layer is the one that the model's own library declares, and the score of a row is -<delta h^T, W> / (|delta h^T| |W|) in
float64, from plain hooks on that layer.
"""

import argparse
import ast
import functools
import json
import logging
import math
import multiprocessing
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import census_transformers
import census_zoo as zoo
import torch
from torch import Tensor, nn

import gwa_logging

SECONDS = 60.0
"""A model's time limit."""

TOLERANCE = 1e-5

JAX_HEADING = "\n## JAX\n"
"""Starts the last part of the page, which is kept: tests/jax/test_head_census.py has the census behind it."""

Row = dict[str, Any]

SUBJECTS = {
    "timm": zoo.timm_subject,
    "torchvision": zoo.torchvision_subject,
    "transformers": census_transformers.transformers_subject,
}

JUDGED = {
    "transformers/BrosSpadeEEForTokenClassification": "two tasks, a linear layer for the first token of a field and a bilinear "
    "product for the others: two outputs, as the refusal says",
}
"""Refusals whose reason is true though the library has a single layer of that width; why."""


# --- one model --------------------------------------------------------------------------------------------------------


def examine(member: zoo.Member) -> Row:
    """What becomes of one model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    said = []
    subjects = SUBJECTS[member.library](member.name)
    while True:
        try:
            subject = next(subjects, None)
            if subject is None:
                break
            subject.model.train()
            subject.loss().backward()
        except Exception as error:  # noqa: BLE001 - sizes or an input that do not fit, which only the library can tell
            said.append(f"{type(error).__name__}: {error}")
            continue
        return _judge(subject)
    said.append(census_transformers.why_not())
    return {"outcome": "not built", "reason": " | ".join(dict.fromkeys(filter(None, said)))[:500]}


def _judge(subject: zoo.Subject) -> Row:
    model = subject.model
    modules = dict(model.named_modules())
    heads, word = subject.heads, subject.word
    if not heads:
        heads, word = zoo.layers_in(model, ""), f"nothing from the library; {zoo.CLASSES} outputs"
    for path in heads:
        if not modules[path].weight.any():
            nn.init.normal_(modules[path].weight, std=0.02)  # a head of zeros has no score
    effects = {path: effect_of(modules[path], subject) for path in heads}
    heads = [path for path in heads if effects[path] in ("affine", "nonlinear")]
    row: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": subject.given,
        "classifier": heads,
        "kind": ", ".join(dict.fromkeys(type(modules[path]).__name__ for path in heads)),
        "word": word,
        "effect": ", ".join(dict.fromkeys(effects.values())),
    }
    try:
        (seen,) = _watched(subject, None, heads)
    except gwa_logging.HeadNotFoundError as error:
        row["reason"] = str(error).splitlines()[0]
        named = re.search(r"To watch them all, each by itself: head=(\[.*\])\.", row["reason"])
        if not heads:
            return row | {"outcome": "no classifier"}
        if len(heads) == 1 or named is None:
            return row | {"outcome": "refused"}
        several = _watched(subject, ast.literal_eval(named[1]), heads)
        right = {each["head"] for each in several} == set(heads) and all(each["right"] for each in several)
        return row | {
            "outcome": "several" if right else "wrong",
            "rows": several[0]["rows"],
            "difference": max(each["difference"] for each in several),
        }
    if not heads and seen["right"]:  # of an encoder the features: the scores of the layer that makes them
        return row | seen | {"outcome": "no classifier"}
    right = heads == [seen["head"]] and seen["right"]
    return row | seen | {"outcome": "right" if right else "wrong"}


def effect_of(layer: nn.Module, subject: zoo.Subject) -> str:
    """How the logits depend on the weight of a layer: "affine", "nonlinear", "direction only", "none"."""
    subject.model.eval()
    weight = layer.weight
    kept = weight.detach().clone()
    step = torch.randn_like(kept) * (kept.std() + 0.01)

    def logits_with(changed: Tensor) -> Tensor:
        weight.copy_(changed)
        torch.manual_seed(0)
        return subject.logits().double()

    with torch.no_grad():
        at, one, two, longer = map(logits_with, (kept, kept + step, kept + 2 * step, 2 * kept))
        weight.copy_(kept)
    subject.model.train()
    first, second = one - at, two - one
    size = first.abs().max()
    if not size > 0:
        return "none"
    if (longer - at).abs().max() < 1e-4 * size:
        return "direction only"
    return "affine" if (second - first).abs().max() < 1e-3 * size else "nonlinear"


def _watched(subject: zoo.Subject, head: list[str] | None, heads: list[str]) -> list[Row]:
    """Watches, trains one step, and compares the scores of every head that is watched with the oracle's."""
    model = subject.model
    modules = dict(model.named_modules())
    oracles = {path: Oracle(modules[path]) for path in heads or [p for p, m in modules.items() if zoo.is_layer(m)]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        options: Row = {"early_stop": None, "directory": folder, "num_samples": zoo.BATCH}
        with gwa_logging.watch(model, head=head, **options) as monitor:
            seconds = round(time.perf_counter() - started, 2)
            monitor.tag(torch.arange(zoo.BATCH))
            subject.loss().backward()
            optimizer.step()
            monitor.end_epoch()
            rows = []
            for each in (monitor, *monitor.heads.values()):
                said = each._adapter.head  # "head 'fc' (Linear 32 -> 7): why"
                path, how = re.fullmatch(r"head (?:'(.*)'|\(the model itself\)) \(.*?\): (.*)", said).groups(default="")
                rows.append({"head": path, "how": how, "watch_seconds": seconds} | _compared(each, oracles.get(path)))
    for oracle in oracles.values():
        oracle.remove()
    return rows


def _compared(monitor: gwa_logging.Monitor, oracle: "Oracle | None") -> Row:
    """Whether count, mean, deviation and, where a row is a sample of the batch, each score are the oracle's."""
    report = monitor.history[-1]
    if oracle is None:
        return {"right": False, "rows": report.count}
    scores = oracle.scores()
    differences = [abs(report.count - len(scores))]
    if len(scores):
        differences.append(abs(report.mean - float(scores.mean())))
    if len(scores) > 1:
        differences.append(abs(report.std - float(scores.std(correction=0))))
    if len(scores) == oracle.rows == zoo.BATCH:
        ledger = {suspect.id: suspect.mean_score for suspect in monitor.suspects(zoo.BATCH)}
        differences += [abs(ledger.get(i, math.inf) - float(scores[i])) for i in range(zoo.BATCH)]
    worst = max(differences)
    right = bool(worst < TOLERANCE) and len(scores) > 0
    return {"right": right, "rows": len(scores), "difference": float(f"{worst:.1e}")}


class Oracle:
    """Plain hooks on a layer; the scores of its rows in float64."""

    def __init__(self, layer: nn.Module) -> None:
        self._calls: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self._handle = layer.register_forward_hook(self._called)
        self.rows = 0

    def _called(self, layer: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if logits.requires_grad:
            deltas: list[Tensor] = []
            self._calls.append((args[0].detach().clone(), layer.weight.detach().clone(), deltas))
            logits.register_hook(lambda delta: deltas.append(delta.clone()))

    def scores(self) -> Tensor:
        """float64 [rows that have a score]."""
        found = []
        for h, weight, deltas in self._calls:
            if not deltas:
                continue
            h, delta, weight = h.double(), deltas[0].double(), weight.double()
            if weight.ndim > 2:  # a 1x1 convolution: an image is a sample
                h, delta, weight = h.flatten(2).mT, delta.flatten(2).mT, weight.flatten(1)
            else:  # every row is a sample
                h, delta = h.reshape(-1, 1, h.shape[-1]), delta.reshape(-1, 1, delta.shape[-1])
            self.rows += len(h)
            gradients = delta.mT @ h
            norms = gradients.flatten(1).norm(dim=1) * weight.norm()
            found.append((-(gradients * weight).sum((1, 2)) / norms)[norms > 0])
        return torch.cat(found) if found else torch.zeros(0)

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


# --- all models -------------------------------------------------------------------------------------------------------


def in_processes(tasks: Iterable[tuple[str, Callable[[], Any]]], jobs: int, limit: float) -> Iterator[tuple[str, Any]]:
    """Runs each task in a process of its own; its result is a string if it did not come in time, or died."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key, task = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, task), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (key, process, time.monotonic() + limit)
        ready: list[Any] = wait(list(running), timeout=1.0)
        late = [c for c, (_, _, end) in running.items() if c not in ready and time.monotonic() > end]
        for connection in [*ready, *late]:
            key, process, _ = running.pop(connection)
            try:
                result = connection.recv() if connection in ready else f"not done within {limit:g} s"
            except EOFError:
                process.join()
                result = f"the process ended with {process.exitcode}"
            process.kill()
            process.join()
            yield key, result


def _send(connection: Connection, task: Callable[[], Any]) -> None:
    connection.send(task())


def _safe(member: zoo.Member) -> Row:
    try:
        return examine(member)
    except Exception as error:  # noqa: BLE001 - the census counts it
        return {"outcome": "error", "reason": f"{type(error).__name__}: {error}"[:500]}


def members(jobs: int) -> list[zoo.Member]:
    """Every family of every library."""
    import timm

    tasks: list[tuple[str, Callable[[], list[zoo.Member]]]] = [
        (module, functools.partial(zoo.timm_members, module)) for module in timm.list_modules()
    ]
    tasks.append(("torchvision", zoo.torchvision_members))
    found = census_transformers.transformers_members()
    for module, several in in_processes(tasks, jobs, 600):
        if isinstance(several, str):
            raise RuntimeError(f"the models of {module} could not be listed: {several}")
        found += several
    return sorted(found)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/census.json"), help="results; those in it are kept"
    )
    parser.add_argument("--docs", type=Path, help="where the table goes")
    parser.add_argument("--again", metavar="PATTERN", help="do those again whose key or outcome it is found in")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="do no others than those whose key it is found in"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of each model")
    arguments = parser.parse_args()
    state = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    versions = _versions()
    rows: dict[str, Row] = state.get("families", {})
    if not rows:
        rows = {member.key: {"model": member.name} for member in members(arguments.jobs)}
        _write(arguments.json, versions, rows)
    again = re.compile(arguments.again or r"(?!)")
    tasks = []
    for key, row in rows.items():
        member = zoo.Member(*key.split("/", 1), row["model"])
        done = "outcome" in row and not again.search(f"{key} {row['outcome']}")
        if not done and re.search(arguments.only, key):
            tasks.append((key, functools.partial(_safe, member)))
    for i, (key, result) in enumerate(in_processes(tasks, arguments.jobs, arguments.seconds), 1):
        result = {"outcome": "error", "reason": result} if isinstance(result, str) else result
        rows[key] = {"model": rows[key]["model"], **result}
        print(
            f"{i}/{len(tasks)} {key} ({rows[key]['model']}): {result['outcome']} {result.get('reason', '')[:300]}",
            flush=True,
        )
        _write(arguments.json, versions, rows)
    print(*summary(rows), sep="\n")
    if arguments.docs:
        before = arguments.docs.read_text() if arguments.docs.exists() else ""
        _, heading, jax = before.partition(JAX_HEADING)
        arguments.docs.write_text(document(rows, versions).rstrip("\n") + "\n" + heading + jax)


def _write(path: Path, versions: dict[str, str], rows: dict[str, Row]) -> None:
    """One line for each family."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    path.write_text(f'{{"versions": {json.dumps(versions)}, "families": {{\n{lines}\n}}}}\n')


def _versions() -> dict[str, str]:
    zoo.declare_torchvision()
    import timm
    import torchvision
    import transformers

    found = {m.__name__: m.__version__ for m in (torch, torchvision, timm, transformers)}
    return {name: version.split("+")[0] for name, version in found.items()}


COLUMNS = ("right", "several", "refused, true", "refused, false", "wrong", "error", "no classifier", "not built")


def outcome(key: str, row: Row) -> str:
    """The column of a family."""
    if row["outcome"] == "refused":
        return "refused, true" if key in JUDGED else "refused, false"
    return str(row["outcome"])


def summary(rows: dict[str, Row]) -> list[str]:
    """Counts, as a table."""
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
    """docs/census.md."""
    ways = Counter(row["how"] for row in rows.values() if row.get("outcome") == "right")
    slowest = max(row.get("watch_seconds", 0) for row in rows.values())
    worst = max(row.get("difference", 0) for row in rows.values() if row.get("outcome") in ("right", "several"))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# Census: is the head found, and are its scores right?",
        f"Of {named}: the smallest model of every class and kind of classifier in timm, of every class that classifies images "
        "or videos in torchvision, and every class `...For{Sequence,Token,Image,Audio,AudioFrame,Video}Classification` of "
        "transformers, with random weights, seven classes and a tiny input of four samples. Each is watched with "
        "`gwa_logging.watch(model)` and trained one step; count, mean and deviation of the scores, and each sample's own where "
        "a row is a sample, are compared with autograd in float64 on the layer that the library itself declares to be the "
        "classifier. This page is made by:",
        "```bash\npip install torch torchvision timm transformers\n"
        "python benchmarks/census.py --json benchmarks/census.json --docs docs/census.md\n```",
        "\n".join(summary(rows)),
        "\n".join(
            [
                "- **right**: found without help, the right layer, every score within 1e-5 of the oracle's.",
                "- **several**: the output is made by several heads (distilled, averaged, auxiliary). Refused with the list to "
                "pass as `head=[...]`; passed, each head's scores are right.",
                "- **refused**: no head was taken, for a reason that is true, or false.",
                "- **wrong**: another layer than the library's, or other scores. **error**: neither, as said below.",
                "- **no classifier**: an encoder that is built without one, and so has no head to find.",
                "- **not built**: could not be run here, as said below; not counted among the families with one head.",
            ]
        ),
        f"The largest difference from the oracle is {worst:.0e}, and `watch()` took at most {slowest:.1f} s. How the right "
        "ones were found: " + "; ".join(f"{how} ({n})" for how, n in ways.most_common()) + ".",
        "## All but the right ones",
        _table(
            ("family", "model", "outcome", "what was said"),
            [
                (key, row["model"], outcome(key, row), _said(key, row))
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


def _said(key: str, row: Row) -> str:
    said = " ".join(str(row.get("reason") or f"{row.get('how', '')}: `{row.get('head', '')}`").split())
    said = said if len(said) < 400 else said[:400] + "..."
    return f"{said} ({JUDGED[key]})" if key in JUDGED else said


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells)


if __name__ == "__main__":
    main()
