"""The training and test data of a run: images or sentences, with noisy labels.

Digits come with scikit-learn. Fashion-MNIST, CIFAR-10N and CLINC150 are read from a folder of the user's.
"""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.grid import DATA, NOISE, Run
from benchmarks.study.nets import VOCABULARY, frozen_features

TEST_SAMPLES = 3000
"""At most; half as many for EfficientNet."""
WORDS = 16
"""A sentence for the transformer: this many words, cut or padded with 0."""

Array = npt.NDArray[Any]


class Samples(NamedTuple):
    """The data of a run.

    Attributes:
        x, labels: training inputs and their noisy labels. Numbers float32 [n, features]; images float32 [n, channels, side,
            side] with mean 0 and standard deviation 1; sentences as TF-IDF float32 [n, VOCABULARY] or as word numbers
            int64 [n, WORDS].
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


def load(run: Run, folder: Path, device: torch.device, held_out: slice | None = None) -> Samples:
    """The data of a run.

    Args:
        run: the run.
        folder: where fashion_mnist.npz, cifar10n.npz and clinc150.json are.
        device: the device of the tensors.
        held_out: the part of the training samples that is held out, if any.
    """
    data, noise = DATA[run.data], NOISE[run.noise]
    rng = np.random.default_rng([run.seed, list(DATA).index(run.data)])
    x, clean, test_x, test_labels, human = _source(run, folder, rng)
    if data.imbalance > 1:
        shares = data.imbalance ** (-np.arange(data.classes) / (data.classes - 1))
        sizes = np.round(shares / shares.sum() * data.samples).astype(int)
        chosen = np.concatenate([np.flatnonzero(clean == c)[:size] for c, size in enumerate(sizes)])
        rng.shuffle(chosen)
    else:
        chosen = np.arange(data.samples)
    x, clean = x[chosen], clean[chosen].astype(np.int64)
    n = len(clean)
    if noise.human:
        noisy = human[noise.human][chosen].astype(np.int64)
    else:
        rng = np.random.default_rng([run.seed, 17, list(NOISE).index(run.noise)])
        wrong = rng.random(n) < noise.share
        shift = 1 - clean % 2 if noise.by_class else rng.integers(1, data.classes, n)
        noisy = np.where(wrong, (clean + shift) % data.classes, clean)
    keep, out = np.ones(n, bool), np.zeros(n, bool)
    if held_out is not None:
        out[held_out] = True
        keep = ~out
    if run.net == "efficientnet":
        test_x, test_labels = test_x[: TEST_SAMPLES // 2], test_labels[: TEST_SAMPLES // 2]
        x, test_x = (frozen_features(torch.from_numpy(part).to(device)).cpu().numpy() for part in (x, test_x))
    arrays = (x[keep], noisy[keep], (noisy != clean)[keep], x[out], noisy[out], test_x, test_labels.astype(np.int64))
    return Samples(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


def _source(run: Run, folder: Path, rng: np.random.Generator) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    """Shuffled training inputs and labels, test inputs and labels, and the human labels."""
    match DATA[run.data].source:
        case "digits":
            from sklearn.datasets import load_digits

            pixels, labels = load_digits(return_X_y=True)
            order = rng.permutation(len(pixels))
            x, labels = _standardised(pixels.reshape(-1, 1, 8, 8)[order]), labels[order]
            n = DATA[run.data].samples
            return x[:n], labels[:n], x[n:], labels[n:], {}
        case "fashion":
            with np.load(folder / "fashion_mnist.npz") as file:
                order = rng.permutation(len(file["x_train"]))
                order = order[
                    : max(20_000, DATA[run.data].samples) if DATA[run.data].imbalance > 1 else DATA[run.data].samples
                ]
                x, labels = file["x_train"][order], file["y_train"][order]
                test_x, test_labels = file["x_test"][:TEST_SAMPLES], file["y_test"][:TEST_SAMPLES]
            both = _standardised(np.concatenate([x, test_x])[:, None])
            return both[: len(x)], labels, both[len(x) :], test_labels, {}
        case "cifar10n":
            with np.load(folder / "cifar10n.npz") as file:
                order = rng.permutation(len(file["clean"]))[: DATA[run.data].samples]
                x = _decoded(file["train_jpeg"], file["train_offsets"], order)
                test_x = _decoded(file["test_jpeg"], file["test_offsets"], np.arange(TEST_SAMPLES))
                test_labels = file["test_labels"][:TEST_SAMPLES]
                human = {noise.human: file[noise.human][order] for noise in NOISE.values() if noise.human}
                labels = file["clean"][order]
            both = _standardised(np.concatenate([x, test_x]))
            return both[: len(x)], labels, both[len(x) :], test_labels, human
        case "made-up":
            from sklearn.datasets import make_classification

            x, labels = make_classification(
                DATA[run.data].samples + TEST_SAMPLES,
                n_features=32,
                n_informative=12,
                n_classes=DATA[run.data].classes,
                n_clusters_per_class=2,
                class_sep=1.5,
                flip_y=0,
                random_state=run.seed,
            )
            x, n = _standardised(x), DATA[run.data].samples
            return x[:n], labels[:n], x[n:], labels[n:], {}
        case _:
            content = json.loads((folder / "clinc150.json").read_text())
            names = sorted({intent for _, intent in content["train"]})
            order = rng.permutation(len(content["train"]))[: DATA[run.data].samples]
            train, test = [content["train"][i] for i in order], content["test"]
            labels, test_labels = (np.array([names.index(intent) for _, intent in part]) for part in (train, test))
            encode = _tf_idf if run.net == "bag-of-words" else _word_numbers
            x, test_x = encode([text for text, _ in train], [text for text, _ in test])
            return x, labels, test_x, test_labels, {}


def _standardised(pixels: Array) -> Array:
    return ((pixels - pixels.mean()) / pixels.std()).astype(np.float32)


def _decoded(data: Array, offsets: Array, indices: Array) -> Array:
    """JPEG images as uint8 [n, 3, 32, 32]."""
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))) for i in indices]
    return np.stack(images).transpose(0, 3, 1, 2)


def _tf_idf(train: list[str], test: list[str]) -> tuple[Array, Array]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(max_features=VOCABULARY, ngram_range=(1, 2))
    scale = np.float32(np.sqrt(VOCABULARY) / 4)
    return tuple(
        part.toarray().astype(np.float32) * scale
        for part in (vectorizer.fit_transform(train), vectorizer.transform(test))
    )


def _word_numbers(train: list[str], test: list[str]) -> tuple[Array, Array]:
    counts = Counter(word for text in train for word in text.split())
    numbers = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2))}  # 0: padding, 1: unknown

    def encode(texts: list[str]) -> Array:
        rows = [[numbers.get(word, 1) for word in text.split()][:WORDS] for text in texts]
        return np.array([row + [0] * (WORDS - len(row)) for row in rows], np.int64)

    return encode(train), encode(test)


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
