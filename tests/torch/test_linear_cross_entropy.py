"""`linear_cross_entropy`: its loss and gradients are PyTorch's, its scores those of one row at a time in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gwa_logging
from gwa_logging import EpochReport, InvalidInputError, Monitor
from gwa_logging.integrations.torch import linear_cross_entropy

CLASSES, WIDTH, B, T = 23, 5, 4, 6


class Decoder(nn.Module):
    """A small language model, without attention, that computes its own loss."""

    def __init__(self, bias: bool = True, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, WIDTH)
        self.lm_head = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.options = {"chunk": 5, **options}

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return linear_cross_entropy(hidden, self.lm_head.weight, target, self.lm_head.bias, **self.options)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of which some are ignored; every row of the first input is."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (B, T), generator=generator)
    target[0], target[1, :2] = -100, -100
    return torch.randn(B, T, 3, generator=generator), target


def oracle(model: Decoder, x: Tensor, target: Tensor, smoothing: float = 0.0) -> np.ndarray:
    """float64 [B, T]: the scores by each row's own gradient of the head's weight; NaN in ignored rows."""
    return scores_and_lengths(model, x, target, smoothing)[0]


def scores_and_lengths(
    model: Decoder, x: Tensor, target: Tensor, smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The scores, and the norms of the gradients; 0 in ignored rows."""
    double = copy.deepcopy(model).double()
    scores, lengths = np.full(target.shape, np.nan), np.zeros(target.shape)
    for index in np.ndindex(*target.shape):
        if target[index] == -100:
            continue
        logits = double.lm_head(torch.tanh(double.body(x[index].double())))
        loss = F.cross_entropy(logits, target[index], label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss, double.lm_head.weight)
        weight = double.lm_head.weight
        scores[index] = float((-(gradient * weight).sum() / gradient.norm() / weight.norm()).detach())
        lengths[index] = float(gradient.norm())
    return scores, lengths


@pytest.fixture
def watch(tmp_path) -> Iterator[Callable[..., Monitor]]:
    """`gwa_logging.watch` of a decoder's head, whose monitors are closed after the test."""
    with ExitStack() as monitors:
        yield lambda model, **options: monitors.enter_context(
            gwa_logging.watch(model, head=model.lm_head, directory=tmp_path, **options)
        )


RUN = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]
"""The fast tier has the compiled passes of `test_every_row_gets_its_score_and_its_predicted_class`, and one with two models."""


def compiled_if(how: str, model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend) if how == "compiled" else model


def by_row(monitor: Monitor) -> np.ndarray:
    """float64 [B, T]: what the ledger holds if every row has its own id; NaN where it holds nothing."""
    scores = np.full(B * T, np.nan)
    for suspect in monitor.suspects(B * T):
        scores[suspect.id] = suspect.mean_score
    return scores.reshape(B, T)


def is_close(report: EpochReport, expected: np.ndarray) -> bool:
    """Returns True if a report's count and moments are those of the expected scores."""
    expected = expected[~np.isnan(expected)]
    moments = (report.mean, report.std), (expected.mean(), expected.std())
    return report.count == expected.size and np.allclose(*moments, atol=1e-6)


EVERY_ROW = torch.arange(B * T)

