"""The benchmark's training steps in PyTorch: bare, watched, and with each alternative that users could log instead."""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gwa_logging
from benchmarks.measuring import Group, Step
from benchmarks.models import TransformerBlock
from benchmarks.score_forms import published_scores

PER_SAMPLE_BYTES = 500e6
"""The largest B x C x D tensor of per-sample gradients that is computed."""

BACKENDS = ("wandb", "mlflow", "tensorboard", "trackio")


class Work(NamedTuple):
    """A model, the path of its head, and a batch."""

    model: nn.Module
    head: str
    x: Tensor
    y: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, D and C: samples, features and classes of the head."""
        classes, features = self.model.get_submodule(self.head).weight.shape  # type: ignore[union-attr]
        return len(self.y), features, classes


def mlp() -> Work:
    """About 1.5 ms per step on one core."""
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Work(model, "4", torch.randn(128, 128), torch.randint(0, 10, (128,)))


def cnn() -> Work:
    """About 50 ms per step on one core."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 100))
    return Work(model, "10", torch.randn(64, 3, 32, 32), torch.randint(0, 100, (64,)))


class Vit(nn.Module):
    """A few blocks of ViT-S on 32 x 32 images with patches of 4 x 4 pixels."""

    def __init__(self, layers: int = 4, width: int = 384) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.body = nn.Sequential(*(TransformerBlock(width, 6) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2) + self.positions).mean(1))  # type: ignore[no-any-return]


def vit() -> Work:
    """Four blocks of ViT-S; more classes than features."""
    return Work(Vit(), "head", torch.randn(4, 3, 32, 32), torch.randint(0, 1000, (4,)))


def tokens(words: int) -> Work:
    """128 tokens and a head with this number of words."""
    width = 128
    model = nn.Sequential(
        nn.Embedding(1024, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, words, bias=False)
    )
    return Work(model, "3", torch.randint(0, 1024, (128,)), torch.randint(0, words, (128,)))


def many_classes() -> Work:
    """128 samples and a head with 21,843 classes."""
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 21_843))
    return Work(model, "2", torch.randn(128, 256), torch.randint(0, 21_843, (128,)))


WORKS: dict[str, Callable[[], Work]] = {
    "MLP": mlp,
    "CNN": cnn,
    "ViT-S blocks": vit,
    "32k words": lambda: tokens(32_000),
    "128k words": lambda: tokens(128_000),
    "21,843 classes": many_classes,
}


