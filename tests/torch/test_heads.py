"""Which layer is the head, how it is found, and what is said when it is not."""

import copy
import dataclasses
import logging
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.find_head import describe, find_head
from tests.torch.peft_model import PeftModel


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
    """Its forward assigns attributes."""

    def forward(self, x):
        self.features = self.body(x)
        self.calls = getattr(self, "calls", 0) + 1
        return self.first(self.features)


class Own(nn.Linear):
    """Like timm's Linear: overrides forward and computes the same."""

    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class Scaled(nn.Linear):
    """Overrides forward and computes more."""

    def forward(self, input):
        return 2.0 * F.linear(input, self.weight, self.bias)


class LowRank(nn.Linear):
    """Like loralib's Linear: at first it is linear in its weight, since half of the product is zero."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, input):
        return F.linear(input, self.weight + self.up @ self.down, self.bias)


class Adapter(nn.Module):
    """Like PEFT's lora.Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Headed(nn.Module):
    """A body and a head of the test's choice; `traceable` or not."""

    def __init__(self, head: nn.Module, traceable: bool) -> None:
        super().__init__()
        self.body, self.head, self.traceable = nn.Linear(8, 8), head, traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.head(torch.relu(self.body(x)))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return 16 * F.linear(F.normalize(x), F.normalize(self.prototypes.weight))


class Functional(nn.Module):
    """A weight that is no layer, in a container that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return F.linear(self.inner(x), self.table)


class Adjusted(nn.Module):
    """A temperature, an offset per class and a prior go with any head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.scale, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(5))
        self.register_buffer("prior", torch.zeros(5))

    def forward(self, x):
        return self.fc(x) * self.scale.exp() + self.offset - self.prior


class Outputs(NamedTuple):
    aux: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass
class Record:
    aux: torch.Tensor
    logits: torch.Tensor


class Auxiliary(Base):
    """Its output names the logits."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        h = self.body(x)
        return self.kind(aux=self.second(h), logits=self.first(h))


class DynamicAuxiliary(Auxiliary):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


class Masked(Base):
    """A trace with a symbol for the mask would take the other way: a symbol is not None."""

    def forward(self, x, mask=None):
        return self.second(self.body(x) * mask) if mask is not None else self.first(self.body(x))


class Counts(Base):
    """Its forward changes a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        self.steps = self.steps
        return self.first(self.body(x)) * (1 + 0 * torch.rand(1))


