"""Several rows of the head for one input: tokens, views, clips, and repeated calls."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gwa_logging
from gwa_logging import Monitor, alignment_scores
from gwa_logging.integrations.torch.units import ATTEMPTS
from tests.torch.tiers import tiered

B, T = 6, 4
WIDTH = {"by logits": (16, 5), "by embeddings": (4, 9)}
width_of = pytest.mark.parametrize("width", WIDTH)
RUN = ["eager", "compiled"]
run_of = pytest.mark.parametrize("how", RUN)


class Net(nn.Module):
    """A body, a head, and a function that makes one row of logits from the head's rows."""

    def __init__(self, width: str, after: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        torch.manual_seed(0)
        features, classes = WIDTH[width]
        self.body, self.head = nn.Sequential(nn.Linear(8, features), nn.Tanh()), nn.Linear(features, classes)
        self.before, self.after = before or (lambda x: x), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.body(self.before(x))))


def data(tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, tokens, 8, generator=generator), torch.randint(0, 5, (B,), generator=generator)


def rows_and_lengths(model: Net, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[B, T]: the score of each row by its own gradient, in float64, NaN where it has none; and the gradients' norms."""
    h = model.body(x).detach().double()
    head = model.head.double()
    logits = head(h)
    logits.retain_grad()
    F.cross_entropy(model.after(logits), y).backward()
    scores = alignment_scores(logits.grad.numpy(), h.numpy(), head.weight.detach().numpy())
    lengths = (logits.grad.norm(dim=-1) * h.norm(dim=-1)).numpy()
    model.zero_grad()
    model.float()
    return scores, lengths


def rows_of(model: Net, x: Tensor, y: Tensor) -> np.ndarray:
    """[B, T]: the scores alone."""
    return rows_and_lengths(model, x, y)[0]


def weighted(model: Net, x: Tensor, y: Tensor) -> np.ndarray:
    """[B]: the mean of each input's scores, weighted by the gradients' norms."""
    scores, lengths = rows_and_lengths(model, x, y)
    return np.average(scores, axis=1, weights=lengths)


def compiled_if(how: str, model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model


def by_id(monitor: Monitor) -> dict[int, tuple[float, float]]:
    return {suspect.id: (suspect.mean_score, suspect.times_seen) for suspect in monitor.suspects()}


# --- decoders -----------------------------------------------------------------------------------------------------------


@tiered("tokens, width, how", [3, 11], WIDTH, RUN)
def test_a_decoder_classifier_has_one_sample_for_each_input_with_its_id(tokens, width, how):
    last = torch.arange(B) % tokens
    model = Net(width, lambda z: z[torch.arange(B), last])
    x, y = data(tokens)
    want = rows_of(model, x, y)[np.arange(B), last]
    predicted = model(x).argmax(-1)
    with gwa_logging.watch(model, num_samples=3 * B, head="head") as monitor:
        run = compiled_if(how, model)
        for first in (0, B, 2 * B):
            monitor.tag(torch.arange(first, first + B))
            F.cross_entropy(run(x), y).backward()
        report, found = monitor.end_epoch(), monitor.suspects()
        assert monitor.faults == {}
    assert (report.count, report.excluded) == (3 * B, 0)
    assert report.mean == pytest.approx(want.mean(), abs=1e-6)
    assert {s.id: s.mean_score for s in found} == pytest.approx(dict(enumerate([*want] * 3)), abs=1e-5)
    assert {s.times_seen for s in found} == {1.0}
    assert {s.id: s.predicted for s in found} == dict(enumerate([*predicted.tolist()] * 3))


@tiered("width, how", WIDTH, RUN)
def test_an_input_of_a_decoder_whose_token_has_no_gradient_is_one_sample_without_a_score(width, how):
    last = torch.arange(B) % T
    model = Net(width, lambda z: z[torch.arange(B), last])
    x, y = data()
    y[2] = -100
    with gwa_logging.watch(model, num_samples=B, head="head") as monitor:
        monitor.tag(torch.arange(B))
        F.cross_entropy(compiled_if(how, model)(x), y).backward()
        report = monitor.end_epoch()
        assert by_id(monitor).keys() == set(range(B)) - {2}
    assert (report.count, report.excluded) == (B - 1, 1)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize("tokens", [3, 12])
def test_the_decoder_classifiers_of_transformers_give_every_sample_its_score(family, tokens):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "num_labels": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"GPT2": {"n_layer": 1, "n_head": 2, "n_embd": 16}}.get(
        family,
        {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16},
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x, y = torch.randint(3, 50, (B, tokens)), torch.randint(0, 5, (B,))
    x[1, -1:] = 0  # padded
    want = []
    for i in range(B):
        loss = model(input_ids=x[i : i + 1], labels=y[i : i + 1]).loss
        (gradient,) = torch.autograd.grad(loss, model.score.weight)
        want.append(-F.cosine_similarity(gradient.flatten(), model.score.weight.flatten(), 0).item())
    with gwa_logging.watch(model, num_samples=B) as monitor:
        monitor.tag(torch.arange(B))
        model(input_ids=x, labels=y).loss.backward()
        report, found = monitor.end_epoch(), by_id(monitor)
        assert monitor.faults == {}
    assert (report.count, report.excluded) == (B, 0)
    assert found == {i: (pytest.approx(score, abs=1e-5), 1.0) for i, score in enumerate(want)}


# --- positions, and inputs whose rows are pooled after the head ---------------------------------------------------------


def samples_of(model: Net, x: Tensor, y: Tensor) -> list[float]:
    """The oracle: the cosine between the weight and the negative gradient of one input at a time, in float64."""
    model, scores = model.double(), []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, model.head.weight)
        scores.append(-F.cosine_similarity(gradient.flatten(), model.head.weight.flatten(), 0).item())
    model.float()
    return scores


def per_row(z: Tensor) -> Tensor:
    return z.flatten(0, 1)


def masked_mean(z: Tensor) -> Tensor:
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    return (shares[:, None] * z).sum(1)


def views_side_by_side(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def segments(z: Tensor) -> Tensor:
    return z.view(-1, T, z.shape[-1]).mean(1)


POOLING: dict[str, Callable[[str], Net]] = {
    "token mean": lambda width: Net(width, lambda z: z.mean(1)),
    "weighted mean": lambda width: Net(width, masked_mean),
    "views in two dimensions": lambda width: Net(width, lambda z: z.mean((1, 2)), lambda x: x.view(-1, 2, 2, 8)),
    "segments of a video": lambda width: Net(width, segments, views_side_by_side),
}


@tiered("kind, width", POOLING, WIDTH)
def test_inputs_whose_rows_the_loss_pools_are_samples(kind, width, caplog):
    model, (x, y) = POOLING[kind](width), data()
    want, predicted = samples_of(model, x, y), model(x).argmax(-1)
    with gwa_logging.watch(model, num_samples=B, head="head") as monitor:
        history = []
        for _ in range(2):
            for _ in range(2):
                monitor.tag(torch.arange(B))
                F.cross_entropy(model(x), y).backward()
            history.append(monitor.end_epoch())
        found = monitor.suspects()
        assert monitor.faults == {}
    assert [(report.count, report.excluded) for report in history] == [(2 * B, 0)] * 2
    assert {s.id: s.mean_score for s in found} == pytest.approx(dict(enumerate(want)), abs=1e-5)
    assert history[0].mean == pytest.approx(np.mean(want), abs=1e-6)
    assert {s.times_seen for s in found} == {4.0}
    assert {s.id: s.predicted for s in found} == dict(enumerate(predicted.tolist()))
    expected = f"{B * T} rows in one pass of {B} inputs, and the loss pools the rows"
    assert [sum(expected in note for note in report.notes) for report in history] == [1, 0]
    assert sum(expected in message for message in caplog.messages) == 1


@pytest.mark.parametrize("classes", [2, 5])
def test_rows_with_a_loss_of_their_own_are_samples(classes, caplog):
    model, (x, y) = Net("by logits", per_row), data()
    y = torch.randint(0, classes, (B * T,), generator=torch.Generator().manual_seed(2))
    want = rows_of(model, x, y)
    with gwa_logging.watch(model, num_samples=B, head="head") as monitor:
        for _ in range(2):
            monitor.tag(torch.arange(B))
            F.cross_entropy(model(x), y).backward()
        report, found = monitor.end_epoch(), by_id(monitor)
        assert monitor.faults == {}
    assert (report.count, report.mean) == (2 * B * T, pytest.approx(want.mean(), abs=1e-6))
    assert found == {i: (pytest.approx(score, abs=1e-5), 2.0) for i, score in enumerate(weighted(model, x, y))}
    assert sum("Each row with a gradient" in message for message in caplog.messages) == 1


@tiered("width, how", WIDTH, RUN)
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_unit_sample_scores_inputs_however_the_loss_uses_the_rows(width, how, pooling):
    model = Net(width, lambda z: z.mean(1) if pooling == "mean" else z.max(1).values)
    x, y = data()
    want = samples_of(model, x, y)
    with gwa_logging.watch(model, num_samples=B, head="head", unit="sample") as monitor:
        run = compiled_if(how, model)
        for _ in range(2):
            monitor.tag(torch.arange(B))
            F.cross_entropy(run(x), y).backward()
        report, found = monitor.end_epoch(), by_id(monitor)
        assert monitor.faults == {}
    assert (report.count, report.mean) == (2 * B, pytest.approx(np.mean(want), abs=1e-6))
    assert not any("rows" in note for note in report.notes)
    assert found == {i: (pytest.approx(score, abs=1e-5), 2.0) for i, score in enumerate(want)}


@tiered("width, how", WIDTH, RUN)
def test_unit_position_scores_rows_whose_mean_is_the_ids_score(width, how):
    model = Net(width, lambda z: z.mean(1))
    x, y = data()
    with gwa_logging.watch(model, num_samples=B, head="head", unit="position") as monitor:
        run = compiled_if(how, model)
        for _ in range(2):
            monitor.tag(torch.arange(B))
            F.cross_entropy(run(x), y).backward()
        report, found = monitor.end_epoch(), by_id(monitor)
        assert monitor.faults == {}
    assert report.count == 2 * B * T
    assert not any("rows" in note for note in report.notes)
    assert found == {i: (pytest.approx(score, abs=1e-5), 2.0) for i, score in enumerate(weighted(model, x, y))}


def test_a_compiled_model_scores_rows_and_names_the_remedy(caplog):
    model, (x, y) = Net("by logits", lambda z: z.mean(1)), data()
    with gwa_logging.watch(model, head="head") as monitor:
        F.cross_entropy(compiled_if("compiled", model)(x), y).backward()
        report = monitor.end_epoch()
    assert report.count == B * T
    assert sum("pass unit='sample' to watch()" in message for message in caplog.messages) == 1


def test_passes_that_tell_nothing_leave_the_question_open():
    """A head of zeros, gradients that overflowed, and inputs with one scored row each."""
    model, (x, y) = Net("by logits", lambda z: z.mean(1)), data()
    weight = model.head.weight.detach().clone()
    with gwa_logging.watch(model, head="head") as monitor:
        nn.init.zeros_(model.head.weight)
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model.head.weight.copy_(weight)
        (F.cross_entropy(model(x), y) * torch.inf).backward()
        model.after = lambda z: z[:, 0]
        F.cross_entropy(model(x), y).backward()
        model.after = lambda z: z.mean(1)
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        report = monitor.end_epoch()
    assert report.count == 3 * B  # 3 passes with scores; rows without a gradient are excluded


@pytest.mark.parametrize(("undecided", "decided"), [(ATTEMPTS, B * T), (ATTEMPTS - 1, B)], ids=["all", "all but one"])
def test_after_eight_passes_that_decide_nothing_rows_are_samples_for_good(undecided, decided, caplog):
    """One pass with pooled rows follows: after the last attempt it no longer changes what a sample is."""
    model, (x, y) = Net("by logits", lambda z: z[:, 0]), data()
    assert ATTEMPTS == 8
    with gwa_logging.watch(model, head="head") as monitor:
        for _ in range(undecided):
            assert not any("the head saw" in message for message in caplog.messages)
            F.cross_entropy(model(x), y).backward()
        assert monitor.end_epoch().count == undecided * B
        model.after = lambda z: z.mean(1)
        F.cross_entropy(model(x), y).backward()
        assert monitor.end_epoch().count == decided
    noted = [message for message in caplog.messages if "the head saw" in message]
    assert len(noted) == 1
    assert ("the loss pools the rows of an input" if decided == B else "Each row with a gradient") in noted[0]


def test_two_calls_of_the_head_in_one_forward_are_noted_as_rows(caplog):
    model, (x, y) = twice(Net("by logits", lambda z: z)), data()
    with gwa_logging.watch(model, head="net.head") as monitor:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
        report = monitor.end_epoch()
        assert monitor.faults == {}
    assert report.count == 3 * B * 2
    assert any(f"{B * 2} rows in one pass of {B} inputs" in note for note in report.notes)
    assert sum("rows in one pass" in message for message in caplog.messages) == 1


def twice(model: Net) -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, 0]) + self.net(x[:, 1])

    return Twice()


