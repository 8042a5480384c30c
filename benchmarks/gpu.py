"""What `watch` costs on a GPU: time, memory, kernel launches, and whether the host blocks on the device.

    python -m benchmarks.gpu [--parts resnet50 vit scoring] [--seconds 10] [--json FILE]

Measures training steps of ResNet-50 and ViT-S/16 with 256 images, in bfloat16 autocast, eager and compiled, of a language
model head with 128,000 words and of a head with 21,843 classes. Copies of one model take turns in a new random order each
round: bare, watched, watched with a ledger, and bare again; the difference of the two bare copies is the noise. The steps are
timed by CUDA events, so the host runs ahead of the device as it does in training. Overheads are medians over the rounds with
their 95 % bootstrap interval, and means, which include the flush at every 50th step.

`--tiny` runs the same on small shapes, also on a CPU: a test uses it to show that the benchmark runs.
"""

import argparse
import contextlib
import copy
import gc
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gwa_logging
from benchmarks.device_clock import Stopwatch, copy_bandwidth, median_graph_seconds, median_seconds, synchronize
from benchmarks.models import ResNet, ViT
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
from gwa_logging.faults import Faults

Step = Callable[[], None]
IMAGENET_SAMPLES = 1_281_167  # the size of the ledger
FLUSH_EVERY = 50  # steps, the default of log_every_n_steps


class Work(NamedTuple):
    """A model, the path of its head, a batch, and the optimizer that trains it."""

    model: nn.Module
    head: str
    x: Tensor
    y: Tensor
    optimizer: type[torch.optim.Optimizer]


def resnet50(device: torch.device, tiny: bool) -> Work:
    """256 images of 224 x 224, channels last; 2,048 features, so scored from the logits."""
    model = ResNet((1,)) if tiny else ResNet()
    x = torch.randn(4, 3, 32, 32) if tiny else torch.randn(256, 3, 224, 224)
    model.to(device, memory_format=torch.channels_last)
    x = x.to(device, memory_format=torch.channels_last)
    return Work(model, "head", x, torch.randint(0, 1000, (len(x),), device=device), torch.optim.SGD)


def vit(device: torch.device, tiny: bool) -> Work:
    """256 images of 224 x 224; 384 features for 1,000 classes, so scored from the embeddings."""
    model = ViT(1, 32, 2) if tiny else ViT()
    x = torch.randn(2 if tiny else 256, 3, 224, 224, device=device)
    return Work(model.to(device), "head", x, torch.randint(0, 1000, (len(x),), device=device), torch.optim.AdamW)


def tokens(device: torch.device, tiny: bool) -> Work:
    """4,096 tokens and a head with 128,000 words, in bfloat16."""
    rows, width, words = (8, 16, 40) if tiny else (4096, 1024, 128_000)
    body = [nn.Embedding(words, width), nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*body, nn.Linear(width, words, bias=False)).to(device, torch.bfloat16)
    x, y = torch.randint(0, words, (2, rows), device=device)
    return Work(model, "3", x, y, torch.optim.SGD)


def many_classes(device: torch.device, tiny: bool) -> Work:
    """512 samples and a head with 21,843 classes."""
    rows, width, classes = (8, 16, 40) if tiny else (512, 1024, 21_843)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes)).to(device)
    x = torch.randn(rows, width, device=device)
    return Work(model, "2", x, torch.randint(0, classes, (rows,), device=device), torch.optim.SGD)


WORKS: dict[str, Callable[[torch.device, bool], Work]] = {
    "resnet50": resnet50,
    "vit": vit,
    "tokens": tokens,
    "21843": many_classes,
}


