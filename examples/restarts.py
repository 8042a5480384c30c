"""A training that may be killed or preempted at any moment, and continues in the same journal and the same run of the tracker.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/restarts.py

torchrun restarts all workers if one of them dies. After SIGTERM, which a scheduler sends before it takes the machine away, the
workers save a checkpoint and end; start the same command again to continue. docs/restarts.md has a job script for SLURM.
"""

import argparse
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gwa_logging

SAMPLES, FEATURES, CLASSES, BATCH = 640, 16, 4, 16


def main(options: argparse.Namespace) -> None:
    """Trains from the last checkpoint, if there is one, to the end or until SIGTERM."""
    preempted = torch.zeros(1)
    signal.signal(signal.SIGTERM, lambda *_: preempted.fill_(1))  # torchrun passes it on to the workers
    distributed.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))  # or nccl
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, FEATURES), torch.randint(0, CLASSES, (SAMPLES,))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = gwa_logging.watch(model, backend=options.backend, directory=options.directory, log_every_n_steps=5)
    per_epoch = SAMPLES // (BATCH * ranks)
    first, last = 0, options.epochs * per_epoch
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        monitor.load_state_dict(saved["gwa"])
        first = saved["step"]
    for step in range(first, last):
        epoch, batch = divmod(step, per_epoch)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        ids = order[(batch * ranks + rank) * BATCH :][:BATCH]
        nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch == per_epoch - 1:
            monitor.end_epoch()
        if (step + 1) % options.save_every == 0:
            distributed.all_reduce(preempted)  # the signal may reach the workers in different steps
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["gwa"] = monitor.state_dict()  # on every rank
            if rank == 0:
                save(state, options.checkpoint)
            if preempted:
                monitor.close(resumable=True)
                break
    else:
        monitor.close()
        if rank == 0:
            options.checkpoint.with_name("finished").touch()
    distributed.destroy_process_group()


def save(state: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint that is complete or absent, even if the process is killed meanwhile."""
    unfinished = path.with_name(f"{path.name}.new")
    torch.save(state, unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=7, help="steps between two checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--directory", default="gwa_runs")
    parser.add_argument("--backend", default="local")
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a worker gives up on the others")
    main(parser.parse_args())
