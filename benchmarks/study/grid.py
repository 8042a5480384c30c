"""The cells of the study: combinations of data, label noise, network, recipe and seed, in groups of one question each."""

from collections.abc import Iterator
from itertools import chain, product, zip_longest
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """A data set.

    Attributes:
        samples: number of training samples.
        epochs, batch: number of epochs and batch size.
        classes: number of classes.
        source: "digits" (scikit-learn), "fashion" (Fashion-MNIST), "cifar10n" (CIFAR-10 with human labels), "clinc"
            (CLINC150) or "made-up" (scikit-learn's make_classification).
        imbalance: how many times larger the largest class is than the smallest.
    """

    samples: int
    epochs: int
    batch: int
    classes: int
    source: str
    imbalance: int = 1


class Noise(NamedTuple):
    """Wrong labels.

    Attributes:
        share: probability that a label is wrong.
        by_class: if False, a wrong label is any other class. If True, every second class is mislabelled as the next one and
            the other classes are right, as usual for class-dependent ("asymmetric") noise; so half as many labels are wrong.
        human: the name of a set of human labels, which come with the data; then `share` is the share that is wrong.
    """

    share: float
    by_class: bool = False
    human: str = ""


class Recipe(NamedTuple):
    """An optimiser and its schedule."""

    optimiser: str
    rate: float
    decay: float
    cosine: bool = False
    augment: bool = False


DATA = {
    "digits": Data(1200, 60, 64, 10, "digits"),
    "fashion-3k": Data(3000, 30, 128, 10, "fashion"),
    "cifar10n-5k": Data(5000, 30, 128, 10, "cifar10n"),
    "fashion-2k": Data(2000, 15, 64, 10, "fashion"),
    "cifar10n-2k": Data(2000, 15, 64, 10, "cifar10n"),
    "clinc-6k": Data(6000, 30, 128, 150, "clinc"),
    "fashion-3k-imbalanced": Data(3000, 30, 128, 10, "fashion", imbalance=20),
    "digits-long": Data(1200, 180, 64, 10, "digits"),
    "fashion-3k-long": Data(3000, 90, 128, 10, "fashion"),
    "fashion-6k": Data(6000, 40, 128, 10, "fashion"),
    "fashion-24k": Data(24000, 30, 256, 10, "fashion"),
    "made-up-2k": Data(2000, 40, 64, 8, "made-up"),
}
NOISE = {
    "clean": Noise(0.0),
    "10 %": Noise(0.1),
    "20 %": Noise(0.2),
    "40 %": Noise(0.4),
    "20 % by class": Noise(0.2, True),
    "40 % by class": Noise(0.4, True),
    "human 9 %": Noise(0.09, human="aggregate"),
    "human 17 %": Noise(0.172, human="random1"),
    "human 40 %": Noise(0.402, human="worse"),
}
RECIPES = {
    "adam": Recipe("adam", 1e-3, 0.0),
    "sgd": Recipe("sgd", 0.05, 5e-4),
    "adamw-cosine": Recipe("adamw", 2e-3, 0.05, cosine=True),
    "sgd-cosine-augment": Recipe("sgd", 0.05, 5e-4, cosine=True, augment=True),
    "finetune": Recipe("sgd", 0.01, 1e-4),
}
FOLDS = 3
"""Trainings for cleanlab's out-of-sample probabilities."""


class Run(NamedTuple):
    """One training.

    Attributes:
        group: the question that it answers; a key of `GROUPS`, or "clean" for a further clean run without a competitor.
        part: "full" trains on all samples; "held-out" on 90 % of them, and evaluates the rest, whose labels are as noisy;
            "folds" trains three times on two thirds, for cleanlab.
    """

    group: str
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
        """True for the cells on which choices were made.

        Of the group "first" one half, which is balanced in every factor and keeps the seeds of a combination together; of the
        other groups the cells with seed 0. Choices did not see any "table" or "clean".
        """
        if self.group == "first":
            values = (self.data, self.noise, self.net, self.recipe)
            return sum(factor.index(value) for factor, value in zip(_FIRST, values, strict=True)) % 2 == 0
        return self.group not in ("table", "clean") and self.seed == 0


