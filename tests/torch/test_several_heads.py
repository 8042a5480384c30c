"""Several heads of one model, each watched separately."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError
from gwa_logging.journal import read_journal


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.head_dist = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), self.head_dist(h)


def train(model: Distilled, monitor: gwa_logging.Monitor, epochs: int = 3, both: bool = True) -> None:
    for epoch in monitor.epochs(epochs):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(4):
            x, y = torch.randn(10, 8, generator=generator), torch.randint(0, 5, (10,), generator=generator)
            one, two = model(x)
            loss = F.cross_entropy(one, y)
            (loss + F.cross_entropy(two, y.flip(0)) if both else loss).backward()


def alone(head: str) -> list[gwa_logging.EpochReport]:
    model = Distilled()
    with gwa_logging.watch(model, head=head) as monitor:
        train(model, monitor)
    return monitor.history


def values(history: list[gwa_logging.EpochReport]) -> list[tuple]:
    return [(r.epoch, r.step, r.count, r.gwa, r.stable_gwa, r.histogram) for r in history]


def test_each_head_has_the_scores_that_it_would_have_alone():
    model = Distilled()
    with gwa_logging.watch(model, head=["head", model.head_dist]) as monitor:
        train(model, monitor)
    assert values(monitor.history) == values(alone("head"))
    assert values(monitor.heads["head_dist"].history) == values(alone("head_dist"))
    assert monitor.heads["head_dist"].journal.parent == monitor.journal.parent / "head_dist"
    kinds = [record.kind for record in read_journal(monitor.heads["head_dist"].journal)[0]]
    assert (kinds.count("epoch"), kinds[0], kinds[-1]) == (3, "run", "close")


def test_the_alert_follows_the_first_head():
    model = Distilled()
    rule = gwa_logging.EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    with gwa_logging.watch(model, head=["head_dist", "head"], early_stop=rule) as monitor:
        train(model, monitor)
    assert monitor.alert is not None
    assert monitor.heads["head"].alert is None


def test_both_write_into_one_mlflow_run(monkeypatch, tmp_path):
    from tests.trackers import new_database

    client = new_database(tmp_path, monkeypatch)
    model = Distilled()
    with gwa_logging.watch(model, head=["head", "head_dist"], backend="mlflow") as monitor:
        train(model, monitor)
    (run,) = client.search_runs([client.get_experiment_by_name("gwa").experiment_id])
    assert run.info.status == "FINISHED"
    for key, history in (("gwa/gwa", monitor.history), ("gwa/head_dist/gwa", monitor.heads["head_dist"].history)):
        assert [m.value for m in client.get_metric_history(run.info.run_id, key)] == [r.gwa for r in history]
    assert monitor.faults == monitor.heads["head_dist"].faults == {}


def test_both_write_into_one_wandb_run(tmp_path):
    import wandb

    from tests.trackers import folder_of, read_back

    run = wandb.init(mode="offline", dir=tmp_path, reinit="create_new")
    model = Distilled()
    with gwa_logging.watch(model, head=["head", "head_dist"], backend="wandb", run=run) as monitor:
        train(model, monitor)
    assert monitor.faults == monitor.heads["head_dist"].faults == {}
    run.finish()
    disk = read_back(folder_of(run))
    for prefix, history in (("gwa", monitor.history), ("gwa/head_dist", monitor.heads["head_dist"].history)):
        assert disk.column(f"{prefix}/epoch", f"{prefix}/gwa") == [(r.epoch, r.gwa) for r in history]


def test_a_head_that_an_epoch_does_not_train_is_no_error():
    model = Distilled()
    with gwa_logging.watch(model, head=["head", "head_dist"]) as monitor:
        train(model, monitor, both=False)
    assert len(monitor.history) == 3
    assert monitor.heads["head_dist"].history == []
    assert monitor.faults == {"head 'head_dist'": 3}


def test_the_ledger_is_kept_for_each_head():
    model = Distilled()
    with gwa_logging.watch(model, head=["head", "head_dist"], num_samples=10) as monitor:
        monitor.tag(torch.arange(10))
        train(model, monitor, epochs=1)
        assert len(monitor.suspects(20)) == len(monitor.heads["head_dist"].suspects(20)) == 10


def test_the_state_holds_all_heads():
    model = Distilled()
    monitor = gwa_logging.watch(model, head=["head", "head_dist"])
    train(model, monitor)
    state, before = monitor.state_dict(), monitor.heads["head_dist"].history
    monitor = gwa_logging.watch(model, head=["head", "head_dist"])
    monitor.load_state_dict(state)
    assert values(monitor.heads["head_dist"].history) == values(before)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [([], InvalidInputError, "at least one head"), (["head", "nope"], HeadNotFoundError, "no module of this path")],
)
def test_a_wrong_list_of_heads_is_named_and_leaves_nothing_behind(head, error, message):
    model = Distilled()
    with pytest.raises(error, match=message):
        gwa_logging.watch(model, head=head)
    assert not model.head._forward_hooks
    assert "forward" not in model.head.__dict__


def test_a_head_whose_name_is_a_relative_path_stays_in_the_runs_folder(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.add_module("/aux %", nn.Linear(8, 5))  # torch takes any name without a dot; parents are joined by one

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.head(x), self._modules["/aux %"](x)

    model = Named()
    with gwa_logging.watch(model, head=["head", model._modules["/aux %"]], directory=tmp_path / "runs") as monitor:
        train(model, monitor, epochs=1)
        (other,) = monitor.heads.values()
    assert other.journal.parent == monitor.journal.parent / "_aux__"
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert read_journal(other.journal)[0][0].name == "gwa/_aux__"
