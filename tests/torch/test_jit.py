"""torch.jit.trace and torch.jit.script of a watched model."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Dynamic(nn.Module):
    """fx cannot trace it, so its head is found in the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.head(torch.tanh(self.body(x)))


def net(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, classes))


def step(model: nn.Module) -> None:
    F.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 5, (4,))).backward()


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 8))])
@pytest.mark.parametrize("classes", [5, 50], ids=["by logits", "by embeddings"])
def test_a_watched_model_can_be_scripted_and_traced_and_is_observed_as_before(make, classes):
    model, x = net(classes), torch.randn(4, 8)
    monitor = gwa_logging.watch(model, num_samples=4)
    monitor.tag(torch.arange(4))
    step(model)
    monitor.tag(torch.arange(4))
    made = make(model)
    step(model)
    assert monitor.end_epoch().count == 8
    assert [suspect.times_seen for suspect in monitor.suspects(9)] == [2, 2, 2, 2]
    assert monitor.faults == {}
    assert torch.equal(made(x), model(x))
    file = io.BytesIO()
    torch.jit.save(made, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("classes", [5, 50], ids=["by logits", "by embeddings"])
def test_the_traced_graph_is_that_of_the_bare_model(classes):
    model = net(classes)
    x = torch.randn(4, 8)
    bare = [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]
    gwa_logging.watch(model)
    assert [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()] == bare


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_model_whose_head_is_not_known_yet_can_be_scripted_and_traced_and_is_observed_after_that():
    model, x = Dynamic(), torch.randn(4, 8)
    monitor = gwa_logging.watch(model)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x).detach())
    monitor.close()
    model = Dynamic()
    monitor = gwa_logging.watch(model)
    assert torch.equal(torch.jit.script(model)(x), model(x).detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(7):
        step(model)
        optimizer.step()
    assert monitor.end_epoch().count == 2 * 4
