"""What `watch` costs on a GPU: time, memory, kernel launches, and whether the host ever waits for the device.

    python benchmarks/gpu.py [--parts resnet50 vit scoring] [--seconds 10] [--json FILE]

Training steps are those of ResNet-50 and ViT-S/16, B = 256, in bfloat16 autocast, eager and compiled; and those of a token
head with 128,000 words and of a head with 21,843 classes. Copies of a model take turns step by step, in another order each
round: bare, watched, watched with a ledger, and bare again, which against the first is the noise floor. CUDA events stand
between the steps and nothing waits for them, so that the host may run ahead as it does in training. Overheads are medians
over rounds with the 95 % interval of their bootstrap, and the mean, in which the work at every 50th step shows.

`--tiny` is the same in small, on a CPU if need be, so that a test can run it.
"""

import argparse
import contextlib
import copy
import gc
import itertools
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
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.head_layers import Linear, norm

Step = Callable[[], None]
SAMPLES = 1_281_167  # of ImageNet: the size of the ledger
EVERY = 50  # steps between two histograms, by default


class Bottleneck(nn.Module):
    """A residual block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50 with 1,000 classes; fewer blocks for a test."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(channels, 64 * 2**stage, 2 if stage and not block else 1))
                channels = 256 * 2**stage
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block, normalised before its parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(*shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape))
        return x + self.mlp(self.norms[1](x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """ViT-S/16 with 1,000 classes; fewer layers for a test."""

    def __init__(self, layers: int = 12, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 197, width))
        self.body = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.body(x)[:, 0])  # type: ignore[no-any-return]


class Work(NamedTuple):
    """A model, the path of its head, a batch, and how it is trained."""

    model: nn.Module
    head: str
    x: Tensor
    y: Tensor
    optimizer: type[torch.optim.Optimizer]


def resnet50(device: torch.device, tiny: bool) -> Work:
    """B = 256 images of 224 x 224, channels last; 2,048 features, so scored by the logits."""
    model = ResNet((1,)) if tiny else ResNet()
    x = torch.randn(4, 3, 32, 32) if tiny else torch.randn(256, 3, 224, 224)
    model.to(device, memory_format=torch.channels_last)
    x = x.to(device, memory_format=torch.channels_last)
    return Work(model, "head", x, torch.randint(0, 1000, (len(x),), device=device), torch.optim.SGD)


def vit(device: torch.device, tiny: bool) -> Work:
    """B = 256 images of 224 x 224; 384 features for 1,000 classes, so scored by the embeddings."""
    model = ViT(1, 32, 2) if tiny else ViT()
    x = torch.randn(2 if tiny else 256, 3, 224, 224, device=device)
    return Work(model.to(device), "head", x, torch.randint(0, 1000, (len(x),), device=device), torch.optim.AdamW)


def tokens(device: torch.device, tiny: bool) -> Work:
    """A batch of 4,096 tokens before a head with 128,000 words, in bfloat16."""
    rows, width, words = (8, 16, 40) if tiny else (4096, 1024, 128_000)
    body = [nn.Embedding(words, width), nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*body, nn.Linear(width, words, bias=False)).to(device, torch.bfloat16)
    x, y = torch.randint(0, words, (2, rows), device=device)
    return Work(model, "3", x, y, torch.optim.SGD)


def many_classes(device: torch.device, tiny: bool) -> Work:
    """B = 512 before a head with 21,843 classes."""
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
    """Copies of one model: bare, watched, with a ledger, and bare again; each with its step."""

    def __init__(self, work: Work, compiled: bool, tiny: bool, directory: str) -> None:
        copies = {"bare": work.model}
        for name in ("watched", "ledger", "again"):
            copies[name] = copy.deepcopy(work.model)
        self.monitors = {
            "watched": gwa_logging.watch(copies["watched"], head=work.head, directory=directory),
            "ledger": gwa_logging.watch(copies["ledger"], head=work.head, directory=directory, num_samples=SAMPLES),
        }
        self.ids = torch.randint(0, SAMPLES, (len(work.y),))  # on the host, as a loader gives them
        self.device = work.x.device
        self.run = {name: self._step_of(model, name, work, compiled, tiny) for name, model in copies.items()}

    def _step_of(self, model: nn.Module, name: str, work: Work, compiled: bool, tiny: bool) -> Step:
        # A test is about this script, not about the code that the compiler makes.
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
        """Ends the watches; says so if they saw nothing."""
        for name, monitor in self.monitors.items():
            monitor.close()
            assert monitor.history, f"the {name} steps were not seen"


def wait(device: torch.device) -> None:
    """Waits for everything that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Marks moments on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Marks the moment when the device has come so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next; waits, and begins anew."""
        wait(self.device)
        marks, self.marks = self.marks, []
        pairs = itertools.pairwise(marks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def times(steps: Steps, seconds: float) -> dict[str, np.ndarray]:
    """Seconds, float [rounds], of each step, in turn. The host runs ahead of the device within ten rounds."""
    rng = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in steps.run}
    watch = Stopwatch(steps.device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        # One step that is not counted: it fills the queue of the device, which was just waited for.
        order = ["bare", *(name for _ in range(10) for name in rng.permutation(list(steps.run)))]
        for name in order:
            watch.mark()
            steps.run[name]()
        watch.mark()
        for name, lasted in list(zip(order, watch.seconds(), strict=True))[1:]:
            taken[name].append(lasted)
    return {name: np.array(lasted) for name, lasted in taken.items()}


def overhead(taken: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Per cent over the bare step: median over rounds with its 95 % interval, and the mean."""
    bare = taken["bare"] if name == "again" else (taken["bare"] + taken["again"]) / 2
    percent = 100 * (taken[name] - bare) / np.median(bare)
    rng = np.random.default_rng(0)
    low, high = np.percentile([np.median(rng.choice(percent, len(percent))) for _ in range(500)], [2.5, 97.5])
    return {"median": float(np.median(percent)), "low": low, "high": high, "mean": float(percent.mean())}


