"""Trains the cells in several processes. Each run has its own file, so the training can be interrupted and continued."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.study.grid import Run, grid


def _train(run: Run, data: Path, directory: Path) -> float:
    import numpy as np
    import torch

    from benchmarks.study.train import train

    torch.set_num_threads(1)
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    series = train(run, data, device)
    unfinished = directory / f".{run.name}.npz"
    np.savez(unfinished, **series)
    unfinished.rename(directory / f"{run.name}.npz")
    return time.monotonic() - began


def train_all(data: Path, directory: Path, workers: int, minutes: float, only: str) -> None:
    """Trains every run without a file whose name contains `only`; starts none after `minutes`."""
    directory.mkdir(parents=True, exist_ok=True)
    left = [run for run in grid() if only in run.name and not (directory / f"{run.name}.npz").exists()]
    deadline = time.monotonic() + minutes * 60
    print(f"{len(left)} runs to train", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting, done, failed = {}, 0, 0
    queue = iter(left)
    while time.monotonic() < deadline or waiting:
        while len(waiting) < workers and time.monotonic() < deadline:
            run = next(queue, None)
            if run is None:
                break
            waiting[pool.submit(_train, run, data, directory)] = run
        if not waiting:
            break
        for future in [f for f in waiting if f.done()]:
            run = waiting.pop(future)
            try:
                seconds = future.result()
            except Exception as error:  # noqa: BLE001 - the other runs continue
                failed += 1
                print(f"{run.name}: {type(error).__name__}: {error}", flush=True)
            else:
                done += 1
                print(f"{done}: {run.name} took {seconds:.0f} s", flush=True)
        time.sleep(0.02)
    print(f"{done} trained, {failed} failed, {len(left) - done - failed} left", flush=True)
    pool.shutdown()
