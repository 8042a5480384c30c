"""The ledger and the state of two ranks, with PyTorch's own sampler and loader."""

import io
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.journal import read_journal
from tests.agreement import N as SAMPLES
from tests.agreement import by_loop, random_epochs
from tests.torch.ranks import World

N, BATCH, EPOCHS = (
    25,
    4,
    3,
)  # the sampler gives one sample to both ranks: 13 each, three batches and one sample left over
OPTIONS: dict[str, Any] = {"num_samples": N, "log_every_n_steps": 2, "early_stop": None}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))


def training_set() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 8, generator=generator), torch.randint(0, 5, (N,), generator=generator)


class Outcome(NamedTuple):
    """What one rank has seen."""

    drawn: list[int]
    history: list[Any]
    suspects: list[Any]
    listed: list[str]
    state: bytes
    """Saved in the middle of the second epoch."""


def train(interrupt: bool) -> Outcome:
    """Without an optimizer, so that each sample always has the same score."""
    model = DistributedDataParallel(net())
    dataset = gwa_logging.with_ids(TensorDataset(*training_set()))
    sampler: Any = DistributedSampler(dataset, shuffle=True)
    monitors = [gwa_logging.watch(model, **OPTIONS)]
    drawn: list[int] = []
    file = io.BytesIO()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, (x, y, ids) in enumerate(DataLoader(dataset, BATCH, sampler=sampler, drop_last=True)):
            if (epoch, number) == (1, 2):
                state = monitors[-1].state_dict()
                torch.save(state, file)
                if interrupt:
                    monitors.append(gwa_logging.watch(model, **OPTIONS))
                    file.seek(0)
                    monitors[-1].load_state_dict(torch.load(file))
            monitors[-1].tag(ids)
            drawn += ids.tolist()
            F.cross_entropy(model(x), y).backward()
        monitors[-1].end_epoch()
    suspects = monitors[-1].suspects(N)
    history = monitors[-1].history
    monitors[-1].log_suspects(3)
    journals = [monitor.journal for monitor in monitors if monitor.journal]
    monitors[-1].close()
    listed = [record.kind for journal in journals for record in read_journal(journal)[0]]
    return Outcome(drawn, history, suspects, listed, file.getvalue())


def whole() -> Outcome:
    return train(interrupt=False)


def resumed() -> Outcome:
    return train(interrupt=True)


def invalid_ids() -> dict[str, int]:
    """One rank's ids are wrong, the other one's are missing."""
    model = DistributedDataParallel(net())
    x, y = training_set()
    with gwa_logging.watch(model, **OPTIONS) as monitor:
        if torch.distributed.get_rank() == 0:
            monitor.tag(torch.arange(N) + 5)
        F.cross_entropy(model(x), y).backward()
        monitor.suspects()
        return monitor.faults


def after_the_epochs() -> list[str]:
    """The list of suspects that is written automatically."""
    model = DistributedDataParallel(net())
    x, y = training_set()
    with gwa_logging.watch(model, **OPTIONS) as monitor:
        for _ in monitor.epochs(2):
            monitor.tag(torch.arange(N))
            F.cross_entropy(model(x), y).backward()
    return [record.kind for record in read_journal(monitor.journal)[0]] if monitor.journal else []


def split() -> tuple[list[Any], dict[str, int]]:
    """A compiled head that is split by classes: no rank has all logits of a sample."""
    from tests.torch.test_distributed import Net, by_classes

    model = torch.compile(by_classes(Net()), backend="aot_eager")
    x, y = training_set()
    with gwa_logging.watch(model, num_samples=N, early_stop=None) as monitor:
        monitor.tag(torch.arange(N))
        F.cross_entropy(model(x), y).backward()
        return monitor.suspects(N), monitor.faults


def own_scores() -> tuple[Any, list[Any]]:
    """Scores from the user, of which each rank has a part."""
    mesh = init_device_mesh("cpu", (2,))
    scores = distribute_tensor(torch.linspace(-0.5, 0.5, N), mesh, [Shard(0)])
    with gwa_logging.watch(net(), **OPTIONS) as monitor:
        monitor.update(scores, torch.arange(N))
        return monitor.end_epoch(), monitor.suspects(N)


