"""Timing on the device's own clock: CUDA events on a GPU, `time.perf_counter` on a CPU."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def synchronize(device: torch.device) -> None:
    """Blocks until the device has done everything that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Marks moments in the device's queue without blocking the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Marks the moment when the device has done all that was queued before."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns the seconds between successive marks and clears them. Blocks until the device has passed the last mark."""
        synchronize(self.device)
        marks, self.marks = self.marks, []
        pairs = itertools.pairwise(marks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def median_seconds(call: Callable[[int], Any], device: torch.device, repetitions: int) -> float:
    """Median seconds of `call(index)`, after three calls to warm up."""
    for index in range(3):
        call(index)
    watch = Stopwatch(device)
    for index in range(repetitions):
        watch.mark()
        call(index)
    watch.mark()
    return float(np.median(watch.seconds()))


def median_graph_seconds(call: Callable[[int], Any], device: torch.device, count: int) -> float | None:
    """Median seconds of `call(index)` without the host's kernel launches; None on a CPU.

    Records `count` calls in one CUDA graph and times its replay.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return median_seconds(lambda _: graph.replay(), device, 20) / count


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(2**16 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda _: target.copy_(source), device, 20)
