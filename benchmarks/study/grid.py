"""The grid: every combination of data, label noise, network, recipe and seed."""

from itertools import product
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """A data set: number of training images, epochs and batch size."""

    images: int
    epochs: int
    batch: int


class Noise(NamedTuple):
    """Wrong labels.

    Attributes:
        share: probability that a label is wrong.
        by_class: if False, a wrong label is any other class. If True, every second class is mislabelled as the next one and
            the other classes are right, as usual for class-dependent ("asymmetric") noise; so half as many labels are wrong.
    """

    share: float
    by_class: bool = False


class Recipe(NamedTuple):
    """An optimiser and its schedule."""

    optimiser: str
    rate: float
    decay: float
    cosine: bool = False
    augment: bool = False


DATA = {"digits": Data(1200, 60, 64), "fashion-6k": Data(6000, 40, 128), "fashion-24k": Data(24000, 30, 256)}
NOISE = {
    "clean": Noise(0.0),
    "10 %": Noise(0.1),
    "20 %": Noise(0.2),
    "40 %": Noise(0.4),
    "20 % by class": Noise(0.2, True),
    "40 % by class": Noise(0.4, True),
}
NETS = ("mlp", "cnn", "resnet", "vit")
RECIPES = {
    "adam": Recipe("adam", 1e-3, 0.0),
    "sgd": Recipe("sgd", 0.05, 5e-4),
    "adamw-cosine": Recipe("adamw", 2e-3, 0.05, cosine=True),
    "sgd-cosine-augment": Recipe("sgd", 0.05, 5e-4, cosine=True, augment=True),
}
SEEDS = (0, 1)

FOLDS = 3
CLEANLAB_ON = (("digits", "fashion-6k"), ("adam", "sgd-cosine-augment"))
"""Data and recipes with out-of-sample probabilities for cleanlab; each needs FOLDS further trainings."""


class Run(NamedTuple):
    """One cell of the grid.

    Attributes:
        part: "full" trains on all images; "held-out" on 90 % of them, and evaluates the rest, whose labels are as noisy;
            "folds" trains three times on two thirds, for cleanlab.
    """

    data: str
    noise: str
    net: str
    recipe: str
    seed: int
    part: str = "full"

    @property
    def name(self) -> str:
        """Name of the file with its results."""
        return "_".join(str(value).replace(" ", "") for value in self).replace("%", "pc")

    @property
    def for_choosing(self) -> bool:
        """True for the half on which choices are made. Balanced in every factor; all seeds of a combination are in one half."""
        factors = ((DATA, self.data), (NOISE, self.noise), (RECIPES, self.recipe))
        return (sum(list(f).index(v) for f, v in factors) + NETS.index(self.net)) % 2 == 0


def _cells(seed: int) -> list[Run]:
    cells = [Run(*cell, seed) for cell in product(DATA, NOISE, NETS, RECIPES)]
    return [cells[index] for index in np.random.default_rng(seed).permutation(len(cells))]


def grid() -> list[Run]:
    """All runs, seed by seed and shuffled, so that any prefix is balanced; a held-out run follows its full run."""
    runs = []
    cells = [cell for seed in SEEDS for cell in _cells(seed)]
    for run in cells:
        runs += [run, run._replace(part="held-out")]
        if NOISE[run.noise].share and run.seed == 0 and run.data in CLEANLAB_ON[0] and run.recipe in CLEANLAB_ON[1]:
            runs.append(run._replace(part="folds"))
    return runs