def documents_and_predictions() -> tuple[list[Any], list[Any], dict[str, int]]:
    """The first rank has documents, the second one predictions; document 3 is in both. Then the state is loaded again."""
    model = net()
    with gwa_logging.watch(model, **OPTIONS) as monitor:
        if torch.distributed.get_rank() == 0:
            scores = torch.tensor([[0.5, -0.25, 0.5], [0.25, 0.75, -0.5]])
            monitor.update(scores, torch.tensor([[3, 3, 2], [3, 2, -1]]))
        else:
            monitor.update(torch.tensor([0.25, -0.5]), torch.tensor([3, 7]), predicted=torch.tensor([1, 2]))
        suspects, state = monitor.suspects(N), monitor.state_dict()
    with gwa_logging.watch(model, **OPTIONS) as other:
        other.load_state_dict(state)
        return suspects, other.suspects(N), other.faults


AT_EPOCH_3 = EarlyStop(statistic="agreement", patience=1, min_delta=1e9, drop=0)


def until_the_alert() -> tuple[list[Any], list[int], list[int], list[int], list[int], dict[str, int]]:
    """Each rank has half of every epoch's scores; the monitor is replaced in the middle of epoch 2."""
    options = OPTIONS | {"num_samples": SAMPLES, "early_stop": AT_EPOCH_3}
    monitor = gwa_logging.watch(net(), **options)
    for epoch, batches in enumerate(random_epochs(0)):
        for number, (scores, ids) in enumerate(batches):
            if (epoch, number) == (2, 3):
                state = monitor.state_dict()
                monitor = gwa_logging.watch(net(), **options)
                monitor.load_state_dict(state)
            own = slice(torch.distributed.get_rank(), None, 2)
            monitor.update(torch.from_numpy(scores[own].copy()), torch.from_numpy(ids[own].copy()))
        monitor.end_epoch()
        if monitor.alert is not None and monitor.alert.epoch == epoch:
            at_alert = [suspect.id for suspect in monitor.suspects(SAMPLES)]
    frozen, whole_run = monitor.suspects(SAMPLES), monitor.suspects(SAMPLES, whole_run=True)
    again = gwa_logging.watch(net(), **options)
    again.load_state_dict(monitor.state_dict())
    loaded = again.suspects(SAMPLES)
    lists = [[suspect.id for suspect in found] for found in (frozen, loaded, whole_run)]
    return monitor.history, at_alert, *lists, monitor.faults


ALONE = {"num_samples": N, "log_every_n_steps": 2, "early_stop": None, "labels": np.arange(N) % 5}


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ids (some of them twice, some never), and predicted classes, of which one is nearly always the same."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=generator) - 0.6
    ids = torch.randint(0, N - 3, (40,), generator=generator)
    return scores, ids, torch.where(torch.rand(40, generator=generator) < 0.96, 3, ids % 5)


class Parts(NamedTuple):
    """What one rank has of a ledger that all ranks keep together."""

    kept: list[range]
    answers: list[Any]
    """From the monitor, from one that resumed from its own part, and from one that resumed from the state of all."""
    sizes: list[int]
    refused: str
    device_bytes: int


def answers(monitor: Monitor) -> Any:
    """Everything that is read from the ledger."""
    table = monitor.suspects_table()
    columns = (table.mean_score, table.times_seen, table.label, table.predicted, monitor.label_quality())
    caveats = monitor._recording.suspects.caveats()
    return monitor.suspects(4), monitor.suspects(N), [column.tolist() for column in columns], caveats


