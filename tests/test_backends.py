"""The contract that every backend meets with its real tracker: the numbers of the journal arrive unchanged."""

import csv
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import pytest
import torch
import wandb

from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.integrations import heatmap_picture
from gwa_logging.journal import read_journal
from gwa_logging.protocols import RunContext
from gwa_logging.records import EPOCH_KEYS, AnyRecord, EpochReport, IntervalRecord, StopAlert
from gwa_logging.registry import BACKENDS, open_backend
from tests.trackers import (
    BATCH,
    BATCHES,
    INTERVAL_KEYS,
    OnMlflow,
    OnMlflowServer,
    OnTensorBoard,
    OnTrackio,
    OnWandb,
    Series,
    Tracker,
    TrackerContents,
    Training,
    numbers_in,
    run_of,
    totals_in,
)
from tests.wandb_server import OnWandbServer

EPOCHS = 3
ALERT_AT_ONCE = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)  # no epoch can exceed the first one by this much

TRACKERS = {
    "MLflow": OnMlflow,
    "MLflow server": OnMlflowServer,
    "W&B": OnWandb,
    "W&B online": OnWandbServer,
    "TensorBoard": OnTensorBoard,
    "Trackio": OnTrackio,
}
SLOW = {"MLflow server": pytest.mark.slow}
ONE_OF_EACH = ("MLflow", "W&B", "TensorBoard", "Trackio")


def of(*names: str) -> list[Any]:
    """Parameters of a test: trackers; the server only in the slow tier."""
    return [pytest.param(name, marks=SLOW.get(name, ())) for name in names]


WITH_HISTOGRAMS = ("W&B", "W&B online", "TensorBoard", "Trackio")
WITH_ROWS_OF_ANY_STEP = ("MLflow", "MLflow server", "TensorBoard", "Trackio")
WITH_RUNS_THAT_END = ("MLflow", "MLflow server", "W&B", "W&B online", "Trackio")


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heatmap_picture, "PAUSE", 0.0)
        yield
    wandb.teardown()
    OnMlflowServer.stop()
    OnWandbServer.stop()


def until(true: Callable[[], bool], within: float = 60.0) -> bool:
    """Polls until a condition holds, for libraries that send no event."""
    deadline = time.monotonic() + within
    while not (done := true()) and time.monotonic() < deadline:
        Event().wait(0.02)
    return done


class Trained(NamedTuple):
    """A finished training with a tracker."""

    tracker: Tracker
    monitor: Monitor
    run: Any
    records: list[AnyRecord]
    held: TrackerContents
    """What the tracker contains at the end."""
    ended: bool
    """True if the run had ended after `close()`."""

    def expected(self) -> dict[str, Series]:
        """The numbers of the journal, in the precision of this tracker."""
        return {
            key: [(step, float(self.tracker.precision(value))) for step, value in values]
            for key, values in numbers_in(self.records).items()
        }


# --- two models in one run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_second_model_in_the_same_run_needs_another_name(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    tracker = TRACKERS[name]()
    tracker.set_up(tmp_path, monkeypatch)
    run = tracker.start()
    one, two = Training(), Training()
    options = {"backend": tracker.backend, "run": run}
    first = one.watch(tmp_path, **options)

    def files() -> set[Path]:
        return {*(tmp_path / "gwa").rglob("*"), *(tmp_path / "runs").rglob("*")}

    before = files()
    with pytest.raises(
        InvalidInputError, match=f"backend='{tracker.backend}': the monitor of another model.*name='gwa2'"
    ):
        two.watch(tmp_path, **options)
    assert files() == before
    second = two.watch(tmp_path, name="gwa2", **options)
    first = one.watch(tmp_path, **options)  # the same model: its monitor is replaced
    first.close()
    second.close()
    two.watch(tmp_path, **options).close()
    tracker.end(run)


# --- a run that `watch` starts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A training with each tracker, in a run that `watch` starts."""
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            done[name] = _train_alone(TRACKERS[name](), tmp_path_factory.mktemp("alone"))
        return done[name]

    return train


