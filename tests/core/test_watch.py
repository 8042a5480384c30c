"""watch(): what it refuses, and how clearly; when it creates files, and when it releases everything."""

import gc
import inspect
import logging
import math
import os
import re
import threading
import weakref
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging import BackendError, EarlyStop, HeadNotFoundError, InvalidInputError, MissingDependencyError, registry
from gwa_logging._closer import closer
from gwa_logging.journal import FILE_NAME, read_journal
from gwa_logging.settings import WatchSettings


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "nonsense"}, "unknown backend 'nonsense'; choose from 'local', 'wandb', 'mlflow', "),
        ({"backend": "wanbd"}, "unknown backend 'wanbd'; did you mean 'wandb'? Choose from 'local', 'wandb', "),
        ({"backend": ["local", "WandB"]}, "unknown backend 'WandB'; did you mean 'wandb'? Choose from "),
        ({"backend": 7}, "backend=7: expected a name such as 'wandb'"),
        ({"backend": []}, "backend=[]: expected at least one backend"),
        (
            {"lgo_every_n_steps": 3},
            "unknown argument 'lgo_every_n_steps'; did you mean 'log_every_n_steps'? Choose from",
        ),
        ({"zzz": 3}, "unknown argument 'zzz'; choose from 'backend', 'run', 'head', "),
        ({"log_every_n_steps": 0}, "log_every_n_steps=0: expected an integer of at least 1"),
        ({"log_every_n_steps": "50"}, "log_every_n_steps='50': expected an integer of at least 1"),
        ({"samples_per_epoch": True}, "samples_per_epoch=True: expected an integer of at least 1, or None"),
        ({"num_samples": 1e4}, "num_samples=10000.0: expected an integer from 1 to 2**31 - 1, or None"),
        ({"num_samples": 2**31}, "num_samples=2147483648: expected an integer from 1 to 2**31 - 1"),
        ({"num_samples": 3, "labels": [0, 1]}, "num_samples=3: there are 2 labels"),
        ({"labels": [0.5]}, "labels: expected class indices, int [num_samples], found float64"),
        ({"early_stop": "yes"}, "early_stop='yes': expected an EarlyStop(...) or None"),
        ({"early_stop": {"patience": 3}}, "early_stop={'patience': 3}: expected an EarlyStop(...) or None"),
        ({"on_alert": "mail"}, "on_alert='mail': expected a function of the StopAlert, or None"),
        ({"directory": 7}, "directory=7: expected a path"),
        ({"name": "../etc"}, "name='../etc': expected 1 to 64 letters, digits, "),
        ({"name": ""}, "name='': expected 1 to 64 letters"),
        ({"backend": ["wandb", "mlflow"], "run": "abc"}, "run={'mlflow': run}"),
        ({"backend": ["wandb", "mlflow"], "run": {"mlfow": "abc"}}, "run={'mlfow': ...}: it is not among the backends"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_nothing_is_created(model, arguments, message):
    with pytest.raises(InvalidInputError) as error:
        gwa_logging.watch(model, **arguments)
    assert message in str(error.value)
    assert not Path("gwa_runs").exists()


TEXTS = ["x", "", "50", b"x"]
NUMBERS = [1e4, 0.5, -1, 2**70, True, math.nan, math.inf]
OBJECTS = [None, [], {}, [[1], [2, 3]], object(), nn.Linear]
PHRASES_OF_PYDANTIC = (
    "nput should", "alid dictionary", "ield required", "xtra inputs", "greater than", "less than", "alue error", "ssertion",
    "type=", "pydantic", "instance of", "nable to",
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "field"),
    [(settings, field) for settings in (WatchSettings, EarlyStop) for field in settings.model_fields],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_wrong_value_of_any_field_is_answered_in_the_words_of_the_validation_library(settings, field):
    refused = 0
    for value in TEXTS + NUMBERS + OBJECTS:
        try:
            settings(**{field: value})
        except InvalidInputError as error:
            refused += 1
            message = str(error)
            assert message.startswith((f"{field}=", "labels: ", "notify: ", "look: ", "look_ids: ", "dataset: ")), (
                message
            )
            assert not [phrase for phrase in PHRASES_OF_PYDANTIC if phrase in message], message
            assert len(message) < 400
    assert refused or field in ("run", "head")


def test_numpy_integers_and_paths_as_text_are_accepted():
    settings = WatchSettings(log_every_n_steps=np.int64(3), labels=np.array([0, 1], np.uint8), directory="runs")
    assert (settings.log_every_n_steps, settings.num_samples, settings.directory) == (3, 2, Path("runs"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"patience": 0}, "patience=0: expected an integer of at least 1"),
        ({"patience": 2.0}, "patience=2.0: expected an integer of at least 1"),
        ({"warmup": -0.1}, "warmup=-0.1: expected a number of at least 0"),
        ({"warmup": "1"}, "warmup='1': expected a number of at least 0"),
        ({"min_delta": -1}, "min_delta=-1"),
        (
            {"statistic": "median"},
            "statistic='median': expected 'separation', 'stable', 'gwa', 'mean', 'consensus' or 'agreement'",
        ),
        ({"patienc": 3}, "unknown argument 'patienc'; did you mean 'patience'?"),
    ],
)
def test_a_wrong_stop_rule_is_named(rule, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        EarlyStop(**rule)


def test_the_backend_is_the_second_argument(model):
    monitor = gwa_logging.watch(model, "tensorboard")
    assert [delivery.backend.name for delivery in monitor._deliveries] == ["tensorboard"]
    monitor.close()


def test_the_signature_shows_no_internals():
    parameters = inspect.signature(gwa_logging.watch).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert repr(parameters["early_stop"].default) == "EarlyStop()"
    assert repr(EarlyStop(patience=3)) == "EarlyStop(patience=3)"


@pytest.mark.parametrize("thing", ["a string", 7, None, nn.Linear, object()])
def test_something_that_is_no_model_is_refused(thing):
    with pytest.raises(InvalidInputError, match=r"model: expected a torch\.nn\.Module"):
        gwa_logging.watch(thing)


def test_a_backend_that_is_not_installed_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "absent_tracker", "absent_tracker")
    with pytest.raises(MissingDependencyError, match=r"pip install 'gwa-logging\[absent_tracker\]'"):
        gwa_logging.watch(model, backend="absent_tracker")


