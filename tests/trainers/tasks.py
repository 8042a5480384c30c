"""What the tests of all trainers share: a net, random samples, and the plain loop whose results every trainer must give."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gwa_logging
from gwa_logging import EpochReport

SAMPLES, FEATURES, CLASSES, BATCH = 96, 8, 4, 24
EPOCHS = 3
RATE = 0.3


def samples() -> tuple[np.ndarray, np.ndarray]:
    """float32 [SAMPLES, FEATURES], and labels int64 [SAMPLES] computed from them, one in five of them wrong."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(1)
    return x, np.where(rng.random(SAMPLES) < 0.2, rng.integers(0, CLASSES, SAMPLES), y)


class Samples(Dataset):
    """The samples, as (x, y, id), or as dicts."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        x, y = samples()
        self._columns = torch.from_numpy(x), torch.from_numpy(y), torch.arange(SAMPLES)
        self._names = names

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        row = [column[index] for column in self._columns]
        return dict(zip(self._names, row, strict=True)) if self._names else row


def loader() -> DataLoader:
    """Always in the same order, so that a trainer sees the batches that the plain loop sees."""
    return DataLoader(Samples(), batch_size=BATCH)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def plain(
    model: nn.Module, epochs: int = EPOCHS, batches: Iterable[Any] | None = None, **arguments: Any
) -> tuple[list[EpochReport], list[float]]:
    """The plain loop: returns its reports and its losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    with gwa_logging.watch(model, **arguments) as monitor:
        for _ in range(epochs):
            for x, y, _ in loader() if batches is None else batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            monitor.end_epoch()
    return monitor.history, losses


def statistics(reports: Iterable[EpochReport]) -> Iterator[dict[str, float]]:
    for report in reports:
        yield report.metrics | report.quantiles | {"negative": report.negative_fraction, "step": report.step}


def assert_equal(found: Sequence[EpochReport], expected: Sequence[EpochReport], **tolerance: float) -> None:
    """Checks that two runs have the same epochs, to 1e-6 unless `tolerance` is given."""
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(statistics(found), statistics(expected), strict=True):
        assert mine == pytest.approx(theirs, **tolerance or {"abs": 1e-6, "rel": 1e-6}, nan_ok=True)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_adds_only_its_session(callback: Any, base: type) -> None:
    """Checks that a callback adds `monitor` and `_gwa_session` to a trainer's own class, and nothing else."""
    assert set(dir(callback)) - set(dir(base())) == {"monitor", "_gwa_session"}
    assert type(callback).monitor.__doc__
