"""What all callbacks share, without a trainer: where to send, and state that a checkpoint can hold."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gwa_logging import InvalidInputError, MissingDependencyError
from gwa_logging.journal import read_journal
from gwa_logging.trainer_session import TrainerSession, _plain, _restored


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
def test_the_trainers_own_runs_fill_in_what_the_user_has_left_open(arguments, runs, expected):
    places = TrainerSession(**arguments)._places(runs)
    assert (places["backend"], places["run"]) == expected


def test_state_is_plain_json_and_comes_back_to_the_bit():
    state = {
        "ledger": [np.arange(5, dtype=np.float32) / 3, np.arange(5, dtype=np.int32)],
        "summary": {"mean": np.float64(1 / 3), "bins": np.zeros((2, 3), np.int64), "infinite": -np.inf},
        "history": [],
    }
    back = _restored(json.loads(json.dumps(_plain(state))))
    for mine, theirs in zip(back["ledger"], state["ledger"], strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    assert back["summary"]["mean"] == 1 / 3
    assert back["summary"]["bins"].shape == (2, 3)
    assert back["summary"]["infinite"] == -np.inf
    assert back["history"] == []


def test_an_epoch_in_which_nothing_was_seen_is_a_fault_and_no_end_of_the_training():
    follower = TrainerSession()
    follower._begin(nn.Linear(4, 3), training=object(), planned=3, runs={})
    follower._step(0)
    assert follower._end_epoch() is None
    assert follower.monitor.faults == {"epoch": 1}
    follower._end()


def test_state_that_does_not_fit_is_refused_and_leaves_nothing_watched():
    ids = torch.arange(2)
    model, follower = nn.Linear(4, 3), TrainerSession(num_samples=2)
    follower._begin(model, training=object(), planned=None, runs={})
    follower.monitor.tag(ids)
    model(torch.ones(2, 4)).square().sum().backward()
    state = follower.state_dict()
    other = TrainerSession(num_samples=9)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="ledger"):
        other._begin(model, training=object(), planned=None, runs={})
    assert not model._forward_hooks
    assert other.monitor._closed


@pytest.mark.parametrize(
    "damage", [{"base64": "!"}, {"base64": ""}, {"dtype": "nothing"}, {"shape": [7]}, {"shape": "x"}, {"base64": None}]
)
def test_a_checkpoint_whose_arrays_are_damaged_is_refused_and_nothing_is_loaded(damage):
    model, follower = nn.Linear(4, 3), TrainerSession(num_samples=2)
    follower._begin(model, training=object(), planned=None, runs={})
    follower.monitor.tag(torch.arange(2))
    model(torch.ones(2, 4)).square().sum().backward()
    follower.monitor.end_epoch()
    state = follower.state_dict()
    state["monitor"]["ledger"]["sums"] |= damage
    before = str(follower.monitor.state_dict())
    with pytest.raises(InvalidInputError, match="state: an array in the checkpoint is damaged"):
        follower.load_state_dict(state)
    with pytest.raises(InvalidInputError, match=r"state: not a state_dict\(\) of a TrainerSession"):
        follower.load_state_dict({**state, "epoch": "x"})
    assert str(follower.monitor.state_dict()) == before
    follower._end()


@pytest.mark.parametrize(
    ("room", "missing"),
    [
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("transformers", ["transformers"]),
        ("accelerate", ["accelerate"]),
        ("keras", ["keras"]),
    ],
)
def test_a_trainer_that_is_not_installed_is_named_with_the_remedy(room, missing, monkeypatch):
    name = f"gwa_logging.integrations.{room}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for package in missing:
        for loaded in [known for known in sys.modules if known.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'gwa-logging\[{room}\]'"):
        importlib.import_module(name)


def test_a_training_that_was_interrupted_gives_its_run_to_the_next_one():
    interrupted, following = (TrainerSession(backend="tensorboard", run="runs") for _ in range(2))
    models = [nn.Linear(4, 3) for _ in range(2)]
    interrupted._begin(models[0], training=object(), planned=None, runs={})
    interrupted._step(0)
    following._begin(models[1], training=object(), planned=None, runs={})
    assert read_journal(interrupted.monitor.journal)[0][-1].kind == "close"
    assert interrupted._end_epoch() is None
    following._end()
