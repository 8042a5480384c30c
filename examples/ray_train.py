"""Trains an MLP with Ray Train in two workers on scikit-learn's digits, with a share of the training labels flipped.

python examples/ray_train.py --noise 0.3 --stop

The journal and the checkpoints go to ray_results/digits. If the program is killed, run it again: it continues from the last
checkpoint. Delete the folder to start from zero.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import torch
from digits import Digits, arguments, load
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gwa_logging import EarlyStop
from gwa_logging.integrations.ray import metrics, save_state, watch


def train_loop_per_worker(config: dict[str, Any]) -> None:
    data: Digits = config["data"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(config["seed"])
    model = prepare_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    bare_model = getattr(model, "module", model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dataset = TensorDataset(torch.from_numpy(data.x), torch.from_numpy(data.y), torch.arange(len(data.y)))
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, seed=config["seed"])
    loader = DataLoader(dataset, batch_size=64 // world, sampler=sampler)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "model.pt"), weights_only=True)
        bare_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    rule = EarlyStop(action="stop" if config["stop"] else "alert")
    with watch(
        model, backend=config["backend"], early_stop=rule, log_every_n_steps=5, num_samples=len(data.y)
    ) as monitor:
        for epoch in monitor.epochs(config["epochs"]):
            sampler.set_epoch(epoch)
            for x, y, ids in loader:
                monitor.tag(ids)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            monitor.end_epoch()
            with torch.no_grad():
                predicted = bare_model(torch.from_numpy(data.x_test)).argmax(1)
            accuracy = float((predicted.numpy() == data.y_test).mean())
            with TemporaryDirectory() as folder:
                save_state(monitor, folder)
                if rank == 0:
                    states = {"model": bare_model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(states, Path(folder, "model.pt"))
                ray.train.report(
                    {"accuracy": accuracy, **metrics(monitor)},
                    checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None,
                )


def main() -> None:
    args = arguments(__doc__ or "")
    ray.init(num_cpus=2, include_dashboard=False)
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "data": load(args.noise, args.seed),
            "backend": args.backend.split(","),
            **{name: getattr(args, name) for name in ("epochs", "seed", "stop")},
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="digits",
            storage_path=str(Path("ray_results").absolute()),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    result = trainer.fit()
    print(f"Last epoch: {result.metrics}")
    print(f"Journals:   {Path(result.path, 'gwa_runs')}")


if __name__ == "__main__":
    main()