def test_a_failing_import_inside_an_installed_tracker_is_not_disguised(model, monkeypatch, tmp_path):
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


def test_a_deleted_model_does_not_keep_its_run():
    backend = Kept()
    model = nn.Linear(4, 3)
    first = gwa_logging.watch(model, backend=backend)
    first.update(torch.tensor([0.1, 0.2]))
    del model
    gwa_logging.watch(nn.Linear(4, 3), backend=backend).close()
    assert read_journal(first.journal)[0][-1].kind == "close"


def test_models_whose_runs_are_started_for_them_do_not_share_one(model):
    with (
        gwa_logging.watch(model, backend="tensorboard") as first,
        gwa_logging.watch(nn.Linear(4, 3), backend="tensorboard") as second,
    ):
        runs = [read_journal(monitor.journal)[0][0].places["tensorboard"].run for monitor in (first, second)]
    assert runs[0] != runs[1]


# --- files ------------------------------------------------------------------------------------------------------------


class BrokenBackend(Kept):
    """Fails when the monitor asks for its run, which comes after it was opened."""

    name = "broken"

    @property
    def run_ref(self) -> None:
        raise OSError("the tracker is gone")


def test_a_watch_that_fails_leaves_no_folder(model):
    with pytest.raises(OSError, match="the tracker is gone"):
        gwa_logging.watch(model, backend=["local", BrokenBackend()])
    with pytest.raises(HeadNotFoundError):
        gwa_logging.watch(model, head="nope")
    assert not Path("gwa_runs").exists()
    assert not model._forward_hooks


@pytest.mark.parametrize("number", [1, 3])
def test_a_watch_without_a_training_step_leaves_no_folder(model, number):
    for _ in range(number):
        monitor = gwa_logging.watch(model)
        assert monitor.journal.exists()
        monitor.close()
    assert not Path("gwa_runs").exists()


def test_an_unused_watch_removes_nothing_that_others_put_there(model, tmp_path):
    (tmp_path / "runs").mkdir()
    monitor = gwa_logging.watch(model, directory="runs")
    (monitor.journal.parent / "weights.bin").write_bytes(b"x")
    monitor.close()
    assert [path.name for path in (tmp_path / "runs").rglob("*.*")] == ["weights.bin"]
    gwa_logging.watch(model, directory="runs").close()
    assert (tmp_path / "runs").is_dir()


def test_a_head_beside_the_first_that_fails_leaves_no_folder():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(HeadNotFoundError):
        gwa_logging.watch(model, head=["1", "nope"])
    assert not Path("gwa_runs").exists()


