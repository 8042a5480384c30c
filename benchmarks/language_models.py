"""What the loss of a language model's head costs: time and peak memory of full logits and of fused losses, bare and watched.

    python -m benchmarks.language_models [--vocabulary 32000 128000] [--rows 4096] [--width 256] [--seconds 60] [--compiled]

Peak memory is that of a new process per way, above what it needs before the step. For the times the ways take turns in one
process; "again" is the bare fused loss a second time, so its difference is the noise of the machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gwa_logging
from benchmarks.measuring import measure, overheads
from gwa_logging.integrations.torch import linear_cross_entropy

ROOT = Path(__file__).parents[1]


class Decoder(nn.Module):
    """The end of a language model: its last layer, its head and its loss."""

    def __init__(self, loss: "Loss", classes: int, width: int) -> None:
        super().__init__()
        self.loss = loss
        self.body = nn.Linear(32, width)
        self.lm_head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean loss of inputs [N, 32] and classes [N]."""
        return self.loss(torch.tanh(self.body(x)), self, target)


Loss = Callable[[Tensor, Decoder, Tensor], Tensor]


def full_logits(hidden: Tensor, model: Decoder, target: Tensor) -> Tensor:
    """The loss of the head's output."""
    return F.cross_entropy(model.lm_head(hidden), target)


def fused(hidden: Tensor, model: Decoder, target: Tensor) -> Tensor:
    """This library's fused loss."""
    return linear_cross_entropy(hidden, model.lm_head.weight, target)


def of_torch(hidden: Tensor, model: Decoder, target: Tensor) -> Tensor:
    """PyTorch's fused loss, from 2.13 on, in its chunked form."""
    loss: Any = F.linear_cross_entropy
    return loss(hidden, model.lm_head.weight, target, options=nn.LinearCrossEntropyOptions())  # type: ignore[no-any-return]


def of_liger(hidden: Tensor, model: Decoder, target: Tensor) -> Tensor:
    """Liger's fused loss, on a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, hidden, target)  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Loss, bool]] = {
    "full logits": (full_logits, False),
    "full logits, watched": (full_logits, True),
    "PyTorch's fused loss": (of_torch, False),
    "Liger's fused loss": (of_liger, False),
    "bare": (fused, False),
    "again": (fused, False),
    "watched": (fused, True),
}
"""The loss, and whether the model is watched. "bare" is this library's fused loss without `watch`."""


def step_of(way: str, args: argparse.Namespace, classes: int, monitors: ExitStack) -> Callable[[], None]:
    """A training step, whose monitor is closed with `monitors`."""
    loss, is_watched = WAYS[way]
    torch.manual_seed(0)
    model = Decoder(loss, classes, args.width).to(args.device)
    if is_watched:
        directory = monitors.enter_context(tempfile.TemporaryDirectory())
        monitors.enter_context(gwa_logging.watch(model, head=model.lm_head, directory=directory))
    trained = torch.compile(model) if args.compiled else model
    x = torch.randn(args.rows, 32, device=args.device)
    target = torch.randint(0, classes, (args.rows,), device=args.device)

    def step() -> None:
        trained(x, target).backward()
        model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step


def ways_on(device: str) -> list[str]:
    """The ways that run on a device and with this PyTorch."""
    missing = set() if hasattr(F, "linear_cross_entropy") else {"PyTorch's fused loss"}
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        missing.add("Liger's fused loss")
    if device == "cpu":  # its kernels need a GPU
        missing.add("Liger's fused loss")
    return [way for way in WAYS if way not in missing]


def peak_megabytes(way: str, args: argparse.Namespace, classes: int) -> float:
    """Peak memory of a step in this process, above what it has needed before them."""
    with ExitStack() as monitors:
        step = step_of(way, args, classes, monitors)
        if args.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        before = _peak_kilobytes()
        step()
        return (_peak_kilobytes() - before) / 1024


def _peak_kilobytes() -> int:
    """Peak memory of this process. On Linux `ru_maxrss` begins with that of the process that has started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_in_new_process(way: str, classes: int, arguments: list[str]) -> float:
    """`peak_megabytes` of a new process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.language_models",
        *arguments,
        "--peak",
        way,
        "--vocabulary",
        str(classes),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> dict[str, Any]:
    """Prints the figures of every way, and returns them by vocabulary and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the times of one vocabulary; 0 leaves them out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.peak:
        print(peak_megabytes(args.peak, args, args.vocabulary[0]))
        return {}
    results: dict[str, Any] = {}
    for classes in args.vocabulary:
        found = {
            way: {"peak_mb": peak_in_new_process(way, classes, arguments)}
            for way in ways_on(args.device)
            if way != "again"
        }
        if args.seconds:
            with ExitStack() as monitors:
                steps = {way: step_of(way, args, classes, monitors) for way in ways_on(args.device)}
                times = measure(steps, args.seconds, warm_up=1, least=3)
                for way, overhead in overheads(times).items():
                    found.setdefault(way, {}).update(overhead)
                found["bare"]["ms"] = float(sorted(1e3 * times["bare"])[len(times["bare"]) // 2])
        results[str(classes)] = found
        for way, figures in found.items():
            print(classes, way, json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
