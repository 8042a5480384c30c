"""Times of the scoring alone on this machine's CPU, compared with the published form and with the bytes that must be read.

    python -m benchmarks.scoring [--json FILE]

The limit is the time to read once what the scores depend on, at the speed at which one thread copies a large tensor (reads and
writes counted). Successive calls use different batches, so that large ones are not in a cache.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.score_forms import (
    SIZES,
    TINY_SIZES,
    Batch,
    bytes_read,
    library_form,
    published_factored,
    published_product,
    random_batch,
)

PRODUCT_ROWS_BYTES = 2**27
"""The published product is timed on as many samples as fit into this; its time is proportional to their number."""


def bandwidth(tiny: bool) -> float:
    """Bytes per second that a copy of 256 MB reads and writes."""
    source = torch.ones(2**16 if tiny else 2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds({"copy": lambda _: target.copy_(source)}, 0.1 if tiny else 2)["copy"]


def median_seconds(calls: dict[str, Callable[[int], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Median seconds of each call. The calls take turns for `seconds`, and at least `least` times."""
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
    for samples, features, classes in TINY_SIZES if tiny else SIZES:
        read = bytes_read(samples, features, classes)
        count = 2 if tiny else int(min(16, max(2, 200e6 // read)))
        batches = [random_batch(samples, features, classes, torch.device("cpu")) for _ in range(count)]
        ours = library_form(features, classes)
        ways: dict[str, Callable[[Batch], Tensor]] = {
            "ours": ours,
            "ours, compiled": torch.compile(ours, dynamic=False, backend="aot_eager" if tiny else "inductor"),
            "published, factored": published_factored,
        }
        first = batches[0]
        expected = published_factored(first)
        for name, way in ways.items():
            error = float((way(first) - expected).abs().max())
            assert error < 1e-4, f"{name} differs by {error}"
        rows = min(samples, max(1, PRODUCT_ROWS_BYTES // (4 * features * classes)))
        part = Batch(*(x[:rows] if x.shape[0] == samples else x for x in first))
        calls = {name: (lambda i, way=way, b=batches: way(b[i % len(b)])) for name, way in ways.items()}
        taken = median_seconds(calls, seconds)
        product = median_seconds({"product": lambda _, part=part: published_product(part)}, seconds / 4, 2)["product"]
        taken["published, product"] = product * samples / rows
        row = {name: {"us": 1e6 * each, "times_the_limit": each * copied / read} for name, each in taken.items()}
        results["sizes"][f"{samples} x {features} x {classes}"] = {
            "bytes": read,
            "limit_us": 1e6 * read / copied,
            "product_rows": rows,
            **row,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="time to measure each size")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
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