# --- the loss and its gradients ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    classes=st.integers(1, 12),
    features=st.integers(1, 6),
    chunk=st.integers(1, 11),
    ignored=st.floats(0, 1),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    has_bias=st.booleans(),
    trained=st.sampled_from(["all", "hidden", "weight"]),
    seed=st.integers(0, 2**16),
)
def test_the_loss_and_its_gradients_are_those_of_pytorch(
    rows, classes, features, chunk, ignored, smoothing, reduction, dtype, has_bias, trained, seed
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, trainable: bool = False) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_(trainable)

    hidden = normal(rows, features, trainable=trained != "weight")
    weight = normal(classes, features, trainable=trained != "hidden")
    bias = normal(classes, trainable=trained != "hidden") if has_bias else None
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = 7 + classes
    options = {"ignore_index": 7 + classes, "label_smoothing": smoothing, "reduction": reduction}
    factors = normal(rows) if reduction == "none" else normal()
    ours = linear_cross_entropy(hidden, weight, target, bias, chunk=chunk, **options)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), target, **options)
    trainable = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    found, expected = (torch.autograd.grad(loss, trainable, factors) for loss in (ours, theirs))
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * (1 + rows if reduction == "sum" else 1), "equal_nan": True}
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, **tolerance)
    assert all(torch.allclose(a, b, **tolerance) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradients_in_float64_pass_gradcheck(reduction):
    def loss(hidden, weight, bias):
        target = torch.tensor([[0, 3, -100], [6, 6, 1]])
        return linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, label_smoothing=0.2, chunk=4)

    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, 3, 4), (7, 4), (7,))]
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in arguments])


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(watch, reduction):
    model = Decoder(chunk=7, reduction=reduction)
    watch(model)
    x, target = torch.randn(40, 50, 3), torch.zeros(40, 50, dtype=torch.int64)
    with Sizes() as sizes:
        model(x, target).sum().backward()
    assert max(sizes.seen) == 40 * 50 * WIDTH < 40 * 50 * CLASSES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradients_are_as_accurate_as_those_of_full_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 32, generator=generator) for size in (256, 100))
    target = torch.randint(0, 100, (256,), generator=generator)

    def gradients(loss: Callable[..., Tensor], kind: torch.dtype, autocast: bool) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = loss(*leaves)
        return [gradient.double() for gradient in torch.autograd.grad(found, leaves)]

    exact = gradients(lambda h, w: F.cross_entropy(F.linear(h, w), target), torch.float64, False)
    full = gradients(lambda h, w: F.cross_entropy(F.linear(h, w), target), torch.float32, True)
    ours = gradients(lambda h, w: linear_cross_entropy(h, w, target, chunk=16), torch.float32, True)
    for truth, theirs, found in zip(exact, full, ours, strict=True):
        assert (found - truth).norm() < min(1.5 * (theirs - truth).norm() + 1e-6, 0.02 * truth.norm())


# --- the scores -------------------------------------------------------------------------------------------------------

