"""The per-sample ledger in PyTorch, against sums of each sample's scores."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import gwa_logging
from gwa_logging import InvalidInputError, Monitor
from gwa_logging.integrations.torch.head_layers import layer_of
from gwa_logging.integrations.torch.tagged_tensors import TaggedTensors
from gwa_logging.ledger import TaggedBatch
from tests.torch.tiers import tiered

N, FEATURES = 23, 8


def net(classes: int = 5, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, classes))


def samples(classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, FEATURES, generator=generator), torch.randint(0, classes, (N,), generator=generator)


def scores(model: nn.Sequential, x: Tensor, y: Tensor) -> np.ndarray:
    """The oracle: each sample's own gradient, in float64."""
    h = model[:2](x).detach().double()
    weight, bias = model[2].weight.detach().double(), model[2].bias.detach().double()
    delta = (torch.softmax(h @ weight.T + bias, 1) - F.one_hot(y, weight.shape[0])).numpy()
    return gwa_logging.alignment_scores(delta, h.numpy(), weight.numpy())


def step(model: nn.Module, monitor: Monitor, x: Tensor, y: Tensor, *tag) -> None:
    if tag:
        monitor.tag(*tag)
    F.cross_entropy(model(x), y).backward()


def by_id(monitor: Monitor) -> dict[int, tuple[float, float]]:
    return {s.id: (s.mean_score, s.times_seen) for s in monitor.suspects(N)}


@pytest.mark.parametrize("drop_last", [False, True])
def test_shuffled_epochs_with_the_last_batch_kept_or_dropped_add_up(drop_last):
    model, (x, y) = net(), samples()
    dataset = gwa_logging.with_ids(TensorDataset(x, y))
    shuffle = torch.Generator().manual_seed(3)
    expected: dict[int, list[float]] = {}
    true = scores(model, x, y)
    with gwa_logging.watch(model, num_samples=N, log_every_n_steps=3) as monitor:
        for _ in range(3):
            for a, b, ids in DataLoader(dataset, 5, shuffle=True, drop_last=drop_last, generator=shuffle):
                step(model, monitor, a, b, ids)
                for i in ids.tolist():
                    expected.setdefault(i, []).append(true[i])
            monitor.end_epoch()
        found = by_id(monitor)
    assert {i: seen for i, (_, seen) in found.items()} == {i: len(own) for i, own in expected.items()}
    assert {i: mean for i, (mean, _) in found.items()} == pytest.approx(
        {i: np.mean(own) for i, own in expected.items()}, abs=1e-6
    )


def test_a_sample_that_is_drawn_again_or_augmented_in_the_same_batch_counts_each_time():
    model, (x, y) = net(), samples()
    ids = torch.tensor(list(WeightedRandomSampler(torch.ones(N), 60, generator=torch.Generator().manual_seed(0))))
    views = x[ids] + 0.1 * torch.randn(60, FEATURES, generator=torch.Generator().manual_seed(2))
    true = scores(model, views, y[ids])
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, views, y[ids], ids)
        found = by_id(monitor)
    for i, (mean, seen) in found.items():
        own = true[ids == i]
        assert seen == len(own)
        assert mean == pytest.approx(own.mean(), abs=1e-6)
    assert found.keys() == set(ids.tolist())


@pytest.mark.parametrize("whole", [True, False], ids=["one lambda", "a lambda for each"])
def test_the_score_of_a_mixed_input_is_divided_by_its_weights(whole):
    model, (x, y) = net(), samples()
    ids = torch.stack([torch.arange(N), torch.randperm(N, generator=torch.Generator().manual_seed(5))], 1)
    weights = (0.7, 0.3) if whole else torch.rand(N, 1).mul(torch.tensor([1.0, -1.0])).add(torch.tensor([0.0, 1.0]))
    shares = torch.as_tensor(weights).expand(N, 2).double().numpy()
    mixed = (x[ids] * torch.as_tensor(shares[:, :, None]).float()).sum(1)
    true = scores(model, mixed, y)
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, mixed, y, ids, weights)
        found = by_id(monitor)
    sums, seen = np.zeros(N), np.zeros(N)
    np.add.at(sums, ids.numpy(), shares * true[:, None])
    np.add.at(seen, ids.numpy(), shares)
    assert {i: s for i, (_, s) in found.items()} == pytest.approx(dict(enumerate(seen)), abs=1e-6)
    assert {i: mean for i, (mean, _) in found.items()} == pytest.approx(dict(enumerate(sums / seen)), abs=1e-5)


