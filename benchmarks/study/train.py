"""Trains one run and records the signals of every criterion and suspect score at every epoch."""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gwa_logging
from benchmarks.study.grid import DATA, FOLDS, RECIPES, Run
from benchmarks.study.images import CLASSES, Images, augmented, load
from benchmarks.study.nets import make_net

SUSPECT_SCORES = ("gwa", "aum", "loss", "confidence", "forgetting", "el2n")


def train(run: Run, fashion: Path, device: torch.device) -> dict[str, np.ndarray]:
    """Trains a run. Returns arrays whose first axis is the epoch, except cleanlab's, which are scalars."""
    torch.manual_seed(run.seed)
    if run.part == "full":
        return _Full(run, load(run, fashion, device)).series()
    images = DATA[run.data].images
    if run.part == "held-out":
        return _HeldOut(run, load(run, fashion, device, slice(images * 9 // 10, images))).series()
    return _cleanlab(run, fashion, device)


class _Training:
    """Training of one network."""

    def __init__(self, run: Run, images: Images) -> None:
        self.run, self.images, self.data, self.recipe = run, images, DATA[run.data], RECIPES[run.recipe]
        self.device = images.x.device
        self.net = make_net(run.net, images.x.shape[-1], CLASSES).to(self.device)
        groups = {"lr": self.recipe.rate, "weight_decay": self.recipe.decay}
        self.optimiser: torch.optim.Optimizer = {
            "adam": lambda: torch.optim.Adam(self.net.parameters(), **groups),
            "adamw": lambda: torch.optim.AdamW(self.net.parameters(), **groups),
            "sgd": lambda: torch.optim.SGD(self.net.parameters(), momentum=0.9, **groups),
        }[self.recipe.optimiser]()
        self.steps_per_epoch = math.ceil(len(images.x) / self.data.batch)
        self.steps = 0

    def series(self) -> dict[str, np.ndarray]:
        rows = [self.epoch() for _ in range(self.data.epochs)]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def epoch(self) -> dict[str, object]:
        """Trains for one epoch and returns its signals."""
        self.net.train()
        order = torch.randperm(len(self.images.x), device=self.device)
        for ids in order.split(self.data.batch):
            if self.recipe.cosine:
                share = self.steps / (self.steps_per_epoch * self.data.epochs)
                for group in self.optimiser.param_groups:
                    group["lr"] = self.recipe.rate * 0.5 * (1 + math.cos(math.pi * share))
            x = self.images.x[ids]
            if self.recipe.augment:
                x = augmented(x, mirror=self.run.data != "digits")
            self.step(ids, x)
            self.steps += 1
        return {"test_accuracy": self.accuracy(self.images.test_x, self.images.test_labels)}

    def step(self, ids: Tensor, x: Tensor) -> Tensor:
        logits = self.net(x)
        F.cross_entropy(logits, self.images.labels[ids]).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return logits.detach()

    def logits(self, x: Tensor) -> Tensor:
        self.net.eval()
        with torch.no_grad():
            return torch.cat([self.net(part) for part in x.split(2500)])

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        return float((self.logits(x).argmax(1) == labels).float().mean())


class _HeldOut(_Training):
    """Training with a held-out part, which is evaluated at every epoch."""

    def epoch(self) -> dict[str, object]:
        row = super().epoch()
        logits = self.logits(self.images.held_out_x)
        row["held_out_accuracy"] = float((logits.argmax(1) == self.images.held_out_labels).float().mean())
        row["held_out_loss"] = float(F.cross_entropy(logits, self.images.held_out_labels))
        return row


class _Full(_Training):
    """Watched training on all images."""

    def __init__(self, run: Run, images: Images) -> None:
        super().__init__(run, images)
        n = len(images.x)
        self.twin = copy.deepcopy(self.net)  # for gradients outside the training
        self.head = [module for module in self.twin.modules() if isinstance(module, nn.Linear)][-1]
        self.outputs = torch.zeros(n, CLASSES, device=self.device)
        self.past = torch.zeros(n, device=self.device)
        self.predicted = torch.full((n,), -1, device=self.device)
        self.sums = {name: torch.zeros(n, device=self.device) for name in SUSPECT_SCORES}
        self.was_right = torch.zeros(n, dtype=torch.bool, device=self.device)
        self.ever_right = torch.zeros(n, dtype=torch.bool, device=self.device)

    def series(self) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as directory:
            self.monitor = gwa_logging.watch(
                self.net, num_samples=len(self.images.x), early_stop=None, directory=directory
            )
            with self.monitor:
                return super().series()

    def step(self, ids: Tensor, x: Tensor) -> Tensor:
        self.monitor.tag(ids)
        logits = super().step(ids, x)
        self.outputs[ids] = logits
        return logits

    def epoch(self) -> dict[str, object]:
        row = super().epoch()
        report = self.monitor.end_epoch()
        for name in ("count", "mean", "std", "skewness", "excess_kurtosis"):
            row[name] = getattr(report, name)
        row["bins"] = report.histogram.dense().astype(np.int32)
        row.update(self._score_signals())
        row.update(self._logit_signals())
        row.update(self._gradient_signals())
        if bool(self.images.flipped.any()):
            scores = {name: self.sums[name] for name in SUSPECT_SCORES}
            scores["forgetting"] = torch.where(self.ever_right, scores["forgetting"], torch.inf)
            row["auroc"] = [auroc(scores[name], self.images.flipped) for name in SUSPECT_SCORES]
            row["precision"] = [precision(scores[name], self.images.flipped) for name in SUSPECT_SCORES]
        return row

    def _score_signals(self) -> dict[str, object]:
        """Signals from the ledger: mean scores, and the share of samples whose score keeps its sign."""
        ledger = self.monitor._adapter.ledger()
        sums, seen = (torch.as_tensor(part).to(self.device) for part in (ledger.sums, ledger.seen))
        now = sums - self.past
        agreement = float((torch.sign(now) == torch.sign(self.past)).float().mean())
        self.past = sums
        self.sums["gwa"] = -sums / seen.clamp(min=1)
        return {"sign_agreement": agreement}

    def _logit_signals(self) -> dict[str, object]:
        labels, logits = self.images.labels[:, None], self.outputs
        predicted = logits.argmax(1)
        changed = float((predicted != self.predicted).float().mean())
        self.predicted = predicted
        right = predicted == labels[:, 0]
        self.sums["forgetting"] += (self.was_right & ~right).float()
        self.was_right, self.ever_right = right, self.ever_right | right
        own = logits.gather(1, labels)[:, 0]
        others = logits.scatter(1, labels, -torch.inf).amax(1)
        self.sums["aum"] -= own - others
        loss = F.cross_entropy(logits, labels[:, 0], reduction="none")
        self.sums["loss"] += loss
        probabilities = logits.softmax(1)
        self.sums["confidence"] -= probabilities.gather(1, labels)[:, 0]
        self.sums["el2n"] += (probabilities - F.one_hot(labels[:, 0], CLASSES)).norm(dim=1)
        return {"train_loss": float(loss.mean()), "train_accuracy": float(right.float().mean()), "changed": changed}

    def _gradient_signals(self) -> dict[str, object]:
        """Signals from separate gradients: Gradient Disparity over five batches, and the norm of the head's gradient on one."""
        self.twin.load_state_dict(self.net.state_dict())
        self.twin.train()
        parameters = list(self.twin.parameters())
        gradients = []
        for ids in torch.randperm(len(self.images.x), device=self.device).split(self.data.batch)[:5]:
            losses = F.cross_entropy(self.twin(self.images.x[ids]), self.images.labels[ids], reduction="none")
            grads = torch.autograd.grad((losses / losses.std()).mean(), parameters)
            gradients.append(torch.cat([g.ravel() for g in grads]))
        distances = torch.pdist(torch.stack(gradients))
        self.twin.eval()
        first = slice(0, self.data.batch)
        loss = F.cross_entropy(self.twin(self.images.x[first]), self.images.labels[first])
        (head_gradient,) = torch.autograd.grad(loss, [self.head.weight])
        norm = float(head_gradient.norm())
        return {
            "disparity": float(distances.mean()),
            "head_norm": norm,
            "head_norm_scaled": norm / float(self.head.weight.detach().norm()),
        }


def auroc(scores: Tensor, flipped: Tensor) -> float:
    """Probability that a wrong label has a higher score than a right one; ties count half."""
    _, index, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0)[index]
    wrong = flipped.sum()
    above = ranks[flipped].double().sum() - wrong * (wrong + 1) / 2
    return float(above / (wrong * (~flipped).sum()))


def precision(scores: Tensor, flipped: Tensor) -> float:
    """Share of wrong labels among the n highest scores, where n is the number of wrong labels."""
    return float(flipped[scores.topk(int(flipped.sum())).indices].float().mean())


def _cleanlab(run: Run, fashion: Path, device: torch.device) -> dict[str, np.ndarray]:
    """cleanlab's scores from out-of-sample probabilities, each fold at the epoch of its best held-out accuracy."""
    from cleanlab.rank import get_label_quality_scores

    n = DATA[run.data].images
    probabilities, whole = np.zeros((n, CLASSES)), load(run, fashion, device)
    for fold in range(FOLDS):
        part = slice(n * fold // FOLDS, n * (fold + 1) // FOLDS)
        training = _HeldOut(run, load(run, fashion, device, part))
        best = -1.0
        for _ in range(training.data.epochs):
            accuracy = float(training.epoch()["held_out_accuracy"])  # type: ignore[arg-type]
            if accuracy > best:
                best = accuracy
                probabilities[part] = training.logits(training.images.held_out_x).double().softmax(1).cpu().numpy()
    flipped, out = whole.flipped.cpu(), {}
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        scores = -torch.from_numpy(
            get_label_quality_scores(whole.labels.cpu().numpy(), probabilities, method=method).copy()
        )
        out[f"auroc_{method}"] = np.array(auroc(scores, flipped))
        out[f"precision_{method}"] = np.array(precision(scores, flipped))
    return out
