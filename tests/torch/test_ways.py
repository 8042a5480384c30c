"""Ways of training, losses and shapes of heads, against the gradient of each sample's own loss in float64.

The score of a sample is the cosine between its negative gradient and the weight that the head multiplied with. So the oracle
is a loop: one sample, one loss, one gradient of that weight. Where numbers are rounded to 16 bits, the oracle is
`alignment_scores` of the pass's tensors.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError, NoObservationsError, alignment_scores
from tests.torch.test_probe import Recorder
from tests.torch.tiers import tiered

N, D, C = 24, 12, 5
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine the threads of such small steps block each other
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A body, a head, and a function of the logits."""

    def __init__(self, body: nn.Module, head: nn.Module, after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.body, self.head, self.after = body, head, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.body(x)))


def net(features: int = D, classes: int = C, **options: Any) -> Net:
    body = nn.Sequential(nn.Linear(8, features), nn.Tanh())
    return Net(body, nn.Linear(features, classes), **options)


def data(n: int = N, classes: int = C) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 8), torch.randint(0, classes, (n,))


def effective(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight that the head multiplies with: in evaluation mode, reading it changes nothing."""
    training = head.training
    weight = head.eval().weight.detach().clone()
    head.train(training)
    return weight, None if head.bias is None else head.bias.detach().clone()


def one_by_one(model: Net, loss: Loss, x: Tensor, y: Tensor, weight: Tensor | None = None) -> np.ndarray:
    """The oracle. Call it before the update, or give it the weight of the pass."""
    effective_weight, bias = effective(model.head)
    w = (effective_weight if weight is None else weight).double().requires_grad_()
    b = None if bias is None else bias.double()
    apply = F.linear if w.ndim == 2 else {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.ndim]
    body, x = copy.deepcopy(model.body).double(), x.double() if x.is_floating_point() else x
    y = y.double() if y.is_floating_point() else y
    scores = []
    for i in range(len(x)):
        (grad,) = torch.autograd.grad(loss(model.after(apply(body(x[i : i + 1]), w, b)), y[i : i + 1]), w)
        scores.append(-(grad * w).sum() / grad.norm() / w.norm())
    return torch.stack(scores).detach().numpy()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


RUN = {"eager": lambda model: model, "compiled": compiled}
WIDTH = {"narrow": (D, C), "wide": (4, C)}
run_of = pytest.mark.parametrize("how", RUN)
width_of = pytest.mark.parametrize("width", WIDTH)
run_and_width_of = tiered("width, how", WIDTH, RUN)


# --- ways of training -----------------------------------------------------------------------------------------------


class Step:
    """One pass over all samples, each of which trains the model once."""

    def __init__(self, model: Net, run: Any, recorder: Recorder) -> None:
        self.model, self.run, self.recorder = model, run, recorder
        self.x, self.y = data()

    def loss(self, part: slice = slice(None), through: Any = None) -> Tensor:
        self.recorder.monitor.tag(torch.arange(N)[part])
        return F.cross_entropy((through or self.run)(self.x[part]), self.y[part])


PARTS = [slice(0, 9), slice(9, 13), slice(13, N)]


def one_backward(step: Step) -> None:
    step.loss().backward()


def gradient_accumulation(step: Step) -> None:
    for part in PARTS:
        step.loss(part).backward()


def several_forwards(step: Step) -> None:
    sum(step.loss(part) for part in PARTS).backward()


def crossed(step: Step) -> None:
    first, second, third = (step.loss(part) for part in PARTS)
    second.backward()
    first.backward()
    third.backward()


def forgotten_forwards(step: Step) -> None:
    for _ in range(50):
        step.run(step.x)
    step.loss().backward()


def evaluation_between(step: Step) -> None:
    one = step.loss(PARTS[0])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            step.model.eval()
            step.run(step.x)
            step.model.train()
            step.run(step.x)
    (one + step.loss(PARTS[1])).backward()
    with torch.no_grad():
        step.run(step.x)
    step.loss(PARTS[2]).backward()


def gradient_clipping(step: Step) -> None:
    step.loss().backward()
    clip_grad_norm_(step.model.parameters(), 1e-3)


def checkpointed(reentrant: bool) -> Callable[[Step], None]:
    def way(step: Step) -> None:
        step.x.requires_grad_()
        step.loss(through=lambda x: checkpoint(step.run, x, use_reentrant=reentrant)).backward()

    return way


def frozen_backbone(step: Step) -> None:
    step.model.body.requires_grad_(False)
    step.loss().backward()


def frozen_head(step: Step) -> None:
    step.model.head.requires_grad_(False)
    step.loss().backward()


def channels_last_input(step: Step) -> None:
    step.model.body.insert(0, nn.Flatten())
    step.x = step.x.view(N, 2, 2, 2).to(memory_format=torch.channels_last)
    step.loss().backward()


def data_parallel(step: Step) -> None:
    step.loss(through=nn.DataParallel(step.run)).backward()


def loss_scale(step: Step) -> None:
    (65536 * step.loss()).backward()


def anomaly_detection(step: Step) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        step.loss().backward()


def an_exception_before(step: Step) -> None:
    with pytest.raises(ZeroDivisionError):
        (step.loss() / (1 // 0)).backward()
    step.loss().backward()


WAYS = {
    "one backward pass": one_backward,
    "gradient accumulation": gradient_accumulation,
    "several forwards per backward": several_forwards,
    "forwards and backwards crossed": crossed,
    "forwards without a backward": forgotten_forwards,
    "no_grad, inference_mode and eval between": evaluation_between,
    "gradient clipping": gradient_clipping,
    "reentrant checkpointing": checkpointed(True),
    "non-reentrant checkpointing": checkpointed(False),
    "frozen backbone": frozen_backbone,
    "frozen head": frozen_head,
    "channels_last": channels_last_input,
    "DataParallel on the CPU": data_parallel,
    "loss scale": loss_scale,
    "anomaly detection": anomaly_detection,
    "an exception in the step before": an_exception_before,
}


@tiered("way, width, how", WAYS, WIDTH, RUN)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_way_of_training_counts_each_sample_once_with_its_right_score(way, width, how):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    step = Step(model, RUN[how](model), recorder)
    WAYS[way](step)
    want = one_by_one(model, F.cross_entropy, step.x.detach(), step.y)
    report = recorder.monitor.end_epoch()
    assert (report.count, report.excluded, recorder.monitor.faults) == (N, 0, {})
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


INDUCTOR = {
    "default": lambda model: torch.compile(model),
    "fullgraph=True": lambda model: torch.compile(model, fullgraph=True),
    'mode="reduce-overhead"': lambda model: torch.compile(model, fullgraph=True, mode="reduce-overhead"),
    "model.compile()": lambda model: (model.compile(), model)[1],
}


@pytest.mark.parametrize(
    ("mode", "width"),
    [
        pytest.param(mode, width, marks=() if (mode, width) == ("fullgraph=True", "wide") else pytest.mark.slow)
        for mode in INDUCTOR
        for width in WIDTH
    ],
)
def test_torch_compile_gives_the_scores_of_a_step_with_several_forwards(mode, width):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    step = Step(model, INDUCTOR[mode](model), recorder)
    want = one_by_one(model, F.cross_entropy, step.x, step.y)
    several_forwards(step)
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def watched_before(model: Net, compile_it: Any) -> tuple[Any, Recorder]:
    recorder = Recorder(model, N)
    return compile_it(model), recorder


def watched_after(model: Net, compile_it: Any) -> tuple[Any, Recorder]:
    run = compile_it(model)
    return run, Recorder(run, N)


def watched_after_a_step(model: Net, compile_it: Any) -> tuple[Any, Recorder]:
    run = compile_it(model)
    F.cross_entropy(run(torch.randn(N, 8)), torch.zeros(N, dtype=torch.int64)).backward()
    return run, Recorder(model, N)


WATCHED = {"before": watched_before, "after": watched_after, "after a step": watched_after_a_step}
COMPILE = {"torch.compile": compiled, "model.compile()": compiled_in_place}


@tiered("watched, compile_it, width, how", WATCHED, COMPILE, WIDTH, ["compiled"])
def test_a_compiled_model_may_be_watched_at_any_time(watched, compile_it, width, how):
    model = net(*WIDTH[width])
    run, recorder = WATCHED[watched](model, COMPILE[compile_it])
    step = Step(model, run, recorder)
    want = one_by_one(model, F.cross_entropy, step.x, step.y)
    one_backward(step)
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@tiered(
    "what, variant, width, how", ["the whole model", "only the backbone"], ["reentrant", "non-reentrant"], WIDTH, RUN
)
def test_checkpointing_in_the_step_counts_each_sample_once(what, variant, width, how):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)

    def forward(x: Tensor) -> Tensor:
        if what == "the whole model":
            return checkpoint(model, x, use_reentrant=variant == "reentrant")
        return model.head(checkpoint(model.body, x, use_reentrant=variant == "reentrant"))

    step = Step(
        model, torch.compile(forward, fullgraph=True, backend="aot_eager") if how == "compiled" else forward, recorder
    )
    step.x.requires_grad_()
    gradient_accumulation(step)
    sum(F.cross_entropy(step.run(step.x[part]), step.y[part]) for part in PARTS).backward()
    assert recorder.monitor.end_epoch().count == 2 * N
    want, scores = one_by_one(model, F.cross_entropy, step.x.detach(), step.y), recorder.scores()
    if (what, variant, how) == ("the whole model", "reentrant", "eager"):
        # The head's pass is repeated in the backward pass, last one first, when the ids of all but the last are gone.
        known = np.isfinite(scores)
        assert known.sum() >= N // 3
        scores, want = scores[known], want[known]
    np.testing.assert_allclose(scores, want, atol=1e-5)


class Shown(Net):
    """A net that also returns its embeddings."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.head(h), h


def autocast(dtype: torch.dtype) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]:
    def pass_through(run: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        with torch.autocast("cpu", dtype=dtype):
            z, h = run(x)
            z.retain_grad()
            loss = F.cross_entropy(z, y)
        scaler.scale(loss).backward()
        return z, h

    return pass_through


def pure_bfloat16(run: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z, h = run(x.bfloat16())
    z.retain_grad()
    F.cross_entropy(z, y).backward()
    return z, h


ROUNDED = {
    "autocast fp16 with GradScaler": autocast(torch.float16),
    "autocast bf16": autocast(torch.bfloat16),
    "bf16 model": pure_bfloat16,
}


@pytest.mark.slow
@width_of
@pytest.mark.parametrize("way", ROUNDED)
def test_sixteen_bits_compiled_by_inductor_give_the_scores_of_the_rounded_tensors(way, width):
    assert_scores_of_rounded_tensors(way, lambda model: compiled(model, backend="inductor"), width)


@tiered("way, width, how", ROUNDED, WIDTH, RUN)
def test_sixteen_bits_give_the_scores_of_the_rounded_tensors(way, width, how):
    assert_scores_of_rounded_tensors(way, RUN[how], width)


def assert_scores_of_rounded_tensors(way: str, run_it: Callable[[nn.Module], Any], width: str) -> None:
    features, classes = WIDTH[width]
    model = Shown(nn.Sequential(nn.Linear(8, 8 * features), nn.Tanh()), nn.Linear(8 * features, 8 * classes))
    model = model.bfloat16() if way == "bf16 model" else model
    x, y = data(classes=8 * classes)
    recorder = Recorder(model, N, head="head")
    z, h = ROUNDED[way](run_it(model), x, y)
    weight = model.head.weight.to(z.dtype)
    want = alignment_scores(*(t.detach().double().numpy() for t in (z.grad, h, weight)))
    assert recorder.monitor.faults == {}
    np.testing.assert_allclose(recorder.scores(), want, atol=5e-3)


def twice_watched(model: Net) -> Recorder:
    """Ids 0 to N - 1 are for the first time that a sample is seen, the rest for the second."""
    return Recorder(model, 2 * N)


@run_and_width_of
def test_both_backward_passes_of_a_step_count_as_in_sam(width, how):
    model = net(*WIDTH[width])
    recorder = twice_watched(model)
    run, (x, y), want = RUN[how](model), data(), []
    for i in range(2):
        want.append(one_by_one(model, F.cross_entropy, x, y))
        recorder.monitor.tag(torch.arange(N) + i * N)
        F.cross_entropy(run(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=0.5 if i == 0 else -0.5)
    assert recorder.monitor.end_epoch().count == 2 * N
    np.testing.assert_allclose(recorder.scores(), np.concatenate(want), atol=1e-5)


@run_and_width_of
def test_every_backward_pass_through_a_retained_graph_counts(width, how):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    x, y = data()
    want = one_by_one(model, F.cross_entropy, x, y)
    loss = F.cross_entropy(RUN[how](model)(x), y)
    if how == "compiled":
        torch._functorch.config.donated_buffer = False
    try:
        loss.backward(retain_graph=True)
        loss.backward()
    finally:
        torch._functorch.config.donated_buffer = True
    report = monitor.end_epoch()
    assert report.count == 2 * N
    assert report.mean == pytest.approx(want.mean(), abs=1e-6)


@width_of
def test_a_gradient_penalty_counts_once_for_the_outer_pass(width):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    x, y = data()
    x.requires_grad_()
    loss = F.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()
    (loss + grad.square().sum()).backward()
    assert monitor.end_epoch().count == N
    assert monitor.faults == {}
    assert model.head.weight.grad is not None


@width_of
def test_create_graph_gives_the_scores_of_an_ordinary_backward_pass(width):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    step = Step(model, model, recorder)
    want = one_by_one(model, F.cross_entropy, step.x, step.y)
    step.loss().backward(create_graph=True)
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)
    for parameter in model.parameters():
        parameter.grad = None


@width_of
def test_torch_autograd_grad_counts_in_eager_mode(width):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    step = Step(model, model, recorder)
    want = one_by_one(model, F.cross_entropy, step.x, step.y)
    torch.autograd.grad(step.loss(), list(model.parameters()))
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@pytest.mark.parametrize("width", ["narrow", pytest.param("wide", marks=pytest.mark.slow)])
def test_a_whole_step_may_be_compiled_with_its_backward_pass(width):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    step = Step(model, model, recorder)
    want = one_by_one(model, F.cross_entropy, step.x, step.y)

    @torch.compile(backend="aot_eager")
    def train(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()

    torch._dynamo.config.compiled_autograd = True
    try:
        train(step.x, step.y)
    finally:
        torch._dynamo.config.compiled_autograd = False
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@width_of
@pytest.mark.parametrize("call", ["autograd.grad", "backward(inputs=)"])
def test_only_a_backward_pass_to_all_leaves_counts_in_a_compiled_model(call, width):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    run, (x, y) = compiled(model), data()
    loss, parameters = F.cross_entropy(run(x), y), list(model.parameters())
    torch.autograd.grad(loss, parameters) if call == "autograd.grad" else loss.backward(inputs=parameters)
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()
    F.cross_entropy(run(x), y).backward()
    assert monitor.end_epoch().count == N


@run_and_width_of
def test_functional_call_is_scored_by_the_weights_that_it_is_given(width, how):
    model = net(*WIDTH[width])
    given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    recorder = Recorder(model, N)
    run = lambda x: torch.func.functional_call(model, given, (x,))  # noqa: E731
    step = Step(model, torch.compile(run, fullgraph=True, backend="aot_eager") if how == "compiled" else run, recorder)
    one_backward(step)
    model.load_state_dict(given)
    np.testing.assert_allclose(recorder.scores(), one_by_one(model, F.cross_entropy, step.x, step.y), atol=1e-5)


@tiered("transform, width, how", ["grad", "vmap(grad)"], WIDTH, RUN)
def test_the_transforms_of_torch_func_work_as_before_and_are_not_observed(transform, width, how):
    model = net(*WIDTH[width])
    x, y = data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    function: Any = torch.func.grad(loss)
    if transform == "vmap(grad)":
        function = torch.func.vmap(
            torch.func.grad(lambda parameters, x, y: loss(parameters, x[None], y[None])), in_dims=(None, 0, 0)
        )
    want = function(parameters, x, y)
    monitor = gwa_logging.watch(model)
    for _ in range(3):
        got = RUN[how](function)(parameters, x, y)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    assert monitor.faults == ({"torch.func": 3} if how == "eager" else {})
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == N


@run_and_width_of
def test_a_model_with_dropout_is_scored_on_the_features_that_were_left(width, how):
    features, classes = WIDTH[width]
    model = Shown(nn.Sequential(nn.Linear(8, features), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(features, classes))
    recorder = Recorder(model, N, head="head")
    x, y = data()
    z, h = RUN[how](model)(x)
    z.retain_grad()
    F.cross_entropy(z, y).backward()
    want = alignment_scores(*(t.detach().numpy() for t in (z.grad, h, model.head.weight)))
    assert (h == 0).any()
    np.testing.assert_allclose(recorder.scores(), np.where(np.isfinite(want), want, np.nan), atol=1e-5)


@width_of
def test_the_samples_of_more_compiled_passes_than_leaves_are_never_mixed_up(width):
    from gwa_logging.integrations.torch.rows import PASSES

    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    run, (x, y) = compiled(model), data()
    sum(F.cross_entropy(run(x), y) for _ in range(PASSES)).backward()
    assert monitor.end_epoch().count == PASSES * N
    sum(F.cross_entropy(run(x), y) for _ in range(PASSES + 1)).backward()
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == ((PASSES - 1) * N, 0)
    assert monitor.faults == {"compiled passes": 2 * N}


def test_a_compiled_step_reads_each_leaf_once_and_the_wide_head_adds_no_matrix_product():
    """The wide head's tap must not compute the gradient of the embeddings a second time."""
    products = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
            return graph

        return aot_autograd(fw_compiler=count, bw_compiler=count)(graph, inputs)

    def step_of(model: Net) -> list[int]:
        products.clear()
        run, (x, y) = compiled(model, backend=counting), data()
        F.cross_entropy(run(x), y).backward()
        return list(products)

    bare = step_of(net(4, 5))
    torch._dynamo.reset()
    model = net(4, 5)
    with gwa_logging.watch(model):
        assert step_of(model) == bare


@width_of
def test_the_input_and_the_bias_may_change_before_the_backward_pass_unless_a_wide_head_needs_the_input(width):
    features, classes = WIDTH[width]
    model = Net(nn.Linear(8, features), nn.Linear(features, classes)).requires_grad_(False)
    model.head.bias.requires_grad_()
    model.body.requires_grad_()
    x, y = data(classes=classes)
    want = one_by_one(model, F.cross_entropy, x, y)
    monitor = gwa_logging.watch(model, head="head", num_samples=N)
    monitor.tag(torch.arange(N))
    h = model.body(x)
    z = model.head(h)
    with torch.no_grad():
        h.mul_(2).add_(1)
        model.head.bias.add_(1)
    F.cross_entropy(z, y).backward()
    if width == "wide":  # a fault, not a wrong score
        assert monitor.faults == {"probe": 1}
    else:
        np.testing.assert_allclose(monitor._adapter.ledger().ledger.sums, want, atol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------------------


class Task:
    """A loss, its targets, and a function of the logits before it."""

    def __init__(self, loss: Loss, y: Tensor | None = None, after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        self.loss, self.after = loss, after
        self.y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(3)) if y is None else y


def soft_labels(n: int = N) -> Tensor:
    return torch.softmax(2 * torch.randn(n, C, generator=torch.Generator().manual_seed(1)), -1)


def mixed(shares: Tensor) -> Tensor:
    """Two labels for each sample, in shares."""
    first, second = torch.randint(0, C, (2, len(shares)), generator=torch.Generator().manual_seed(2))
    return shares[:, None] * F.one_hot(first, C) + (1 - shares[:, None]) * F.one_hot(second, C)


def multi_hot() -> Tensor:
    return (soft_labels() > 0.15).float()


def with_ignored() -> Tensor:
    y = Task(F.cross_entropy).y.clone()
    y[::5] = -100
    return y


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = torch.log_softmax(z, -1).gather(1, y[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def hinge(z: Tensor, y: Tensor) -> Tensor:
    right = z.gather(1, y[:, None])
    others = F.one_hot(y, C) == 0
    return torch.where(others, (1 + z - right).clamp(min=0) ** 2, 0.0).sum(1).mean()


weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
TASKS = {
    "cross-entropy, mean": Task(F.cross_entropy),
    "cross-entropy, sum": Task(lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    "label smoothing": Task(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    "soft targets": Task(F.cross_entropy, soft_labels()),
    "mixup": Task(F.cross_entropy, mixed(torch.linspace(0, 1, N))),
    "cutmix": Task(F.cross_entropy, mixed(torch.arange(N) % 4 / 4)),
    "class weights": Task(lambda z, y: F.cross_entropy(z, y, weight=weights.to(z.dtype))),
    "class weights, sum": Task(lambda z, y: F.cross_entropy(z, y, weight=weights.to(z.dtype), reduction="sum")),
    "ignore_index": Task(F.cross_entropy, with_ignored()),
    "focal": Task(focal),
    "BCE with logits, multi-label": Task(F.binary_cross_entropy_with_logits, multi_hot()),
    "BCE with logits, weighted": Task(
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=weights.to(z.dtype)), multi_hot()
    ),
    "squared hinge": Task(hinge),
    "multi-margin": Task(lambda z, y: F.multi_margin_loss(z, y)),
    "NLL of log_softmax": Task(F.nll_loss, after=lambda z: F.log_softmax(z, -1)),
    "KL of log_softmax": Task(
        lambda z, y: F.kl_div(z, y, reduction="batchmean"), soft_labels(), lambda z: F.log_softmax(z, -1)
    ),
    "temperature": Task(F.cross_entropy, after=lambda z: z / 0.3),
    "soft-capped logits": Task(F.cross_entropy, after=lambda z: 2 * torch.tanh(z / 2)),
}


@tiered(
    "task, width, how",
    *(TASKS, WIDTH, RUN),
)
def test_a_loss_is_scored_by_the_gradient_of_each_samples_own(task, width, how):
    loss, y = TASKS[task].loss, TASKS[task].y
    model = net(*WIDTH[width], after=TASKS[task].after)
    x, _ = data()
    want = one_by_one(model, loss, x, y)
    recorder = Recorder(model, N, head="head")
    RUN[how](lambda x, y: loss(model(x), y))(x, y).backward()
    assert np.isnan(want).sum() == (5 if task == "ignore_index" else 0)
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@run_and_width_of
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_samples_without_a_score_do_not_alarm_anomaly_detection(width, how):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        F.cross_entropy(RUN[how](model)(data()[0]), with_ignored()).backward()
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (N - 5, 5)


@run_and_width_of
def test_gradients_too_small_to_be_squared_count_as_none(width, how):
    """In float32 the square of 1e-22 has hardly a digit left: such a norm would make a wrong score."""
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    z = RUN[how](model)(data()[0])
    z.backward(torch.randn_like(z) * torch.where(torch.arange(N) < 7, 1e-22, 1e-12)[:, None])
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (N - 7, 7)


# --- shapes -----------------------------------------------------------------------------------------------------------


class Case:
    """A model, a batch, the loss, and the number of samples that the head sees."""

    def __init__(self, model: Net, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, samples: int = 0) -> None:
        self.model, self.x, self.y, self.loss, self.samples = model, x, y, loss, samples or len(x)

    def want(self, weight: Tensor) -> np.ndarray:
        return one_by_one(self.model, self.loss, self.x, self.y, weight)


class Tokens(Case):
    """Every position is a sample; the loss ignores some."""

    def __init__(self, features: int, classes: int) -> None:
        x, y = torch.randn(4, 6, 8), torch.randint(0, classes, (4, 6))
        y[0, 4:] = y[2, 1:] = -100
        body = nn.Sequential(nn.Linear(8, features), nn.Tanh())
        super().__init__(Net(body, nn.Linear(features, classes)), x, y, self.of_all, samples=24)

    @staticmethod
    def of_all(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, -2), y.flatten())

    def want(self, weight: Tensor) -> np.ndarray:
        return one_by_one(self.model, self.loss, self.x.flatten(0, 1), self.y.flatten(), weight)


class Decoder(Case):
    """The head is applied to all tokens, and the loss uses the logits of one of them; the others have no score."""

    def __init__(self, features: int, classes: int) -> None:
        self.last = torch.arange(8) % 6
        body = nn.Sequential(nn.Linear(8, features), nn.Tanh())
        model = Net(body, nn.Linear(features, classes, bias=False), lambda z: z[torch.arange(8), self.last])
        super().__init__(model, torch.randn(8, 6, 8), torch.randint(0, classes, (8,)), samples=48)

    def want(self, weight: Tensor) -> np.ndarray:
        alone = Net(self.model.body, self.model.head)
        scores = np.full((8, 6), np.nan)
        tokens = self.x[torch.arange(8), self.last]
        scores[np.arange(8), self.last] = one_by_one(alone, self.loss, tokens, self.y, weight)
        return scores.ravel()


def rows_of(head: Callable[[int, int], nn.Module], features: int = D, classes: int = C) -> Case:
    return Case(Net(nn.Sequential(nn.Linear(8, features), nn.Tanh()), head(features, classes)), *data(classes=classes))


def one_logit() -> Case:
    model = Net(nn.Sequential(nn.Linear(8, D), nn.Tanh()), nn.Linear(D, 1), lambda z: z[:, 0])
    return Case(model, torch.randn(N, 8), torch.randint(0, 2, (N,)).float(), F.binary_cross_entropy_with_logits)


def images(head: nn.Module, size: tuple[int, ...], *, pool_first: bool = False) -> Case:
    """A convolution as the head, and a mean over all positions, after or before it."""
    features = head.in_channels
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[len(size)](1)
    body = nn.Sequential(conv(2, features, 1), nn.Tanh(), *([pool] if pool_first else []))
    return Case(Net(body, head, lambda z: z.flatten(2).mean(2)), torch.randn(8, 2, *size), torch.randint(0, C, (8,)))


class Tied(Net):
    """A language model whose head has the weight of its embedding."""

    def __init__(self, features: int, classes: int) -> None:
        body = nn.Embedding(classes, features)
        super().__init__(body, nn.Linear(features, classes, bias=False))
        self.head.weight = body.weight


class Keyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(x))


class LowRank(nn.Module):
    """A LoRA update of a frozen weight."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, features)), nn.Parameter(torch.randn(classes, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def lora(features: int, classes: int) -> nn.Module:
    head = nn.Linear(features, classes).requires_grad_(False)
    return parametrize.register_parametrization(head, "weight", LowRank(features, classes))


def tied(features: int, classes: int) -> Case:
    tokens = torch.randint(0, classes, (N,))
    return Case(Tied(features, classes), tokens, torch.randint(0, classes, (N,)))


def keyword(features: int, classes: int) -> Case:
    model = rows_of(nn.Linear, features, classes).model
    return Case(Keyword(model.body, model.head), *data(classes=classes))


SHAPES: dict[str, Callable[[], Case]] = {
    "[B, C]": lambda: rows_of(nn.Linear),
    "[B, C], wide": lambda: rows_of(nn.Linear, 4, 9),
    "one logit for two classes": one_logit,
    "tokens [B, T, C], padded": lambda: Tokens(D, C),
    "tokens [B, T, C], padded, wide": lambda: Tokens(4, 9),
    "decoder, one token gathered": lambda: Decoder(D, C),
    "decoder, one token gathered, wide": lambda: Decoder(4, 9),
    "1x1 Conv2d, pooled after": lambda: images(nn.Conv2d(D, C, 1), (2, 3)),
    "1x1 Conv2d, pooled before": lambda: images(nn.Conv2d(D, C, 1), (5, 5), pool_first=True),
    "1x1 Conv2d, many positions": lambda: images(nn.Conv2d(3, C, 1), (5, 5)),
    "1x1 Conv2d, wide": lambda: images(nn.Conv2d(3, C, 1), (1, 2)),
    "1x1 Conv2d without a bias": lambda: images(nn.Conv2d(D, C, 1, bias=False), (2, 3)),
    "Conv1d": lambda: images(nn.Conv1d(D, C, 1), (4,)),
    "Conv3d": lambda: images(nn.Conv3d(D, C, 1), (2, 2, 1)),
    "weight_norm": lambda: rows_of(lambda d, c: parametrizations.weight_norm(nn.Linear(d, c))),
    "weight_norm, wide": lambda: rows_of(lambda d, c: parametrizations.weight_norm(nn.Linear(d, c)), 4, 9),
    "weight_norm, old": lambda: rows_of(lambda d, c: nn.utils.weight_norm(nn.Linear(d, c))),
    "weight_norm, old, wide": lambda: rows_of(lambda d, c: nn.utils.weight_norm(nn.Linear(d, c)), 4, 9),
    "weight_norm of a 1x1 Conv2d": lambda: images(parametrizations.weight_norm(nn.Conv2d(D, C, 1)), (2, 3)),
    "spectral_norm": lambda: rows_of(lambda d, c: parametrizations.spectral_norm(nn.Linear(d, c))),
    "spectral_norm, wide": lambda: rows_of(lambda d, c: parametrizations.spectral_norm(nn.Linear(d, c)), 4, 9),
    "spectral_norm, old": lambda: rows_of(lambda d, c: nn.utils.spectral_norm(nn.Linear(d, c))),
    "spectral_norm, old, wide": lambda: rows_of(lambda d, c: nn.utils.spectral_norm(nn.Linear(d, c)), 4, 9),
    "LoRA as a parametrization": lambda: rows_of(lora),
    "LoRA as a parametrization, wide": lambda: rows_of(lora, 4, 9),
    "tied to the embedding": lambda: tied(D, C),
    "tied to the embedding, wide": lambda: tied(4, 9),
    "called with a keyword": lambda: keyword(D, C),
    "called with a keyword, wide": lambda: keyword(4, 9),
}


@tiered("shape, how", SHAPES, RUN)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_shape_of_the_head_is_scored_by_the_gradient_of_its_effective_weight(shape, how):
    case = SHAPES[shape]()
    model = case.model
    recorder = Recorder(model, case.samples, head="head")
    case.loss(RUN[how](model)(case.x), case.y).backward()
    weight, _ = effective(model.head)  # of the pass: spectral_norm's changes in each
    want = case.want(weight)
    assert recorder.monitor.faults == {}
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
}


@tiered("norm, width, how", NORMS, WIDTH, RUN)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_watched_normalised_head_trains_to_the_same_bits(norm, width, how):
    """Reading the weight of a spectral_norm once more would move its power iteration on."""
    features, classes = WIDTH[width]

    def trained(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        body = nn.Sequential(nn.Linear(8, features), nn.Tanh())
        model = Net(body, NORMS[norm](nn.Linear(features, classes)))
        monitor = gwa_logging.watch(model) if watched else None
        run, optimizer = RUN[how](model), torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            x, y = data()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            assert monitor.end_epoch().count == 3 * N
            monitor.close()
        return [*model.parameters(), *model.buffers()]

    for mine, bare in zip(trained(True), trained(False), strict=True):
        assert torch.equal(mine, bare)


def test_a_head_that_is_parametrised_after_it_is_watched_keeps_its_power_iteration():
    model = net()
    recorder = Recorder(model, N)
    parametrizations.spectral_norm(model.head)
    step = Step(model, model, recorder)
    twin = copy.deepcopy(model)
    one_backward(step)
    twin(step.x)
    for mine, bare in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, bare)
    weight, _ = effective(model.head)
    np.testing.assert_allclose(recorder.scores(), one_by_one(model, F.cross_entropy, step.x, step.y, weight), atol=1e-5)


# --- closing, dropping and copying ------------------------------------------------------------------------------------


@run_and_width_of
def test_a_watch_that_is_closed_before_the_backward_pass_observes_nothing_and_training_continues(width, how):
    model = net(*WIDTH[width])
    run, (x, y) = RUN[how](model), data()
    F.cross_entropy(model(x), y).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monitor = gwa_logging.watch(model, num_samples=N)
    monitor.tag(torch.arange(N))
    loss = F.cross_entropy(run(x), y)
    monitor.close()
    loss.backward()
    assert not monitor._adapter.ledger().ledger.seen.any()
    for parameter, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    F.cross_entropy(run(x), y).backward()


@run_and_width_of
def test_a_notebook_cell_that_is_run_three_times_leaves_one_set_of_hooks(width, how):
    model = net(*WIDTH[width])
    bare, (x, y) = dict(model.head.__dict__), data()
    run = RUN[how](model)
    for _ in range(3):
        monitor = gwa_logging.watch(model)
        F.cross_entropy(run(x), y).backward()
        assert monitor.end_epoch().count == N
        assert len(model.head._forward_hooks) == 1
        assert len(model.head._forward_pre_hooks) == (width == "wide")
    monitor.close()
    assert model.head.__dict__ == bare
    assert not model.head._forward_hooks
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first closed first", "last closed first"])
@pytest.mark.parametrize("head", [nn.Linear, lambda d, c: parametrizations.weight_norm(nn.Linear(d, c))])
def test_a_head_shared_by_two_models_counts_for_both_and_is_restored(head, order):
    shared = head(D, C)
    parts = [shared, *shared.modules()]
    models = [Net(nn.Linear(8, D), shared) for _ in range(2)]
    bare = [dict(part.__dict__) for part in parts]
    monitors = [gwa_logging.watch(model, name=f"gwa{i}") for i, model in enumerate(models)]
    x, y = data()
    F.cross_entropy(models[0](x), y).backward()
    assert [monitor.end_epoch().count for monitor in monitors] == [N, N]
    copy.deepcopy(models[0])
    monitors[order[0]].close()
    F.cross_entropy(models[1](x), y).backward()
    assert monitors[order[1]].end_epoch().count == N
    twin = copy.deepcopy(models[0])
    monitors[order[1]].close()
    assert [part.__dict__ for part in parts] == bare
    assert not any(part._forward_hooks for part in [*twin.modules(), *parts])


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_copy_of_a_watched_parametrised_head_is_not_watched(norm):
    model = net()
    NORMS[norm](model.head)
    monitor = gwa_logging.watch(model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    twin = copy.deepcopy(model)
    assert not any(part._forward_hooks for part in twin.modules())
    assert not any("forward" in part.__dict__ for part in twin.modules())
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == 2 * N


@tiered("state, width, how", ["closed", "still watched"], WIDTH, RUN)
@pytest.mark.usefixtures("small_heap")
def test_a_dropped_model_is_freed(state, width, how):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    x, y = data()
    F.cross_entropy(RUN[how](model)(x), y).backward()
    if state == "closed":
        monitor.close()
    gone = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert gone() is None
    if state == "still watched":
        assert monitor.end_epoch().count == N


@pytest.mark.parametrize("norm", [None, *NORMS])
@width_of
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.usefixtures("small_heap")
def test_a_probe_does_not_keep_its_head_alive(width, norm):
    from gwa_logging.faults import Faults
    from gwa_logging.integrations.torch.accumulate import Accumulator
    from gwa_logging.integrations.torch.head_layers import layer_of
    from gwa_logging.integrations.torch.probe import HeadProbe
    from gwa_logging.integrations.torch.units import Unit

    model = net(*WIDTH[width])
    if norm is not None:
        NORMS[norm](model.head)
    probe = HeadProbe(layer_of(model.head), Accumulator(None), lambda: None, Faults(), Unit(None, Faults()))
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    gone = weakref.ref(model.head)
    del model
    gc.collect()
    assert gone() is None
    probe.close()
    gone = weakref.ref(probe)
    del probe
    gc.collect()
    assert gone() is None


@tiered("width, how", [*WIDTH, "weight_norm"], RUN)
@pytest.mark.usefixtures("small_heap")
def test_memory_does_not_grow_with_the_steps(width, how):
    model = net(*WIDTH.get(width, (D, C)))
    if width == "weight_norm":
        NORMS[width](model.head)
    monitor = gwa_logging.watch(model, log_every_n_steps=5)
    run = RUN[how](model)

    def tensors_after(steps: int) -> int:
        for _ in range(steps):
            x, y = data()
            F.cross_entropy(run(x), y).backward()
            run(x)  # a forward pass without a backward pass
        monitor.flush()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    tensors_after(20)
    while gc.collect():  # what finalizers release is collected in the next round
        pass
    gc.disable()  # nothing may depend on the collector
    try:
        before = tensors_after(20)
        assert tensors_after(20) <= before + 5
    finally:
        gc.enable()
    assert gc.collect() < 40


# --- moving -----------------------------------------------------------------------------------------------------------


def moved_to_float64_and_back(model: Net) -> None:
    model.double().float()


def moved_to_the_cpu(model: Net) -> None:
    model.to("cpu")


MOVES = {"dtype": moved_to_float64_and_back, "device": moved_to_the_cpu}


@tiered("move, width, how", MOVES, WIDTH, RUN)
def test_a_model_may_move_while_it_is_watched(move, width, how):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    MOVES[move](model)
    step = Step(model, RUN[how](model), recorder)
    one_backward(step)
    np.testing.assert_allclose(recorder.scores(), one_by_one(model, F.cross_entropy, step.x, step.y), atol=1e-5)


@run_and_width_of
def test_float64_is_scored(width, how):
    model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    model.double()
    step = Step(model, RUN[how](model), recorder)
    step.x = step.x.double()
    one_backward(step)
    np.testing.assert_allclose(recorder.scores(), one_by_one(model, F.cross_entropy, step.x, step.y), atol=1e-5)


@tiered("by, width, how", ["to_empty", "load_state_dict(assign=True)"], WIDTH, RUN)
def test_a_model_on_meta_may_be_watched_before_it_has_numbers(by, width, how):
    state = net(*WIDTH[width]).state_dict()
    with torch.device("meta"):
        model = net(*WIDTH[width])
    recorder = Recorder(model, N)
    if by == "to_empty":
        model.to_empty(device="cpu").load_state_dict(state)
    else:
        model.load_state_dict(state, assign=True)
    step = Step(model, RUN[how](model), recorder)
    one_backward(step)
    np.testing.assert_allclose(recorder.scores(), one_by_one(model, F.cross_entropy, step.x, step.y), atol=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@run_and_width_of
def test_steps_on_meta_are_not_observed(width, how):
    with torch.device("meta"):
        model = net(*WIDTH[width])
        x, y = data()
    monitor = gwa_logging.watch(model)
    F.cross_entropy(RUN[how](model)(x), y).backward()
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()


@run_and_width_of
def test_nan_weights_exclude_every_sample_and_are_reported(width, how, caplog):
    model = net(*WIDTH[width])
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    monitor = gwa_logging.watch(model)
    x, y = data()
    F.cross_entropy(RUN[how](model)(x), y).backward()
    report = monitor.end_epoch()
    assert (report.count, report.excluded) == (0, N)
    assert monitor.faults == {"samples that are not finite": N}
    assert any("not finite" in message for message in caplog.messages)


@run_and_width_of
def test_a_batch_without_rows_is_a_step_without_samples(width, how):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model)
    run, (x, y) = RUN[how](model), data()
    run(x[:0]).sum().backward()
    F.cross_entropy(run(x), y).backward()
    assert monitor.end_epoch().count == N
    assert monitor.faults == {}


@run_and_width_of
def test_a_batch_of_one_is_scored(width, how):
    model = net(*WIDTH[width])
    recorder = Recorder(model, 1)
    x, y = data(1)
    want = one_by_one(model, F.cross_entropy, x, y)
    F.cross_entropy(RUN[how](model)(x), y).backward()
    np.testing.assert_allclose(recorder.scores(), want, atol=1e-5)


@run_of
def test_integer_outputs_train_nothing_which_is_an_error_at_the_epochs_end(how):
    model = net(after=lambda z: z.argmax(-1))
    monitor = gwa_logging.watch(model, head="head")
    labels = RUN[how](model)(data()[0])
    assert not labels.requires_grad
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()


def test_a_complex_head_is_refused_with_the_reason():
    model = Net(nn.Linear(8, D), nn.Linear(D, C, dtype=torch.complex64))
    with pytest.raises(HeadNotFoundError, match="complex"):
        gwa_logging.watch(model, head="head")


def test_a_head_that_becomes_complex_later_is_not_observed():
    model = net()
    monitor = gwa_logging.watch(model)
    model.to(torch.complex64)
    model(torch.randn(N, 8, dtype=torch.complex64)).abs().sum().backward()
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()
    assert monitor.faults == {"probe": 1}


def test_ids_that_are_not_integers_are_refused():
    with gwa_logging.watch(net(), num_samples=N) as monitor, pytest.raises(InvalidInputError):
        monitor.tag(torch.randn(N))


@tiered("ids, how", [5, 90], RUN)
def test_ids_of_another_number_than_the_samples_are_left_out_and_counted(ids, how, caplog):
    model = net()
    with gwa_logging.watch(model, num_samples=100) as monitor:
        run, (x, y) = RUN[how](model), data()
        monitor.tag(torch.arange(ids))
        F.cross_entropy(run(x), y).backward()
        monitor.tag(torch.arange(50, 50 + N))
        F.cross_entropy(run(x), y).backward()
        assert monitor.end_epoch().count == 2 * N
        assert {suspect.id for suspect in monitor.suspects()} == set(range(50, 50 + N))
    assert monitor.faults == {"sample ids": min(ids, N)}
    assert any(f"{min(ids, N)} ids were" in message for message in caplog.messages)


# --- one graph --------------------------------------------------------------------------------------------------------


@width_of
@pytest.mark.parametrize("norm", [None, "weight_norm", "spectral_norm"])
def test_the_probe_breaks_no_graph(norm, width):
    model = net(*WIDTH[width])
    if norm is not None:
        NORMS[norm](model.head)
    with gwa_logging.watch(model):
        explained = torch._dynamo.explain(model)(data()[0])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@width_of
def test_ragged_batches_recompile_nothing_after_the_first_two_steps(width):
    model = net(*WIDTH[width])
    monitor = gwa_logging.watch(model, num_samples=1000)
    run, seen = compiled(model), 0
    for step, n in enumerate((32, 7, 32, 7, 19, 2, 64, 33, 32)):
        if step == 2:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch._dynamo.config.error_on_recompile = True
        try:
            if step % 3:
                monitor.tag(torch.arange(seen, seen + n))
            x, y = data(n)
            loss = F.cross_entropy(run(x), y)
            if step == 5:
                loss = loss + F.cross_entropy(run(x), y)
                seen += n
            loss.backward()
        finally:
            torch._dynamo.config.error_on_recompile = False
        seen += n
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert monitor.end_epoch().count == seen
