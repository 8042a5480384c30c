"""Which passes count as training."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gwa_logging
from gwa_logging import Monitor, NoObservationsError
from tests.torch.tiers import tiered

N = 12
WIDTH = {"by logits": (16, 5), "by embeddings": (4, 9)}
width_of = pytest.mark.parametrize("width", WIDTH)
RUN = ["eager", "compiled"]
run_of = pytest.mark.parametrize("how", RUN)


def net(width: str = "by logits") -> nn.Sequential:
    torch.manual_seed(0)
    features, classes = WIDTH[width]
    return nn.Sequential(nn.Linear(8, features), nn.Tanh(), nn.Linear(features, classes))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 8, generator=generator), torch.randint(0, 5, (N,), generator=generator)


def one_by_one(model: nn.Sequential, x: Tensor, y: Tensor) -> np.ndarray:
    """The oracle: the score of each sample by its own gradient of the head's weight."""
    scores = []
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model[-1].weight)
        scores.append(-(gradient * model[-1].weight).sum() / gradient.norm() / model[-1].weight.norm())
    return torch.stack(scores).detach().double().numpy()


@pytest.fixture
def watch() -> Iterator[Callable[..., Monitor]]:
    """`gwa_logging.watch`, whose monitors are closed after the test."""
    with ExitStack() as monitors:
        yield lambda *args, **options: monitors.enter_context(gwa_logging.watch(*args, **options))


