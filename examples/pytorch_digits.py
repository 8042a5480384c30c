"""Trains a CNN in PyTorch on scikit-learn's digits, with a share of the training labels flipped.

python examples/pytorch_digits.py --backend mlflow --noise 0.3
"""

import numpy as np
import torch
from digits import arguments, batches, load, summary
from torch import nn

import gwa_logging


class CNN(nn.Module):
    """Two convolutions and a classifier head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    x, y = torch.from_numpy(data.x)[:, None], torch.from_numpy(data.y)
    x_test, y_test = torch.from_numpy(data.x_test)[:, None], torch.from_numpy(data.y_test)
    model = CNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    accuracies = []

    monitor = gwa_logging.watch(
        model,
        backend=args.backend.split(","),
        early_stop=gwa_logging.EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        labels=y,
    )
    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(y), 64, rng):
                monitor.tag(torch.from_numpy(batch))
                criterion(model(x[batch]), y[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                accuracies.append((model(x_test).argmax(1) == y_test).double().mean().item())
        monitor.log_suspects(images=data.x)  # with their pictures
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
