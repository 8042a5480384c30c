"""Draws the pictures of docs/histograms.md from four small runs on scikit-learn's digits, a few seconds each.

python examples/pictures.py docs/images
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from digits import batches, load
from pytorch_digits import CNN
from torch import nn

import gwa_logging
from gwa_logging.integrations.heatmap_picture import draw
from gwa_logging.journal import read_journal
from gwa_logging.records import EpochReport, IntervalRecord
from gwa_logging.report.heatmap import Timeline

COLOURS = 128
"""Size of the palette of the pictures, which halves the size of the files."""


def train(directory: str, *, epochs: int, noise: float, learning_rate: float = 1e-3) -> Path:
    """Trains the CNN of pytorch_digits.py and returns the path of the journal."""
    data = load(noise, seed=0)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(data.x)[:, None], torch.from_numpy(data.y)
    model = CNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    with gwa_logging.watch(model, log_every_n_steps=5, early_stop=None, directory=directory) as monitor:
        for _ in monitor.epochs(epochs):
            for batch in batches(len(y), 64, rng):
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return monitor.journal


def picture(journal: Path, path: Path, title: str) -> None:
    """Draws the scores of a journal and prints the report of the last epoch."""
    records, _ = read_journal(journal)
    timeline = Timeline()
    for record in records:
        if isinstance(record, IntervalRecord):
            timeline.add(record)
    draw(timeline.heatmap(), title).quantize(COLOURS).save(path, optimize=True)
    last = [record for record in records if isinstance(record, EpochReport)][-1]
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB; {last}, {last.excluded} excluded")


def main() -> None:
    images = Path(sys.argv[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        for name, settings in {
            "healthy": {"epochs": 40, "noise": 0.0},
            "mislabelled": {"epochs": 10, "noise": 0.3},
            "memorising": {"epochs": 45, "noise": 0.3},
            "dead": {"epochs": 5, "noise": 0.0, "learning_rate": 0.2},
        }.items():
            picture(train(directory, **settings), images / f"{name}.png", name)


if __name__ == "__main__":
    main()