@contextlib.contextmanager
def noted_faults() -> Iterator[list[str]]:
    """Faults of the watch while this is open, each with the line it came from: they never reach the training step."""
    noted: list[str] = []
    record = Faults.record

    def note(self: Faults, kind: str, message: str, *args: Any) -> None:
        noted.append(f"{kind}: {message} {_line(sys.exc_info()[1])}")
        record(self, kind, message, *args)

    Faults.record = note  # type: ignore[method-assign,assignment]
    try:
        yield noted
    finally:
        Faults.record = record  # type: ignore[method-assign]


def _line(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in reversed(frames[-3:]))


def checked(steps: Steps, name: str, count: int) -> dict[str, Any]:
    """Where the host waited for the device in some steps (nowhere, if empty), and what they needed of its memory.

    MB on the device: the peak above what lay there before, and what was left when they were done.
    """
    if steps.device.type != "cuda":
        steps.run[name]()
        return {"synchronisations": ["not measured: no GPU"], "peak_mb": 0.0, "left_mb": 0.0}
    gc.collect()
    wait(steps.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with noted_faults() as found:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(count):
                steps.run[name]()
        except RuntimeError as error:
            found.append(f"{error} {_line(error)}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    wait(steps.device)
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return {
        "synchronisations": list(dict.fromkeys(found)),
        "peak_mb": (peak - before) / 1e6,
        "left_mb": (after - before) / 1e6,
    }


def launches(steps: Steps, name: str, count: int) -> dict[str, float]:
    """Kernels, copies and fills that one step gives to the device, on average over `count` steps; on a CPU, its operators."""
    cuda = steps.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(count):
            steps.run[name]()
        wait(steps.device)
    names = {
        "launches": ("cudaLaunchKernel", "cuLaunchKernel") if cuda else ("aten::",),
        "copies": ("cudaMemcpy", "cuMemcpy"),
        "fills": ("cudaMemset", "cuMemset"),
        "waits": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
    }
    averages = profile.key_averages()
    numbers = {k: sum(row.count for row in averages if row.key.startswith(n)) / count for k, n in names.items()}
    on_device = [row for row in averages if row.device_type == torch.autograd.DeviceType.CUDA]
    numbers["kernels_seen"] = sum(row.count for row in on_device if not row.key.startswith("Mem")) / count
    return numbers


def measure_step(part: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything about one kind of training step."""
    base = part.removesuffix("-compiled")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        steps = Steps(WORKS[base](device, args.tiny), part != base, args.tiny, directory)
        for _ in range(2 if args.tiny else 5):
            for step in steps.run.values():
                step()
        wait(device)
        ready = time.perf_counter() - begin
        taken = times(steps, args.seconds)
        # With a flush among them, where there is one.
        counts = {"bare": 5, "watched": 5 if args.tiny else EVERY, "ledger": 5 if args.tiny else EVERY}
        result: dict[str, Any] = {
            "ready_s": ready,
            "rounds": len(taken["bare"]),
            "bare_ms": float(1e3 * np.median(taken["bare"])),
            **{name: overhead(taken, name) for name in ("watched", "ledger", "again")},
            # The bare step must not wait either, or the check would tell nothing.
            "checked": {name: checked(steps, name, count) for name, count in counts.items()},
            "launches": {name: launches(steps, name, count) for name, count in counts.items()},
        }
        steps.close()
    result["faults"] = {name: dict(monitor.faults) for name, monitor in steps.monitors.items()}
    result["seconds"] = time.perf_counter() - begin
    return result


class Scored(NamedTuple):
    """What a scoring function may read: of one batch, float32."""

    delta: Tensor
    logits: Tensor
    embeddings: Tensor
    grad_embeddings: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor


def by_logits(layer: Linear, batch: Scored) -> Tensor:
    """Ours for heads with no more classes than features."""
    terms = layer.by_logits(batch.delta, batch.logits, batch.embeddings, batch.bias, norm(batch.weight))
    return terms.scores()


def by_input(layer: Linear, batch: Scored) -> Tensor:
    """Ours for the others."""
    kept = layer.by_input(batch.delta)
    return layer.by_input_terms(kept, batch.grad_embeddings, batch.embeddings, norm(batch.weight)).scores()


PRODUCT_BYTES = 4 * 2**30
"""How much of the B x C x D product is made at a time; as a whole it would not fit for the largest head."""


def published_product(batch: Scored) -> Tensor:
    """The published closed form from labels, with the weight's gradient of every sample, [B, C, D], written out."""
    classes = batch.logits.shape[1]
    direction = F.one_hot(batch.labels, classes).float() - batch.logits.softmax(1)
    rows = max(1, PRODUCT_BYTES // (4 * batch.weight.numel()))
    pieces = []
    for some, h in zip(direction.split(rows), batch.embeddings.split(rows), strict=True):
        grads = torch.einsum("bc,bd->bcd", some, h)
        pieces.append((grads * batch.weight).sum((1, 2)) / grads.flatten(1).norm(dim=1))
    return torch.cat(pieces) / batch.weight.norm()


def published_scores(logits: Tensor, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The published closed form with the product taken apart: one more multiplication by the head's weight."""
    direction = F.one_hot(labels, logits.shape[1]).to(logits.dtype) - logits.softmax(1)
    product = ((direction @ weight) * embeddings).sum(1)
    return product / (direction.norm(dim=1) * embeddings.norm(dim=1) * weight.norm())


def published_factored(batch: Scored) -> Tensor:
    """That of one batch."""
    return published_scores(batch.logits, batch.embeddings, batch.weight, batch.labels)


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(2**16 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / typical(lambda _: target.copy_(source), device, 20)


def typical(call: Callable[[int], Any], device: torch.device, repetitions: int) -> float:
    """Seconds of a call on the device's clock, median. The call is told how often it was called."""
    for index in range(3):
        call(index)
    watch = Stopwatch(device)
    for index in range(repetitions):
        watch.mark()
        call(index)
    watch.mark()
    return float(np.median(watch.seconds()))


def on_device(call: Callable[[int], Any], device: torch.device, count: int) -> float | None:
    """Seconds of a call as the device sees it, without the host's launches: `count` calls in one recorded graph."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return typical(lambda _: graph.replay(), device, 20) / count


SIZES = [(512, 512, 10), (1024, 768, 1000), (512, 1024, 21843)]
"""B, D, C."""

TINY = [(8, 16, 4), (8, 4, 16)]


def bytes_read(rows: int, features: int, classes: int) -> int:
    """What the score is made of, in float32: delta, z, h, W and b; with more classes than features delta, dL/dh, h and W."""
    if classes > features:
        return 4 * (rows * (classes + 2 * features) + classes * features)
    return 4 * (rows * (2 * classes + features) + classes * (features + 1))


def measure_scoring(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The scoring alone, against the published form and against the bytes that must be read."""
    bandwidth = copy_bandwidth(device, args.tiny)
    results: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e9}
    for rows, features, classes in TINY if args.tiny else SIZES:
        layer = Linear(nn.Linear(features, classes), classes, features)
        read = bytes_read(rows, features, classes)
        # Several batches in turn, so that none is found in a cache.
        copies = 2 if args.tiny else int(min(64, max(2, 512e6 // read)))
        batches = [scored(rows, features, classes, device) for _ in range(copies)]
        ours = by_input if layer.taps_input else by_logits
        compiled = torch.compile(ours, dynamic=False, backend="aot_eager" if args.tiny else "inductor")
        ways: dict[str, Callable[[Scored], Tensor]] = {
            "ours": lambda batch, ours=ours, layer=layer: ours(layer, batch),  # type: ignore[misc]
            "ours, compiled": lambda batch, ours=compiled, layer=layer: ours(layer, batch),  # type: ignore[misc]
            "published, product": published_product,
            "published, factored": published_factored,
        }
        limit = read / bandwidth
        row: dict[str, Any] = {"bytes": read, "limit_us": 1e6 * limit}
        expected = published_factored(batches[0])
        for name, way in ways.items():
            error = (way(batches[0]) - expected).abs().max().item()
            assert error < 1e-3, f"{name} differs by {error}"
            repetitions = 3 if args.tiny or name == "published, product" else 200
            seconds = typical(lambda i, way=way, b=batches: way(b[i % len(b)]), device, repetitions)  # type: ignore[misc]
            row[name] = {"us": 1e6 * seconds, "times_the_limit": seconds / limit, "error": error}
            if name != "published, product":
                alone = on_device(lambda i, way=way, b=batches: way(b[i % len(b)]), device, len(batches))  # type: ignore[misc]
                if alone is not None:
                    row[name] |= {"device_us": 1e6 * alone, "device_times_the_limit": alone / limit}
        results[f"{rows} x {features} x {classes}"] = row
        del batches
    return results


def scored(rows: int, features: int, classes: int, device: torch.device) -> Scored:
    """A batch as a head leaves it, with cross-entropy."""
    h, w = torch.randn(rows, features, device=device), torch.randn(classes, features, device=device) / features**0.5
    bias, labels = torch.randn(classes, device=device), torch.randint(0, classes, (rows,), device=device)
    z = F.linear(h, w, bias)
    delta = (z.softmax(1) - F.one_hot(labels, classes)) / rows
    return Scored(delta, z, h, delta @ w, w, bias, labels)


def percent(row: dict[str, float]) -> str:
    """For people."""
    return f"{row['median']:+.2f} % [{row['low']:+.2f}, {row['high']:+.2f}] mean {row['mean']:+.2f} %"


def show(part: str, row: dict[str, Any]) -> None:
    """Prints one part."""
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
        print(f"  {name:8} {percent(row[name])}")
    for name, found in row["checked"].items():
        print(f"  {name:8} synchronisations: {found['synchronisations'] or 'none'}")
        print(f"  {name:8} per step: {', '.join(f'{n:.2f} {k}' for k, n in row['launches'][name].items())}")
        print(f"  {name:8} memory: peak {found['peak_mb']:.2f} MB, left {found['left_mb']:.2f} MB")
    print(f"  faults: {row['faults']}")


def main() -> None:
    steps = [name for base in WORKS for name in (base, f"{base}-compiled")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*steps, "scoring"], default=[*steps, "scoring"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, per part")
    parser.add_argument("--json", type=Path, help="where to write the numbers; parts that are there already are kept")
    parser.add_argument("--tiny", action="store_true", help="small shapes, and a CPU will do")
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
            show(part, row)
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