@tiered("width, how", [16, 4], ["eager", "compiled"])
def test_suspects_have_the_label_and_the_class_that_was_predicted_last(width, how):
    model, (x, y) = net(7, width), samples(7)
    monitor = gwa_logging.watch(model, labels=y)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    step(run, monitor, x, y, torch.arange(N))
    with torch.no_grad():
        model[2].weight.mul_(-1)
    step(run, monitor, x[:9], y[:9], torch.arange(9))
    last = model(x).argmax(1)
    with torch.no_grad():
        model[2].weight.mul_(-1)
    last[9:] = model(x).argmax(1)[9:]
    found = {s.id: (s.label, s.predicted) for s in monitor.suspects(N)}
    assert found == {i: (int(y[i]), int(last[i])) for i in range(N)}


def test_label_quality_sorts_like_the_suspects_and_is_nan_for_samples_never_seen():
    model, (x, y) = net(), samples()
    with gwa_logging.watch(model, num_samples=N + 2) as monitor:
        step(model, monitor, x, y, torch.arange(N))
        quality, suspects = monitor.label_quality(), monitor.suspects(N)
    assert quality.dtype == np.float64
    assert np.isnan(quality[N:]).all()
    assert ((quality[:N] >= 0) & (quality[:N] <= 1)).all()
    assert np.argsort(quality)[:N].tolist() == [s.id for s in suspects]
    np.testing.assert_allclose(quality[:N], (scores(model, x, y) + 1) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "counted", "lost"),
    [
        (torch.tensor([0, 1, N, -1, 4]), {0, 1, 4}, 2),
        (torch.tensor([0, 1, 2, 3, 2**40]), {0, 1, 2, 3}, 1),
        (torch.arange(4), set(), 4),  # the batch has five samples, so it is unknown which ids belong to which
        (torch.arange(7), set(), 5),
    ],
)
def test_invalid_ids_and_ids_of_another_number_than_the_samples_are_left_out_counted_and_reported(
    ids, counted, lost, caplog
):
    model, (x, y) = net(), samples()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, x[:5], y[:5], ids)
        assert by_id(monitor).keys() == counted
        assert by_id(monitor).keys() == counted
        assert monitor.faults == {"sample ids": lost}
        assert monitor.end_epoch().count == 5
    assert (
        f"{lost} ids were {'not in [0, 23)' if counted else 'left out: a forward pass was tagged with'}" in caplog.text
    )


def test_ids_of_mixed_samples_without_their_weights_are_left_out_with_the_remedy(caplog):
    model, (x, y) = net(), samples()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, x, y, torch.zeros(N, 2, dtype=torch.int64))
        assert by_id(monitor) == {}
        assert monitor.faults == {"sample ids": N}
    assert "if these are the ids of mixed samples, [batch, m], pass their weights" in caplog.text


def test_weights_that_are_negative_or_nan_are_left_out_and_counted():
    model, (x, y) = net(), samples()
    ids = torch.tensor([[0, 1], [2, 3]])
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, x[:2], y[:2], ids, torch.tensor([[1.5, -0.5], [math.nan, 1.0]]))
        assert {i: seen for i, (_, seen) in by_id(monitor).items()} == {0: 1.5, 3: 1.0}
        assert monitor.faults == {"sample ids": 2}