def parts() -> Parts:
    """Both ranks score samples of any id; then the state is loaded in part and as a whole."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    monitor = gwa_logging.watch(net(), **ALONE)
    for epoch in range(2):
        scores, ids, predicted = draw(ranks * epoch + rank)
        monitor.update(scores, ids, predicted=predicted)
        monitor.end_epoch()
    kept = [monitor._adapter.own_samples(N)]
    found = [answers(monitor)]
    saved, whole = monitor.state_dict(whole_ledger=False), monitor.state_dict()
    for state in (saved, whole):
        resumed = gwa_logging.watch(net(), **ALONE)
        resumed.load_state_dict(state)
        found.append(answers(resumed))
    states: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(states, saved)
    try:
        gwa_logging.watch(net(), **ALONE).load_state_dict(states[(rank + 1) % ranks])
        refused = ""
    except InvalidInputError as error:
        refused = str(error)
    sizes = [len(state["ledger"]["sums"]) for state in (saved, whole)]
    return Parts(kept, found, sizes, refused, monitor._adapter._accumulator._ledger.nbytes)


def check_parts(found: list[Parts], want_sizes: list[int]) -> None:
    """Compares the answers of all ranks with those of one process that has seen the same samples."""
    ranks = len(found)
    alone = gwa_logging.watch(net(), **ALONE)
    for epoch in range(2):
        for rank in range(ranks):
            scores, ids, predicted = draw(ranks * epoch + rank)
            alone.update(scores, ids, predicted=predicted)
        alone.end_epoch()
    few, everyone, columns, caveats = answers(alone)
    assert "predicted as class 3: the model may have collapsed to it" in caveats[0]
    for rank, outcome in enumerate(found):
        for some, all_of_them, values, said in outcome.answers:
            assert [(s.id, s.times_seen, s.predicted, s.label) for s in all_of_them] == [
                (s.id, s.times_seen, s.predicted, s.label) for s in everyone
            ]
            assert [s.mean_score for s in some] == pytest.approx([s.mean_score for s in few], abs=1e-6)
            for ours, want in zip(values, columns, strict=True):
                assert ours == pytest.approx(want, abs=1e-6, nan_ok=True)
            assert said == caveats
        assert outcome.sizes == [want_sizes[rank], N]
        assert outcome.device_bytes == 12 * (want_sizes[rank] + 1)
        assert f"this process keeps the {want_sizes[rank]} from" in outcome.refused


WORLD = {
    function.__name__: function
    for function in (
        whole,
        resumed,
        invalid_ids,
        after_the_epochs,
        split,
        own_scores,
        documents_and_predictions,
        until_the_alert,
        parts,
    )
}


def test_every_sample_is_counted_as_often_as_the_sampler_gave_it_to_either_rank(two_ranks: World) -> None:
    first, second = two_ranks["whole"]
    times = np.bincount(first.drawn + second.drawn, minlength=N)
    assert first.suspects == second.suspects
    assert {s.id: s.times_seen for s in first.suspects} == {i: n for i, n in enumerate(times) if n}
    x, y = training_set()
    model = net()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        monitor.tag(torch.arange(N))
        F.cross_entropy(model(x), y).backward()
        want = {s.id: (s.mean_score, s.predicted) for s in monitor.suspects(N)}
    for suspect in first.suspects:
        assert (suspect.mean_score, suspect.predicted) == (
            pytest.approx(want[suspect.id][0], abs=1e-6),
            want[suspect.id][1],
        )


def test_a_state_in_mid_epoch_holds_what_all_ranks_have_seen(two_ranks: World) -> None:
    for before, after in zip(two_ranks["whole"], two_ranks["resumed"], strict=True):
        assert after.drawn == before.drawn
        assert [(r.epoch, r.step, r.count, r.histogram) for r in after.history] == [
            (r.epoch, r.step, r.count, r.histogram) for r in before.history
        ]
        assert [r.count for r in after.history] == [2 * 3 * BATCH] * EPOCHS
        for a, b in zip(after.history, before.history, strict=True):
            assert a.gwa == pytest.approx(b.gwa, rel=1e-9)
        assert [(s.id, s.times_seen, s.predicted) for s in after.suspects] == [
            (s.id, s.times_seen, s.predicted) for s in before.suspects
        ]
    assert two_ranks["resumed"][0].history == two_ranks["resumed"][1].history


def test_wrong_and_missing_ids_of_all_ranks_are_counted(two_ranks: World) -> None:
    assert two_ranks["invalid_ids"] == [{"sample ids": 5, "samples without ids": N}] * 2


def test_rank_0_alone_writes_the_suspects_on_request_and_after_the_epochs(two_ranks: World) -> None:
    assert [outcome.listed.count("suspects") for outcome in two_ranks["whole"]] == [1, 0]
    first, second = two_ranks["after_the_epochs"]
    assert first[-2:] == ["suspects", "close"]
    assert first.count("suspects") == 1
    assert second == []


def test_a_state_of_two_ranks_is_refused_by_one(two_ranks: World) -> None:
    state = torch.load(io.BytesIO(two_ranks["whole"][0].state))
    monitor: Monitor = gwa_logging.watch(net(), **OPTIONS)
    with pytest.raises(InvalidInputError, match="saved by 2 processes, this run has 1"):
        monitor.load_state_dict(state)
    assert monitor.history == []


def test_scores_of_a_split_head_count_once_and_its_predicted_class_is_unknown(two_ranks: World) -> None:
    from tests.torch.test_distributed import Net

    x, y = training_set()
    model = Net()
    with gwa_logging.watch(model, num_samples=N) as monitor:
        monitor.tag(torch.arange(N))
        F.cross_entropy(model(x), y).backward()
        want = {s.id: (pytest.approx(s.mean_score, abs=1e-6), 1.0, None) for s in monitor.suspects(N)}
    for suspects, faults in two_ranks["split"]:
        assert {s.id: (s.mean_score, s.times_seen, s.predicted) for s in suspects} == want
        assert faults == {}


def test_documents_of_one_rank_and_predictions_of_another_are_merged_and_restored(two_ranks: World) -> None:
    first, second = two_ranks["documents_and_predictions"]
    assert first == second
    suspects, restored, faults = first
    assert restored == suspects
    assert faults == {}
    found = {s.id: s for s in suspects}
    assert {i: (s.times_seen, s.predicted, s.tokens) for i, s in found.items()} == {
        2: (1, None, 2),
        3: (2, 1, 3),
        7: (1, 2, None),
    }
    assert {i: s.mean_score for i, s in found.items()} == pytest.approx(
        {2: 0.625, 3: (0.25 + 0.5 / 3) / 2, 7: -0.5}, abs=1e-6
    )
    assert found[3].negative_share == pytest.approx(1 / 3, abs=0.005)
    assert found[3].lowest_tenth == pytest.approx(-0.25, rel=0.04)


def test_the_users_own_scores_that_are_split_over_ranks_count_once(two_ranks: World) -> None:
    for report, suspects in two_ranks["own_scores"]:
        assert report.count == N
        assert report.mean == pytest.approx(0, abs=1e-7)
        assert [s.id for s in suspects] == list(range(N))
        assert [s.mean_score for s in suspects] == pytest.approx(torch.linspace(-0.5, 0.5, N).tolist())
        assert {s.times_seen for s in suspects} == {1}


def test_the_agreement_is_that_of_all_ranks_and_the_alert_freezes_their_suspects(two_ranks: World) -> None:
    epochs = random_epochs(0)
    first, second = two_ranks["until_the_alert"]
    assert first[1:] == second[1:]
    for history, at_alert, frozen, loaded, whole_run, faults in (first, second):
        assert [report.agreement for report in history] == by_loop(epochs)
        assert [report.stop for report in history] == [False] * 3 + [True] * 3
        assert at_alert == frozen == loaded == ranked(epochs[:4])
        assert whole_run == ranked(epochs) != frozen
        assert faults == {}


def ranked(epochs: list[Any]) -> list[int]:
    """The ids of the samples, the lowest mean score first."""
    batches = [batch for batches in epochs for batch in batches]
    scores, ids = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    sums = np.bincount(ids, scores.astype(np.float64), minlength=SAMPLES)
    seen = np.bincount(ids, minlength=SAMPLES)
    means = np.divide(sums, seen, out=np.full(SAMPLES, np.inf), where=seen > 0)
    return np.argsort(means, kind="stable")[: np.count_nonzero(seen)].tolist()


def test_each_rank_keeps_a_part_of_the_ledger_and_the_answers_are_those_of_one_process(two_ranks: World) -> None:
    check_parts(two_ranks["parts"], [13, 12])
    assert two_ranks["parts"][0].kept == [range(13)]


@pytest.mark.slow
def test_a_rank_may_keep_no_sample_at_all(shared_world: Any) -> None:
    world = shared_world("ledger of fewer samples", 3, "tests.torch.test_ledger_ranks:TINY")
    for suspects, state, again in world["tiny"]:
        assert [(s.id, s.times_seen, s.mean_score) for s in suspects] == [
            (1, 3, pytest.approx(-0.5)),
            (0, 3, pytest.approx(0.5)),
        ]
        assert state == 2
        assert again == suspects


def tiny() -> Any:
    """A ledger of two samples and three ranks."""
    options = OPTIONS | {"num_samples": 2}
    monitor = gwa_logging.watch(net(), **options)
    monitor.update(torch.tensor([0.5, -0.5]), torch.tensor([0, 1]))
    monitor.end_epoch()
    saved = monitor.state_dict(whole_ledger=False)
    resumed = gwa_logging.watch(net(), **options)
    resumed.load_state_dict(saved)
    return monitor.suspects(), len(monitor.state_dict()["ledger"]["sums"]), resumed.suspects()


def untagged() -> Any:
    """A ledger to which nothing is ever added."""
    model = net()
    monitor = gwa_logging.watch(model, **OPTIONS)
    F.cross_entropy(model(training_set()[0]), training_set()[1]).backward()
    report = monitor.end_epoch()
    return report.count, monitor.suspects(), monitor.suspects_table().times_seen.tolist(), monitor.faults


@pytest.mark.slow
def test_a_ledger_without_any_sample_is_read_by_all_ranks(shared_world: Any) -> None:
    world = shared_world("ledger of fewer samples", 3, "tests.torch.test_ledger_ranks:TINY")
    for count, suspects, times_seen, faults in world["untagged"]:
        assert (count, suspects, times_seen) == (3 * N, [], [0.0] * N)
        assert faults["samples without ids"] == 3 * N


TINY = {"tiny": tiny, "untagged": untagged}