class Alternatives:
    """Builds the steps of one model: bare, watched and with each alternative. Closes runs and monitors at the end."""

    def __init__(self, make: Callable[[], Work], compiled: bool, directory: str, backends: bool) -> None:
        self.make = make
        self.compiled = compiled
        self.directory = directory
        self.backends = backends
        self.wandb_run: Any = None
        self.monitors: list[gwa_logging.Monitor] = []

    def group(self) -> Group:
        """All steps of this model, with the reason for each alternative that is missing."""
        steps: dict[str, Step] = {"bare": self._step(), "again": self._step()}
        missing: dict[str, str] = {}
        shape = self.make().shape
        steps["watched"] = self._watched()
        steps["watched, ledger"] = self._watched(num_samples=1_000_000)
        steps["published form"] = self._published()
        if not self.compiled:
            if self.backends:
                for backend in BACKENDS:
                    steps[f"watched, {backend}"] = self._watched(backend=backend)
            for every in (1000, 100, 1):  # 1: every step logs
                steps[f"wandb.watch, {every}"] = self._wandb_watch(every)
            if 4 * math.prod(shape) > PER_SAMPLE_BYTES:
                missing["torch.func"] = missing["BackPACK"] = "B x C x D is too large"
            else:
                steps["torch.func"] = self._per_sample()
                if importlib.util.find_spec("backpack"):
                    steps["BackPACK"] = self._backpack()
                else:
                    missing["BackPACK"] = "not installed"
        return Group(steps, self._check, missing, shape)

    def _check(self) -> None:
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.finish()
            wandb.run = None
        for monitor in self.monitors:
            monitor.close()
            assert monitor.history, "a watched step was not seen"
            assert not monitor.faults, monitor.faults

    def _work(self) -> Work:
        torch.manual_seed(0)
        return self.make()

    def _step(
        self, work: Work | None = None, before: Step | None = None, after: Callable[[Tensor], None] | None = None
    ) -> Step:
        """A training step.

        Args:
            before: called before the forward pass.
            after: called with the logits after the optimizer step.
        """
        model, _, x, y = work if work is not None else self._work()
        run = torch.compile(model, fullgraph=True) if self.compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        criterion = nn.CrossEntropyLoss()

        def step() -> None:
            if before is not None:
                before()
            logits = run(x)
            criterion(logits, y).backward()
            optimizer.step()
            if after is not None:
                after(logits)
            optimizer.zero_grad()

        return step

    def _watched(self, **settings: Any) -> Step:
        work = self._work()
        monitor = gwa_logging.watch(work.model, head=work.head, directory=self.directory, **settings)
        self.monitors.append(monitor)
        ids = torch.arange(len(work.y)) * 1000
        return self._step(work, before=(lambda: monitor.tag(ids)) if "num_samples" in settings else None)

    def _published(self) -> Step:
        work = self._work()
        head = work.model.get_submodule(work.head)
        kept: list[Tensor] = []

        class Returning(nn.Module):
            """Also returns the embeddings, as the published code does."""

            def __init__(self) -> None:
                super().__init__()
                self.model = work.model
                self.seen: Any = None
                head.register_forward_pre_hook(self._see)

            def _see(self, module: nn.Module, args: Any) -> None:
                self.seen = args[0]

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                logits = self.model(x)
                return logits, self.seen

        returning = Returning()
        run = torch.compile(returning) if self.compiled else returning
        score = torch.compile(published_scores) if self.compiled else published_scores
        optimizer = torch.optim.SGD(work.model.parameters(), lr=1e-3, momentum=0.9)
        criterion = nn.CrossEntropyLoss()

        def step() -> None:
            logits, h = run(work.x)
            criterion(logits, work.y).backward()
            optimizer.step()
            with torch.no_grad():
                kept.append(score(logits.detach(), h.detach(), head.weight.detach(), work.y))
            optimizer.zero_grad()

        return step

    def _wandb_watch(self, every: int) -> Step:
        import wandb

        work = self._work()
        if self.wandb_run is None:
            # One run for all steps: the hooks always log to the active run. A plain init() would return the library's own run.
            options = {"mode": "offline", "dir": self.directory}
            self.wandb_run = wandb.run = wandb.init(project="bench", reinit="create_new", **options)
        self.wandb_run.watch(work.model, log="gradients", log_freq=every)
        return self._step(work)

    def _per_sample(self) -> Step:
        """Per-sample gradients of the head alone by torch.func, which is its cheapest use."""
        from torch.func import grad, vmap

        work = self._work()
        head = work.model.get_submodule(work.head)
        kept: list[Tensor] = []
        seen: list[Tensor] = []
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))

        def loss(weight: Tensor, bias: Tensor | None, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, weight, bias), y)

        gradients = vmap(grad(loss), (None, None, 0, 0))

        def after(_: Tensor) -> None:
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
            grads = gradients(weight, bias, seen.pop(), work.y)
            kept.append(-(grads * weight).sum((1, 2)) / (grads.flatten(1).norm(dim=1) * weight.norm()))

        return self._step(work, after=after)

    def _backpack(self) -> Step:
        """Per-sample gradients of the head alone by BackPACK."""
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        work = self._work()
        head = extend(work.model.get_submodule(work.head))
        criterion = extend(nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(work.model.parameters(), lr=1e-3, momentum=0.9)
        kept: list[Tensor] = []

        def step() -> None:
            with backpack(BatchGrad()):
                criterion(work.model(work.x), work.y).backward()
            optimizer.step()
            weight, grads = head.weight.detach(), head.weight.grad_batch
            kept.append(-(grads * weight).sum((1, 2)) / (grads.flatten(1).norm(dim=1) * weight.norm()))
            optimizer.zero_grad()

        return step


def groups(directory: str, names: list[str]) -> dict[str, Callable[[], Group]]:
    """Functions that build the steps of each model, eager and compiled, by name."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{directory}/mlflow.db")
    os.environ.setdefault("TRACKIO_DIR", f"{directory}/trackio")
    return {
        f"PyTorch {name}{', compiled' * compiled}": Alternatives(
            WORKS[name], compiled, directory, backends=name in ("MLP", "CNN")
        ).group
        for compiled in (False, True)
        for name in names
    }