def test_batches_without_ids_are_counted_and_reported(caplog):
    model, (x, y) = net(), samples()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, x[:5], y[:5], torch.arange(5))
        step(model, monitor, x[5:9], y[5:9])
        monitor.update(torch.zeros(3))
        assert by_id(monitor).keys() == set(range(5))
        assert monitor.faults == {"samples without ids": 7}
    assert "samples without ids: 7 samples" in caplog.text


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_ids_in_a_buffer_that_is_reused_for_each_batch_are_those_of_their_batch(kind):
    model, (x, y) = net(), samples()
    buffer = torch.zeros(5, dtype=torch.int64)
    with gwa_logging.watch(model, num_samples=N) as monitor:
        for first in (0, 5, 10):
            buffer.copy_(torch.arange(first, first + 5))
            step(model, monitor, x[buffer], y[buffer], buffer if kind is Tensor else buffer.numpy())
        assert sorted(by_id(monitor)) == list(range(15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (50, 100, 4)])
def test_the_predicted_class_is_the_first_largest_logit_or_nan(dtype, shape):
    head = nn.Linear(3, 4)
    logits = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    predicted = layer_of(head).predicted(logits.transpose(0, -2))
    rows = logits.detach().transpose(0, -2).reshape(-1, 4).tolist()
    assert predicted.tolist() == [row.index(max(row)) for row in rows]
    broken = torch.tensor([[0.0, math.nan, 2.0, 1.0]], dtype=dtype).expand(5000, 4)
    assert layer_of(head).predicted(broken).tolist() == [1] * 5000


def test_an_epoch_of_one_sample_is_counted():
    model, (x, y) = net(), samples()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        step(model, monitor, x[:1], y[:1], torch.tensor([3]))
        report = monitor.end_epoch()
        assert by_id(monitor) == {3: (pytest.approx(scores(model, x[:1], y[:1])[0], abs=1e-6), 1.0)}
    assert report.count == 1


REFUSED = {
    "three dimensions": (
        (torch.zeros(4, 2, 2, dtype=torch.int64),),
        r"sample_ids: expected an integer array \[batch\]; \[batch, positions\] .* \[batch, m\] and weights",
    ),
    "weights without mixing": (
        (torch.arange(4), torch.ones(4)),
        r"expected an integer array \[batch, m\] with weights",
    ),
    "too few weights": (
        (torch.zeros(4, 2, dtype=torch.int64), (1.0,)),
        r"weights: expected \(2,\), the same for every",
    ),
    "weights of another batch": ((torch.zeros(4, 2, dtype=torch.int64), torch.ones(3, 2)), r"found \(3, 2\)"),
    "no numbers": ((torch.arange(4, device="meta"),), "a tensor on the device 'meta'"),
}


@pytest.mark.parametrize("tag", REFUSED)
def test_invalid_tags_are_refused(tag):
    arguments, message = REFUSED[tag]
    with gwa_logging.watch(net(), num_samples=N) as monitor:
        for _ in range(2):  # the second time after a valid tag, whose dtype and shape are known to be right
            with pytest.raises(InvalidInputError, match=message):
                monitor.tag(*arguments)
            monitor.tag(torch.arange(4))
        with pytest.raises(InvalidInputError, match="sample_ids: expected an integer array"):
            monitor.tag(torch.zeros(4))


def test_ids_in_a_buffer_that_is_filled_again_before_they_are_used_are_copied():
    reader, buffer = TaggedTensors(N), torch.arange(4)
    read = []
    for first in range(3):
        read.append(reader.read(TaggedBatch(buffer.copy_(torch.arange(first, first + 4)))).ids)
    assert [ids.tolist() for ids in read] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


WRONG = {
    "predicted without ids": (
        partial(Monitor.update, predicted=torch.arange(3)),
        "update\\(scores, sample_ids, ...\\)",
    ),
    "predictions of another batch": (
        lambda m, s: m.update(s, torch.arange(3), predicted=torch.arange(2)),
        r"predicted: expected integers \(3,\)",
    ),
    "probabilities": (lambda m, s: m.update(s, torch.arange(3), predicted=torch.rand(3)), "found torch.float32"),
    "no suspect": (lambda m, s: m.suspects(0), "k=0"),
}


