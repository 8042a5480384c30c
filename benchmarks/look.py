"""What a look costs: its share of an epoch of 50,000 samples, in batches of the training's size and as one batch.

    python -m benchmarks.look [--inputs 512] [--batch 64] [--repeats 8]

Prints a table for a small convolutional network on 32 x 32 images, on the GPU if there is one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import gwa_logging

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPOCH = 50_000


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The median time after two calls that are not counted: on a CPU its own time, which other programs do not affect."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 2):
        begin = clock()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begin)
    return float(np.median(times[2:]))


def measure(inputs: int, batch: int, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of a training step, and of a look by the form of its inputs."""
    torch.manual_seed(0)
    layers = [_block(3, 16), _block(16, 32, 2), _block(32, 32), _block(32, 64, 2), _block(64, 64)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(inputs, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (inputs,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:batch]), y[:batch]).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder, gwa_logging.watch(model, directory=folder) as monitor:
        adapter = monitor._recording.adapter
        forms = {f"batches of {batch}": list(x.split(batch)), "one batch": x}
        looks = {form: _seconds(lambda look=look: adapter.evaluate(look), repeats) for form, look in forms.items()}  # type: ignore[misc]
        return _seconds(step, repeats), looks


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    step, looks = measure(arguments.inputs, arguments.batch, arguments.repeats)
    epoch = step * EPOCH / arguments.batch
    print(
        f"{DEVICE.type}, {torch.get_num_threads()} threads; a training step of {arguments.batch}: {1000 * step:.1f} ms"
    )
    print(f"| a look at {arguments.inputs} inputs in | ms | share of an epoch of {EPOCH:,} |\n|---|---|---|")
    for form, seconds in looks.items():
        print(f"| {form} | {1000 * seconds:.1f} | {seconds / epoch:.2%} |")


if __name__ == "__main__":
    main()
