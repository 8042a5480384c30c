"""The census: watches a model of every family in timm, torchvision and transformers for one step and checks every score.

    python -m benchmarks.census --json benchmarks/census.json --docs docs/census.md

Needs timm, torchvision and transformers. Each family runs in its own process, with random weights and a tiny input. Results in
the JSON file are kept unless `--again PATTERN` matches them. The oracle shares no code with the library: the right layer is the
one that the model's own library declares, and a row's score is -<delta h^T, W> / (|delta h^T| |W|) in float64, computed from
plain hooks on that layer.
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
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gwa_logging
from benchmarks import census_transformers
from benchmarks import census_zoo as zoo
from benchmarks.census_page import Row, document, summary

SECONDS = 60.0
"""Time limit of one model."""

TOLERANCE = 1e-5

JAX_HEADING = "\n## JAX\n"
"""Begins the last part of the page, which is left unchanged: it comes from tests/jax/test_head_census.py."""

SUBJECTS = {
    "timm": zoo.timm_subject,
    "torchvision": zoo.torchvision_subject,
    "transformers": census_transformers.transformers_subject,
}


# --- one model --------------------------------------------------------------------------------------------------------


def examine(member: zoo.Member) -> Row:
    """Builds, watches and trains one model, and returns the outcome."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    errors = []
    subjects = SUBJECTS[member.library](member.name)
    while True:
        try:
            subject = next(subjects, None)
            if subject is None:
                break
            subject.model.train()
            subject.loss().backward()
        except Exception as error:  # noqa: BLE001 - the sizes or the input do not fit, and every library has its own error for it
            errors.append(f"{type(error).__name__}: {error}")
            continue
        return _judge(subject)
    errors.append(census_transformers.build_failures())
    return {"outcome": "not built", "reason": " | ".join(dict.fromkeys(filter(None, errors)))[:500]}


def _judge(subject: zoo.Subject) -> Row:
    model = subject.model
    modules = dict(model.named_modules())
    heads, source = subject.heads, subject.source
    if not heads:
        heads, source = zoo.layers_in(model, ""), f"nothing from the library; {zoo.CLASSES} outputs"
    for path in heads:
        if not modules[path].weight.any():
            nn.init.normal_(modules[path].weight, std=0.02)  # with a head of zeros, no sample has a score
    effects = {path: effect_of(modules[path], subject) for path in heads}
    heads = [path for path in heads if effects[path] in ("affine", "nonlinear")]
    row: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": subject.input_shape,
        "classifier": heads,
        "kind": ", ".join(dict.fromkeys(type(modules[path]).__name__ for path in heads)),
        "word": source,
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
    if not heads and seen["right"]:  # an encoder: the scores are those of the layer that computes its features
        return row | seen | {"outcome": "no classifier"}
    right = heads == [seen["head"]] and seen["right"]
    return row | seen | {"outcome": "right" if right else "wrong"}


def effect_of(layer: nn.Module, subject: zoo.Subject) -> str:
    """How the logits depend on a layer's weight: "affine", "nonlinear", "direction only" or "none"."""
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
    """Watches, trains one step, and compares the scores of each watched head with the oracle's."""
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
                described = each._adapter.head  # "head 'fc' (Linear 32 -> 7): why"
                path, how = re.fullmatch(r"head (?:'(.*)'|\(the model itself\)) \(.*?\): (.*)", described).groups(
                    default=""
                )
                rows.append({"head": path, "how": how, "watch_seconds": seconds} | _compared(each, oracles.get(path)))
    for oracle in oracles.values():
        oracle.remove()
    return rows


def _compared(monitor: gwa_logging.Monitor, oracle: "Oracle | None") -> Row:
    """Compares count, mean and standard deviation with the oracle's, and each score if a row is a sample of the batch."""
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
    """Scores of the rows of a layer in float64, from plain hooks on it."""

    def __init__(self, layer: nn.Module) -> None:
        self._forwards: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self._handle = layer.register_forward_hook(self._on_forward)
        self.rows = 0

    def _on_forward(self, layer: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if logits.requires_grad:
            deltas: list[Tensor] = []
            self._forwards.append((args[0].detach().clone(), layer.weight.detach().clone(), deltas))
            logits.register_hook(lambda delta: deltas.append(delta.clone()))

    def scores(self) -> Tensor:
        """float64 [rows that have a score]."""
        found = []
        for h, weight, deltas in self._forwards:
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
        """Removes the hook."""
        self._handle.remove()


# --- all models -------------------------------------------------------------------------------------------------------


def in_processes(tasks: Iterable[tuple[str, Callable[[], Any]]], jobs: int, limit: float) -> Iterator[tuple[str, Any]]:
    """Runs each task in its own process. The result of a task that timed out or died is a string with the reason."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key, task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, task), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (key, process, time.monotonic() + limit)
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
    """One member of every family of every library."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/census.json"), help="file of the results; those in it are kept"
    )
    parser.add_argument("--docs", type=Path, help="page to write")
    parser.add_argument("--again", metavar="PATTERN", help="repeat the families whose key or outcome matches")
    parser.add_argument("--only", metavar="PATTERN", default="", help="run only the families whose key matches")
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
    """Writes the results, one line per family."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    path.write_text(f'{{"versions": {json.dumps(versions)}, "families": {{\n{lines}\n}}}}\n')


def _versions() -> dict[str, str]:
    zoo.declare_torchvision()
    import timm
    import torchvision
    import transformers

    found = {m.__name__: m.__version__ for m in (torch, torchvision, timm, transformers)}
    return {name: version.split("+")[0] for name, version in found.items()}


if __name__ == "__main__":
    main()
