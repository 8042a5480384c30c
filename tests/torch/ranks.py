"""Runs scenarios in several processes that form one world over gloo, and collects what they return.

No process outlives the run: if a rank fails or dies, the others get an error from torch, and processes that still run at the
deadline are killed.
"""

import os
import pickle
import traceback
from collections import ChainMap
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import distributed

DEADLINE = 600.0
"""Seconds for all scenarios of a world; a quiet machine needs a tenth of that."""

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another one, unless a scenario sets another timeout."""


class Failure(NamedTuple):
    """What a rank raised."""

    trace: str


class World:
    """What the ranks returned, by scenario."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks

    def __getitem__(self, name: str) -> list[Any]:
        """What each rank returned. Fails with the stack traces if a rank did not return."""
        results = [self.of_rank(name, rank) for rank in range(self.ranks)]
        traces = [f"rank {rank}:\n{found.trace}" for rank, found in enumerate(results) if isinstance(found, Failure)]
        assert not traces, f"{name}\n" + "\n".join(traces)
        return results

    def of_rank(self, name: str, rank: int) -> Any:
        """What one rank returned, or its Failure."""
        path = _result(self.folder, name, rank)
        return pickle.loads(path.read_bytes()) if path.exists() else Failure("the process died or was killed")


def run(scenarios: Sequence[str], ranks: int, folder: Path) -> World:
    """Runs scenarios one after the other on every rank, each in its own process group and working directory.

    Args:
        scenarios: "module:name" of dicts that have functions without arguments, by name.
        ranks: number of processes.
        folder: each scenario gets a folder of its name in it, which the ranks share.
    """
    context = get_context("spawn")
    arguments = [(scenarios, rank, ranks, folder) for rank in range(ranks)]
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


def meet(rank: int, ranks: int, timeout: timedelta = COLLECTIVE_TIMEOUT, at: str = "meeting") -> None:
    """Forms a process group, by a file in the working directory. Returns once all ranks are in it.

    The barrier is needed because gloo returns in a rank as soon as this one has its connections. If it then exits before
    another rank has them, that one fails.
    """
    method = f"file://{Path(at).absolute()}"
    distributed.init_process_group("gloo", method, rank=rank, world_size=ranks, timeout=timeout)
    distributed.barrier()


def _result(folder: Path, name: str, rank: int) -> Path:
    return folder / name / f"rank {rank}.pickle"


def _rank(scenarios: Sequence[str], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    modules_and_names = [each.split(":") for each in scenarios]
    by_name = [getattr(import_module(module), name) for module, name in modules_and_names]
    for name, scenario in ChainMap(*by_name).items():
        result = _result(folder, name, rank)
        result.parent.mkdir(exist_ok=True)
        os.chdir(result.parent)
        try:
            meet(rank, ranks)
            found = scenario()
        except Exception:  # noqa: BLE001 - the test decides what it means
            found = Failure(traceback.format_exc())
        result.write_bytes(pickle.dumps(found))
        if distributed.is_initialized():
            distributed.destroy_process_group()
