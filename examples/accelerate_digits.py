"""Trains an MLP in an Accelerate loop on scikit-learn's digits, with a share of the training labels flipped.

python examples/accelerate_digits.py --noise 0.3
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import arguments, load, summary
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gwa_logging import EarlyStop
from gwa_logging.integrations.accelerate import watch


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    set_seed(args.seed)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    loader = DataLoader(TensorDataset(x, y, torch.arange(len(y))), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3), loader)
    monitor = watch(
        accelerator,
        model,
        backend=args.backend.split(","),  # by default: the accelerator's trackers
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(y),
    )
    accuracies = []
    with monitor:
        for _ in monitor.epochs(args.epochs):
            for x, y, ids in loader:
                monitor.tag(ids)
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                predicted = model(torch.from_numpy(data.x_test)).argmax(1)
            accuracies.append(float((predicted.numpy() == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