def _train_alone(tracker: Tracker, folder: Path) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        tracker.set_up(folder, patch)
        training = Training()
        monitor = training.watch(folder, backend=tracker.backend, early_stop=ALERT_AT_ONCE)
        run = run_of(monitor, tracker.backend)
        for _ in range(EPOCHS):
            training.epoch(monitor)
        monitor.close()
        ended = tracker.ended(run)
        return Trained(tracker, monitor, run, read_journal(monitor.journal)[0], tracker.read(run), ended)


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_every_number_arrives_once_in_order_and_at_its_step(alone, name: str) -> None:
    trained = alone(name)
    expected = trained.expected()
    assert set(expected) == {*INTERVAL_KEYS, *EPOCH_KEYS}
    assert len(expected["gwa"]) == EPOCHS
    assert len(expected["steps/q50"]) > EPOCHS * (BATCHES // 3)
    assert {key: trained.held.numbers.get(key) for key in expected} == expected
    assert trained.monitor.faults == {}


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_consensus_and_agreement_arrive_from_the_second_epoch_on(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    tracker = TRACKERS[name]()
    tracker.set_up(tmp_path, monkeypatch)
    training = Training()
    rule, look = EarlyStop(statistic="agreement"), training.batches[0][0]
    monitor = training.watch(tmp_path, backend=tracker.backend, look=look, early_stop=rule, num_samples=BATCH * BATCHES)
    run = run_of(monitor, tracker.backend)
    for _ in range(3):
        for index in range(BATCHES):
            monitor.tag(torch.arange(BATCH) + index * BATCH)
            training.step(index)
        monitor.end_epoch()
    monitor.close()
    numbers = tracker.read(run).numbers
    for key in ("consensus", "agreement"):
        expected = [(r.epoch, float(tracker.precision(getattr(r, key)))) for r in monitor.history[1:]]
        assert numbers[key] == expected
    assert monitor.faults == {}


@pytest.mark.parametrize("name", WITH_HISTOGRAMS)
def test_every_histogram_contains_all_samples_of_its_interval(alone, name: str) -> None:
    trained = alone(name)
    assert trained.held.totals == totals_in(trained.records)
    assert sum(total for _, total in trained.held.totals) == EPOCHS * BATCHES * BATCH


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_there_is_one_alert_with_the_message_of_the_monitor(alone, name: str) -> None:
    trained = alone(name)
    (text,) = trained.held.alerts
    assert isinstance(trained.monitor.alert, StopAlert)
    assert trained.monitor.alert.message in text


@pytest.mark.parametrize("name", of(*WITH_RUNS_THAT_END))
def test_a_run_that_watch_started_is_ended_by_close(alone, name: str) -> None:
    assert alone(name).ended


# --- the user's run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A training with each tracker in the user's run; the user logs before, during and after it."""
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            done[name] = _train_in_users_run(TRACKERS[name](), tmp_path_factory.mktemp("visit"))
        return done[name]

    return train


def _train_in_users_run(tracker: Tracker, folder: Path) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        tracker.set_up(folder, patch)
        run, training = tracker.start(), Training()
        tracker.log(run, 0.5)
        monitor = training.watch(folder, backend=tracker.backend, run=run)
        for _ in range(EPOCHS):
            training.epoch(monitor, each_step=lambda index: index % 3 or tracker.log(run, 0.5))
            monitor.flush()  # what a slow writer has not delivered before the user's last row would get rows of its own
            tracker.log(run, 0.25)
        monitor.close()
        ended = tracker.ended(run)
        tracker.log(run, 0.125)
        tracker.end(run)
        return Trained(tracker, monitor, run, read_journal(monitor.journal)[0], tracker.read(run), ended)


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_the_users_rows_keep_their_steps_and_values(visits, name: str) -> None:
    values = [0.5, *[*[0.5] * len(range(0, BATCHES, 3)), 0.25] * EPOCHS, 0.125]
    assert visits(name).held.users == list(enumerate(values))


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_close_does_not_end_the_users_run(visits, name: str) -> None:
    assert not visits(name).ended


@pytest.mark.parametrize("name", of(*TRACKERS))
def test_every_epoch_arrives_in_the_users_run(visits, name: str) -> None:
    trained = visits(name)
    expected = {key: values for key, values in trained.expected().items() if key in EPOCH_KEYS}
    assert {key: trained.held.numbers.get(key) for key in expected} == expected
    assert trained.monitor.faults == {}


@pytest.mark.parametrize("name", of(*WITH_ROWS_OF_ANY_STEP))
def test_every_interval_arrives_in_the_users_run(visits, name: str) -> None:
    trained = visits(name)
    expected = {key: values for key, values in trained.expected().items() if key in INTERVAL_KEYS}
    assert {key: trained.held.numbers.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", WITH_HISTOGRAMS)
def test_no_sample_is_missing_in_the_users_run(visits, name: str) -> None:
    assert sum(total for _, total in visits(name).held.totals) == EPOCHS * BATCHES * BATCH


# --- flush, and a run that several backends share ---------------------------------------------------------------------


@pytest.mark.parametrize("name", of(*WITH_ROWS_OF_ANY_STEP, "W&B online"))
def test_after_flush_everything_so_far_is_in_the_tracker(name: str, tmp_path: Path, monkeypatch) -> None:
    """Trackio and W&B store their queues a moment later. Offline, W&B stores at the end of the run."""
    tracker, training = TRACKERS[name](), Training()
    tracker.set_up(tmp_path, monkeypatch)
    monitor = training.watch(tmp_path, backend=tracker.backend)
    run = run_of(monitor, tracker.backend)
    training.epoch(monitor)
    assert monitor.flush(30)
    expected = numbers_in(read_journal(monitor.journal)[0])
    assert expected.keys() == {*INTERVAL_KEYS, *EPOCH_KEYS}

    def steps_held() -> dict[str, list[int]]:
        try:
            numbers = tracker.read(run).numbers
        except ValueError:  # Trackio has not created the project yet
            numbers = {}
        return {key: [step for step, _ in numbers.get(key, [])] for key in expected}

    wanted = {key: [step for step, _ in values] for key, values in expected.items()}
    assert until(lambda: steps_held() == wanted) if name in ("Trackio", "W&B online") else steps_held() == wanted
    monitor.close()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_second_backend_can_share_the_run_of_the_first_and_does_not_end_it(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    tracker = TRACKERS[name]()
    tracker.set_up(tmp_path, monkeypatch)
    first = open_backend(tracker.backend, RunContext("gwa", None, tmp_path))
    second = open_backend(tracker.backend, RunContext("gwa/other.head", first.run, tmp_path / "other"))
    assert second.run == first.run
    second.close()
    assert name == "TensorBoard" or not tracker.ended(first.run)
    first.close()
    assert name == "TensorBoard" or tracker.ended(first.run)


# --- several backends at once -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One training with all trackers at once."""
    folder, training = tmp_path_factory.mktemp("together"), Training()
    trackers = {name: TRACKERS[name]() for name in ONE_OF_EACH}
    with pytest.MonkeyPatch.context() as patch:
        for tracker in trackers.values():
            tracker.set_up(folder, patch)
        monitor = training.watch(folder, backend=[tracker.backend for tracker in trackers.values()])
        runs = {name: run_of(monitor, tracker.backend) for name, tracker in trackers.items()}
        for _ in range(EPOCHS):
            training.epoch(monitor)
        monitor.close()
        records, _ = read_journal(monitor.journal)
        return {
            name: Trained(tracker, monitor, runs[name], records, tracker.read(runs[name]), ended=True)
            for name, tracker in trackers.items()
        }


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_each_of_several_backends_receives_all_numbers(together, name: str) -> None:
    trained = together[name]
    expected = trained.expected()
    assert {key: trained.held.numbers.get(key) for key in expected} == expected
    assert name not in WITH_HISTOGRAMS or trained.held.totals == totals_in(trained.records)
    assert trained.monitor.faults == {}


# --- the example of the page ------------------------------------------------------------------------------------------


PAGE = (Path(__file__).parents[1] / "docs" / "backends.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(GROUP,) = re.findall(r'entry-points\."([^"]+)"', PAGE)


def in_csv(file: Path, prefix: str) -> dict[str, Series]:
    found: dict[str, Series] = {}
    with file.open(newline="") as lines:
        for key, step, value in csv.reader(lines):
            found.setdefault(key.removeprefix(f"{prefix}/"), []).append((int(step), float(value)))
    return found


def test_the_example_of_the_page_is_short() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 40


def test_the_example_of_the_page_receives_all_numbers_as_an_object(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    tracker, training = names["CsvTracker"](tmp_path / "scores.csv"), Training(lr=0.0)
    monitor = training.watch(tmp_path, backend=tracker, early_stop=ALERT_AT_ONCE)
    for _ in range(2):
        training.epoch(monitor)
    monitor.close()
    records, _ = read_journal(monitor.journal)
    found = in_csv(tmp_path / "scores.csv", "gwa")
    assert [found.pop(key)[0][0] for key in monitor.alert.metrics] == 3 * [monitor.alert.epoch]
    assert found == numbers_in(records)
    assert all(tracker.contents().has(r) for r in records if isinstance(r, IntervalRecord | EpochReport | StopAlert))


@pytest.mark.parametrize("run", [None, "named.csv"])
def test_the_example_of_the_page_can_be_installed_and_named(tmp_path: Path, monkeypatch, run: str | None) -> None:
    site = tmp_path / "site"
    (site / "csv_backend-1.0.dist-info").mkdir(parents=True)
    (site / "csv_backend-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: csv-backend\nVersion: 1.0\n"
    )
    (site / "csv_backend-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\ncsv = gwa_csv_backend\n")
    (site / "gwa_csv_backend.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(sys.modules, "gwa_csv_backend", None)  # so that the module is removed after the test
    del sys.modules["gwa_csv_backend"]
    training = Training()
    monitor = training.watch(tmp_path, backend=["local", "csv"], name="mine", run=run and {"csv": str(tmp_path / run)})
    training.epoch(monitor)
    monitor.close()
    file = tmp_path / run if run else monitor.journal.parent / "scores.csv"
    assert in_csv(file, "mine") == numbers_in(read_journal(monitor.journal)[0])
    with pytest.raises(InvalidInputError, match=r"'local', 'wandb', .*'csv'"):
        training.watch(tmp_path, backend="nonsense")


def test_the_page_shows_every_backend() -> None:
    (names,) = re.findall(r"\| `backend=` \|(.*)\|", PAGE)
    assert set(re.findall(r'"(\w+)"', names)) == set(BACKENDS)
