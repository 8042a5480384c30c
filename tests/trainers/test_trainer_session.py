"""TrainerSession without a trainer: where results go, and a state that a checkpoint can hold."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gwa_logging import EarlyStop, InvalidInputError, MissingDependencyError
from gwa_logging.journal import read_journal
from gwa_logging.trainer_session import TrainerSession, decode_arrays, encode_arrays


@pytest.mark.parametrize(
    ("arguments", "runs", "expected"),
    [
        ({}, {}, (["local"], None)),
        ({}, {"wandb": "w", "mlflow": None}, (["wandb", "mlflow"], {"wandb": "w"})),
        ({"backend": "mlflow"}, {"wandb": "w", "mlflow": "m"}, (["mlflow"], {"mlflow": "m"})),
        ({"backend": "local"}, {"wandb": "w"}, (["local"], None)),
        ({"run": "mine"}, {"wandb": "w"}, (["wandb"], "mine")),
        (
            {"backend": ["wandb", "mlflow"], "run": {"mlflow": "mine"}},
            {"wandb": "w", "mlflow": "m"},
            (["wandb", "mlflow"], {"wandb": "w", "mlflow": "mine"}),
        ),
    ],
)
def test_the_trainers_own_runs_are_used_where_the_user_named_none(arguments, runs, expected):
    destination = TrainerSession(arguments)._destination(runs)
    assert (destination["backend"], destination["run"]) == expected


def test_state_is_plain_json_and_is_restored_bit_for_bit():
    state = {
        "ledger": [np.arange(5, dtype=np.float32) / 3, np.arange(5, dtype=np.int32)],
        "summary": {"mean": np.float64(1 / 3), "bins": np.zeros((2, 3), np.int64), "infinite": -np.inf},
        "history": [],
    }
    back = decode_arrays(json.loads(json.dumps(encode_arrays(state))))
    for mine, theirs in zip(back["ledger"], state["ledger"], strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    assert back["summary"]["mean"] == 1 / 3
    assert back["summary"]["bins"].shape == (2, 3)
    assert back["summary"]["infinite"] == -np.inf
    assert back["history"] == []


def test_an_epoch_without_observations_is_counted_as_a_fault_and_does_not_end_training():
    session = TrainerSession({})
    session.begin(nn.Linear(4, 3), training=object(), planned=3, runs={})
    session.enter_epoch(0)
    session.count_step()
    assert session.end_epoch() is None
    assert session.monitor.faults == {"epoch": 1}
    session.end()


def test_the_progress_has_the_agreement_only_if_the_rule_watches_it():
    session = TrainerSession({"num_samples": 4, "early_stop": EarlyStop(statistic="agreement")})
    model = nn.Linear(4, 3)
    session.begin(model, training=object(), planned=2, runs={})
    shown = []
    for epoch in range(2):
        session.enter_epoch(epoch)
        session.monitor.update(torch.tensor([0.1, -0.2, 0.3, (-1) ** epoch * 0.2]), torch.arange(4))
        session.count_step()
        shown.append(session.progress(session.end_epoch()))
    session.end()
    assert np.isnan(shown[0]["gwa/agreement"])
    assert shown[1]["gwa/agreement"] == 0.75
    assert "gwa/agreement" not in TrainerSession({}).progress(session.monitor.history[0])


def test_state_that_does_not_fit_is_refused_and_leaves_nothing_watched():
    ids = torch.arange(2)
    model, session = nn.Linear(4, 3), TrainerSession({"num_samples": 2})
    session.begin(model, training=object(), planned=None, runs={})
    session.monitor.tag(ids)
    model(torch.ones(2, 4)).square().sum().backward()
    state = session.state_dict()
    other = TrainerSession({"num_samples": 9})
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="ledger"):
        other.begin(model, training=object(), planned=None, runs={})
    assert not model._forward_hooks
    assert other.monitor._closed


@pytest.mark.parametrize(
    "damage", [{"base64": "!"}, {"base64": ""}, {"dtype": "nothing"}, {"shape": [7]}, {"shape": "x"}, {"base64": None}]
)
def test_a_checkpoint_whose_arrays_are_damaged_is_refused_and_nothing_is_loaded(damage):
    model, session = nn.Linear(4, 3), TrainerSession({"num_samples": 2})
    session.begin(model, training=object(), planned=None, runs={})
    session.monitor.tag(torch.arange(2))
    model(torch.ones(2, 4)).square().sum().backward()
    session.monitor.end_epoch()
    state = session.state_dict()
    state["monitor"]["ledger"]["sums"] |= damage
    before = str(session.monitor.state_dict())
    with pytest.raises(InvalidInputError, match="state: an array in the checkpoint is damaged"):
        session.load_state_dict(state)
    with pytest.raises(InvalidInputError, match=r"state: expected a state_dict\(\) of GWACallback"):
        session.load_state_dict({**state, "epoch": "x"})
    assert str(session.monitor.state_dict()) == before
    session.end()


@pytest.mark.parametrize(
    ("trainer", "missing"),
    [
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("transformers", ["transformers"]),
        ("accelerate", ["accelerate"]),
        ("keras", ["keras"]),
    ],
)
def test_a_missing_trainer_is_named_with_the_pip_command(trainer, missing, monkeypatch):
    name = f"gwa_logging.integrations.{trainer}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for package in missing:
        for loaded in [known for known in sys.modules if known.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'gwa-logging\[{trainer}\]'"):
        importlib.import_module(name)


def test_the_next_training_takes_over_the_run_of_an_interrupted_one():
    interrupted, following = (TrainerSession({"backend": "tensorboard", "run": "runs"}) for _ in range(2))
    models = [nn.Linear(4, 3) for _ in range(2)]
    interrupted.begin(models[0], training=object(), planned=None, runs={})
    interrupted.enter_epoch(0)
    models[0](torch.ones(2, 4)).square().sum().backward()
    interrupted.count_step()
    following.begin(models[1], training=object(), planned=None, runs={})
    assert read_journal(interrupted.monitor.journal)[0][-1].kind == "close"
    assert interrupted.end_epoch() is None
    following.end()


def test_a_later_epoch_of_the_trainer_closes_one_that_was_left_open():
    model, session = nn.Linear(4, 3), TrainerSession({})
    session.begin(model, training=object(), planned=2, runs={})
    for epoch in (0, 0, 1):
        session.enter_epoch(epoch)
        model(torch.ones(2, 4)).square().sum().backward()
        session.count_step()
    assert [report.count for report in session.monitor.history] == [4]
    session.end()


def test_ending_a_training_undoes_what_was_set_up_for_it_and_the_session_can_be_used_again():
    session, undone = TrainerSession({}), []
    for n in range(2):
        session.begin(nn.Linear(4, 3), training=object(), planned=None, runs={})
        session.cleanup.callback(undone.append, n)
        session.end()
        session.end()
    assert undone == [0, 1]


def test_two_sessions_of_one_training_are_refused():
    first, second, training = TrainerSession({}), TrainerSession({}), object()
    first.begin(nn.Linear(4, 3), training=training, planned=None, runs={})
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        second.begin(nn.Linear(4, 3), training=training, planned=None, runs={})
    assert first.is_training(training)
    first.end()
    assert not first.is_training(training)