LOSSES = {
    "mean": {},
    "smoothed": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "one chunk": {"chunk": None},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_a_watched_model_gets_the_score_of_every_row_without_another_line(watch, options):
    model, (x, target) = Decoder(**options), batch()
    monitor = watch(model, num_samples=B * T)
    monitor.tag(EVERY_ROW)
    model(x, target).mean().backward()
    expected = oracle(model, x, target, options.get("label_smoothing", 0.0))
    assert np.allclose(by_row(monitor), expected, atol=1e-6, equal_nan=True)
    report = monitor.end_epoch()
    assert (report.count, monitor.faults) == (int((target != -100).sum()), {})


@pytest.mark.parametrize("how", RUN)
def test_ids_of_inputs_get_the_weighted_mean_of_their_rows(watch, how):
    model, steps = Decoder(), 3
    monitor, trained = watch(model, num_samples=B), compiled_if(how, model)
    expected, rows = [], 0
    for step in range(steps):
        x, target = batch(step)
        scores, lengths = scores_and_lengths(model, x, target)
        expected.append(np.average(np.nan_to_num(scores[1:]), axis=1, weights=lengths[1:]))
        rows += int((target != -100).sum())
        monitor.tag(torch.arange(B))
        trained(x, target).backward()
    found = {suspect.id: (suspect.mean_score, suspect.times_seen) for suspect in monitor.suspects(B)}
    assert found.keys() == {1, 2, 3}
    assert np.allclose([found[i][0] for i in (1, 2, 3)], np.mean(expected, axis=0), atol=1e-6)
    assert {seen for _, seen in found.values()} == {steps}
    assert monitor.end_epoch().count == rows


@pytest.mark.parametrize(
    ("how", "reduction"),
    [
        ("eager", "mean"),
        ("eager", "none"),
        ("compiled", "mean"),
        pytest.param("compiled", "none", marks=pytest.mark.slow),
    ],
)
def test_every_row_gets_its_score_and_its_predicted_class(watch, how, reduction):
    model, (x, target) = Decoder(reduction=reduction, bias=False), batch()
    monitor = watch(model, num_samples=B * T, labels=target.flatten().clamp(min=0))
    trained = compiled_if(how, model)
    for _ in range(2):  # the second pass takes another slot of the same graph
        monitor.tag(EVERY_ROW)
        trained(x, target).mean().backward()
    assert np.allclose(by_row(monitor), oracle(model, x, target), atol=1e-6, equal_nan=True)
    predicted = model.lm_head(torch.tanh(model.body(x))).argmax(-1).flatten()
    suspects = monitor.suspects(B * T)
    assert [each.predicted for each in suspects] == [int(predicted[each.id]) for each in suspects]
    assert {each.times_seen for each in suspects} == {2}


@pytest.mark.slow
def test_one_graph_of_inductor_is_right_for_different_numbers_of_rows(watch):
    model = Decoder()
    monitor, trained = watch(model), torch.compile(model, fullgraph=True, dynamic=True)
    expected = []
    for step, rows in enumerate((3, 4, 2, 4, 5)):
        x, target = (tensor[:, :rows] for tensor in batch(step))
        expected.append(oracle(model, x, target).ravel())
        trained(x, target).backward()
    assert is_close(monitor.end_epoch(), np.concatenate(expected))


@pytest.mark.slow
def test_a_compiled_graph_notices_that_watching_begins_and_ends(watch):
    model, (x, target) = Decoder(), batch()
    trained = compiled_if("compiled", model)
    trained(x, target).backward()
    first = watch(model)
    trained(x, target).backward()
    assert is_close(first.end_epoch(), oracle(model, x, target))
    first.close()
    trained(x, target).backward()
    second = watch(model)
    trained(x, target).backward()
    assert is_close(second.end_epoch(), oracle(model, x, target))


@pytest.mark.parametrize("first", [pytest.param("watched", marks=pytest.mark.slow), "other"])
def test_models_of_one_class_that_share_a_compiled_graph_keep_their_scores_apart(watch, first):
    models, (x, target) = {"watched": Decoder(), "other": Decoder()}, batch()
    monitor = watch(models["watched"])
    trained = {name: compiled_if("compiled", model) for name, model in models.items()}
    second = "other" if first == "watched" else "watched"
    for name in (first, second, first):
        trained[name](x, target).backward()
    assert monitor.end_epoch().count == (2 if first == "watched" else 1) * int((target != -100).sum())


@pytest.mark.parametrize("how", RUN)
def test_passes_that_are_paused_in_eval_mode_or_without_gradients_do_not_count_and_leave_the_ids(watch, how):
    model, (x, target) = Decoder(), batch()
    monitor, trained = watch(model, num_samples=B), compiled_if(how, model)
    trained(x, target).backward()
    monitor.end_epoch()
    monitor.tag(torch.arange(B))
    with monitor.paused():
        trained(x, target).backward()
    model.eval()
    trained(x, target).backward()
    with torch.no_grad():
        trained(x, target)
    model.train()
    trained(x, target).backward()
    trained(x, target)  # never differentiated
    assert monitor.end_epoch().count == int((target != -100).sum())
    assert {each.times_seen for each in monitor.suspects(B)} == {1}


def test_a_backward_pass_that_leaves_the_weight_out_does_not_count(watch):
    model, (x, target) = Decoder(), batch()
    monitor = watch(model)
    torch.autograd.grad(model(x, target), model.body.weight)
    model(x, target).backward()
    assert monitor.end_epoch().count == int((target != -100).sum())


def test_a_row_whose_loss_is_not_used_has_no_score_and_a_negative_factor_negates_it(watch):
    model, (x, target) = Decoder(reduction="none"), batch()
    monitor = watch(model, num_samples=B * T)
    factors = torch.ones(B, T)
    factors[2], factors[3] = 0.0, -2.0
    monitor.tag(EVERY_ROW)
    (model(x, target) * factors).sum().backward()
    expected = oracle(model, x, target) * torch.where(factors == 0, torch.nan, factors.sign()).numpy()
    assert np.allclose(by_row(monitor), expected, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_loss_scale_that_overflows_the_gradients_changes_no_score(watch, reduction, dtype, tolerance):
    model, (x, target) = Decoder(reduction=reduction), batch()
    monitor = watch(model, num_samples=B * T)
    monitor.tag(EVERY_ROW)
    with torch.autocast("cpu", dtype):
        loss = model(x, target).mean()
    (loss * 2.0**126).backward()
    assert np.allclose(by_row(monitor), oracle(model, x, target), atol=tolerance, equal_nan=True)
    assert monitor.end_epoch().excluded == int((target == -100).sum())


def test_a_model_in_bfloat16_gets_its_scores_and_a_loss_in_float32(watch):
    model, (x, target) = Decoder().bfloat16(), batch()
    monitor = watch(model, num_samples=B * T)
    monitor.tag(EVERY_ROW)
    loss = model(x.bfloat16(), target)
    loss.backward()
    assert np.allclose(by_row(monitor), oracle(model, x.bfloat16(), target), atol=5e-3, equal_nan=True)
    assert (loss.dtype, model.lm_head.weight.grad.dtype) == (torch.float32, torch.bfloat16)


def test_all_rows_ignored_give_the_loss_of_pytorch_zero_gradients_and_no_score(watch):
    model, (x, target) = Decoder(), batch()
    monitor = watch(model)
    loss = model(x, torch.full_like(target, -100))
    loss.backward()
    assert loss.isnan()
    assert not model.lm_head.weight.grad.any()
    model(x, target).backward()
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (int((target != -100).sum()), B * T + int((target == -100).sum()))


@pytest.mark.parametrize("part", ["body", "lm_head"])
def test_a_frozen_body_and_a_frozen_head_have_the_same_scores(watch, part):
    model, (x, target) = Decoder(), batch()
    getattr(model, part).requires_grad_(False)
    monitor = watch(model, num_samples=B * T)
    monitor.tag(EVERY_ROW)
    model(x, target).backward()
    expected = oracle(copy.deepcopy(model).requires_grad_(), x, target)
    assert np.allclose(by_row(monitor), expected, atol=1e-6, equal_nan=True)


def test_a_checkpointed_loss_with_the_weight_of_the_embedding_counts_once(watch):
    model, (x, target) = Decoder(), batch()
    model.embedding = nn.Embedding(CLASSES, WIDTH)
    model.embedding.weight = model.lm_head.weight
    monitor = watch(model)
    checkpoint(model, x, target, use_reentrant=False).backward()
    assert is_close(monitor.end_epoch(), oracle(model, x, target))


def test_passes_that_wait_for_one_backward_pass_all_count_with_their_ids(watch):
    model, batches = Decoder(), [batch(1), batch(2)]
    monitor = watch(model, num_samples=B * T)
    losses = []
    for x, target in batches:
        monitor.tag(EVERY_ROW)
        losses.append(model(x, target))
    sum(losses).backward()
    first, second = (oracle(model, x, target) for x, target in batches)
    both = np.where(np.isnan(first), second, np.where(np.isnan(second), first, (first + second) / 2))
    assert np.allclose(by_row(monitor), both, atol=1e-6, equal_nan=True)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_twice_is_refused_with_the_remedy(reduction):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]), reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(InvalidInputError, match=r"differentiated twice.* use F\.cross_entropy on the logits"):
        (gradient**2).sum().backward()


