"""Trains an MLP with an Ignite Engine on scikit-learn's digits, with a share of the training labels flipped.

python examples/ignite_digits.py --backend mlflow --noise 0.3
"""

from typing import Any

import torch
from digits import arguments, load, summary
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gwa_logging import EarlyStop
from gwa_logging.integrations.ignite import GWAHandler


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    torch.manual_seed(args.seed)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    x_test, y_test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
    loader = DataLoader(TensorDataset(x, y, torch.arange(len(y))), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(engine: Engine, batch: Any) -> float:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    trainer = Engine(step)
    handler = GWAHandler(
        model,
        backend=args.backend.split(","),
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(y),
        sample_ids=2,  # where the ids are in a batch
    )
    handler.attach(trainer)
    accuracies = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Engine) -> None:
        print(handler.monitor.history[-1])
        with torch.no_grad():
            accuracies.append((model(x_test).argmax(1) == y_test).double().mean().item())

    trainer.run(loader, max_epochs=args.epochs)
    summary(handler.monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
