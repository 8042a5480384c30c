"""Measures what `gwa_logging` and its alternatives cost, and writes docs/performance.md with its picture.

    python -m benchmarks [--minutes 10] [--only PyTorch MLP] [--tiny] [--docs DIR]

`--tiny` runs everything briefly, for the tests. `--page` only rewrites the page from the figures of the last run.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import jax_steps, page, scoring, torch_steps
from benchmarks.measuring import measure, overheads
from benchmarks.score_forms import bytes_read

RESULTS = Path(__file__).parent / "performance.json"


def machine() -> dict[str, Any]:
    """Describes this machine and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
    }


def measured_groups(args: argparse.Namespace, directory: str, seconds: float) -> dict[str, Any]:
    """Measures all steps of each model and prints the figures as they come."""
    results = {}
    names = {"torch": ["MLP", "21,843 classes"], "jax": ["MLP"]} if args.tiny else {}
    groups = {
        **torch_steps.groups(directory, names.get("torch", list(torch_steps.WORKS))),
        **jax_steps.groups(directory, names.get("jax", list(jax_steps.WORKS))),
    }
    if args.tiny:
        del groups["PyTorch 21,843 classes, compiled"]  # the compiler takes longer than all the rest
    wanted = {name: make for name, make in groups.items() if not args.only or any(o in name for o in args.only)}
    for name, make in wanted.items():
        begin = time.perf_counter()
        group = make()
        share = 1.0 if ", compiled" in name or name.startswith("JAX") else 1.5
        taken = measure(group.steps, share * seconds, 1 if args.tiny else 3, 2 if args.tiny else 10)
        group.check()
        rows = overheads(taken)
        results[name] = {
            "bare_ms": float(1e3 * np.median(taken["bare"])),
            "rounds": len(taken["bare"]),
            "steps": rows,
            "missing": group.missing,
            "read_bytes": bytes_read(*group.head),
        }
        print(f"\n{name}: {results[name]['bare_ms']:.2f} ms, {time.perf_counter() - begin:.0f} s", flush=True)
        for other, row in rows.items():
            print(
                f"  {other:24}{row['median']:+8.2f} % [{row['low']:+.2f}, {row['high']:+.2f}]  mean {row['mean']:+.2f} %"
            )
        del group
        torch.compiler.reset()
        jax.clear_caches()
    return results


def measured_scale(*options: str) -> dict[str, Any]:
    """The figures of `benchmarks.scale`, from a process of its own: this one has imported much that its ranks do not need."""
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "benchmarks.scale", "--json=scale.json", *options]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, Any] = json.loads(Path("scale.json").read_text())
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="approximate time in all")
    parser.add_argument(
        "--only", nargs="+", default=[], help="only groups whose names contain one of these; leaves the page unchanged"
    )
    parser.add_argument("--tiny", action="store_true", help="run everything briefly")
    parser.add_argument("--page", action="store_true", help="only write the page, from the figures of the last run")
    parser.add_argument("--docs", type=Path, default=page.DOCS, help="folder of the page")
    args = parser.parse_args(arguments)
    if args.page:
        print(page.write(json.loads(RESULTS.read_text()), args.docs))
        return
    torch.set_num_threads(1)
    here = machine()
    print(here)
    # The compilers take two minutes, scoring and scale one or two; the groups share the rest.
    seconds = 0.1 if args.tiny else max(2.0, 60 * (args.minutes - 4.5) / 21)
    docs = args.docs.resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, contextlib.chdir(directory):
        results = {"machine": here, "groups": measured_groups(args, directory, seconds)}
        if args.only:
            return
        results["scoring"] = scoring.measure(0.1 if args.tiny else 8.0, args.tiny)
        results["scale"] = measured_scale(*(("--steps=60", "--ranks", "1", "2", "--losing=0") if args.tiny else ()))
    if not args.tiny:
        RESULTS.write_text(json.dumps(results, indent=1))
    print(page.write(results, docs))


if __name__ == "__main__":
    main()