SINGLE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "one row for each input": lambda: (nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5)), torch.randn(B, 8)),
    "sequences with the time first": lambda: (Net("by logits", lambda z: z, lambda x: x[-1]), torch.randn(T, B, 8)),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_row_per_input_gives_no_note_and_leaves_no_hook_on_the_model(kind):
    model, x = SINGLE[kind]()
    hooks = len(model._forward_hooks)
    with gwa_logging.watch(model, head="head" if kind.startswith("seq") else None) as monitor:
        F.cross_entropy(model(x), torch.zeros(B, dtype=torch.int64)).backward()
        assert len(model._forward_hooks) == hooks
        assert not any("rows in one pass" in note for note in monitor.end_epoch().notes)


def test_ids_for_views_that_lie_side_by_side_are_reported_at_once_and_never_guessed(caplog):
    model, (x, _) = Net("by logits", lambda z: z, views_side_by_side), data()
    y = torch.randint(0, 5, (B * T,), generator=torch.Generator().manual_seed(2))
    with gwa_logging.watch(model, num_samples=B, head="head") as monitor:
        monitor.tag(torch.arange(B))
        F.cross_entropy(model(x), y).backward()
        assert monitor.faults == {"sample ids": B}
        assert f"tagged with {B} ids, but the head saw {B * T} rows" in caplog.text
        assert monitor.suspects() == []
        assert monitor.faults == {"sample ids": B}


