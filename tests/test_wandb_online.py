"""W&B online: wandb-core uploads to a stand-in for W&B's server, which fails, hangs, stops and comes back."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import wandb

import gwa_logging
from gwa_logging import EarlyStop, Monitor
from gwa_logging.integrations import heatmap_picture
from gwa_logging.journal import read_journal
from gwa_logging.records import EpochReport, IntervalRecord, StopAlert, SuspectsRecord
from tests.test_outages import Outage
from tests.trackers import BATCH, BATCHES, Training
from tests.wandb_server import OnWandbServer, StoredRun, WandbServer


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnWandbServer]:
    with WandbServer() as server:
        tracker = OnWandbServer(server)
        tracker.set_up(tmp_path, monkeypatch)
        yield tracker
        server.status, server.taking, server.hanging = 200, True, False
        wandb.teardown()


def only_run(server: WandbServer) -> StoredRun:
    (run,) = server.runs.values()
    return run


def train(monitor: Monitor, training: Training, epochs: int) -> None:
    for _ in range(epochs):
        for index in range(BATCHES):
            monitor.tag(torch.arange(index * BATCH, (index + 1) * BATCH))
            training.step(index)
        monitor.end_epoch()


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_pictures_tables_alerts_config_and_summary_arrive_and_are_read_back(
    online: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heatmap_picture, "PAUSE", 0.0)
    training, server = Training(), online.server
    at_once = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)  # no epoch can exceed the first one by this much
    monitor = training.watch(tmp_path, backend="wandb", num_samples=BATCHES * BATCH, early_stop=at_once)
    (backend,) = (delivery.backend for delivery in monitor._deliveries)
    train(monitor, training, 3)
    monitor.log_suspects(3)  # a second list, after that of the alert
    monitor.close()
    assert monitor.faults == {}
    assert server.unknown == []
    run, records = only_run(server), read_journal(monitor.journal)[0]
    assert run.is_finished
    pictures = [row["gwa/picture"] for row in run.history if "gwa/picture" in row]
    assert len(pictures) > 1
    for picture in pictures:
        assert run.files[picture["path"]].startswith(b"\x89PNG")
        assert len(run.files[picture["path"]]) == picture["size"]
    assert json.loads(run.config)["gwa"]["value"]["version"] == gwa_logging.__version__
    summary = json.loads(run.summary)
    best = max(report.separation for report in monitor.history)
    assert summary["gwa/separation"] == {"last": monitor.history[-1].separation, "max": best}
    assert summary["gwa/best_value"] == monitor.history[0].separation
    assert summary["gwa/stop_epochs"] == [record.epoch for record in records if isinstance(record, StopAlert)]
    suspects = [record for record in records if isinstance(record, SuspectsRecord)]
    tables = [row["gwa/suspects"]["path"] for row in run.history if "gwa/suspects" in row]
    assert [json.loads(run.files[path])["data"] for path in tables] == [record.rows() for record in suspects]
    assert [stored.type for stored in server.artifacts].count("run_table") == len(suspects)
    assert len(run.alerts) == 1
    (journal,) = (stored.files for stored in server.artifacts if stored.type == "gwa")
    assert journal["gwa/journal.jsonl"] == monitor.journal.read_bytes()
    assert len(suspects) == 2
    assert summary["gwa/suspects_steps"] == [record.step for record in suspects]
    held = backend.contents()
    assert all(
        held.has(record)
        for record in records
        if isinstance(record, IntervalRecord | EpochReport | StopAlert | SuspectsRecord)
    )
    assert [epoch for epoch in range(9) if epoch in held.epochs] == [0, 1, 2]
    assert [step for step in range(99) if step in held.intervals] == [r.step for r in records if r.kind == "interval"]


def test_a_run_that_is_resumed_by_its_id_continues_its_rows_and_repeats_none(
    online: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without WANDB_PROJECT the run is in the project "gwa"."""
    monkeypatch.delenv("WANDB_PROJECT")
    training = Training()
    monitor = training.watch(tmp_path, backend="wandb")
    training.epoch(monitor)
    state = monitor.state_dict()
    training.epoch(monitor)
    monitor.close()
    run = only_run(online.server)
    assert run.project == "gwa"
    rows = len(run.history)
    again = Training()
    resumed = again.watch(tmp_path, backend="wandb", run=run.name)
    resumed.load_state_dict(state)
    again.epoch(resumed)
    again.epoch(resumed)
    resumed.close()
    wanted = [(report.epoch, report.count) for report in resumed.history]
    assert resumed.faults == {}
    assert len(run.history) > rows
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    epochs = [(row["gwa/epoch"], row["gwa/stats/count"]) for row in run.history if "gwa/epoch" in row]
    assert epochs == wanted == [(0, 56), (1, 56), (2, 56)]
    steps = Counter(row["gwa/step"] for row in run.history if "gwa/step" in row)
    assert set(steps.values()) == {1}