class Summed(Base):
    """An output that is changed in place."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        z = self.first(self.body(x))
        z += self.second(x)
        return z


class Declaring(Base):
    """As a model of timm that cannot be traced: its own library says what the classifier is."""

    num_classes = 5

    def __init__(self, *classifier: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(classifier)

    def get_classifier(self):
        return self.parts[0] if len(self.parts) == 1 else tuple(self.parts)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return sum(part(self.body(x)) for part in self.parts)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (nn.Linear(8, 5), ""),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5), nn.Dropout(), nn.Flatten()), "2"),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 5))), "1.0"),
        (DeclaredLast(), "first"),
        (Softmaxed(), "first"),
        (Keeps(), "first"),
        (Adjusted(), "fc"),
        (Headed(Own(8, 5), True), "head"),
        (Auxiliary(dict), "first"),
        (Auxiliary(Outputs), "first"),
        (Auxiliary(Record), "first"),
        (nn.DataParallel(DeclaredLast()), "first"),
        (torch.compile(DeclaredLast()), "first"),
    ],
    ids=[
        "itself",
        "sequential",
        "nested",
        "declared last",
        "softmaxed",
        "keeps",
        "scaled and shifted",
        "own forward",
        "mapping",
        "named tuple",
        "record",
        "DataParallel",
        "compiled",
    ],
)
def test_the_head_is_the_layer_that_the_output_comes_from(model, path):
    head = find_head(model)
    assert head.path == path
    assert "the output comes from it" in str(head)


def test_a_path_or_a_module_names_the_head():
    model = TwoHeads()
    assert find_head(model, "second").module is model.second
    assert find_head(model, model.first).path == "first"


def test_tracing_adds_no_attributes_to_the_model():
    model = Keeps()
    assert find_head(model).path == "first"
    assert not hasattr(model, "features")
    assert not hasattr(model, "calls")


def test_the_head_of_a_model_that_cannot_be_traced_is_found_in_its_first_training_pass(caplog):
    caplog.set_level(logging.INFO, "gwa_logging")
    model = Dynamic()
    monitor = gwa_logging.watch(model)
    with torch.no_grad():
        model(torch.randn(4, 8))
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 5, (4,))).backward()
    report = monitor.end_epoch()
    assert any("head 'first'" in message and "first pass" in message for message in caplog.messages)
    assert report.count == 12  # the pass that showed the head is observed as well


@pytest.mark.parametrize(
    ("model", "message", "count"),
    [
        (TwoHeads(), "several layers: 'first', 'second'", 3),
        (ConvolutionLast(), "does not come from one linear layer, but from 'conv' (Conv2d is not a 1x1", 1),
        (nn.Conv2d(1, 5, 3), "has no linear layer and no 1x1 convolution", 0),
    ],
    ids=["two heads", "convolution", "none"],
)
def test_a_head_that_is_missing_or_ambiguous_is_refused_with_the_candidates(model, message, count):
    with pytest.raises(HeadNotFoundError) as error:
        gwa_logging.watch(model)
    assert message in str(error.value)
    assert len(error.value.candidates) == count
    for candidate in error.value.candidates:
        assert candidate in str(error.value)
    assert not count or "head='dotted.path'" in str(error.value)


def test_two_heads_found_in_the_first_pass_are_refused_before_anything_is_trained():
    model = DynamicTwoHeads()
    monitor = gwa_logging.watch(model)
    with pytest.raises(HeadNotFoundError, match="'first', 'second'"):
        model(torch.randn(4, 8))
    monitor.close()


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("no.such.layer", HeadNotFoundError, "has no module of this path"),
        (nn.Linear(8, 5), HeadNotFoundError, "not part of"),
        ("", HeadNotFoundError, "TwoHeads is neither a linear"),
        (5, InvalidInputError, "expected a dotted path"),
    ],
)
def test_a_wrong_head_argument_is_named_in_the_error(head, error, message):
    with pytest.raises(error, match=message):
        gwa_logging.watch(TwoHeads(), head=head)


def first_pass(model: nn.Module) -> str:
    """The monitor's description of a head that was found in the first training pass."""
    monitor = gwa_logging.watch(model)
    output = model(torch.randn(4, 8))
    output = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    F.cross_entropy(output, torch.arange(4)).backward()
    assert monitor.end_epoch().count == 4
    return monitor._adapter.head


@pytest.mark.parametrize("kind", [dict, Outputs, Record], ids=["mapping", "named tuple", "record"])
def test_the_logits_of_an_output_with_other_tensors_show_the_head_in_the_first_pass(kind):
    model = DynamicAuxiliary(kind)
    assert find_head(model) is None
    assert "head 'first' (Linear 8 -> 5): the output of the first pass" in first_pass(model)


def test_a_head_that_is_called_by_keyword_is_found_in_the_first_pass():
    class ByKeyword(Base):
        def forward(self, x):
            return self.first(input=self.body(x)) if x.sum() < 1e9 else x

    assert "head 'first'" in first_pass(ByKeyword())


def test_an_argument_that_may_be_none_is_not_taken_for_a_mask():
    """Its two traces do not agree, so the head is found in the first pass, with the mask or without."""
    assert find_head(Masked()) is None
    assert "head 'first'" in first_pass(Masked())


def test_tracing_changes_no_buffer_and_draws_no_random_number():
    model = Counts()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    assert find_head(model).path == "first"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_whose_output_is_changed_in_place_does_not_hide_the_other_one():
    gwa_logging.watch(model := Summed())
    with pytest.raises(HeadNotFoundError, match="several layers: 'first', 'second'"):
        model(torch.randn(4, 8))


# --- what libraries declare -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classifier", "path"),
    [
        (nn.Linear(8, 5), "parts.0"),
        (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)), "parts.0.2"),
        (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5)), "parts.0.1"),
    ],
    ids=["layer", "two layers, one with as many outputs as classes", "wrapper"],
)
def test_a_classifier_that_the_library_declares_is_the_head_if_the_model_cannot_be_traced(classifier, path):
    head = find_head(Declaring(classifier))
    assert head.path == path
    assert "declared by the model's get_classifier()" in str(head)


