"""Trains an MLP with fastai on scikit-learn's digits, with a share of the training labels flipped.

python examples/fastai_digits.py --backend mlflow --noise 0.3
"""

import torch
from digits import arguments, load, summary
from fastai.basics import Callback, DataLoader, DataLoaders, Learner
from torch import nn
from torch.utils.data import TensorDataset

from gwa_logging import EarlyStop, with_ids
from gwa_logging.integrations.fastai import GWACallback


class Accuracies(Callback):
    """Measures the accuracy on the test set after each epoch."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.values: list[float] = []

    def after_epoch(self) -> None:
        with torch.no_grad():
            self.values.append((self.model(self.x).argmax(1) == self.y).double().mean().item())


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    torch.manual_seed(args.seed)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    x_test, y_test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
    train = DataLoader(with_ids(TensorDataset(x, y)), bs=64, shuffle=True, device="cpu")
    test = DataLoader(TensorDataset(x_test, y_test), bs=len(y_test), device="cpu")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    callback = GWACallback(
        backend=args.backend.split(","),  # without it: the run of WandbCallback
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(y),
        sample_ids=2,  # where the ids are in a batch
    )
    accuracies = Accuracies(x_test, y_test)
    loaders = DataLoaders(train, test, device="cpu")
    Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), cbs=[callback, accuracies]).fit(args.epochs)
    summary(callback.monitor, accuracies.values, data.flipped)


if __name__ == "__main__":
    main()