_SYNTHETIC = ("clean", "10 %", "20 %", "40 %", "20 % by class", "40 % by class")
_HUMAN = ("clean", "human 9 %", "human 17 %", "human 40 %")
_RECIPES = ("adam", "sgd", "adamw-cosine", "sgd-cosine-augment")

_FIRST = (
    ("digits", "fashion-6k", "fashion-24k"),
    _SYNTHETIC,
    ("mlp", "large-cnn", "large-resnet", "large-vit"),
    _RECIPES,
)
"""The factors of the group "first"."""

GROUPS = {
    "grid": "small images, four recipes",
    "human": "human label noise (CIFAR-10N)",
    "finetune": "fine-tuning a pretrained EfficientNet-Lite0",
    "text": "text of 150 classes (CLINC150)",
    "imbalance": "classes from 1 to 20 times the smallest",
    "long": "three times the epochs",
    "table": "made-up tables of numbers, which no choice saw",
    "first": "larger networks and data, without a look",
}
"""Each group of cells, in words."""


def _products(group: str) -> Iterator[Run]:
    """All cells of a group."""

    def cells(data: str, noises: tuple[str, ...], nets: tuple[str, ...], recipes: tuple[str, ...]) -> Iterator[Run]:
        return (Run(group, data, *rest) for rest in product(noises, nets, recipes, range(2)))

    some = ("clean", "20 %", "40 %", "20 % by class")
    match group:
        case "grid":
            yield from cells("digits", _SYNTHETIC, ("mlp", "cnn", "resnet", "vit"), _RECIPES)
            yield from cells("fashion-3k", _SYNTHETIC, ("mlp", "cnn", "vit"), _RECIPES)
        case "human":
            yield from cells("cifar10n-5k", _HUMAN, ("cnn", "resnet", "vit"), ("adamw-cosine", "sgd-cosine-augment"))
        case "finetune":
            yield from cells("cifar10n-2k", _HUMAN, ("efficientnet",), ("finetune",))
            yield from cells("fashion-2k", some, ("efficientnet",), ("finetune",))
        case "text":
            yield from cells("clinc-6k", some, ("bag-of-words", "transformer"), ("adam", "adamw-cosine"))
        case "imbalance":
            yield from cells("fashion-3k-imbalanced", some, ("mlp", "cnn", "vit"), ("adam", "adamw-cosine"))
        case "long":
            yield from cells("digits-long", some, ("mlp", "cnn", "vit"), ("adamw-cosine", "sgd-cosine-augment"))
            yield from cells("fashion-3k-long", some, ("mlp",), ("adamw-cosine",))
        case "table":
            yield from cells("made-up-2k", _SYNTHETIC, ("mlp",), _RECIPES[:3])
        case "clean":
            for data, nets, seeds in (("digits", ("mlp", "cnn", "vit"), 6), ("fashion-3k", ("mlp", "cnn"), 10)):
                for seed, net, recipe in product(range(2, seeds), nets, ("adamw-cosine", "sgd-cosine-augment")):
                    yield Run(group, data, "clean", net, recipe, seed)
        case "first":
            yield from (Run(group, *rest) for rest in product(*_FIRST, range(2)))


def grid() -> list[Run]:
    """All runs; a held-out run follows its full run. The groups alternate, so that any prefix answers all questions."""
    groups = {}
    for index, group in enumerate(GROUPS):
        cells = list(_products(group))
        groups[group] = [cells[i] for i in np.random.default_rng(index).permutation(len(cells))]
    first = groups.pop("first")
    large = groups.pop("grid")
    mixed = [run for run in chain(*zip_longest(large[::2], large[1::2], *groups.values())) if run is not None]
    mixed.sort(key=lambda run: run.seed)
    paired = [part for run in mixed + first for part in (run, run._replace(part="held-out"))]
    folds = [run._replace(part="folds") for run in first if _has_folds(run)]
    return paired + list(_products("clean")) + folds


def _has_folds(run: Run) -> bool:
    some = ("digits", "fashion-6k", "adam", "sgd-cosine-augment")
    return bool(NOISE[run.noise].share) and run.seed == 0 and run.data in some and run.recipe in some
