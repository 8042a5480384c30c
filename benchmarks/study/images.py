"""Images and labels: scikit-learn's digits, and Fashion-MNIST from a file of the user's."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.grid import DATA, NOISE, Run

CLASSES = 10


class Images(NamedTuple):
    """The data of a run.

    Attributes:
        x, labels: training images float32 [n, 1, side, side] with mean 0 and standard deviation 1, and their noisy labels.
        flipped: bool [n], True where the label is wrong.
        held_out_x, held_out_labels: the held-out part of the training data; its labels are as noisy.
        test_x, test_labels: test data with clean labels.
    """

    x: Tensor
    labels: Tensor
    flipped: Tensor
    held_out_x: Tensor
    held_out_labels: Tensor
    test_x: Tensor
    test_labels: Tensor


def load(run: Run, fashion: Path, device: torch.device, held_out: slice | None = None) -> Images:
    """The images of a run.

    Args:
        run: the run.
        fashion: an .npz file with Fashion-MNIST: x_train, y_train, x_test, y_test.
        device: the device of the tensors.
        held_out: the part of the training images that is held out, if any.
    """
    data, noise = DATA[run.data], NOISE[run.noise]
    rng = np.random.default_rng([run.seed, list(DATA).index(run.data)])
    if run.data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = rng.permutation(len(images))
        images, labels = images.reshape(-1, 8, 8)[order], labels[order]
        test = images[data.images :], labels[data.images :]
    else:
        with np.load(fashion) as file:
            order = rng.permutation(len(file["x_train"]))[: data.images]
            images, labels = file["x_train"][order], file["y_train"][order]
            test = file["x_test"], file["y_test"]
    images, labels = images[: data.images], labels[: data.images].astype(np.int64)

    rng = np.random.default_rng([run.seed, 17, list(NOISE).index(run.noise)])
    wrong = rng.random(data.images) < noise.share
    shift = 1 - labels % 2 if noise.by_class else rng.integers(1, CLASSES, data.images)
    wrong &= shift > 0
    noisy = np.where(wrong, (labels + shift) % CLASSES, labels)

    mean, spread = images.mean(), images.std()

    def tensor(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(((pixels - mean) / spread).astype(np.float32))[:, None].to(device)

    keep, out = np.ones(data.images, bool), np.zeros(data.images, bool)
    if held_out is not None:
        out[held_out] = True
        keep = ~out
    return Images(
        tensor(images[keep]),
        torch.from_numpy(noisy[keep]).to(device),
        torch.from_numpy(wrong[keep]).to(device),
        tensor(images[out]),
        torch.from_numpy(noisy[out]).to(device),
        tensor(test[0]),
        torch.from_numpy(test[1].astype(np.int64)).to(device),
    )


def augmented(x: Tensor, mirror: bool) -> Tensor:
    """Shifts each image by up to a twelfth of its side and, if `mirror`, mirrors it with probability 1/2."""
    batch = x.shape[0]
    theta = torch.zeros(batch, 2, 3, device=x.device)
    theta[:, 0, 0] = 1.0
    if mirror:
        theta[:, 0, 0] -= 2.0 * (torch.rand(batch, device=x.device) < 0.5)
    theta[:, 1, 1] = 1.0
    theta[:, :, 2] = (torch.rand(batch, 2, device=x.device) * 2 - 1) / 6
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
