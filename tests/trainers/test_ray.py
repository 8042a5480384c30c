"""Ray Train and Ray Tune, with two workers: the results of the plain loop, restarts, storage and stopping.

Ray runs here for real, on this machine. A run takes some ten seconds, most of it to start processes and to import torch.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gwa_logging import EpochReport, InvalidInputError
from gwa_logging.cli import main
from gwa_logging.journal import read_journal
from gwa_logging.records import EPOCH_KEYS, IntervalRecord
from tests.pages import DOCS, ROOT, python_blocks
from tests.trainers.tasks import BATCH, EPOCHS, SAMPLES, assert_equal, net, plain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("ray") is None, reason="needs ray[train]; it is not imported while tests are collected"
    ),
]

STEPS = SAMPLES // BATCH


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[dict[str, str]]:
    """The environment of a process that runs Ray: no network, no usage statistics, own temporary folder."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it contains sockets
    yield {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,
        "RAY_memory_monitor_refresh_ms": "0",  # other tests may fill the memory
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # seconds until a killed worker is noticed
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_environment: dict[str, str]) -> Iterator[None]:
    """Ray with two CPUs."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_environment.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="WARNING")
        yield
        ray.shutdown()


def run(loop: Any, folder: Path, workers: int = 2, failures: int = 0, filesystem: Any = None, **config: Any) -> Any:
    """Trains with Ray Train. Its storage is the folder, its name "run". Returns Ray's result."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        loop,
        train_loop_config={"folder": str(folder), **config},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder) if filesystem is None else "storage",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=failures),
        ),
    )
    return trainer.fit()


def noted(folder: Path, rank: int) -> dict[str, Any]:
    found = json.loads((folder / f"rank {rank}.json").read_text())
    return found | {"history": [EpochReport.model_validate(report) for report in found["history"]]}


def journals(folder: Path) -> list[Path]:
    """The journals of a run, in the order in which they were begun."""
    return sorted((folder / "run" / "gwa_runs").glob("*/journal.jsonl"), key=lambda path: path.parent.name)


def intervals(folder: Path) -> list[IntervalRecord]:
    """The intervals of all journals in order of their steps; of those that were repeated after a restart, the last."""
    last = {}
    for journal in journals(folder):
        own = [record for record in read_journal(journal)[0] if isinstance(record, IntervalRecord)]
        steps = [record.step for record in own]
        assert steps == sorted(set(steps)), "no journal has an interval twice"
        last |= {record.step: record for record in own}
    return [last[step] for step in sorted(last)]


@pytest.mark.usefixtures("cluster")
def test_two_workers_report_the_same_as_the_plain_loop(tmp_path):
    from tests.trainers.ray_loops import train

    result = run(train, tmp_path, watch={"num_samples": SAMPLES})
    expected = plain(net())[0]
    for rank in (0, 1):
        assert_equal(noted(tmp_path, rank)["history"], expected)
        assert noted(tmp_path, rank)["faults"] == {}
    assert len(journals(tmp_path)) == 1
    assert [record.step for record in intervals(tmp_path)] == list(range(EPOCHS * STEPS))
    assert result.metrics["gwa/separation"] == pytest.approx(expected[-1].separation, abs=1e-6)
    assert result.metrics["gwa/stop"] == 0
    assert result.metrics["loss"] == 1