def test_a_used_watch_keeps_its_journal(model):
    monitor = gwa_logging.watch(model)
    monitor.update(torch.tensor([0.1]))
    monitor.close()
    assert [path.name for path in Path("gwa_runs").rglob("*.jsonl")] == [FILE_NAME]


# --- what the user reads at the start -----------------------------------------------------------------------------------


def test_one_line_on_stderr_states_the_head_and_the_journal(model, capfd):
    monitor = gwa_logging.watch(model)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("gwa_logging: watching head (the model itself) (Linear 4 -> 3)")
    assert line.endswith(f"journal: {monitor.journal}")
    model(torch.ones(2, 4)).sum().backward()
    assert capfd.readouterr().err == ""


def test_a_program_that_configures_the_logger_gets_that_line_there(model, capfd, caplog):
    caplog.set_level(logging.INFO, "gwa_logging")
    gwa_logging.watch(model)
    assert "watching head" in caplog.text
    caplog.clear()
    caplog.set_level(logging.ERROR, "gwa_logging")
    gwa_logging.watch(model)
    assert caplog.text == capfd.readouterr().err == ""


def test_a_head_with_one_logit_gets_a_line_about_regression(capfd):
    model = nn.Linear(4, 1)
    gwa_logging.watch(model)
    for _ in range(2):
        model(torch.randn(8, 4)).sigmoid().log().sum().backward()
    assert capfd.readouterr().err.count("meaningless with a regression loss") == 1


# --- what a long sweep keeps --------------------------------------------------------------------------------------------


def close(model: nn.Module, monitor: gwa_logging.Monitor) -> None:
    monitor.end_epoch()
    monitor.close()


def drop(model: nn.Module, monitor: gwa_logging.Monitor) -> None:
    """Leaves both to the garbage collector."""


def collect() -> None:
    """Returns once everything that was dropped has been closed."""
    gc.collect()
    assert closer.wait(60)


def resources(earlier: set[threading.Thread]) -> tuple[int, int]:
    """Open files and threads, once all monitors are closed and all threads but the earlier ones have ended."""
    collect()
    for thread in set(threading.enumerate()) - earlier:
        if thread.name.startswith("gwa_logging") and thread.name != "gwa_logging closer":
            thread.join(60)
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def megabytes() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", [close, drop])
def test_many_watches_in_one_process_end_with_the_files_threads_monitors_and_memory_of_the_first(end, number):
    def run() -> "weakref.ref[gwa_logging.Monitor]":
        model = nn.Linear(4, 3)
        monitor = gwa_logging.watch(model, num_samples=200_000, backend=Kept(), log_every_n_steps=1)
        monitor.update(torch.tensor([0.1, 0.2]), torch.tensor([3, 4]))
        model(torch.ones(2, 4)).sum().backward()
        end(model, monitor)
        return weakref.ref(monitor)

    collect()
    earlier = set(threading.enumerate())
    monitors = [run()]
    first, before = resources(earlier), megabytes()
    monitors += [run() for _ in range(number - 1)]
    assert resources(earlier) == first
    assert megabytes() < before + 150  # 200 ledgers take 480 MB
    gc.collect()
    assert [reference() for reference in monitors] == [None] * number
    journals = list(Path("gwa_runs").rglob(FILE_NAME))
    assert len(journals) == number
    assert {read_journal(path)[0][-1].kind for path in journals} == {"close"}


def test_a_monitor_that_is_still_referenced_outlives_its_model_until_the_next_watch(model):
    deleted = nn.Linear(4, 3)
    monitor = gwa_logging.watch(deleted, backend=(backend := Kept()))
    deleted(torch.ones(2, 4)).sum().backward()
    del deleted
    collect()
    assert monitor.end_epoch().count == 2
    gwa_logging.watch(model)
    assert backend.closed
    with pytest.raises(InvalidInputError, match="because its model was deleted"):
        monitor.end_epoch()


def test_a_model_keeps_a_monitor_that_nothing_else_refers_to(model):
    journal = gwa_logging.watch(model, log_every_n_steps=1).journal
    collect()
    until = monotonic() + 60
    while len(read_journal(journal)[0]) < 3 and monotonic() < until:  # a thread writes them
        model(torch.ones(2, 4)).sum().backward()
    assert [record.kind for record in read_journal(journal)[0]][:3] == ["run", "interval", "interval"]
