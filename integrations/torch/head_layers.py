"""What a classifier head can be, and its part in the score: small functions for each kind of layer.

A linear layer maps every row of [..., D] to [..., C], and every row is a sample. A convolution with a kernel of one is the
same at every position of an image, but its sample is the image: the gradient of the weight is a sum over the positions,
sum_p delta_p h_p^T, which is not rank one, and its norm is the ghost norm:

    |sum_p delta_p h_p^T|^2 = sum_pq (delta_p . delta_q) (h_p . h_q)

Source: Goodfellow, "Efficient per-example gradient computations", 2015, for one position; Li et al., "Large language models
can be strong differentially private learners", 2021, for many.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from gwa_logging.integrations.torch.accumulate import Terms
from gwa_logging.integrations.torch.module_patch import ModulePatch, unchecked

_WIDE = (torch.float32, torch.float64)
"""Types whose squares are added up as they are. To name a type costs a microsecond; a step without need is spared it."""


_MANY = 2**14
"""Numbers from which NumPy's argmax is the quicker one on the CPU, up to ten times."""


class Linear:
    """A linear layer: [..., D] to [..., C].

    Attributes:
        module: the layer.
        classes, features: C and D.
        taps_input: whether the score is taken by -(dL/dh) . h, which needs no logits: if they are wider than the embeddings.
    """

    def __init__(self, module: nn.Module, classes: int, features: int) -> None:
        self._module = weakref.ref(module)
        self.classes = classes
        self.features = features
        self.taps_input = classes > features and not _parametrised(module)
        self._computed: Tensor | None = None
        self._attachment: Callable[[], ModulePatch | None] = lambda: None
        if _parametrised(module):
            parametrization: Any = module.parametrizations["weight"]  # type: ignore[index]
            self._attachment = weakref.ref(ModulePatch(parametrization, after=self._keep))

    def __str__(self) -> str:
        return f"{self.features} features, {self.classes} classes"

    @property
    def module(self) -> nn.Module:
        """The layer, which is not kept alive by this."""
        module = self._module()
        assert module is not None
        return module

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, weight: Tensor) -> None:
        if torch.is_grad_enabled():
            unchecked(self._exchange, weight)

    def _exchange(self, computed: Tensor | None) -> Tensor | None:
        before, self._computed = self._computed, computed
        return before

    def close(self) -> None:
        """Takes the hook off a parametrised weight."""
        attachment = self._attachment()
        if attachment is not None:
            attachment.remove()

    def weight(self, module: nn.Module) -> Tensor:
        """The weight of the forward pass that has just been: of a parametrised one, reading it anew might change it.

        Args:
            module: the layer, or a replica of it.
        """
        if "parametrizations" not in module._modules:
            return module.weight  # type: ignore[return-value]
        computed = unchecked(self._exchange, None)
        return _evaluated(module) if computed is None else computed

    def rows(self, logits: Tensor) -> int:
        """How many samples are in there."""
        return logits.numel() // self.classes if self.classes else 0

    def predicted(self, logits: Tensor) -> Tensor:
        """int64 [rows]: the class of the largest logit of each sample."""
        logits = logits.detach()
        is_long = logits.numel() >= _MANY and logits.is_cpu and logits.dtype in _WIDE
        if is_long and type(logits) is Tensor and not is_compiling():
            return flat(torch.from_numpy(logits.numpy().argmax(-1)))
        return flat(logits.argmax(-1))

    def logits(self, embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, computed again."""
        return nn.functional.linear(embeddings, weight, bias)

    def by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        """The terms of the scores by -delta . (z - b)."""
        delta, logits = wide(delta), wide(logits)
        product = torch.linalg.vecdot(delta, logits if bias is None else logits - bias)
        return Terms(flat(product), flat(norms(delta)), flat(norms(embeddings)), weight_norm)

    def by_input(self, delta: Tensor) -> Tensor:
        """What must be kept of delta until the gradient of the embeddings comes: |delta|, float32 [rows]."""
        return flat(norms(delta))

    def by_input_terms(self, kept: Tensor, grad: Tensor, embeddings: Tensor, weight_norm: Tensor) -> Terms:
        """The terms of the scores by -(dL/dh) . h."""
        return Terms(
            flat(torch.linalg.vecdot(wide(grad), wide(embeddings))), kept, flat(norms(embeddings)), weight_norm
        )


class Pointwise(Linear):
    """A convolution whose kernel is one wide: [B, D, ...] to [B, C, ...]; a sample is an image."""

    def __init__(self, module: nn.Module, classes: int, features: int) -> None:
        super().__init__(module, classes, features)
        self.taps_input = False  # the ghost norm needs delta and h together

    def rows(self, logits: Tensor) -> int:
        return logits.shape[0]

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.detach().flatten(2).sum(2).argmax(-1)

    def logits(self, embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = (-1, *(1,) * (embeddings.ndim - 2))
        out = torch.einsum("cd,bd...->bc...", weight.flatten(1), embeddings)
        return out if bias is None else out + bias.view(shape)

    def by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        delta, logits, embeddings = (
            wide(x).flatten(2) for x in (delta, logits, embeddings)
        )  # [B, channels, positions]
        product = (delta * (logits if bias is None else logits - bias[:, None])).sum((1, 2))
        delta_norms = torch.linalg.vector_norm(delta, dim=(1, 2))
        positions = delta.shape[-1]
        if positions**2 <= self.classes * self.features:
            ghost = ((delta.mT @ delta) * (embeddings.mT @ embeddings)).sum((1, 2)).clamp(min=0).sqrt()
        else:
            ghost = torch.linalg.vector_norm(delta @ embeddings.mT, dim=(1, 2))
        # Of what would be |h| if there were one position: the ghost norm per |delta|.
        embedding_norms = torch.where(delta_norms > 0, ghost / delta_norms, 1.0)
        return Terms(product, delta_norms, embedding_norms, weight_norm)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be a head; None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{kind} has a forward of its own, so it is not known to be linear in its input"
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if {*module.kernel_size, *module.stride, module.groups} != {1} or set(module.padding) - {0, *"valid"}:
            how = f"kernel {module.kernel_size}, stride {module.stride}, {module.groups} groups"
            return f"{kind} is no 1x1 convolution: {how}"
    else:
        return f"{kind} is neither a linear layer nor a 1x1 convolution"
    weight = next(iter(module.parametrizations["weight"].parameters())) if _parametrised(module) else module.weight  # type: ignore[index,union-attr]
    if not weight.is_floating_point():
        return f"{kind} has a weight of {weight.dtype}: packed, quantised and complex weights are not read"
    return None


def layer_of(module: nn.Module) -> Linear:
    """A head's layer; the module must not be refused."""
    make = getattr(type(module), "watched_layer", None)  # of a module of ours that stands for another library's layer
    if make is not None:
        return make(module)  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear):
        return Linear(module, module.out_features, module.in_features)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), refusal(module)
    return Pointwise(module, module.out_channels, module.in_channels)