def test_transforms_of_torch_func_work_and_are_reported_as_not_observed(watch):
    model, (x, target) = Decoder(), batch()
    monitor = watch(model)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, target))

    found = torch.func.grad(loss)(dict(model.named_parameters()))["lm_head.weight"]
    model(x, target).backward()
    assert torch.allclose(found, model.lm_head.weight.grad, atol=1e-6)
    assert monitor.faults == {"torch.func": 1}
    assert monitor.end_epoch().count == int((target != -100).sum())


def partitioned() -> Tensor:
    """What is left of a parameter that DeepSpeed has partitioned."""
    weight = torch.zeros(0)
    weight.ds_id = 1
    return weight


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
WRONG = {
    "width": ((torch.zeros(3, 5), W, Y), {}, r"hidden: expected \[\.\.\., 4\], as the weight's D, found \(3, 5\)"),
    "one row": ((torch.zeros(4), W, torch.tensor(0)), {}, r"hidden: expected \[\.\.\., 4\].*found \(4,\)"),
    "weight": ((H, torch.zeros(5), Y), {}, r"weight: expected \[V, D\], found \(5,\)"),
    "ZeRO-3": (
        (H, partitioned(), Y),
        {},
        r"weight: expected \[V, D\], found \(0,\)\. ZeRO-3 has partitioned it: gather",
    ),
    "rows": ((H, W, torch.tensor([0, 1])), {}, r"target: expected \(3,\), one class for each row.*found \(2,\)"),
    "probabilities": ((H, W, torch.zeros(3, 5)), {}, r"target: expected class indices.*use F\.cross_entropy"),
    "class": ((H, W, torch.tensor([0, 1, 5])), {}, r"target: expected classes in 0 to 4 or ignore.*found 0 to 5"),
    "negative class": ((H, W, torch.tensor([0, 1, -1])), {}, r"target: expected classes in 0 to 4.*found -1 to 1"),
    "bias": ((H, W, Y, torch.zeros(4)), {}, r"bias: expected \[5\], one number for each class, found \(4,\)"),
    "integers": ((H, W.long(), Y), {}, r"hidden and weight: expected floats, found torch\.float32 and torch\.int64"),
    "dtype": ((H.double(), W, Y), {}, r"hidden: is torch\.float64, but weight is torch\.float32.*torch\.autocast"),
    "smoothing": ((H, W, Y), {"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], found 1\.5"),
    "reduction": ((H, W, Y), {"reduction": "avg"}, r"reduction: expected one of 'mean', 'sum', 'none', found 'avg'"),
    "chunk": ((H, W, Y), {"chunk": 0}, r"chunk: expected a positive number of rows, found 0"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_what_was_found(arguments, options, message):
    with pytest.raises(InvalidInputError, match=message):
        linear_cross_entropy(*arguments, **options)
