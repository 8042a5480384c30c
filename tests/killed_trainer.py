"""A training that is killed in the middle of a step, for test_journal_writer.py."""

import os
import signal
import sys

import torch
from torch import nn

import gwa_logging


def main(directory: str, epoch_steps: int, steps: int) -> None:
    """Trains, and kills its own process after `steps` steps. Prints the number of steps that have been saved each time."""
    model = nn.Linear(8, 4)
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    monitor = gwa_logging.watch(model, directory=directory, log_every_n_steps=1, early_stop=None)
    for step in range(1, steps + 1):
        nn.functional.cross_entropy(model(x), y).backward()
        if step % epoch_steps == 0:
            monitor.end_epoch() if step % (2 * epoch_steps) == 0 else monitor.state_dict()
            print(step, flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
