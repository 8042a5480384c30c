"""The callback for Ultralytics: the results of its training loop written out, and its own stopping, resuming and trackers."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError
from tests.trainers.tasks import EPOCHS, assert_closed, assert_equal, weights

cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
os.environ |= {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "YOLO_CONFIG_DIR": tempfile.mkdtemp(),  # not the user's settings
}
from tests.trainers.torchvision_operators import define_operators  # noqa: E402

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
define_operators()
from ultralytics import YOLO  # noqa: E402
from ultralytics.models.yolo.classify import ClassificationTrainer  # noqa: E402
from ultralytics.utils import SETTINGS  # noqa: E402

from gwa_logging.integrations.ultralytics import GWACallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLASSES, PER_CLASS, BATCH = 3, 8, 6
SAMPLES = CLASSES * PER_CLASS
MODEL = """
nc: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


@pytest.fixture(autouse=True)
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the current folder hold a model and images; Ultralytics writes its runs there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OPTIONS, "project", str(tmp_path / "runs"))
    monkeypatch.setitem(SETTINGS, "mlflow", False)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(PER_CLASS):
                image = rng.integers(0, 256, (32, 32, 3)) // (1 + label * (index % 4 > 0))
                cv2.imwrite(str(folder / f"{index}.png"), image.astype(np.uint8))
    Path("tiny-cls.yaml").write_text(MODEL)


OPTIONS = {
    "data": "images",
    "epochs": EPOCHS,
    "imgsz": 32,
    "batch": BATCH,
    "nbs": BATCH,  # a step per batch
    "device": "cpu",
    "workers": 0,
    "plots": False,
    "optimizer": "SGD",
    "lr0": 0.02,
    "amp": False,
    "verbose": False,
}


def train(callback: Any = None, **options: Any) -> YOLO:
    model = YOLO("tiny-cls.yaml", task="classify")
    if callback is not None:
        callback.add_to(model)
    model.train(**OPTIONS | options)
    return model


class PlainLoop(ClassificationTrainer):
    """Ultralytics's model, data and optimizer in the plain loop of PyTorch's quickstart."""

    monitor: Any = None

    def _do_train(self) -> None:
        self._setup_train()
        self.final = self.model
        self.accumulate = 1
        steps = len(self.train_loader)
        warmup = self._get_warmup_iterations(steps)
        with gwa_logging.watch(self.model, head="model.2.linear") as monitor:
            type(self).monitor = monitor
            for epoch in range(self.epochs):
                self.epoch = epoch
                self.scheduler.step()
                self._model_train()
                for index, batch in enumerate(self.train_loader):
                    step = index + steps * epoch
                    if warmup and step <= warmup:
                        for group in self.optimizer.param_groups:
                            start = self.args.warmup_bias_lr if group.get("param_group") == "bias" else 0.0
                            ends = [start, group["initial_lr"] * self.lf(epoch)]
                            group["lr"] = float(np.interp(step, [0, warmup], ends))
                            ends = [self.args.warmup_momentum, self.args.momentum]
                            group["momentum"] = float(np.interp(step, [0, warmup], ends))
                    loss, _ = self.model(self.preprocess_batch(batch))
                    loss.sum().backward()
                    self.optimizer_step()
                monitor.end_epoch()


def plain(**options: Any) -> Any:
    trainer = PlainLoop(overrides=OPTIONS | {"model": "tiny-cls.yaml", "task": "classify"} | options)
    trainer.train()
    return PlainLoop.monitor, weights(trainer.final)


class Ends:
    """Remembers the weights of the trainer's model at the end, since Ultralytics then loads the best ones."""

    def __call__(self, trainer: Any) -> None:
        self.weights = weights(trainer.model).clone()


def test_statistics_and_weights_equal_those_of_the_plain_loop():
    expected, end = plain()
    callback, found = GWACallback(), Ends()
    model = YOLO("tiny-cls.yaml", task="classify")
    callback.add_to(model)
    model.add_callback("on_train_end", found)
    model.train(**OPTIONS)
    assert_equal(callback.monitor.history, expected.history)
    assert torch.equal(found.weights, end)
    assert [report.count for report in callback.monitor.history] == [SAMPLES] * EPOCHS
    assert callback.monitor.faults == {}
    assert_closed(callback.monitor)
    assert not Path(model.trainer.save_dir, "gwa_logging.json").exists()
    assert "preprocess_batch" not in vars(model.trainer)
    model.predict(np.zeros((32, 32, 3), np.uint8))


