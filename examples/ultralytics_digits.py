"""Trains a small YOLO classification model on scikit-learn's digits, with a share of the training labels flipped.

python examples/ultralytics_digits.py --backend mlflow --noise 0.3

Ultralytics is licensed under AGPL-3.0.
"""

from pathlib import Path
from typing import Any

import numpy as np
from digits import arguments, load, summary
from PIL import Image
from ultralytics import YOLO

from gwa_logging import EarlyStop
from gwa_logging.integrations.ultralytics import GWACallback

MODEL = """
nc: 10
backbone:
  - [-1, 1, Conv, [32, 3, 1]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes float32 [N, 8, 8] in [0, 1] as files, in a folder for each class."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).astype(np.uint8)).resize((32, 32)).convert("RGB").save(path)


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    folder = Path("digits").absolute()
    write(folder / "train", data.x, data.y)
    write(folder / "val", data.x_test, data.y_test)
    Path("digits-cls.yaml").write_text(MODEL)

    callback = GWACallback(
        backend=args.backend.split(","),  # without it: the trackers in Ultralytics's settings
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(data.y),
    )
    accuracies: dict[int, float] = {}

    def remember(trainer: Any) -> None:
        accuracies.setdefault(trainer.epoch, trainer.metrics["metrics/accuracy_top1"])

    model = YOLO("digits-cls.yaml", task="classify")
    callback.add_to(model)
    model.add_callback("on_fit_epoch_end", remember)
    plain = {
        "auto_augment": None,
        "erasing": 0.0,
        "fliplr": 0.0,
        "scale": 0.0,
        "hsv_h": 0.0,
        "hsv_s": 0.0,
        "hsv_v": 0.0,
    }
    options = {"imgsz": 32, "batch": 64, "device": "cpu", "plots": False, "project": str(Path("runs").absolute())}
    model.train(data=str(folder), epochs=args.epochs, seed=args.seed, **options, **plain)

    files = [Path(sample[0]) for sample in model.trainer.train_loader.dataset.samples]  # an id is an index in this list
    flipped = data.flipped[[int(file.stem) for file in files]]
    summary(callback.monitor, list(accuracies.values()), flipped)


if __name__ == "__main__":
    main()