# --- the head called several times --------------------------------------------------------------------------------------


@tiered("width, how", WIDTH, RUN)
def test_every_call_of_the_head_in_one_forward_gets_the_ids(width, how):
    model = twice(Net(width, lambda z: z))
    x, y = data()
    h = model.net.body(x[:, :2]).detach().double()
    with gwa_logging.watch(model, num_samples=2 * B, head="net.head") as monitor:
        run = compiled_if(how, model)
        for first in (0, B):
            monitor.tag(torch.arange(first, first + B))
            z = run(x)
            z.retain_grad()
            F.cross_entropy(z, y).backward()
        run(x).sum().backward()  # of unknown samples
        report, found = monitor.end_epoch(), by_id(monitor)
        assert monitor.faults == {"samples without ids": 2 * B}
    weight = model.net.head.weight.detach().double().numpy()
    want = np.mean([alignment_scores(z.grad.numpy(), h[:, i].numpy(), weight) for i in range(2)], 0)
    assert report.count == 6 * B
    assert found == {i: (pytest.approx(want[i % B], abs=1e-5), 2.0) for i in range(2 * B)}


def test_a_forward_without_ids_after_one_with_ids_does_not_get_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5))
    x, y = torch.randn(B, 8), torch.zeros(B, dtype=torch.int64)
    with gwa_logging.watch(model, num_samples=B) as monitor:
        for _ in range(2):
            monitor.tag(torch.arange(B))
            (F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)).backward()
        assert {seen for _, seen in by_id(monitor).values()} == {2.0}
        assert monitor.faults == {"samples without ids": 2 * B}
