"""watch(): what it refuses, and how clearly."""

from pathlib import Path

import pytest
from torch import nn

import gwa_logging
from gwa_logging import BackendError, EarlyStop, GwaError, InvalidInputError, MissingDependencyError, registry
from gwa_logging.journal import read_journal


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "nonsense"}, "there is no such backend; there are 'local', 'wandb', 'mlflow'"),
        ({"backend": 7}, "expected a name such as 'wandb'"),
        ({"backend": []}, "at least one backend"),
        ({"lgo_every_n_steps": 3}, "unknown argument 'lgo_every_n_steps': did you mean 'log_every_n_steps'?"),
        ({"zzz": 3}, "unknown argument 'zzz': there are: backend"),
        ({"log_every_n_steps": 0}, "log_every_n_steps=0"),
        ({"log_every_n_steps": -5}, "greater than or equal to 1"),
        ({"samples_per_epoch": 0}, "samples_per_epoch=0"),
        ({"num_samples": -1}, "num_samples=-1"),
        ({"early_stop": "yes"}, "early_stop='yes'"),
        ({"on_alert": "mail"}, "on_alert='mail'"),
        ({"name": "../etc"}, "name='../etc'"),
        ({"name": ""}, "name=''"),
        ({"backend": ["wandb", "mlflow"], "run": "abc"}, "run={'mlflow': run}"),
        ({"backend": ["wandb", "mlflow"], "run": {"mlfow": "abc"}}, "'mlfow': ...}: it is not among the backends"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found(model, arguments, said):
    with pytest.raises(InvalidInputError) as error:
        gwa_logging.watch(model, **arguments)
    assert said in str(error.value)
    assert isinstance(error.value, ValueError | GwaError)
    assert not Path("gwa_runs").exists() or not list(Path("gwa_runs").glob("*/journal.jsonl")) or "backend" in arguments


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"patience": 0}, "patience=0"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"min_delta": -1}, "min_delta=-1"),
        ({"statistic": "median"}, "'stable'"),
        ({"patienc": 3}, "did you mean 'patience'?"),
    ],
)
def test_a_wrong_stop_rule_is_named(rule, said):
    with pytest.raises(InvalidInputError, match=said.replace("?", r"\?")):
        EarlyStop(**rule)


@pytest.mark.parametrize("thing", ["a string", 7, None, nn.Linear, object()])
def test_something_that_is_no_model_is_refused(thing):
    with pytest.raises(InvalidInputError, match=r"model: expected a torch\.nn\.Module"):
        gwa_logging.watch(thing)


def test_a_backend_that_is_not_installed_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "absent_tracker", "absent_tracker")
    with pytest.raises(MissingDependencyError, match=r"pip install 'gwa-logging\[absent_tracker\]'"):
        gwa_logging.watch(model, backend="absent_tracker")


def test_a_failing_import_inside_of_an_installed_tracker_is_not_disguised(model, monkeypatch, tmp_path):
    (tmp_path / "broken_tracker.py").write_text("import something_else_entirely")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BACKENDS, "broken_tracker", "broken_tracker")
    with pytest.raises(ModuleNotFoundError, match="something_else_entirely"):
        gwa_logging.watch(model, backend="broken_tracker")


def test_a_directory_that_cannot_be_written_is_an_error_at_once(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="directory="):
        gwa_logging.watch(model, directory=tmp_path / "file")


def test_a_watch_that_fails_leaves_nothing_on_the_model(model):
    with pytest.raises(InvalidInputError):
        gwa_logging.watch(model, backend="nonsense")
    assert not model._forward_hooks


class Kept:
    """A user's own backend."""

    name = "kept"

    def __init__(self) -> None:
        self.closed = False

    def write(self, record: object) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    threaded = True


def test_a_backend_of_the_users_takes_one_model_under_each_name(model):
    backend, other = Kept(), nn.Linear(4, 3)
    monitor = gwa_logging.watch(model, backend=backend)
    with pytest.raises(InvalidInputError, match=r"backend='kept': .*still writes to it under name='gwa'.*name='gwa2'"):
        gwa_logging.watch(other, backend=["local", backend])
    assert not backend.closed
    gwa_logging.watch(other, backend=backend, name="other").close()
    gwa_logging.watch(other, backend=Kept()).close()
    monitor.close()
    gwa_logging.watch(other, backend=backend).close()


def test_a_model_that_no_longer_exists_does_not_keep_its_run():
    backend = Kept()
    first = gwa_logging.watch(nn.Linear(4, 3), backend=backend)
    gwa_logging.watch(nn.Linear(4, 3), backend=backend).close()
    assert read_journal(first.journal)[0][-1].kind == "close"


def test_models_whose_runs_are_started_for_them_do_not_meet(model):
    with (
        gwa_logging.watch(model, backend="tensorboard") as first,
        gwa_logging.watch(nn.Linear(4, 3), backend="tensorboard") as second,
    ):
        runs = [read_journal(monitor.journal)[0][0].places["tensorboard"].run for monitor in (first, second)]
    assert runs[0] != runs[1]