def test_several_classifiers_that_the_library_declares_are_refused_with_the_list_to_pass():
    with pytest.raises(HeadNotFoundError, match=r"head=\['parts.0', 'parts.1'\]"):
        find_head(Declaring(nn.Linear(8, 5), nn.Linear(8, 5)))


def test_if_a_declared_classifier_has_two_layers_of_that_width_the_first_pass_decides():
    model = Declaring(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 5)))
    assert find_head(model) is None
    assert "head 'parts.0.2'" in first_pass(model)


def test_a_model_built_without_a_classifier_has_none():
    with pytest.raises(HeadNotFoundError, match=r"has no classifier, according to its get_classifier\(\)"):
        find_head(Declaring(nn.Identity()))
    assert find_head(Declaring(nn.Identity()), "body").path == "body"


# --- what looks like a head but is not one -------------------------------------------------------------------------------


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "first pass"])
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Cosine(), "a normalised vector (a cosine head)"),
        (Functional(), "(5 x 8) that is not called as a layer (F.linear on a parameter"),
        (Scaled(8, 5), "'head' (Scaled overrides forward, and does not compute W h + b in training mode)"),
        (LowRank(8, 5), "'head' (LowRank overrides forward, with 'down', 'up' besides its weight)"),
        (Adapter(nn.Linear(8, 5)), "'head' (Adapter is an adapter: it adds terms to the layer that it wraps"),
        (nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5)), "'head.1' (LayerNorm is neither a linear layer"),
        (nn.Bilinear(8, 8, 5), "'head' (Bilinear is neither a linear layer"),
    ],
    ids=["cosine", "functional", "scaled", "low rank", "adapter", "normalised", "bilinear"],
)
def test_the_refusal_names_what_the_output_comes_from(head, message, traceable):
    model = Headed(head, traceable)
    if isinstance(head, nn.Bilinear):
        model.head.forward = lambda x: nn.Bilinear.forward(head, x, x)
    with pytest.raises(HeadNotFoundError) as error:  # noqa: PT012 - the trace raises at once, or else the first pass
        monitor = gwa_logging.watch(model)
        assert not traceable
        assert "found in the first training pass" in monitor._adapter.head
        model(torch.randn(4, 8))
    assert message in str(error.value)


def test_a_packed_weight_is_refused_with_the_reason():
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 5)
            self.weight = nn.Parameter(torch.zeros(20, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, input):
            return input[:, :5] + self.weight.sum()

    for wanted in (None, "head"):
        with pytest.raises(HeadNotFoundError, match="packed or quantised"):
            find_head(Headed(Packed(), True), wanted)


def test_a_lazy_layer_is_refused_since_it_has_no_shape():
    with pytest.raises(HeadNotFoundError, match="run one forward pass before watch"):
        find_head(Headed(nn.LazyLinear(5), True), "head")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_description_names_every_candidate_and_the_choice():
    lines = describe(Headed(nn.Sequential(LowRank(8, 8), nn.Linear(8, 5)), True)).splitlines()
    assert lines[0] == "Headed: 3 layers that could be the head, or look like it"
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["body", "Linear"],
        ["head.0", "LowRank"],
        ["head.1", "Linear"],
    ]
    assert lines[2].endswith("candidate")
    assert lines[3].endswith("refused: LowRank overrides forward, with 'down', 'up' besides its weight")
    assert lines[4].endswith("HEAD: the output comes from it (traced)")
    assert (
        len({line.index(word) for line, word in zip(lines[1:5], ["shape", "8 -> 8", "8 -> 8", "8 -> 5"], strict=True)})
        == 1
    )
    assert lines[5] == "head 'head.1' (Linear 8 -> 5): the output comes from it (traced)"


