"""What is trained: every combination of data, label noise, net, recipe and seed."""

from itertools import product
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """A data set: how many images are trained on, for how many epochs, in which batches."""

    images: int
    epochs: int
    batch: int


class Noise(NamedTuple):
    """Wrong labels.

    Attributes:
        share: probability that a label is wrong.
        by_class: False: any class is mistaken for any other. True: every other class is mistaken for the next one, and the
            rest are right, as is usual for class-dependent ("asymmetric") noise; so half as many labels are wrong.
    """

    share: float
    by_class: bool = False


class Recipe(NamedTuple):
    """An optimiser with its schedule."""

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
"""Data and recipes for which cleanlab's out-of-sample probabilities are made; each takes FOLDS further trainings."""


class Run(NamedTuple):
    """One cell of the grid.

    Attributes:
        part: "full" trains on everything; "held-out" on 90 %, and looks at the rest, whose labels are as noisy; "folds"
            trains on two thirds three times, for cleanlab.
    """

    data: str
    noise: str
    net: str
    recipe: str
    seed: int
    part: str = "full"

    @property
    def name(self) -> str:
        """Of its file."""
        return "_".join(str(value).replace(" ", "") for value in self).replace("%", "pc")

    @property
    def for_choosing(self) -> bool:
        """Whether choices may look at it: half of the combinations, balanced in every factor; all seeds together."""
        factors = ((DATA, self.data), (NOISE, self.noise), (RECIPES, self.recipe))
        return (sum(list(f).index(v) for f, v in factors) + NETS.index(self.net)) % 2 == 0


def _cells(seed: int) -> list[Run]:
    cells = [Run(*cell, seed) for cell in product(DATA, NOISE, NETS, RECIPES)]
    return [cells[index] for index in np.random.default_rng(seed).permutation(len(cells))]


def grid() -> list[Run]:
    """All runs, seed by seed, each shuffled, so that any part of it is balanced; a held-out run follows its full one."""
    runs = []
    cells = [cell for seed in SEEDS for cell in _cells(seed)]
    for run in cells:
        runs += [run, run._replace(part="held-out")]
        if NOISE[run.noise].share and run.seed == 0 and run.data in CLEANLAB_ON[0] and run.recipe in CLEANLAB_ON[1]:
            runs.append(run._replace(part="folds"))
    return runs
