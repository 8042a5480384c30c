"""Trains one run and records what every criterion and suspect score needs, at every epoch."""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gwa_logging
from benchmarks.study.data import Samples, augmented, load
from benchmarks.study.grid import DATA, FOLDS, RECIPES, Run
from benchmarks.study.nets import head_of, make_net
from gwa_logging.integrations.torch.weights import WeightAverage

LOOK = 512
"""Number of training inputs that the checkpoint is evaluated on after each epoch."""

DIRECTIONS = 32
"""Number of random directions in which GradStop's statistic is computed."""

Row = dict[str, object]


def train(run: Run, folder: Path, device: torch.device) -> dict[str, np.ndarray]:
    """Trains a run.

    Returns:
        Arrays. Their first axis is the epoch, except those of "labels", "flipped" and "look_ids". Of "folds": "labels",
        "flipped", and "probabilities" [samples, classes].
    """
    torch.manual_seed(run.seed)
    if run.part == "full":
        return _Full(run, load(run, folder, device)).series()
    if run.part == "folds":
        return _folds(run, folder, device)
    n = DATA[run.data].samples
    return _HeldOut(run, load(run, folder, device, slice(n * 9 // 10, n))).series()


class _Training:
    """Training of one network, with the running average of its weights."""

    def __init__(self, run: Run, samples: Samples) -> None:
        self.run, self.samples, self.data, self.recipe = run, samples, DATA[run.data], RECIPES[run.recipe]
        self.device = samples.x.device
        self.net = make_net(run.net, samples.x, self.data.classes).to(self.device)
        self.average, self.averaged_net = WeightAverage(), copy.deepcopy(self.net)
        groups = {"lr": self.recipe.rate, "weight_decay": self.recipe.decay}
        self.optimiser: torch.optim.Optimizer = {
            "adam": lambda: torch.optim.Adam(self.net.parameters(), **groups),
            "adamw": lambda: torch.optim.AdamW(self.net.parameters(), **groups),
            "sgd": lambda: torch.optim.SGD(self.net.parameters(), momentum=0.9, **groups),
        }[self.recipe.optimiser]()
        self.steps_per_epoch = math.ceil(len(samples.x) / self.data.batch)
        self.steps = 0

    def series(self) -> dict[str, np.ndarray]:
        rows = [self.epoch() for _ in range(self.data.epochs)]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def epoch(self) -> Row:
        """Trains for one epoch and returns its signals."""
        self.net.train()
        order = torch.randperm(len(self.samples.x), device=self.device)
        for ids in order.split(self.data.batch):
            if self.recipe.cosine:
                share = self.steps / (self.steps_per_epoch * self.data.epochs)
                for group in self.optimiser.param_groups:
                    group["lr"] = self.recipe.rate * 0.5 * (1 + math.cos(math.pi * share))
            x = self.samples.x[ids]
            if self.recipe.augment:
                x = augmented(x, mirror=self.data.source != "digits")
            self.step(ids, x)
            self.average.update(self.net)
            self.steps += 1
        self.average.end_epoch(self.net)
        self._copy_averages()
        accuracies = (self.accuracy(net, self.samples.test_x, self.samples.test_labels) for net in self.nets())
        return dict(zip(("test_accuracy", "averaged_test_accuracy"), accuracies, strict=True))

    def step(self, ids: Tensor, x: Tensor) -> None:
        F.cross_entropy(self.net(x), self.samples.labels[ids]).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def nets(self) -> tuple[nn.Module, nn.Module]:
        """The network in training, and the one with the averaged weights."""
        return self.net, self.averaged_net

    def _copy_averages(self) -> None:
        with torch.no_grad():
            pairs = zip(
                (*self.net.parameters(), *self.net.buffers()),
                (*self.averaged_net.parameters(), *self.averaged_net.buffers()),
                strict=True,
            )
            for source, target in pairs:
                average = self.average.of(source)
                target.copy_(source if average is None else average)

    def logits(self, net: nn.Module, x: Tensor) -> Tensor:
        net.eval()
        with torch.no_grad():
            return torch.cat([net(part) for part in x.split(1000)])

    def accuracy(self, net: nn.Module, x: Tensor, labels: Tensor) -> float:
        return float((self.logits(net, x).argmax(1) == labels).float().mean())


class _HeldOut(_Training):
    """Training with a held-out part, which is evaluated at every epoch."""

    def epoch(self) -> Row:
        row = super().epoch()
        for net, prefix in zip(self.nets(), ("", "averaged_"), strict=True):
            logits = self.logits(net, self.samples.held_out_x)
            labels = self.samples.held_out_labels
            row[f"{prefix}held_out_accuracy"] = float((logits.argmax(1) == labels).float().mean())
            row[f"{prefix}held_out_loss"] = float(F.cross_entropy(logits, labels))
        return row


class _Full(_Training):
    """Watched training on all samples."""

    def __init__(self, run: Run, samples: Samples) -> None:
        super().__init__(run, samples)
        n, classes = len(samples.x), self.data.classes
        self.twin = copy.deepcopy(self.net)  # for gradients outside the training
        self.features: Tensor  # of the last forward pass
        for net in self.nets():
            head_of(net).register_forward_pre_hook(self._keep_features)
        self.outputs = torch.zeros(n, classes, device=self.device)
        self.sizes = torch.zeros(n, device=self.device)  # of the gradient with respect to the logits
        self.past = torch.zeros(n, device=self.device)
        self.predicted = torch.full((n,), -1, device=self.device)
        look = np.random.default_rng([run.seed, 512]).permutation(n)[:LOOK]
        self.look_ids = torch.from_numpy(np.sort(look)).to(self.device)
        head, generator = head_of(self.net), torch.Generator().manual_seed(0)
        self.directions = tuple(
            torch.randn(size, DIRECTIONS, generator=generator).to(self.device)
            for size in (head.out_features, head.in_features)
        )
        self.projected = torch.zeros(n, DIRECTIONS, device=self.device)

    def _keep_features(self, head: nn.Module, arguments: tuple[Tensor]) -> None:
        self.features = arguments[0].detach()

    def series(self) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as directory:
            self.monitor = gwa_logging.watch(
                self.net, num_samples=len(self.samples.x), early_stop=None, directory=directory
            )
            with self.monitor:
                series = super().series()
        labels, flipped, look_ids = (
            t.cpu().numpy() for t in (self.samples.labels, self.samples.flipped, self.look_ids)
        )
        return series | {"labels": labels, "flipped": flipped, "look_ids": look_ids}

    def step(self, ids: Tensor, x: Tensor) -> None:
        self.monitor.tag(ids)
        logits, labels = self.net(x), self.samples.labels[ids]
        F.cross_entropy(logits, labels).backward()
        with torch.no_grad():
            self.outputs[ids] = logits
            delta = logits.softmax(1)
            delta[torch.arange(len(ids)), labels] -= 1
            self.sizes[ids] = delta.norm(dim=1)
            by_class, by_feature = self.directions
            self.projected[ids] = (delta @ by_class) * (self.features @ by_feature)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def epoch(self) -> Row:
        row = super().epoch()
        report = self.monitor.end_epoch()
        for name in ("count", "mean", "std", "skewness", "excess_kurtosis"):
            row[name] = getattr(report, name)
        row["bins"] = report.histogram.dense().astype(np.int32)
        row.update(self._sample_signals())
        row.update(self._gradient_signals())
        row.update(self._look())
        return row

    def _sample_signals(self) -> Row:
        """The signals of each sample in this epoch, and what some criteria make of them."""
        ledger = self.monitor._adapter.ledger().ledger
        sums = torch.as_tensor(ledger.sums).to(self.device)
        scores, agrees = sums - self.past, torch.sign(sums - self.past) == torch.sign(self.past)
        self.past = sums
        labels, logits = self.samples.labels[:, None], self.outputs
        predicted = logits.argmax(1)
        changed = float((predicted != self.predicted).float().mean())
        self.predicted = predicted
        loss = F.cross_entropy(logits, labels[:, 0], reduction="none")
        margins = logits.gather(1, labels)[:, 0] - logits.scatter(1, labels, -torch.inf).amax(1)
        projected = self.projected.double()
        covariance, total = torch.cov(projected.T), projected.sum(0)
        return {
            "scores": _half(scores),
            "sizes": _half(self.sizes),
            "losses": _half(loss.clamp(max=1e4)),
            "margins": _half(margins.clamp(-1e4, 1e4)),
            "trained_outputs": _half(logits[self.look_ids]),
            "sign_agreement": float(agrees.float().mean()),
            "train_loss": float(loss.mean()),
            "train_accuracy": float((predicted == labels[:, 0]).float().mean()),
            "changed": changed,
            "grad_stop": float(total @ torch.linalg.pinv(covariance * len(projected)) @ total),
        }

    def _gradient_signals(self) -> Row:
        """Signals from separate gradients: Gradient Disparity over five batches, and the norm of the head's gradient on one."""
        self.twin.load_state_dict(self.net.state_dict())
        self.twin.train()
        parameters = list(self.twin.parameters())
        gradients = []
        for ids in torch.randperm(len(self.samples.x), device=self.device).split(self.data.batch)[:5]:
            losses = F.cross_entropy(self.twin(self.samples.x[ids]), self.samples.labels[ids], reduction="none")
            grads = torch.autograd.grad((losses / losses.std()).mean(), parameters)
            gradients.append(torch.cat([g.ravel() for g in grads]))
        distances = torch.pdist(torch.stack(gradients))
        self.twin.eval()
        first = slice(0, self.data.batch)
        loss = F.cross_entropy(self.twin(self.samples.x[first]), self.samples.labels[first])
        (head_gradient,) = torch.autograd.grad(loss, [head_of(self.twin).weight])
        return {"disparity": float(distances.mean()), "head_norm": float(head_gradient.norm())}

    def _look(self) -> Row:
        """Logits of the look's inputs, without and with averaged weights, and what their alignment scores need."""
        row: Row = {}
        for net, prefix in zip(self.nets(), ("", "averaged_"), strict=True):
            row[f"{prefix}look"] = _half(self.logits(net, self.samples.x[self.look_ids]))
            row[f"{prefix}look_bias"] = head_of(net).bias.detach().cpu().numpy().copy()
        return row


def _folds(run: Run, folder: Path, device: torch.device) -> dict[str, np.ndarray]:
    """Out-of-sample probabilities for cleanlab, each fold at the epoch of its best held-out accuracy."""
    n = DATA[run.data].samples
    probabilities, whole = np.zeros((n, DATA[run.data].classes)), load(run, folder, device)
    for fold in range(FOLDS):
        part = slice(n * fold // FOLDS, n * (fold + 1) // FOLDS)
        training = _HeldOut(run, load(run, folder, device, part))
        best = -1.0
        for _ in range(training.data.epochs):
            accuracy = float(training.epoch()["held_out_accuracy"])  # type: ignore[arg-type]
            if accuracy > best:
                best = accuracy
                logits = training.logits(training.net, training.samples.held_out_x)
                probabilities[part] = logits.double().softmax(1).cpu().numpy()
    return {
        "labels": whole.labels.cpu().numpy(),
        "flipped": whole.flipped.cpu().numpy(),
        "probabilities": probabilities,
    }


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float16)