def compiled_if(how: str, model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model


def times_seen(monitor: Monitor) -> dict[int, float]:
    return {suspect.id: suspect.times_seen for suspect in monitor.suspects(N)}


@tiered("width, how", WIDTH, RUN, odd=True)
def test_passes_in_eval_mode_do_not_count_and_leave_the_ids_to_the_next_training_pass(watch, width, how):
    model, (x, y) = net(width), data()
    want = one_by_one(model, x, y)
    monitor = watch(model, num_samples=N)
    run = compiled_if(how, model)
    monitor.tag(torch.arange(N))
    model.eval()
    F.cross_entropy(run(x), y).backward()
    model.train()
    F.cross_entropy(run(x), y).backward()
    report = monitor.end_epoch()
    assert report.count == N
    assert report.mean == pytest.approx(want.mean(), abs=1e-6)
    assert times_seen(monitor) == dict.fromkeys(range(N), 1.0)
    assert monitor.faults == {}


@tiered("how", RUN)
def test_training_in_eval_mode_is_reported_after_a_few_steps(watch, how, caplog):
    model, (x, y) = net(), data()
    monitor = watch(model)
    model.eval()
    run, optimizer = compiled_if(how, model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
    assert monitor.faults == {"silence": 1}
    assert "passes with the head in eval mode" in caplog.text
    with pytest.raises(NoObservationsError, match=r"call model\.train\(\)"):
        monitor.end_epoch()


def test_a_backbone_in_eval_mode_under_a_head_in_training_mode_counts(watch):
    model, (x, y) = net(), data()
    monitor = watch(model)
    model.eval()
    model[-1].train()
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == N


@tiered("width, how", WIDTH, RUN)
def test_nothing_counts_while_paused_and_ids_wait_for_the_next_counted_pass(watch, width, how):
    model, (x, y) = net(width), data()
    want = one_by_one(model, x, y)
    monitor = watch(model, num_samples=N)
    run = compiled_if(how, model)
    F.cross_entropy(run(x), y).backward()
    before = monitor.end_epoch()
    torch._dynamo.config.error_on_recompile = True
    try:
        monitor.tag(torch.arange(N // 2))
        with monitor.paused():
            for _ in range(3):
                F.cross_entropy(run(x), y).backward()
            monitor.tag(torch.arange(N))
            under_way = F.cross_entropy(run(x), y)
            with monitor.paused():
                monitor.update(torch.zeros(3))
        under_way.backward()
        counted = F.cross_entropy(run(x), y)
        with monitor.paused():
            F.cross_entropy(run(x), y).backward()
        counted.backward()
    finally:
        torch._dynamo.config.error_on_recompile = False
    report = monitor.end_epoch()
    assert (before.count, report.count) == (N, N)
    assert report.mean == pytest.approx(want.mean(), abs=1e-6)
    assert times_seen(monitor) == dict.fromkeys(range(N), 1.0)


@run_of
def test_a_backward_pass_while_paused_keeps_its_ids_for_the_next_pass(watch, how):
    model, (x, y) = net(), data()
    monitor = watch(model, num_samples=N)
    run = compiled_if(how, model)
    monitor.tag(torch.arange(N))
    loss = F.cross_entropy(run(x), y)
    with monitor.paused():
        loss.backward()
    F.cross_entropy(run(x), y).backward()
    assert monitor.end_epoch().count == N
    assert times_seen(monitor) == dict.fromkeys(range(N), 1.0)


def test_counting_resumes_after_an_exception_while_paused(watch):
    model, (x, y) = net(), data()
    monitor = watch(model)
    with pytest.raises(ZeroDivisionError), monitor.paused():
        raise ZeroDivisionError
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == N


def test_paused_holds_for_every_head(watch):
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.one(h), self.two(h)

    model, (x, y) = TwoHeads(), data()
    monitor = watch(model, head=["one", "two"])
    for _ in range(2):
        with monitor.paused():
            sum(F.cross_entropy(z, y) for z in model(x)).backward()
    sum(F.cross_entropy(z, y) for z in model(x)).backward()
    assert monitor.end_epoch().count == N
    assert monitor.heads["two"].history[-1].count == N


def test_a_first_pass_while_paused_shows_the_head_and_does_not_count(watch):
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            if h.isnan().any():  # tracing stops here
                raise ValueError
            return self.head(h)

    model, (x, y) = Untraceable(), data()
    monitor = watch(model)
    with monitor.paused():
        F.cross_entropy(model(x), y).backward()
    model.eval()
    F.cross_entropy(model(x), y).backward()
    model.train()
    F.cross_entropy(model(x), y).backward()
    assert monitor.end_epoch().count == N


# --- without paused() ---------------------------------------------------------------------------------------------------


def attack_by_grad(loss: Tensor, x: Tensor) -> None:
    torch.autograd.grad(loss, x)


def attack_by_inputs(loss: Tensor, x: Tensor) -> None:
    loss.backward(inputs=[x])


def penalty(loss: Tensor, x: Tensor) -> None:
    torch.autograd.grad(loss, x, create_graph=True)


HEADS = {
    "[B, D]": lambda features, classes: nn.Linear(features, classes),
    "[B, D], no bias": lambda features, classes: nn.Linear(features, classes, bias=False),
    "[B, 1, D]": lambda features, classes: nn.Sequential(
        nn.Unflatten(1, (1, features)), nn.Linear(features, classes), nn.Flatten(1)
    ),
    "[B, 1, D], no bias": lambda features, classes: nn.Sequential(
        nn.Unflatten(1, (1, features)), nn.Linear(features, classes, bias=False), nn.Flatten(1)
    ),
    "1x1 convolution": lambda features, classes: nn.Sequential(
        nn.Unflatten(1, (features, 1, 1)), nn.Conv2d(features, classes, 1), nn.Flatten(1)
    ),
}


@width_of
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("attack", [attack_by_grad, attack_by_inputs, penalty])
def test_a_backward_pass_that_gives_the_heads_weight_no_gradient_does_not_count(watch, attack, head, width):
    model, (x, y) = net(width), data()
    model[-1] = HEADS[head](*WIDTH[width])
    monitor = watch(model, num_samples=N)
    monitor.tag(torch.arange(N))
    x.requires_grad_()
    attack(F.cross_entropy(model(x), y), x)
    with pytest.raises(NoObservationsError):
        monitor.end_epoch()
    F.cross_entropy(model(x.detach()), y).backward()
    assert monitor.end_epoch().count == N
    assert times_seen(monitor) == dict.fromkeys(range(N), 1.0)
    assert monitor.faults == {}


@width_of
@pytest.mark.parametrize("head", HEADS)
def test_autograd_grad_of_the_parameters_counts(watch, head, width):
    model, (x, y) = net(width), data()
    model[-1] = HEADS[head](*WIDTH[width])
    monitor = watch(model)
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert monitor.end_epoch().count == N


@width_of
def test_of_a_gradient_penalty_only_the_outer_pass_counts_and_keeps_its_ids(watch, width):
    model, (x, y) = net(width), data()
    monitor = watch(model, num_samples=N)
    x.requires_grad_()
    monitor.tag(torch.arange(N))
    loss = F.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    F.cross_entropy(model(x), y).backward()  # without ids: those of the pass before are used up
    assert monitor.end_epoch().count == 2 * N
    assert times_seen(monitor) == dict.fromkeys(range(N), 1.0)
    assert monitor.faults == {"samples without ids": N}


# --- what is lost is counted --------------------------------------------------------------------------------------------


@width_of
def test_the_samples_of_too_many_compiled_passes_are_counted_exactly(width):
    model, (x, y) = net(width), data()
    with gwa_logging.watch(model, num_samples=40 * N) as monitor:
        run, loss = compiled_if("compiled", model), torch.zeros(())
        for i in range(40):
            monitor.tag(torch.arange(N) + i * N)
            loss = loss + F.cross_entropy(run(x), y)
        loss.backward()
        report = monitor.end_epoch()
        assert (report.count, report.excluded) == (24 * N, 0)
        assert {s.id for s in monitor.suspects(40 * N)} == set(range(8 * N, 32 * N))
        assert monitor.faults == {"compiled passes": 16 * N}


LOST = {
    "too few": (torch.arange(5), 5),
    "too many": (torch.arange(30), N),
    "out of range": (torch.arange(N) + N - 2, N - 2),
}


@tiered("kind, how", LOST, RUN)
def test_lost_ids_are_reported_with_the_next_interval(kind, how):
    ids, lost = LOST[kind]
    model, (x, y) = net(), data()
    with gwa_logging.watch(model, num_samples=N, log_every_n_steps=2) as monitor:
        run = compiled_if(how, model)
        monitor.tag(ids)
        F.cross_entropy(run(x), y).backward()
        assert monitor.flush()
        assert monitor.faults == {"sample ids": lost}
        for _ in range(2):
            monitor.tag(ids)
            F.cross_entropy(run(x), y).backward()
        assert monitor.flush()
        assert monitor.faults == {"sample ids": 3 * lost}
        monitor.suspects()
        assert monitor.faults == {"sample ids": 3 * lost}


def test_samples_of_compiled_passes_without_ids_are_counted_without_the_padding():
    model, (x, y) = net(), data()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        F.cross_entropy(compiled_if("compiled", model)(x), y).backward()
        monitor.suspects()
        assert monitor.faults == {"samples without ids": N}


def test_expanded_weights_are_a_fault_with_the_reason(caplog):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model, (x, y) = net(), data()
    with gwa_logging.watch(model) as monitor:
        F.cross_entropy(call_for_per_sample_grads(model)(x), y).backward()
        assert model[0].weight.grad_sample.shape[0] == N
        assert monitor.faults == {"ExpandedWeights": 1}
    assert "passes of call_for_per_sample_grads are not observed" in caplog.text


class ChangedInPlace(nn.Module):
    """Cannot be traced, and changes its logits in place."""

    def __init__(self, width: str) -> None:
        super().__init__()
        layers = net(width)
        self.body, self.head = layers[:2], layers[2]

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if h.isnan().any():
            raise ValueError
        return self.head(h).mul_(2.0)


@width_of
def test_the_first_pass_of_a_model_that_changes_its_logits_in_place_is_scored(width):
    model, (x, y) = ChangedInPlace(width), data()
    z = model.head(model.body(x))
    (delta,) = torch.autograd.grad(F.cross_entropy(2 * z, y), z)
    arrays = (delta, model.body(x), model.head.weight)
    want = gwa_logging.alignment_scores(*(array.detach().double().numpy() for array in arrays))
    with gwa_logging.watch(model, num_samples=N) as monitor:
        for part in (slice(0, 5), slice(5, N)):
            monitor.tag(torch.arange(N)[part])
            F.cross_entropy(model(x[part]), y[part]).backward()
        assert monitor.end_epoch().count == N
        found = {suspect.id: suspect.mean_score for suspect in monitor.suspects(N)}
        assert monitor.faults == {}
    assert found == pytest.approx(dict(enumerate(want)), abs=1e-5)


def test_two_threads_that_train_one_model_keep_their_ids_apart():
    model = net()
    x, _ = data()
    want = [one_by_one(model, sign * x, torch.full((N,), i)).mean() for i, sign in enumerate((1, -1))]
    both = Barrier(2)

    def train(i: int, sign: int) -> None:
        for _ in range(20):
            both.wait()
            monitor.tag(torch.full((N,), i))
            both.wait()
            F.cross_entropy(model(sign * x), torch.full((N,), i)).backward()

    with gwa_logging.watch(model, num_samples=2) as monitor:
        threads = [Thread(target=train, args=each) for each in ((0, 1), (1, -1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = {s.id: (s.mean_score, s.times_seen) for s in monitor.suspects()}
        assert monitor.faults == {}
    assert found == {i: (pytest.approx(score, abs=1e-5), 20.0 * N) for i, score in enumerate(want)}