def test_a_run_id_of_the_default_project_is_found_and_the_users_run_accepts_the_folder_as_an_artifact(
    online: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two lines of docs/backends.md for users who started the run themselves."""
    monkeypatch.delenv("WANDB_PROJECT")
    run, training = online.start(), Training()
    monitor = training.watch(tmp_path, backend="wandb", run=run)
    training.epoch(monitor)
    monitor.close()
    run.log_artifact(str(monitor.journal.parent), name="gwa", type="gwa")
    run.finish()
    (stored,) = online.server.artifacts
    assert stored.files["journal.jsonl"] == monitor.journal.read_bytes()
    resumed = training.watch(tmp_path, backend="wandb", run=run.id)
    training.epoch(resumed)
    resumed.close()
    assert resumed.faults == {}
    epochs = [row["gwa/epoch"] for row in only_run(online.server).history if "gwa/epoch" in row]
    assert epochs == [0, 0]


def test_a_run_whose_artifact_fails_is_finished(
    online: OnWandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    training = Training()
    monitor = training.watch(tmp_path, backend="wandb")
    training.epoch(monitor)
    monkeypatch.setattr(wandb.Run, "log_artifact", refuse)
    with caplog.at_level("WARNING", "gwa_logging"):
        monitor.close()
    assert "no artifact (OSError('disk full'))" in caplog.text
    assert only_run(online.server).is_finished
    assert online.server.artifacts == []
    assert monitor.faults == {}


# --- a server that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: OnWandbServer, request: pytest.FixtureRequest
) -> Iterator[Outage]:
    """A trainer in a separate process, which logs to the stand-in."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_RETRY_WAIT_MAX_SECONDS", "2")
    monkeypatch.setenv("WANDB_X_FILE_STREAM_RETRY_WAIT_MIN_SECONDS", "1")
    outage = Outage(online, tmp_path, None)
    yield outage
    outage.child.kill()


def fail_with(status: int) -> Callable[[WandbServer], None]:
    return lambda server: setattr(server, "status", status)


def recover(server: WandbServer) -> None:
    server.status, server.hanging = 200, False
    server.start()


FAILURES: dict[str, Callable[[WandbServer], None]] = {
    "status 429": fail_with(429),
    "status 500": fail_with(500),
    "hangs": lambda server: setattr(server, "hanging", True),
    "stopped": WandbServer.stop,
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_after_an_outage_everything_arrives_once_and_no_step_waited(failure: str, outage: Outage) -> None:
    server = outage.tracker.server
    outage.child.do("epoch")
    FAILURES[failure](server)
    for _ in range(2):
        outage.child.do("epoch")
    if failure.startswith("status"):
        status = int(failure.removeprefix("status "))
        assert server.wait(lambda: server.statuses.get(status, 0) > 0), server.statuses
    recover(server)
    outage.child.do("epoch")
    assert outage.child.do("flush", 60)["done"]
    closed = outage.close()
    assert closed["faults"] == {}
    run = only_run(server)
    assert server.wait(lambda: run.is_finished)
    outage.child.end()
    outage.check(run.name)
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["stopped", "hangs", "status 500"])
def test_a_server_that_stays_away_delays_no_step_and_close_is_bounded_and_a_replay_sends_the_rest(
    failure: str, outage: Outage
) -> None:
    server = outage.tracker.server
    outage.child.do("epoch")
    run = only_run(server)
    assert server.wait(lambda: len(run.history) > 0)
    FAILURES[failure](server)
    for _ in range(2):
        outage.child.do("epoch")
    outage.close()
    outage.child.kill()
    recover(server)
    outage.replayed()
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