class Steps:
    """Training steps of four copies of one model: bare, watched, watched with a ledger, and bare again."""

    def __init__(self, work: Work, compiled: bool, tiny: bool, directory: str) -> None:
        copies = {"bare": work.model}
        for name in ("watched", "ledger", "again"):
            copies[name] = copy.deepcopy(work.model)
        options: dict[str, Any] = {"head": work.head, "directory": directory}
        self.monitors = {
            "watched": gwa_logging.watch(copies["watched"], **options),
            "ledger": gwa_logging.watch(copies["ledger"], num_samples=IMAGENET_SAMPLES, **options),
        }
        self.ids = torch.randint(0, IMAGENET_SAMPLES, (len(work.y),))  # on the host, as a data loader returns them
        self.device = work.x.device
        self.run = {name: self._step_of(model, name, work, compiled, tiny) for name, model in copies.items()}

    def _step_of(self, model: nn.Module, name: str, work: Work, compiled: bool, tiny: bool) -> Step:
        # A test checks this script, not the compiler's code, so aot_eager will do.
        run = torch.compile(model, fullgraph=True, backend="aot_eager" if tiny else "inductor") if compiled else model
        optimizer = work.optimizer(model.parameters(), lr=1e-4)
        monitor = self.monitors.get(name) if name == "ledger" else None

        def step() -> None:
            if monitor is not None:
                monitor.tag(self.ids)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(run(work.x), work.y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def close(self) -> None:
        """Closes the monitors. Fails if one of them has seen no step."""
        for name, monitor in self.monitors.items():
            monitor.close()
            assert monitor.history, f"the {name} steps were not seen"


def times(steps: Steps, seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each step, float [rounds]. The host runs ahead of the device for ten rounds at a time."""
    rng = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in steps.run}
    watch = Stopwatch(steps.device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        # The first step is not counted: it only fills the device's queue, which is empty after a synchronisation.
        order = ["bare", *(name for _ in range(10) for name in rng.permutation(list(steps.run)))]
        for name in order:
            watch.mark()
            steps.run[name]()
        watch.mark()
        for name, lasted in list(zip(order, watch.seconds(), strict=True))[1:]:
            taken[name].append(lasted)
    return {name: np.array(lasted) for name, lasted in taken.items()}


def overhead(taken: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Per cent over the bare step: the median over the rounds, its 95 % interval, and the mean."""
    bare = taken["bare"] if name == "again" else (taken["bare"] + taken["again"]) / 2
    percent = 100 * (taken[name] - bare) / np.median(bare)
    rng = np.random.default_rng(0)
    low, high = np.percentile([np.median(rng.choice(percent, len(percent))) for _ in range(500)], [2.5, 97.5])
    return {"median": float(np.median(percent)), "low": low, "high": high, "mean": float(percent.mean())}


@contextlib.contextmanager
def recorded_faults() -> Iterator[list[str]]:
    """Yields a list of the faults that occur in this context, with their source lines: watch() never raises them."""
    noted: list[str] = []
    record = Faults.record

    def note(self: Faults, kind: str, message: str, *args: Any) -> None:
        noted.append(f"{kind}: {message} {_source_lines(sys.exc_info()[1])}")
        record(self, kind, message, *args)

    Faults.record = note  # type: ignore[method-assign,assignment]
    try:
        yield noted
    finally:
        Faults.record = record  # type: ignore[method-assign]


def _source_lines(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in reversed(frames[-3:]))


def synchronisations_and_memory(steps: Steps, name: str, count: int) -> dict[str, Any]:
    """Lists the lines that block the host on the device in `count` steps, and measures the device memory that they need.

    Memory in MB: the peak above what was allocated before, and what is still allocated after the steps.
    """
    if steps.device.type != "cuda":
        steps.run[name]()
        return {"synchronisations": ["not measured: no GPU"], "peak_mb": 0.0, "left_mb": 0.0}
    gc.collect()
    synchronize(steps.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with recorded_faults() as found:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(count):
                steps.run[name]()
        except RuntimeError as error:
            found.append(f"{error} {_source_lines(error)}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronize(steps.device)
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return {
        "synchronisations": list(dict.fromkeys(found)),
        "peak_mb": (peak - before) / 1e6,
        "left_mb": (after - before) / 1e6,
    }


def launches(steps: Steps, name: str, count: int) -> dict[str, float]:
    """Kernel launches, copies and fills of one step, averaged over `count` steps; on a CPU the operators."""
    cuda = steps.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(count):
            steps.run[name]()
        synchronize(steps.device)
    names = {
        "launches": ("cudaLaunchKernel", "cuLaunchKernel") if cuda else ("aten::",),
        "copies": ("cudaMemcpy", "cuMemcpy"),
        "fills": ("cudaMemset", "cuMemset"),
        "waits": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
    }
    averages = profile.key_averages()
    numbers = {k: sum(row.count for row in averages if row.key.startswith(n)) / count for k, n in names.items()}
    kernels = [row for row in averages if row.device_type == torch.autograd.DeviceType.CUDA]
    numbers["kernels_seen"] = sum(row.count for row in kernels if not row.key.startswith("Mem")) / count
    return numbers


def measure_step(part: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All figures of one kind of training step."""
    base = part.removesuffix("-compiled")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        steps = Steps(WORKS[base](device, args.tiny), part != base, args.tiny, directory)
        for _ in range(2 if args.tiny else 5):
            for step in steps.run.values():
                step()
        synchronize(device)
        ready = time.perf_counter() - begin
        taken = times(steps, args.seconds)
        watched_steps = 5 if args.tiny else FLUSH_EVERY  # include a flush
        counts = {"bare": 5, "watched": watched_steps, "ledger": watched_steps}
        result: dict[str, Any] = {
            "ready_s": ready,
            "rounds": len(taken["bare"]),
            "bare_ms": float(1e3 * np.median(taken["bare"])),
            **{name: overhead(taken, name) for name in ("watched", "ledger", "again")},
            # Includes the bare step: only if that does not block either does the check say anything about the watched one.
            "checked": {name: synchronisations_and_memory(steps, name, count) for name, count in counts.items()},
            "launches": {name: launches(steps, name, count) for name, count in counts.items()},
        }
        steps.close()
    result["faults"] = {name: dict(monitor.faults) for name, monitor in steps.monitors.items()}
    result["seconds"] = time.perf_counter() - begin
    return result


def measure_scoring(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of the scoring alone, compared with the published form and with the bytes that must be read."""
    bandwidth = copy_bandwidth(device, args.tiny)
    results: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e9}
    for samples, features, classes in TINY_SIZES if args.tiny else SIZES:
        read = bytes_read(samples, features, classes)
        # Successive calls use different batches, so that none is in a cache.
        copies = 2 if args.tiny else int(min(64, max(2, 512e6 // read)))
        batches = [random_batch(samples, features, classes, device) for _ in range(copies)]
        ours = library_form(features, classes)
        ways: dict[str, Callable[[Batch], Tensor]] = {
            "ours": ours,
            "ours, compiled": torch.compile(ours, dynamic=False, backend="aot_eager" if args.tiny else "inductor"),
            "published, product": published_product,
            "published, factored": published_factored,
        }
        limit = read / bandwidth
        row: dict[str, Any] = {"bytes": read, "limit_us": 1e6 * limit}
        expected = published_factored(batches[0])
        for name, way in ways.items():
            error = (way(batches[0]) - expected).abs().max().item()
            assert error < 1e-3, f"{name} differs by {error}"

            def call(index: int, way: Callable[[Batch], Tensor] = way, batches: list[Batch] = batches) -> Tensor:
                return way(batches[index % len(batches)])

            seconds = median_seconds(call, device, 3 if args.tiny or name == "published, product" else 200)
            row[name] = {"us": 1e6 * seconds, "times_the_limit": seconds / limit, "error": error}
            if name != "published, product":
                alone = median_graph_seconds(call, device, len(batches))
                if alone is not None:
                    row[name] |= {"device_us": 1e6 * alone, "device_times_the_limit": alone / limit}
        results[f"{samples} x {features} x {classes}"] = row
        del batches
    return results


def print_part(part: str, row: dict[str, Any]) -> None:
    """Prints the figures of one part."""
    print(f"\n{part}", flush=True)
    if part == "scoring":
        print(f"  copy: {row['copy_gb_per_s']:.0f} GB/s")
        for size, ways in ((s, w) for s, w in row.items() if isinstance(w, dict)):
            print(f"  {size}: limit {ways['limit_us']:.1f} us")
            for name, way in ((n, w) for n, w in ways.items() if isinstance(w, dict)):
                alone = f", {way['device_us']:.1f} us without launches" if "device_us" in way else ""
                print(f"    {name:22}{way['us']:12.1f} us  {way['times_the_limit']:8.1f} times the limit{alone}")
        return
    print(f"  bare step {row['bare_ms']:.2f} ms, {row['rounds']} rounds, ready after {row['ready_s']:.0f} s")
    for name in ("watched", "ledger", "again"):
        over = row[name]
        interval = f"[{over['low']:+.2f}, {over['high']:+.2f}]"
        print(f"  {name:8} {over['median']:+.2f} % {interval} mean {over['mean']:+.2f} %")
    for name, found in row["checked"].items():
        print(f"  {name:8} synchronisations: {found['synchronisations'] or 'none'}")
        print(f"  {name:8} per step: {', '.join(f'{n:.2f} {k}' for k, n in row['launches'][name].items())}")
        print(f"  {name:8} memory: peak {found['peak_mb']:.2f} MB, left {found['left_mb']:.2f} MB")
    print(f"  faults: {row['faults']}")


def main() -> None:
    steps = [name for base in WORKS for name in (base, f"{base}-compiled")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*steps, "scoring"], default=[*steps, "scoring"])
    parser.add_argument("--seconds", type=float, default=10.0, help="time to measure each part")
    parser.add_argument("--json", type=Path, help="file to write the figures to; parts already in it are kept")
    parser.add_argument("--tiny", action="store_true", help="use small shapes; runs on a CPU, too")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no GPU was found; --tiny tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    results["machine"] = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    print(results["machine"])
    for part in args.parts:
        try:
            row = measure_scoring(args, device) if part == "scoring" else measure_step(part, args, device)
        except Exception as error:  # noqa: BLE001 - the other parts may still succeed
            results[part] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(f"\n{part}: {results[part]['traceback']}")
        else:
            results[part] = row
            print_part(part, row)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if any("error" in results[part] for part in args.parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
