"""Which layer is the head, how it is found, and what is said when it is not."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.heads import find_head


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 5)


class DeclaredLast(Base):
    """The last linear layer is not the head."""

    def forward(self, x):
        return self.first(torch.relu(self.second(self.body(x))[:, :1] * self.body(x)))


class Softmaxed(Base):
    """The head's output is processed further, by things without parameters."""

    def forward(self, x):
        return {"log_probs": F.log_softmax(F.dropout(self.first(self.body(x)), 0.0) / 2.0, -1)}


class TwoHeads(Base):
    def forward(self, x):
        h = self.body(x)
        return (self.first(h) + self.second(h)) / 2


class Dynamic(Base):
    """fx cannot trace it: the flow depends on the data."""

    def forward(self, x):
        h = self.body(x)
        if h.sum() > 1e9:
            return self.second(h)
        return self.first(h)


class DynamicTwoHeads(Base):
    def forward(self, x):
        h = self.body(x)
        return self.first(h) * 1.0 + self.second(h) if h.sum() < 1e9 else h


class ConvolutionLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.conv = nn.Linear(1, 1), nn.Conv2d(1, 5, 8)

    def forward(self, x):
        return self.conv(x.view(-1, 1, 8, 1).expand(-1, -1, -1, 8) * self.gate(x[:, :1]).sigmoid()[:, :, None, None])[
            :, :, 0, 0
        ]


class Keeps(Base):
    """Its forward keeps things on itself."""

    def forward(self, x):
        self.features = self.body(x)
        self.calls = getattr(self, "calls", 0) + 1
        return self.first(self.features)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (nn.Linear(8, 5), ""),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5), nn.Dropout(), nn.Flatten()), "2"),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 5))), "1.0"),
        (DeclaredLast(), "first"),
        (Softmaxed(), "first"),
        (Keeps(), "first"),
        (nn.DataParallel(DeclaredLast()), "first"),
        (torch.compile(DeclaredLast()), "first"),
    ],
    ids=["itself", "sequential", "nested", "declared last", "softmaxed", "keeps", "DataParallel", "compiled"],
)
def test_the_head_is_the_layer_that_the_output_comes_from(model, path):
    head = find_head(model)
    assert head.path == path
    assert "the output comes from it" in str(head)


def test_a_path_or_a_module_names_the_head():
    model = TwoHeads()
    assert find_head(model, "second").module is model.second
    assert find_head(model, model.first).path == "first"


def test_tracing_leaves_nothing_on_the_model():
    model = Keeps()
    find_head(model)
    assert not hasattr(model, "features")
    assert not hasattr(model, "calls")


def test_a_model_that_cannot_be_traced_is_read_in_its_first_training_pass(caplog):
    caplog.set_level(logging.INFO, "gwa_logging")
    model = Dynamic()
    monitor = gwa_logging.watch(model)
    with torch.no_grad():
        model(torch.randn(4, 8))
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 5, (4,))).backward()
    report = monitor.end_epoch()
    assert any("head 'first'" in message and "first pass" in message for message in caplog.messages)
    assert report.count == 12  # the pass that told the head is observed as well


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (TwoHeads(), "several layers: 'first', 'second'"),
        (ConvolutionLast(), "does not come from one linear layer, but from 'conv' (Conv2d is no 1x1"),
        (nn.Conv2d(1, 5, 3), "has no linear layer and no 1x1 convolution"),
    ],
    ids=["two heads", "convolution", "none"],
)
def test_a_head_that_is_missing_or_ambiguous_is_refused_with_the_candidates(model, said):
    with pytest.raises(HeadNotFoundError) as error:
        gwa_logging.watch(model)
    assert said in str(error.value)
    for candidate in error.value.candidates:
        assert candidate in str(error.value)
    assert not error.value.candidates or "head='dotted.path'" in str(error.value)


def test_two_heads_found_in_the_first_pass_are_refused_before_anything_is_trained():
    model = DynamicTwoHeads()
    monitor = gwa_logging.watch(model)
    with pytest.raises(HeadNotFoundError, match="'first', 'second'"):
        model(torch.randn(4, 8))
    monitor.close()


@pytest.mark.parametrize(
    ("head", "error", "said"),
    [
        ("no.such.layer", HeadNotFoundError, "has no such module"),
        (nn.Linear(8, 5), HeadNotFoundError, "not part of"),
        ("", HeadNotFoundError, "TwoHeads is neither a linear"),
        (5, InvalidInputError, "expected a dotted path"),
    ],
)
def test_a_wrong_head_argument_is_named(head, error, said):
    with pytest.raises(error, match=said):
        gwa_logging.watch(TwoHeads(), head=head)
