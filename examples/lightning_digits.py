"""Trains an MLP in Lightning on scikit-learn's digits, with a share of the training labels flipped.

python examples/lightning_digits.py --backend mlflow --noise 0.3
"""

import lightning
import torch
from digits import arguments, load, summary
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gwa_logging import EarlyStop
from gwa_logging.integrations.lightning import GWACallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.accuracies: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y, _ = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracies.append((self.model(x).argmax(1) == y).double().mean().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    lightning.seed_everything(args.seed)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    train = DataLoader(TensorDataset(x, y, torch.arange(len(y))), batch_size=64, shuffle=True)
    test = TensorDataset(torch.from_numpy(data.x_test), torch.from_numpy(data.y_test))

    callback = GWACallback(
        backend=args.backend.split(","),  # without it: the trainer's own loggers
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(y),
        sample_ids=2,  # where the ids are in a batch
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=args.epochs, callbacks=[callback], **quiet)
    module = Digits()
    trainer.fit(module, train, DataLoader(test, batch_size=len(test)))
    summary(callback.monitor, module.accuracies, data.flipped)


if __name__ == "__main__":
    main()
