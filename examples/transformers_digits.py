"""Trains a small vision transformer with transformers' Trainer on scikit-learn's digits, with a share of the labels flipped.

python examples/transformers_digits.py --backend mlflow --noise 0.3
"""

import numpy as np
import torch
from digits import arguments, load, summary
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from gwa_logging import EarlyStop
from gwa_logging.integrations.transformers import GWACallback


def rows(x: np.ndarray, y: np.ndarray, **more: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """The data set, one dict per sample."""
    columns = {"pixel_values": x[:, None], "labels": y, **more}
    return [{name: torch.as_tensor(column[i]) for name, column in columns.items()} for i in range(len(y))]


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    set_seed(args.seed)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "intermediate_size": 128}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 4, "initializer_range": 0.1}
    model = ViTForImageClassification(ViTConfig(**sizes, **depth, num_labels=10))

    callback = GWACallback(
        backend=args.backend.split(","),  # by default: the trackers that the trainer reports to
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(data.y),
        sample_ids="id",  # the column with the ids, which the trainer keeps
    )
    training = TrainingArguments(
        "transformers_output",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=len(data.y_test),
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=rows(data.x, data.y, id=np.arange(len(data.y))),
        eval_dataset=rows(data.x_test, data.y_test),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()
    accuracies = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    summary(callback.monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