@pytest.mark.parametrize("call", WRONG)
def test_invalid_calls_are_refused(call):
    do, message = WRONG[call]
    with gwa_logging.watch(net(), num_samples=N) as monitor, pytest.raises(InvalidInputError, match=message):
        do(monitor, torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2**31}, "num_samples=2147483648"),
        ({"num_samples": 2.5}, "num_samples=2.5"),
        ({"num_samples": 3, "labels": [0, 1]}, "num_samples=3"),
        ({"labels": [0.5, 1.0]}, r"expected class indices, int \[num_samples\], found float64"),
        ({"labels": [[0, 1]]}, r"found int64 of shape \(1, 2\)"),
        ({"labels": []}, r"found float64 of shape \(0,\)"),
    ],
)
def test_a_ledger_of_an_invalid_size_is_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        gwa_logging.watch(net(), **options)


def test_without_a_ledger_every_call_that_needs_one_is_refused_with_the_reason():
    with gwa_logging.watch(net()) as monitor:
        for call in (monitor.suspects, monitor.label_quality, monitor.log_suspects):
            with pytest.raises(InvalidInputError, match="there is no ledger: watch"):
                call()


@pytest.mark.parametrize(
    ("collapsed", "labels", "is_reported"),
    [
        (True, None, True),
        (True, "spread", True),
        (True, "one class", False),  # as they should be
        (False, "spread", False),
    ],
)
def test_an_alert_says_if_nearly_all_samples_are_predicted_as_one_class(collapsed, labels, is_reported):
    model, (x, y) = net(), samples()
    if collapsed:
        with torch.no_grad():
            model[2].bias[3] = 50.0
    given = {None: {"num_samples": N}, "spread": {"labels": y}, "one class": {"labels": torch.full((N,), 3)}}[labels]
    rule = gwa_logging.EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    with gwa_logging.watch(model, early_stop=rule, **given) as monitor:
        for _ in range(2):
            step(model, monitor, x, y, torch.arange(N))
            monitor.end_epoch()
    assert monitor.alert is not None
    sentence = "100% of the samples are predicted as class 3: the model may have collapsed to it"
    assert (sentence in monitor.alert.caveats) == is_reported


def test_an_alert_whose_ledger_cannot_be_read_is_raised_without_its_caveats(monkeypatch):
    model, (x, y) = net(), samples()
    rule = gwa_logging.EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    with gwa_logging.watch(model, early_stop=rule, num_samples=N) as monitor:
        for _ in range(2):
            step(model, monitor, x, y, torch.arange(N))
            monkeypatch.setattr(monitor._adapter, "ledger", lambda: 1 / 0)
            monitor.end_epoch()
    assert monitor.alert is not None
    assert monitor.faults["suspects"] >= 1


def test_an_alert_names_confused_classes_and_reads_the_ledger_once_for_caveats_and_suspects():
    model, x = net(), samples()[0].repeat(3, 1)  # of N samples, too few have a negative mean
    with torch.no_grad():
        model[2].bias[3] = 50.0  # everything is predicted as class 3
    labels = torch.zeros(3 * N, dtype=torch.int64)
    labels[:3] = torch.tensor([1, 2, 4])
    rule = gwa_logging.EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    with gwa_logging.watch(model, early_stop=rule, labels=labels) as monitor:
        reads, read = [], monitor._adapter.ledger
        monitor._adapter.ledger = lambda: reads.append(0) or read()
        for _ in range(2):
            step(model, monitor, x, labels, torch.arange(3 * N))
            monitor.end_epoch()
        assert len(reads) == 1
    assert monitor.alert is not None
    assert any("(0 predicted as 3)" in caveat for caveat in monitor.alert.caveats)
    assert any("collapsed" in caveat for caveat in monitor.alert.caveats)
