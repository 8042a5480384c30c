"""The callback for fastai: the results of the plain loop, and the Learner's own stopping, resuming and recording."""

import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, EpochReport, InvalidInputError, with_ids
from gwa_logging.journal import read_journal
from tests.trainers.tasks import (
    BATCH,
    EPOCHS,
    RATE,
    SAMPLES,
    Samples,
    assert_closed,
    assert_equal,
    loader,
    net,
    plain,
    weights,
)

pytest.importorskip("fastcore", reason="fastai is not installed")
from tests.trainers.torchvision_operators import define_operators

define_operators()
pytest.importorskip("fastai.learner", reason="fastai is not installed")
from fastai.basics import Callback, DataLoader, DataLoaders, Learner  # noqa: E402
from fastai.callback.progress import ProgressCallback  # noqa: E402
from fastai.callback.schedule import lr_find  # noqa: E402, F401  # adds the method to Learner
from fastai.callback.tensorboard import TensorBoardBaseCallback  # noqa: E402
from fastai.callback.wandb import WandbCallback  # noqa: E402
from fastai.optimizer import SGD  # noqa: E402

from gwa_logging.integrations.fastai import GWACallback, _runs  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Pairs:
    """The samples without ids."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return tuple(Samples()[index][:2])


def learner(*callbacks: Any, data: Any = None, valid: Any = None, **arguments: Any) -> Learner:
    train, valid = data or Pairs(), valid or data or Pairs()
    loaders = DataLoaders(*(DataLoader(each, bs=BATCH, device="cpu") for each in (train, valid)), device="cpu")
    model = net()
    made = Learner(
        *(loaders, model),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(SGD, mom=0, decouple_wd=True),
        lr=RATE,
        wd=0.0,
        cbs=list(callbacks),
        **{"train_bn": False, **arguments},
    )
    made.remove_cbs(ProgressCallback)
    return made


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    callback, bare = GWACallback(), net()
    learn = learner(callback)
    assert learn.gwa is callback
    learn.fit(EPOCHS)
    assert_equal(callback.monitor.history, plain(bare)[0])
    torch.testing.assert_close(weights(learn.model), weights(bare), rtol=1e-6, atol=1e-7)
    assert callback.monitor.faults == {}
    assert_closed(callback.monitor)
    assert not learn.model[2]._forward_hooks
    assert "_do_epoch" not in vars(learn)


@pytest.mark.parametrize("valid", [None, Pairs()], ids=["with ids", "without ids"])
def test_the_ids_reach_the_ledger_and_neither_the_model_nor_the_loss(valid):
    callback = GWACallback(num_samples=SAMPLES, sample_ids=2)
    learn = learner(callback, data=with_ids(Pairs()), valid=valid)
    learn.fit(EPOCHS)
    assert_equal(callback.monitor.history, plain(net())[0])
    with gwa_logging.watch(model := net(), num_samples=SAMPLES) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(EPOCHS):
            for x, y, ids in loader():
                monitor.tag(ids)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            monitor.end_epoch()
    found, expected = ({s.id: s.mean_score for s in each.suspects(SAMPLES)} for each in (callback.monitor, monitor))
    assert found == pytest.approx(expected, abs=1e-6)
    assert {suspect.times_seen for suspect in callback.monitor.suspects(SAMPLES)} == {EPOCHS}
    assert "_split" not in vars(learn)


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


def test_the_alert_ends_the_fit_only_with_action_stop_after_the_epoch_was_recorded():
    alerted, stopped = (
        GWACallback(early_stop=EarlyStop(**RULE)),
        GWACallback(early_stop=EarlyStop(action="stop", **RULE)),
    )
    learner(alerted).fit(EPOCHS)
    learn = learner(stopped)
    learn.fit(EPOCHS)
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == alerted.monitor.alert.epoch + 1 < EPOCHS
    assert len(learn.recorder.values) == len(stopped.monitor.history)
    learn.validate()  # which the alert must not end
    assert_closed(stopped.monitor)


class Saves(Callback):
    """Saves the model after each epoch, and fails in the epoch `fails_in`."""

    def __init__(self, fails_in: int = -1) -> None:
        super().__init__()
        self.fails_in = fails_in

    def before_batch(self) -> None:
        if self.training and self.epoch == self.fails_in and self.iter == 2:
            raise RuntimeError("on purpose")

    def after_epoch(self) -> None:
        self.learn.save(f"epoch{self.epoch}")


def test_a_fit_resumed_from_a_backup_equals_an_uninterrupted_one(tmp_path, caplog):
    arguments = {"num_samples": SAMPLES, "sample_ids": 2, "log_every_n_steps": 3}
    whole = GWACallback(**arguments)
    learner(whole, data=with_ids(Pairs())).fit(EPOCHS)

    failed = GWACallback(**arguments, backup=tmp_path / "gwa.json")
    learn = learner(failed, Saves(fails_in=2), data=with_ids(Pairs()), path=tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        learn.fit(EPOCHS)
    assert_closed(failed.monitor)
    assert read_journal(failed.monitor.journal)[0][-1].kind == "close"

    resumed = GWACallback(**arguments, backup=tmp_path / "gwa.json")
    learn = learner(resumed, data=with_ids(Pairs()), path=tmp_path)
    learn.load("epoch1")
    learn.fit(EPOCHS, start_epoch=2)
    assert_equal(resumed.monitor.history, whole.monitor.history)
    assert resumed.monitor.suspects(SAMPLES) == whole.monitor.suspects(SAMPLES)
    assert not list(tmp_path.glob("gwa.*"))

    learn = learner(GWACallback(backup=tmp_path / "nothing.json"), path=tmp_path)
    learn.fit(EPOCHS, start_epoch=2)
    assert "GWA starts again from zero" in caplog.text


def test_what_the_recorder_records_does_not_change():
    learn, bare = learner(GWACallback(log_every_n_steps=1)), learner()
    learn.fit(EPOCHS)
    bare.fit(EPOCHS)
    assert learn.recorder.values == bare.recorder.values
    assert torch.equal(weights(learn.model), weights(bare.model))


def test_neither_lr_find_nor_predictions_are_watched_and_the_learner_can_be_pickled(tmp_path):
    callback = GWACallback()
    learn = learner(callback, path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False)
    assert callback.monitor is None
    learn.fit(1)
    count = callback.monitor.history[0].count
    learn.validate()
    learn.get_preds()
    assert [report.count for report in callback.monitor.history] == [count] == [SAMPLES]
    assert pickle.loads(pickle.dumps(learn)).gwa.monitor is None


def test_results_go_to_the_run_of_the_learners_own_callbacks():
    class Board(TensorBoardBaseCallback):
        def __init__(self) -> None:
            self.writer = type("Writer", (), {"log_dir": "board"})()

    class Wandb(WandbCallback):
        def __init__(self) -> None:
            """Starts nothing."""

    assert _runs([Wandb(), Board(), Saves()]) == {"wandb": None, "tensorboard": "board"}


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)
    with pytest.raises(InvalidInputError, match="sample_ids='id': expected the index"):
        GWACallback(sample_ids="id", num_samples=SAMPLES)
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        learner(GWACallback(), GWACallback()).fit(1)
    with pytest.raises(InvalidInputError, match="sample_ids=2: not found in the batch"):
        learner(GWACallback(sample_ids=2, num_samples=SAMPLES)).fit(1)


def train_ddp(folder: str) -> None:
    """Runs in each of two processes, on half of every batch. fastai's own loader for that needs CUDA."""
    from fastai.distributed import DistributedDL

    class OnCPU(DistributedDL):
        def _broadcast(self, t: Any, rank: int) -> Any:
            return t  # every process has the same order

    torch.set_num_threads(1)
    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    callback = GWACallback(num_samples=SAMPLES, sample_ids=2)

    class Halves:
        """Every second sample, so that together the two processes see the batches of a single process."""

        def __len__(self) -> int:
            return SAMPLES // 2

        def __getitem__(self, index: int) -> Any:
            return with_ids(Pairs())[2 * index + rank]

    learn = learner(callback, data=Halves())
    learn.dls.loaders = [OnCPU(DataLoader(Halves(), bs=BATCH // 2), rank=0, world_size=1) for _ in range(2)]
    with learn.distrib_ctx(in_notebook=False, sync_bn=False, cpu=True):
        learn.fit(EPOCHS)
    result = [report.model_dump(mode="json") for report in callback.monitor.history]
    Path(f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_report_the_same_as_one(tmp_path, two_processes):
    two_processes("tests.trainers.test_fastai", "train_ddp", tmp_path)
    assert len(list(tmp_path.glob("gwa_runs/*/journal.jsonl"))) == 1
    expected = plain(net())[0]
    for rank in (0, 1):
        reports = [EpochReport.model_validate(r) for r in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert_equal(reports, expected)