def test_the_ledger_has_the_ids_of_ultralyticss_training_set():
    callback = GWACallback(num_samples=SAMPLES)
    model = train(callback)
    suspects = callback.monitor.suspects(SAMPLES)
    assert {suspect.times_seen for suspect in suspects} == {EPOCHS}
    assert sorted(suspect.id for suspect in suspects) == list(range(SAMPLES))
    labels = [sample[1] for sample in model.trainer.train_loader.dataset.samples]
    assert [labels[index] for index in range(SAMPLES)] == [i // PER_CLASS for i in range(SAMPLES)]


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


def test_the_alert_ends_training_only_with_action_stop():
    alerted, stopped = (
        GWACallback(early_stop=EarlyStop(**RULE)),
        GWACallback(early_stop=EarlyStop(action="stop", **RULE)),
    )
    train(alerted)
    model = train(stopped)
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == alerted.monitor.alert.epoch + 1 < EPOCHS
    assert model.trainer.epoch == alerted.monitor.alert.epoch
    window = GWACallback(early_stop=EarlyStop(action="stop", **RULE), samples_per_epoch=BATCH, log_every_n_steps=1)
    assert train(window).trainer.epoch == 0


def test_a_resumed_training_continues_with_the_epochs_of_the_killed_one():
    class Killed(BaseException):
        pass

    def kill(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise Killed

    callback = GWACallback(num_samples=SAMPLES)
    model = YOLO("tiny-cls.yaml", task="classify")
    callback.add_to(model)
    model.add_callback("on_train_epoch_start", kill)
    with pytest.raises(Killed):
        model.train(**OPTIONS)
    assert len(callback.monitor.history) == 2
    assert_closed(callback.monitor)
    last = model.trainer.last

    resumed = GWACallback(num_samples=SAMPLES)
    model = YOLO(last)
    resumed.add_to(model)
    model.train(resume=True, device="cpu")
    assert [report.epoch for report in resumed.monitor.history] == list(range(EPOCHS))
    assert_equal(resumed.monitor.history[:2], callback.monitor.history)
    assert {suspect.times_seen for suspect in resumed.monitor.suspects(SAMPLES)} == {EPOCHS}


TRACKED = """
import os
from tests.trainers.torchvision_operators import define_operators
define_operators()
from ultralytics import YOLO
from ultralytics.utils import SETTINGS
from gwa_logging.integrations.ultralytics import GWACallback
from gwa_logging.journal import read_journal
SETTINGS.update({"wandb": True, "tensorboard": True, "mlflow": True})
callback, seen = GWACallback(), {}
model = YOLO("tiny-cls.yaml", task="classify")
callback.add_to(model)
def look(trainer):
    import mlflow, wandb
    seen.update(wandb=wandb.run.path, mlflow=mlflow.active_run().info.run_id, tensorboard=str(trainer.save_dir))
model.add_callback("on_train_start", look)
model.train(**OPTIONS)
places = read_journal(callback.monitor.journal)[0][0].places
assert {name: place.run for name, place in places.items()} == seen, (places, seen)
assert callback.monitor.faults == {}, callback.monitor.faults
import mlflow
metrics = mlflow.MlflowClient().get_run(seen["mlflow"]).data.metrics
assert metrics["gwa/stats/mean"] == callback.monitor.history[-1].mean, metrics
assert "val/loss" in metrics, metrics
"""


def test_results_go_to_the_trackers_that_ultralyticss_settings_turn_on(mlflow_uri):
    """In a process without pytest, where Ultralytics turns its trackers off."""
    environment = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": mlflow_uri()}
    environment.pop("PYTEST_CURRENT_TEST", None)
    environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    program = f"OPTIONS = {OPTIONS!r}\n{TRACKED}"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)
    with pytest.raises(InvalidInputError, match="look=: not possible with Ultralytics"):
        GWACallback(look=torch.zeros(1, 3, 32, 32))
    with pytest.raises(InvalidInputError, match=r"expected an ultralytics\.YOLO or a trainer, found str"):
        GWACallback().add_to("yolo11n-cls.pt")
    with pytest.raises(InvalidInputError, match=f"num_samples=7: Ultralytics's training set has {SAMPLES} images"):
        train(GWACallback(num_samples=7))


def test_two_callbacks_in_one_trainer_are_refused():
    model = YOLO("tiny-cls.yaml", task="classify")
    GWACallback().add_to(model)
    GWACallback().add_to(model)
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        model.train(**OPTIONS)


def test_a_callback_travels_to_the_processes_that_ultralytics_starts():
    """It pickles the callbacks; without GPUs it starts none."""
    callback = pickle.loads(pickle.dumps(GWACallback(num_samples=SAMPLES).on_train_start)).__self__
    train(callback)
    assert len(callback.monitor.history) == EPOCHS


def test_importing_the_callback_does_not_import_ultralytics():
    code = "import sys, gwa_logging.integrations.ultralytics; sys.exit('ultralytics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
