"""What `watch(keep_best=)` costs: the average at each step, and the copy and the file at each new best epoch.

    python -m benchmarks.weights [--tiny] [--batch 16] [--repeats 20]

Prints a table with the median times in ms, and the average's share of a training step with AdamW, on the GPU if there is one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gwa_logging
from benchmarks.models import ResNet, ViT
from gwa_logging.best_weights import write_atomically
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.weights import TorchWeights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _models(*, tiny: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """By name: the model, the shape of its input, and its number of classes."""

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    image = (3, 224, 224)
    resnet, vit = (lambda: ResNet((1, 1, 1, 1)), lambda: ViT(1)) if tiny else (ResNet, ViT)
    return {"MLP": (mlp, (784,), 10), "ResNet-50": (resnet, image, 1000), "ViT-S/16": (vit, image, 1000)}


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time, with the device's part, after two calls that are not counted."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * float(np.median(times[2:]))


def measure(
    make: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, batch: int, repeats: int
) -> list[float]:
    """Millions of parameters; ms of a training step, of the average, of the copy to the host and of the file."""
    torch.manual_seed(0)
    model = make().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(batch, *shape, device=DEVICE), torch.randint(0, classes, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    weights = TorchWeights(lambda: model, tuple, Faults(), averaged=True)
    with tempfile.TemporaryDirectory() as folder, gwa_logging.watch(model, directory=folder, early_stop=None):
        step_ms = _milliseconds(step, repeats)
        average_ms = _milliseconds(weights.after_step, repeats)
        copy_ms = _milliseconds(lambda: weights._snapshot(model), repeats)
        snapshot = weights._snapshot(model)
        assert snapshot is not None
        path = Path(folder) / "weights.pt"
        file_ms = _milliseconds(lambda: write_atomically(path, lambda file: weights.write(snapshot, file)), repeats)
    return [sum(p.numel() for p in model.parameters()) / 1e6, step_ms, average_ms, copy_ms, file_ms]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{DEVICE}, PyTorch {torch.__version__}, batch {arguments.batch}, one thread\n")
    print("| model | parameters | step | average | share of the step | copy | file |")
    print("|---|---|---|---|---|---|---|")
    for name, (make, shape, classes) in _models(tiny=arguments.tiny).items():
        millions, step, average, copied, file = measure(make, shape, classes, arguments.batch, arguments.repeats)
        cells = [name, f"{millions:.1f} M", f"{step:.4g} ms", f"{average:.3g} ms", f"{average / step:.1%}"]
        print("| " + " | ".join([*cells, f"{copied:.3g} ms", f"{file:.3g} ms"]) + " |", flush=True)


if __name__ == "__main__":
    main()
