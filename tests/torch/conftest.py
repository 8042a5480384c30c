"""One thread each, since the models are tiny and other tests may run beside these; and the worlds of ranks, run once."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.torch.ranks import World, run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reset_compiler():
    """Graphs of earlier tests count towards the compiler's limit per function, which older PyTorch shares between models."""
    torch._dynamo.reset()


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Leaves the objects of other tests out of garbage collections, which would take seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """Runs a world once in a test session, also if several workers of pytest-xdist need it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def run_once(
        name: str, ranks: int, *scenarios: str, prepare: Callable[[Path], None] = lambda folder: None
    ) -> World:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                prepare(folder)
                return run(scenarios, ranks, folder)
        return World(folder, ranks)

    return run_once


@pytest.fixture(scope="session")
def two_ranks(shared_world: Callable[..., World]) -> World:
    """The world of two ranks in the fast tier, shared by several modules."""
    return shared_world(
        *("two ranks", 2),
        *("tests.torch.test_distributed:WORLD_OF_TWO", "tests.torch.test_ledger_ranks:WORLD"),
        *("tests.torch.test_look_ranks:WORLD",),
    )
