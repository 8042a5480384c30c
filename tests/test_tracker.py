"""The base class of the trackers, and the one text of an alert."""

import subprocess
import sys

import pytest

from gwa_logging import integrations
from gwa_logging.backend_defaults import with_defaults
from gwa_logging.integrations import BackendError, RunContext, SuspectsRecord, Tracker
from tests.records import close_record, epoch_report, interval_record, run_record, stop_alert

METHODS = ("on_run", "on_interval", "on_epoch", "on_alert", "on_suspects", "on_close")
RECORDS = {
    "on_run": run_record(),
    "on_interval": interval_record(),
    "on_epoch": epoch_report(),
    "on_alert": stop_alert(),
    "on_suspects": SuspectsRecord(step=3, epoch=0, samples=0, suspects=()),
    "on_close": close_record(),
}


class Recorder(Tracker):
    """Notes which method received which record."""

    def __init__(self) -> None:
        super().__init__("mine")
        self.calls = []
        for name in METHODS:
            setattr(self, name, lambda record, name=name: self.calls.append((name, record)))


@pytest.mark.parametrize("method", METHODS)
def test_each_record_is_passed_to_the_method_for_its_kind(method):
    recorder = Recorder()
    recorder.write(RECORDS[method])
    assert recorder.calls == [(method, RECORDS[method])]


def test_an_interval_without_a_score_and_an_unknown_record_are_ignored():
    recorder = Recorder()
    recorder.write(interval_record(scores=[float("nan")]))
    recorder.write("a kind of record that a later version adds")
    assert recorder.calls == []


def test_a_tracker_that_overrides_nothing_accepts_everything():
    tracker = Tracker()
    tracker.write_many(list(RECORDS.values()))
    tracker.close()
    assert (tracker.name, tracker.keyed({"mean": 1})) == ("Tracker", {"gwa/mean": 1})
    assert with_defaults(tracker) is tracker


def test_the_text_of_an_alert_is_its_message_and_a_list_of_its_caveats():
    assert stop_alert(message="Stop now.").text == "Stop now."
    alert = stop_alert(message="Stop now.", caveats=("the epochs are small", "the labels may be clean"))
    assert alert.text == "Stop now.\n\n- But: the epochs are small.\n- But: the labels may be clean."


def test_everything_that_a_backend_needs_is_in_one_place_and_imports_no_tracker():
    assert {Tracker, RunContext, BackendError} <= {getattr(integrations, name) for name in integrations.__all__}
    code = "import sys, gwa_logging.integrations; print({'wandb', 'mlflow', 'torch', 'jax'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
