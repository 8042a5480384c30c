"""Runs scenarios in several processes that form one world over gloo, and brings back what they return.

Whatever happens in a rank, no process outlives the run: a rank that fails or dies brings the others torch's own error, and
what is still there at the deadline is killed.
"""

import os
import pickle
import traceback
from datetime import timedelta
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import distributed

DEADLINE = 240.0
"""Seconds for everything that one world does; a quiet machine needs a tenth of it."""

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another one, unless a scenario says otherwise."""


class Failure(NamedTuple):
    """What a rank raised."""

    trace: str


class World:
    """What the ranks have returned, by scenario."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks

    def __getitem__(self, name: str) -> list[Any]:
        """What each rank has returned; fails with the traces if one of them did not return."""
        results = [self.of_rank(name, rank) for rank in range(self.ranks)]
        traces = [f"rank {rank}:\n{found.trace}" for rank, found in enumerate(results) if isinstance(found, Failure)]
        assert not traces, f"{name}\n" + "\n".join(traces)
        return results

    def of_rank(self, name: str, rank: int) -> Any:
        """What one rank has returned, or its Failure."""
        path = _result(self.folder, name, rank)
        return pickle.loads(path.read_bytes()) if path.exists() else Failure("it was never heard of again")


def run(module: str, scenarios: str, ranks: int, folder: Path) -> World:
    """Runs scenarios one after the other on every rank, each in a process group and a working directory of its own.

    Args:
        module, scenarios: a module, and the name of a dict in it: functions without arguments, by name.
        ranks: how many processes.
        folder: where each scenario has a folder of its name, shared by the ranks; made unless it is there.
    """
    context = get_context("spawn")
    arguments = [(module, scenarios, rank, ranks, folder) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
    until = monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, until - monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return World(folder, ranks)


def meet(rank: int, ranks: int, patience: timedelta = PATIENCE, at: str = "meeting") -> None:
    """Forms a process group, by a file in the working directory. All ranks are in it when the first one goes on.

    gloo lets a rank go that has all its connections; where it is done before another rank has them, that one fails.
    """
    method = f"file://{Path(at).absolute()}"
    distributed.init_process_group("gloo", method, rank=rank, world_size=ranks, timeout=patience)
    distributed.barrier()


def _result(folder: Path, name: str, rank: int) -> Path:
    return folder / name / f"rank {rank}.pickle"


def _rank(module: str, scenarios: str, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, scenario in getattr(import_module(module), scenarios).items():
        result = _result(folder, name, rank)
        result.parent.mkdir(exist_ok=True)
        os.chdir(result.parent)
        try:
            meet(rank, ranks)
            found = scenario()
        except Exception:  # noqa: BLE001 - the test says what it means
            found = Failure(traceback.format_exc())
        result.write_bytes(pickle.dumps(found))
        if distributed.is_initialized():
            distributed.destroy_process_group()