@pytest.mark.parametrize(
    ("model", "wanted", "last"),
    [
        (TwoHeads(), None, "no head: the output of TwoHeads comes from several layers: 'first', 'second'."),
        (TwoHeads(), ["first", "second"], "head 'second' (Linear 8 -> 5): named by head="),
        (Dynamic(), None, "head: will be found in the first training pass"),
        (nn.Conv2d(1, 5, 3), None, "no head: Conv2d has no linear layer and no 1x1 convolution"),
        (nn.Linear(8, 5), None, "head (the model itself) (Linear 8 -> 5): the output comes from it (traced)"),
    ],
    ids=["several", "named", "dynamic", "none", "itself"],
)
def test_the_description_ends_with_the_result(model, wanted, last):
    assert describe(model, wanted).splitlines()[-1].startswith(last)


@pytest.mark.parametrize("head", [nn.Linear(8, 5), nn.Linear(8, 5, bias=False), nn.Linear(8, 50)])
def test_the_first_pass_counts_if_it_changes_its_logits_in_place(head):
    class ChangesLogits(Headed):
        def forward(self, x):
            z = super().forward(x)
            z.div_(2.0)
            z[:, 0].masked_fill_(x[:, 0] > 1, -1e4)
            return z

    model = ChangesLogits(head, False)
    x, y, wants = torch.randn(6, 8), torch.arange(6).clamp(1, 4), []
    for i in range(6):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), head.weight)
        wants.append(-(gradient * head.weight).sum() / gradient.norm() / head.weight.norm())
    monitor = gwa_logging.watch(model, num_samples=6)
    monitor.tag(torch.arange(6))
    F.cross_entropy(model(x), y).backward()
    ledger = monitor._adapter.ledger().ledger
    assert torch.from_numpy(ledger.sums).tolist() == pytest.approx(torch.stack(wants).tolist(), abs=1e-6)
    assert ledger.predicted.tolist() == head(torch.relu(model.body(x))).argmax(1).tolist()
    assert monitor.faults == {}


# --- sizes are not data -----------------------------------------------------------------------------------------------


class Segments(nn.Module):
    """As torchvision's FCN and DeepLab: the head's output is resized to the input; `traceable` or not."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.traceable = traceable
        self.backbone = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.classifier = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        logits = self.classifier(self.backbone(x))
        return {"out": F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class Shaped(Base):
    """Its logits are brought into a form that is taken from other tensors."""

    def __init__(self, reshape: Any) -> None:
        super().__init__()
        self.reshape = reshape

    def forward(self, x):
        h = self.body(x)
        return self.reshape(self.first(h), x, h)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda z, x, h: z.view(x.size(0), -1),
        lambda z, x, h: z.view(h.shape[0], -1),
        lambda z, x, h: z.reshape(x.numel() // x.shape[1], 5).to(x.dtype).to(x),
        lambda z, x, h: z.type_as(x).view_as(torch.zeros_like(z)) + h.new_zeros(h.size(0), 5),
        lambda z, x, h: z.view(x.shape[0] // 2, 2, -1).mean(1),
    ],
    ids=["view", "of a layer's output", "dtype", "as another tensor", "mean over segments"],
)
def test_sizes_and_types_that_are_taken_from_a_tensor_do_not_make_it_a_source_of_the_logits(reshape):
    assert find_head(Shaped(reshape)).path == "first"


@pytest.mark.parametrize(
    "reshape", [lambda z, x, h: z + x.mean(), lambda z, x, h: z.view_as(z) * h.sum()], ids=["the input", "a layer"]
)
def test_a_source_whose_data_is_used_is_still_refused(reshape):
    with pytest.raises(HeadNotFoundError, match=r"from the input|several layers"):
        find_head(Shaped(reshape))


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "first pass"])
def test_the_head_of_a_segmentation_net_is_found_and_its_images_are_scored(traceable):
    model = Segments(traceable)
    x, y = torch.randn(3, 3, 8, 8), torch.randint(0, 4, (3, 8, 8))
    weight, wants = model.classifier[2].weight, []
    for image, label in zip(x, y, strict=True):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(image[None])["out"], label[None]), weight)
        wants.append(-(gradient * weight).sum() / gradient.norm() / weight.norm())
    monitor = gwa_logging.watch(model)
    F.cross_entropy(model(x)["out"], y).backward()
    report = monitor.end_epoch()
    assert "head 'classifier.2'" in monitor._adapter.head
    assert report.count == 3
    assert report.mean == pytest.approx(float(torch.stack(wants).mean().detach()), abs=1e-6)


# --- heads with a forward of their own, in training -------------------------------------------------------------------


class StandardisedInTraining(nn.Linear):
    def forward(self, input):
        weight = self.weight - self.weight.mean(1, keepdim=True) if self.training else self.weight
        return F.linear(input, weight, self.bias)


class DroppedInTraining(nn.Linear):
    def forward(self, input):
        return super().forward(F.dropout(input, 0.5, self.training))


class Capped(nn.Linear):
    """As the logits of Gemma: only large ones are changed."""

    def forward(self, input):
        return 30 * torch.tanh(super().forward(input) / 30)


class Constrained(nn.Linear):
    """Like EEGNet's: its forward limits the norm of the weight, and computes a linear function."""

    def forward(self, input):
        self.calls = getattr(self, "calls", 0) + 1
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1 + 0 * torch.rand(()).item())
        return super().forward(input)


