"""The census's models of timm and torchvision, and what they share with those of transformers: random weights, tiny inputs."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 7
"""Number of classes; no other layer of a tiny model has this width."""

BATCH = 4
LIMIT = 300_000_000
"""Parameters of the largest model that is built."""


class Member(NamedTuple):
    """One model of a library, not yet built.

    Attributes:
        library, family: how the page counts it.
        name: its name in the library.
    """

    library: str
    family: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}/{self.family}"


class Subject(NamedTuple):
    """A model that has been built.

    Attributes:
        model: in training mode.
        loss: runs a forward pass and returns the loss.
        logits: runs a forward pass on the same input and returns the logits.
        heads: the paths of the layers that the library declares to be the classifier.
        source: where the library declares them.
        input_shape: the shape of the input, for the page.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    logits: Callable[[], Tensor]
    heads: list[str]
    source: str
    input_shape: str


def declare_torchvision() -> None:
    """Declares torchvision's operators by name, so that it can be imported where its binaries cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    _operator_libraries.append(library)


_operator_libraries: list[Any] = []  # a library that is garbage-collected removes its operators


def is_layer(module: nn.Module) -> bool:
    """Returns True for a linear layer or a 1x1 convolution. Does not use the code that the census judges."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


def width(module: nn.Module) -> int:
    """Number of outputs of a layer."""
    return int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))


def layers_in(model: nn.Module, part: str) -> list[str]:
    """The paths of the layers with as many outputs as there are classes, in a part of a model."""
    inside = dict(model.named_modules())
    if part not in inside:
        return []
    layers = [path for path, module in inside[part].named_modules(prefix=part) if is_layer(module)]
    return [path for path in layers if width(inside[path]) == CLASSES]


def cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B, C] or [B, T, C] with fixed labels."""
    logits = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_members(module: str) -> list[Member]:
    """The smallest model of every class and kind of classifier in one of timm's modules."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models(module=module):
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=CLASSES)
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            smallest[f"{name}: {type(error).__name__}"] = (0, name)
            continue
        size = sum(p.numel() for p in model.parameters())
        head = model.get_classifier() if hasattr(model, "get_classifier") else None
        parts = head if isinstance(head, tuple | list | nn.ModuleList) else [head]
        family = f"{module}.{type(model).__name__}: {', '.join(type(part).__name__ for part in parts)}"
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [Member("timm", family, name) for family, (_, name) in sorted(smallest.items())]


SHALLOW = {"deepseek_vit": {"depth": 2}}
"""Options for families whose smallest model is large: fewer layers."""


def timm_subject(name: str) -> Iterator[Subject]:
    """A timm model with ever larger inputs, from the smallest on."""
    import timm

    native = timm.get_pretrained_cfg(name)
    shallow = next((options for family, options in SHALLOW.items() if name.startswith(family)), {})
    sizes = [size for size in (64, 84, 96, 128, 160, 192, 224, 256) if native is None or size < native.input_size[-1]]
    for size in [*sizes, None]:
        for options in [{"img_size": size}, {}] if size else [{}]:
            try:
                model = timm.create_model(name, num_classes=CLASSES, **options, **shallow)
            except TypeError:
                continue
            channels, *native_size = model.default_cfg["input_size"]
            input_shape = (BATCH, channels, *([size, size] if size else native_size))
            x = torch.randn(input_shape)
            declared = model.default_cfg.get("classifier")
            declared = [declared] if isinstance(declared, str) else list(declared or ())

            def logits(model: nn.Module = model, x: Tensor = x) -> Tensor:
                out = model(x)
                return sum(out) / len(out) if isinstance(out, tuple | list) else out  # distilled, in training

            yield Subject(
                model,
                lambda f=logits: cross_entropy(f()),
                logits,
                [path for part in declared for path in layers_in(model, part)],
                f"default_cfg['classifier'] = {declared}",
                str(input_shape),
            )


# --- torchvision ------------------------------------------------------------------------------------------------------

TORCHVISION = ("fc", "classifier", "head", "heads.head")
"""Attributes with the classifier in torchvision's models; in a Sequential it is the last layer."""


def torchvision_members() -> list[Member]:
    """The smallest model of every class that classifies images or videos."""
    import torchvision
    from torchvision.models import quantization, video

    smallest: dict[str, tuple[int, str]] = {}
    for module in (torchvision.models, video, quantization):
        for name in torchvision.models.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = _torchvision(name)
            except NotImplementedError:  # computes its own widths with tensors
                model = _torchvision(name)
            family = f"{module.__name__.split('.')[-1]}.{type(model).__name__}"
            size = sum(p.numel() for p in model.parameters())
            smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [Member("torchvision", family, name) for family, (_, name) in sorted(smallest.items())]


def _torchvision(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"init_weights": False} if re.search("googlenet|inception", name) else {}
    if name.startswith("quantized"):
        options["quantize"] = False
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def torchvision_subject(name: str) -> Iterator[Subject]:
    """A torchvision model with ever larger inputs, from the smallest on."""
    from torchvision import models

    video = name in models.list_models(module=models.video)
    for size in (64, 96, 112, 128, 224, 299):
        model = _torchvision(name)
        input_shape = (BATCH, 3, 16, size, size) if video else (BATCH, 3, size, size)
        x = torch.randn(input_shape)
        heads = [found[-1] for part in TORCHVISION if (found := layers_in(model, part))]

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            out = model(x)
            if isinstance(out, Tensor):
                return cross_entropy(out)
            return sum(cross_entropy(z) * (1.0 if i == 0 else 0.4) for i, z in enumerate(out) if z is not None)

        def logits(model: nn.Module = model, x: Tensor = x) -> Tensor:
            out = model(x)
            return out if isinstance(out, Tensor) else out[0]

        yield Subject(model, loss, logits, heads, "torchvision's " + " | ".join(TORCHVISION), str(input_shape))