@pytest.mark.usefixtures("cluster")
def test_after_workers_were_killed_at_random_moments_each_interval_is_there_once(tmp_path, mlflow_uri, capsys):
    from mlflow import MlflowClient

    from tests.trainers.ray_loops import EPOCHS_OF_KILLS, train

    uri = mlflow_uri()
    client = MlflowClient(uri)
    tracked = client.create_run("0").info.run_id
    kills = int(os.environ.get("GWA_TEST_KILLS", "2"))
    arguments = {"backend": "mlflow", "run": tracked}
    run(
        train,
        tmp_path,
        failures=kills,
        kills=kills,
        epochs=EPOCHS_OF_KILLS,
        environment={"MLFLOW_TRACKING_URI": uri},
        watch=arguments,
    )
    expected = plain(net(), EPOCHS_OF_KILLS)[0]
    for rank in (0, 1):
        assert_equal(noted(tmp_path, rank)["history"], expected)
    assert len(list(tmp_path.glob("attempt * 0"))) == kills + 1
    found = intervals(tmp_path)
    assert [record.step for record in found] == list(range(EPOCHS_OF_KILLS * STEPS))
    assert [record.count + record.excluded for record in found] == [BATCH // 2] * len(found)  # those of rank 0
    assert main(["replay", str(tmp_path / "run" / "gwa_runs"), "--backend", "mlflow"]) == 0, capsys.readouterr()
    points = client.get_metric_history(tracked, "gwa/steps/mean")
    assert sorted(point.step for point in points) == list(range(EPOCHS_OF_KILLS * STEPS))
    # A worker that survives the others for a moment may report its part of the epoch in progress.
    for key in EPOCH_KEYS:
        points = client.get_metric_history(tracked, f"gwa/{key}")
        assert sorted({point.step for point in points}) == list(range(EPOCHS_OF_KILLS)), key


@pytest.mark.usefixtures("cluster")
def test_a_failed_run_continues_in_a_new_job_with_another_number_of_workers(tmp_path):
    from ray.train import WorkerGroupError

    from tests.trainers.ray_loops import train

    arguments = {"watch": {"num_samples": SAMPLES}, "fails_after": 1}
    with pytest.raises(WorkerGroupError, match="as planned"):
        run(train, tmp_path, **arguments)
    run(train, tmp_path, workers=1, **arguments)
    assert_equal(noted(tmp_path, 0)["history"], plain(net())[0])
    assert [record.step for record in intervals(tmp_path)] == list(range(EPOCHS * STEPS))
    assert sorted(noted(tmp_path, 0)["suspects"]) == list(range(SAMPLES))


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
@pytest.mark.usefixtures("cluster")
def test_a_trainers_callback_under_ray_resumes_after_a_kill_and_reports_its_metrics(trainer, tmp_path):
    from tests.trainers import ray_loops

    loop = {"lightning": ray_loops.train_in_lightning, "transformers": ray_loops.train_in_transformers}[trainer]
    result = run(loop, tmp_path, failures=1)
    expected = plain(net())[0]
    assert (tmp_path / "died").exists()
    for rank in (0, 1):
        assert_equal(noted(tmp_path, rank)["history"], expected)
        assert noted(tmp_path, rank)["faults"] == {}
    assert [record.step for record in intervals(tmp_path)] == list(range(EPOCHS * STEPS))
    assert result.metrics["gwa/separation"] == pytest.approx(expected[-1].separation, abs=1e-6)
    assert result.metrics["gwa/stop"] == 0


@pytest.mark.usefixtures("cluster")
def test_tune_stops_a_trial_at_the_alert_and_its_journal_is_in_the_trials_storage(tmp_path):
    from ray import tune

    from tests.trainers.ray_loops import trial

    config = tune.RunConfig(name="run", storage_path=str(tmp_path), stop={"gwa/stop": 1}, verbose=0)
    results = tune.Tuner(trial, param_space={"rate": tune.grid_search([0.1, 0.3])}, run_config=config).fit()
    assert len(results) == 2
    for result in results:
        assert result.error is None
        assert (result.metrics["epoch"], result.metrics["gwa/stop"]) == (1, 1)
        (journal,) = Path(result.path, "gwa_runs").glob("*/journal.jsonl")
        records, skipped = read_journal(journal)
        assert [record.epoch for record in records if record.kind == "epoch"] == [0, 1]
        assert skipped == 0


@pytest.mark.usefixtures("cluster")
def test_wrong_calls_in_a_worker_name_the_argument_and_the_remedy(tmp_path):
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    from tests.trainers.ray_loops import refusals

    run(refusals, tmp_path, workers=1, filesystem=SubTreeFileSystem(str(tmp_path), LocalFileSystem()))
    found = json.loads((tmp_path / "found.json").read_text())
    assert "directory: the run's storage is 'subtree'" in found["storage"]
    assert "Pass directory=" in found["storage"]
    assert found["metrics"] == {}
    assert "missing': not a folder; create it" in found["folder"]


def test_outside_a_worker_the_error_asks_for_a_directory():
    from gwa_logging.integrations.ray import storage_directory, watch

    with pytest.raises(InvalidInputError, match=r"directory: this process has no storage .*pass directory="):
        storage_directory()
    with pytest.raises(InvalidInputError, match="directory"):
        watch(net())


def test_outside_a_worker_a_model_can_be_watched_with_a_directory(tmp_path):
    from gwa_logging.integrations.ray import watch

    with watch(net(), directory=tmp_path) as monitor:
        assert monitor.history == []


def test_a_damaged_or_foreign_state_in_the_checkpoint_is_refused_before_training(tmp_path, monkeypatch):
    from ray.train import Checkpoint

    from gwa_logging.integrations import ray as ours

    class Api:
        @staticmethod
        def get_checkpoint() -> Checkpoint:
            return Checkpoint.from_directory(tmp_path)

    monkeypatch.setattr(ours, "_api", lambda: Api)
    for content, message in [
        ("{", "the state is damaged .*earlier checkpoint"),
        ('{"version": 5, "x": {"dtype": "f4", "shape": [9], "base64": "AAAA"}}', "the state is damaged"),
        ("[]", r"not a state_dict\(\) of a monitor"),
        ('{"version": 1}', "expected version"),
    ]:
        (tmp_path / ours.STATE_FILE).write_text(content)
        with pytest.raises(InvalidInputError, match=message):
            ours.watch(net(), directory=tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_checkpoint_without_the_state_starts_from_zero_with_a_warning(tmp_path, monkeypatch, caplog):
    from ray.train import Checkpoint

    from gwa_logging.integrations import ray as ours

    class Api:
        @staticmethod
        def get_checkpoint() -> Checkpoint:
            return Checkpoint.from_directory(tmp_path)

    monkeypatch.setattr(ours, "_api", lambda: Api)
    with ours.watch(net(), directory=tmp_path / "runs"):
        assert "GWA starts again from zero" in caplog.text


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gwa_logging.integrations.ray", raising=False)
    from gwa_logging import MissingDependencyError

    with pytest.raises(MissingDependencyError, match=r"pip install 'gwa-logging\[ray\]'"):
        __import__("gwa_logging.integrations.ray")


@pytest.mark.parametrize("source", ["page", "example"])
def test_the_code_of_the_page_and_the_example_run(source, tmp_path, ray_environment):
    if source == "page":
        program = ["-c", python_blocks(DOCS / "ray.md")[0]]
    else:
        program = [str(ROOT / "examples" / "ray_train.py"), "--epochs", "4"]
    done = subprocess.run(
        [sys.executable, *program],
        cwd=tmp_path,
        env={**os.environ, **ray_environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "gwa/separation" in done.stdout
    assert list(tmp_path.rglob("gwa_runs/*/journal.jsonl"))