@pytest.mark.parametrize("kind", [StandardisedInTraining, DroppedInTraining, Capped])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_head_that_is_not_linear_in_training_is_refused_whatever_mode_it_is_in(kind, training):
    model = Headed(kind(64, 5), True)
    model.body = nn.Linear(8, 64)
    model.train(training)
    with pytest.raises(HeadNotFoundError, match="does not compute W h \\+ b in training mode"):
        gwa_logging.watch(model)


def test_testing_a_head_for_linearity_changes_neither_it_nor_its_mode_nor_the_random_numbers():
    model = Headed(Constrained(8, 5), True).eval()
    head = model.head
    before, attributes = head.weight.detach().clone(), set(vars(head))
    state = torch.get_rng_state()
    assert find_head(model, "head").module is head
    assert torch.equal(head.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(head)) == attributes
    assert not head.training


# --- adapters ---------------------------------------------------------------------------------------------------------


class BaseTunerLayer:
    """Of this name is the base of all adapters of PEFT."""


class Scaling(nn.Module, BaseTunerLayer):
    """As PEFT's IA3: no term is added, the output is scaled."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.ia3_l = layer, nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        return self.base_layer(x) * self.ia3_l


class LowRankBeside(nn.Module):
    """A LoRA layer as many write it themselves."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.linear = layer
        self.lora_A = nn.Parameter(torch.randn(2, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x):
        return self.linear(x) + x @ self.lora_A.T @ self.lora_B.T


@pytest.mark.parametrize("adapter", [Adapter, Scaling, LowRankBeside])
@pytest.mark.parametrize("wrapper", [nn.Sequential, PeftModel, Declaring])
def test_an_adapter_on_the_head_is_refused_by_watch_with_the_remedy(adapter, wrapper):
    head = adapter(nn.Linear(8, 5))
    model = wrapper(head if wrapper is Declaring else Headed(head, True))
    with pytest.raises(HeadNotFoundError, match=f"{adapter.__name__} is an adapter.*modules_to_save"):
        gwa_logging.watch(model)


def test_the_head_of_a_peft_model_whose_body_is_adapted_is_found_before_the_first_pass():
    model = Headed(nn.Linear(8, 5), True)
    model.body = Adapter(model.body)
    head = find_head(PeftModel(model))
    assert head.path == "base_model.head"


@pytest.mark.parametrize("rule", ["default", "passed", "none"])
def test_a_language_model_has_no_stop_alert_unless_a_rule_is_passed(rule, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    config = transformers.LlamaConfig(**sizes, intermediate_size=16, pad_token_id=0, num_labels=3)
    options = {"passed": {"early_stop": EarlyStop()}, "none": {"early_stop": None}, "default": {}}[rule]
    for kind, has_default in (("ForCausalLM", False), ("ForSequenceClassification", True)):
        model = getattr(transformers, f"Llama{kind}")(config)
        with gwa_logging.watch(model, **options) as monitor:
            has_rule = monitor._recording.settings.early_stop is not None
        assert has_rule == {"passed": True, "none": False, "default": has_default}[rule]
        assert ("a language model: no stop alert" in capsys.readouterr().err) == (rule == "default" and not has_default)
