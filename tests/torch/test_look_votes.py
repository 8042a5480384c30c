"""The consensus from training's own predictions, where the look's inputs have sample ids."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import gwa_logging
from gwa_logging import InvalidInputError, Monitor, with_ids
from gwa_logging.integrations.torch.look_inputs import DatasetInputs, spread
from tests.core.test_consensus import expected_from_votes

SIZE, CLASSES, BATCH = 60, 4, 15


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    with ExitStack() as monitors:
        yield lambda *args, **options: monitors.enter_context(gwa_logging.watch(*args, directory=tmp_path, **options))


def problem() -> tuple[Tensor, Tensor, nn.Module, torch.optim.Optimizer]:
    """Inputs, labels of which a third is random, a network that memorises them, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SIZE) % CLASSES
    x = F.one_hot(labels, 8).float() + 0.5 * torch.randn(SIZE, 8, generator=generator)
    labels = torch.where(
        torch.rand(SIZE, generator=generator) < 0.33, torch.randint(0, CLASSES, (SIZE,), generator=generator), labels
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, CLASSES))
    return x, labels, net, torch.optim.Adam(net.parameters(), lr=0.02)


def epoch(net: nn.Module, monitor: Monitor, optimizer: Any, x: Tensor, labels: Tensor, ids: Tensor) -> dict[int, int]:
    """Trains on some samples; the class that the network predicted for each of them, in training mode."""
    predicted = {}
    for part in ids.split(BATCH):
        monitor.tag(part)
        logits = net(x[part])
        F.cross_entropy(logits, labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        predicted |= dict(zip(part.tolist(), logits.argmax(1).tolist(), strict=True))
    return predicted


@pytest.mark.parametrize("way", ["ids given", "chosen from the data set", "logits passed"])
def test_training_votes_for_the_consensus_of_inputs_with_ids(way, watch):
    x, labels, net, optimizer = problem()
    looked_at = torch.arange(0, SIZE, 2) if way != "chosen from the data set" else torch.arange(SIZE)
    options: dict[str, Any] = {
        "ids given": {"look": [x[part] for part in looked_at.split(20)], "look_ids": looked_at},
        "chosen from the data set": {"look": "auto", "dataset": with_ids(TensorDataset(x, labels))},
        "logits passed": {},
    }[way]
    monitor = watch(net, num_samples=SIZE, **options)
    votes: list[dict[int, int]] = []
    values = []
    for number in range(8):
        ids = torch.randperm(SIZE, generator=torch.Generator().manual_seed(number))
        ids = ids[ids % 5 != number % 5]  # a fifth of the samples is not seen in this epoch
        vote = epoch(net, monitor, optimizer, x, labels, ids)
        votes.append({i: c for i, c in vote.items() if i in set(looked_at.tolist())})
        net.eval()
        with torch.no_grad():
            logits = net(x[looked_at])
        net.train()
        if way == "logits passed":
            monitor.look(logits, looked_at)
        looked = dict(zip(looked_at.tolist(), logits.argmax(1).tolist(), strict=True))
        values.append((monitor.end_epoch().consensus, expected_from_votes(votes, looked)))
    assert [found for found, _ in values] == pytest.approx([want for _, want in values], abs=1e-12)
    assert len({found for found, _ in values}) > 4
    assert monitor.faults == {}


def test_a_resumed_run_goes_on_with_the_votes(watch):
    states, values = [], []
    for stop in (8, 3):
        x, labels, net, optimizer = problem()
        net[2].p = 0.0  # type: ignore[union-attr]
        monitor = watch(net, num_samples=SIZE, look=x, look_ids=list(range(SIZE)))
        for number in range(8):
            if number == stop:
                state = monitor.state_dict()
                monitor.close()
                monitor = watch(net, num_samples=SIZE, look=x, look_ids=list(range(SIZE)))
                monitor.load_state_dict(state)
            ids = torch.randperm(SIZE, generator=torch.Generator().manual_seed(number))
            epoch(net, monitor, optimizer, x, labels, ids)
            monitor.end_epoch()
        values.append([report.consensus for report in monitor.history])
        states.append(monitor.state_dict()["look"])
    assert values[0] == values[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("ids", "classes", "shares"))


def test_without_ids_in_training_the_looks_themselves_form_the_consensus(watch):
    x, labels, net, optimizer = problem()
    monitor = watch(net, num_samples=SIZE, look=x, look_ids=range(SIZE))
    for _ in range(3):
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.end_epoch()
    assert monitor.history[0].consensus is None
    assert monitor.history[1].consensus is not None
    assert set(monitor.faults) == {"samples without ids"}


@pytest.mark.parametrize(
    "kind", ["with_ids", "Subset of with_ids", "with_ids of a Subset", "Subset", "loader", "plain"]
)
def test_the_ids_of_chosen_inputs_are_those_of_the_ledger(kind):
    whole = TensorDataset(torch.arange(2000.0), torch.zeros(2000))
    part = list(range(1, 2000, 2))
    cases: dict[str, tuple[Any, int]] = {
        "with_ids": (with_ids(whole), 2000),
        "Subset of with_ids": (Subset(with_ids(whole), part), 2000),
        "with_ids of a Subset": (with_ids(Subset(whole, part)), 1000),
        "Subset": (Subset(whole, part), 2000),
        "loader": (DataLoader(Subset(with_ids(whole), part), 32), 2000),
        "plain": (whole, 2000),
    }
    dataset, num_samples = cases[kind]
    inputs = DatasetInputs(lambda: dataset)
    (chosen_inputs,) = zip(*inputs.batches(nn.Identity()), strict=True)
    ids = inputs.ids(num_samples)
    chosen = spread(1000 if kind not in ("with_ids", "plain") else 2000)
    expected = chosen if kind in ("with_ids", "with_ids of a Subset", "plain") else [part[i] for i in chosen]
    assert ids is not None
    assert ids.tolist() == expected
    read = torch.cat(chosen_inputs).long().tolist()  # an input is its place in the whole data set
    assert read == (expected if kind != "with_ids of a Subset" else [part[i] for i in expected])


def test_ids_are_unknown_where_no_data_set_fits_the_ledger():
    dataset = TensorDataset(torch.zeros(100))
    for num_samples in (None, 200):
        inputs = DatasetInputs(lambda: dataset)
        inputs.batches(nn.Identity())
        assert inputs.ids(num_samples) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"look_ids": [0, 1]}, "look_ids: they are the sample ids of the inputs in look="),
        ({"look": torch.zeros(2, 8), "look_ids": [0, 1], "num_samples": None}, "look_ids: add num_samples="),
        ({"look": torch.zeros(2, 8), "look_ids": [0, 60]}, "look_ids: expected numbers from 0 to 59"),
        ({"look": torch.zeros(2, 8), "look_ids": [0, 0]}, "look_ids: expected different ids"),
        ({"look": torch.zeros(2, 8), "look_ids": [0.5, 1.0]}, "look_ids: expected int"),
    ],
)
def test_wrong_ids_are_refused(options, message, watch):
    with pytest.raises(InvalidInputError, match=message):
        watch(problem()[2], **{"num_samples": SIZE, **options})


def test_another_number_of_ids_than_inputs_is_a_fault(watch):
    x, labels, net, optimizer = problem()
    monitor = watch(net, num_samples=SIZE, look=x, look_ids=[0, 1])
    epoch(net, monitor, optimizer, x, labels, torch.arange(SIZE))
    assert monitor.end_epoch().consensus is None
    assert "look" in monitor.faults