def shape_of(module: nn.Module) -> str:
    """A layer's width, for people."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features", "in_channels", "out_channels")]
    return " -> ".join(str(size) for size in sizes if size is not None)


def _evaluated(module: nn.Module) -> Tensor:
    """A parametrised weight, computed anew as in evaluation: in training mode that could change it."""
    training = [part for part in module.parametrizations.modules() if part.training]  # type: ignore[union-attr]
    for part in training:
        part.training = False
    try:
        return module.weight  # type: ignore[return-value]
    finally:
        for part in training:
            part.training = True


def _parametrised(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def wide(x: Tensor) -> Tensor:
    """In float32, if it is narrower."""
    return x.float() if x.dtype.itemsize < 4 else x


def norms(x: Tensor) -> Tensor:
    """float32 [...] of [..., K]: Euclidean norms over the last dimension; float64 of float64."""
    if x.dtype in _WIDE:
        return torch.linalg.vector_norm(x, dim=-1)  # type: ignore[no-any-return]
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)  # type: ignore[no-any-return]


def norm(x: Tensor) -> Tensor:
    """float32 []: Euclidean (Frobenius) norm of everything; float64 of float64."""
    if x.dtype in _WIDE:
        return torch.linalg.vector_norm(x)  # type: ignore[no-any-return]
    return torch.linalg.vector_norm(x, dtype=torch.float32)  # type: ignore[no-any-return]


def flat(x: Tensor) -> Tensor:
    """[rows] of [...]."""
    return x if x.ndim == 1 else x.reshape(-1)
