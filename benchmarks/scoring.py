"""The scoring alone on this machine: against the published form, and against the bytes that must be read.

    python -m benchmarks.scoring [--json FILE]

The limit is the time to read, once, what the score is made of, at the speed at which a large copy reads and writes on one
thread. Each call works on another batch than the one before, so that none is found in a cache, where they are large.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import (
    SIZES,
    TINY,
    Scored,
    by_input,
    by_logits,
    bytes_read,
    published_factored,
    published_product,
    scored,
)
from gwa_logging.integrations.torch.head_layers import Linear

PRODUCT_ROWS_BYTES = 2**27
"""The published product is timed on as many samples as fit; its time is proportional to them."""


def bandwidth(tiny: bool) -> float:
    """Bytes per second that a copy of 256 MB reads and writes."""
    source = torch.ones(2**16 if tiny else 2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / typical({"copy": lambda _: target.copy_(source)}, 0.1 if tiny else 2)["copy"]


def typical(calls: dict[str, Callable[[int], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Seconds of each call, median; they take turns."""
    for call in calls.values():
        call(0)
        call(1)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, index = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or index < least:
        for name, call in calls.items():
            begin = time.perf_counter()
            call(index)
            taken[name].append(time.perf_counter() - begin)
        index += 1
    return {name: float(np.median(column)) for name, column in taken.items()}


def measure(seconds: float, tiny: bool = False) -> dict[str, Any]:
    """Microseconds of each way at each size."""
    copied = bandwidth(tiny)
    results: dict[str, Any] = {"copy_gb_per_s": copied / 1e9, "sizes": {}}
    for rows, features, classes in TINY if tiny else SIZES:
        layer = Linear(nn.Linear(features, classes), classes, features)
        read = bytes_read(rows, features, classes)
        count = 2 if tiny else int(min(16, max(2, 200e6 // read)))
        batches = [scored(rows, features, classes, torch.device("cpu")) for _ in range(count)]
        ours = by_input if layer.taps_input else by_logits
        compiled = torch.compile(ours, dynamic=False, backend="aot_eager" if tiny else "inductor")
        some = min(rows, max(1, PRODUCT_ROWS_BYTES // (4 * features * classes)))
        ways: dict[str, Callable[[Scored], Tensor]] = {
            "ours": lambda batch, score=ours, layer=layer: score(layer, batch),  # type: ignore[misc]
            "ours, compiled": lambda batch, score=compiled, layer=layer: score(layer, batch),  # type: ignore[misc]
            "published, factored": published_factored,
        }
        first = batches[0]
        expected = published_factored(first)
        for name, way in ways.items():
            error = float((way(first) - expected).abs().max())
            assert error < 1e-4, f"{name} differs by {error}"
        part = Scored(*(x[:some] if x.shape[0] == rows else x for x in first))
        calls = {name: (lambda i, way=way, b=batches: way(b[i % len(b)])) for name, way in ways.items()}
        taken = typical(calls, seconds)
        product = typical({"product": lambda _, part=part: published_product(part)}, seconds / 4, 2)["product"]
        taken["published, product"] = product * rows / some
        row = {name: {"us": 1e6 * each, "times_the_limit": each * copied / read} for name, each in taken.items()}
        results["sizes"][f"{rows} x {features} x {classes}"] = {
            "bytes": read,
            "limit_us": 1e6 * read / copied,
            "product_rows": some,
            **row,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="per size")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.seconds)
    print(f"copy: {results['copy_gb_per_s']:.1f} GB/s")
    for size, row in results["sizes"].items():
        print(f"\n{size}: limit {row['limit_us']:.0f} us")
        for name, way in ((name, way) for name, way in row.items() if isinstance(way, dict)):
            print(f"  {name:22}{way['us']:14.0f} us  {way['times_the_limit']:8.2f} times the limit")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
