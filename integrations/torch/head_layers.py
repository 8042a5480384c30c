"""The kinds of layers that can be a classifier head, and how each kind computes the terms of the score.

A linear layer maps every row of [..., D] to [..., C], and every row is a sample, unless the loss pools the rows of an input
(see `units`). A 1x1 convolution does the same at every position of an image, but its sample is the image. The gradient of the
weight is then a sum over the positions, sum_p delta_p h_p^T, which does not have rank one; its norm is the ghost norm:

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

from gwa_logging.integrations.torch.module_patch import ModulePatch, unchecked
from gwa_logging.integrations.torch.scores import (
    Terms,
    at_least_float32,
    flat,
    row_norms,
    terms_by_embeddings,
    terms_by_logits,
    without_bias,
)

_NUMPY_ARGMAX_FROM = 2**14
"""Number of logits from which NumPy's argmax on the CPU is faster than PyTorch's, up to ten times."""


class Linear:
    """A linear layer: [..., D] to [..., C].

    Attributes:
        module: the layer.
        classes, features: C and D.
        taps_input: True if the numerator is (dL/dh) . h, which needs no logits: if they are wider than the embeddings.
        pools_rows: True if an input with several rows is one sample.
    """

    terms_by_embeddings = staticmethod(terms_by_embeddings)
    without_bias = staticmethod(without_bias)

    def __init__(self, module: nn.Module, classes: int, features: int) -> None:
        self._module = weakref.ref(module)
        self.classes = classes
        self.features = features
        self.taps_input = classes > features and not _parametrised(module)
        self.pools_rows = False
        self._computed: Tensor | None = (
            None  # a parametrised weight, from the forward pass to the end of the layer's call
        )
        self._patch: Callable[[], ModulePatch | None] = lambda: None
        if _parametrised(module):
            parametrization: Any = module.parametrizations["weight"]  # type: ignore[index]
            self._patch = weakref.ref(ModulePatch(parametrization, after=self._keep_computed))

    def __str__(self) -> str:
        return f"{self.features} features, {self.classes} classes"

    @property
    def module(self) -> nn.Module:
        """The layer, of which only a weak reference is held."""
        module = self._module()
        assert module is not None
        return module

    def _keep_computed(self, module: nn.Module, args: Any, kwargs: Any, weight: Tensor) -> None:
        if torch.is_grad_enabled():
            unchecked(self._swap_computed, weight)

    def _swap_computed(self, computed: Tensor | None) -> Tensor | None:
        before, self._computed = self._computed, computed
        return before

    def close(self) -> None:
        """Removes the hook from a parametrised weight."""
        patch = self._patch()
        if patch is not None:
            patch.remove()

    def weight(self, module: nn.Module) -> Tensor:
        """The weight that the last forward pass used. Computing a parametrised weight again might change it.

        Args:
            module: the layer, or a replica of it.
        """
        if "parametrizations" not in module._modules:
            return module.weight  # type: ignore[return-value]
        computed = unchecked(self._swap_computed, None)
        return _evaluated(module) if computed is None else computed

    def pool_rows(self) -> None:
        """Makes each input [..., D] of [B, ..., D] one sample, whatever the number of its rows."""
        self.pools_rows = True
        self.taps_input = False  # the ghost norm needs delta and h together

    def terms_by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        """The terms of each sample, with the numerator delta . (z - b)."""
        if self.pools_rows and delta.ndim > 2:
            delta, logits, embeddings = (by_input(x, x.shape[0]) for x in (delta, logits, embeddings))
            return terms_of_inputs(delta, logits, embeddings, bias, weight_norm)
        return terms_by_logits(delta, logits, embeddings, bias, weight_norm)

    def rows(self, logits: Tensor) -> int:
        """The number of samples in the logits."""
        if self.pools_rows and logits.ndim > 2:
            return logits.shape[0]
        return logits.numel() // self.classes if self.classes else 0

    def predicted(self, logits: Tensor) -> Tensor:
        """int64 [rows]: the class of the largest logit of each sample, or of the sum of its rows' logits."""
        if self.pools_rows and logits.ndim > 2:
            return by_input(logits.detach(), logits.shape[0]).sum(1).argmax(-1)
        is_long = (
            logits.numel() >= _NUMPY_ARGMAX_FROM and logits.is_cpu and logits.dtype in (torch.float32, torch.float64)
        )
        if is_long and type(logits) is Tensor and not is_compiling():
            return flat(torch.from_numpy(logits.detach().numpy().argmax(-1)))
        return flat(logits.argmax(-1))

    def logits(self, embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, computed again."""
        return nn.functional.linear(embeddings, weight, bias)

    def delta_norms(self, delta: Tensor) -> Tensor:
        """float32 [rows]: |delta|, which is kept until the gradient of the embeddings arrives."""
        return flat(row_norms(delta))


def by_input(x: Tensor, inputs: int) -> Tensor:
    """float32 [inputs, positions, K] of [inputs, ..., K] or [inputs * positions, K]; float64 if the input is."""
    return at_least_float32(x).reshape(inputs, -1, x.shape[-1])


def ghost_norms(delta: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """|delta| of each input, and the factor that makes it the norm of the input's gradient, in place of |h|: [inputs] each.

    Args:
        delta: [inputs, positions, C].
        embeddings: [inputs, positions, D].
    """
    delta_norms = torch.linalg.vector_norm(delta, dim=(1, 2))
    if delta.shape[1] ** 2 <= delta.shape[2] * embeddings.shape[2]:
        norms = ((delta @ delta.mT) * (embeddings @ embeddings.mT)).sum((1, 2)).clamp(min=0).sqrt()
    else:
        norms = torch.linalg.vector_norm(delta.mT @ embeddings, dim=(1, 2))
    return delta_norms, torch.where(delta_norms > 0, norms / delta_norms, 1.0)


def terms_of_inputs(
    delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
) -> Terms:
    """The terms of inputs with several rows each, of [inputs, positions, K]."""
    product = (delta * (logits if bias is None else logits - bias)).sum((1, 2))
    return Terms(product, *ghost_norms(delta, embeddings), weight_norm)


class Pointwise(Linear):
    """A 1x1 convolution: [B, D, ...] to [B, C, ...]. A sample is an image."""

    def __init__(self, module: nn.Module, classes: int, features: int) -> None:
        super().__init__(module, classes, features)
        self.pool_rows()

    def terms_by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        delta, logits, embeddings = (at_least_float32(x).flatten(2).mT for x in (delta, logits, embeddings))
        return terms_of_inputs(delta, logits, embeddings, bias, weight_norm)

    @staticmethod
    def without_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
        return without_bias(logits, None if bias is None else bias.view(-1, *(1,) * (logits.ndim - 2)))

    def rows(self, logits: Tensor) -> int:
        return logits.shape[0]

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.detach().flatten(2).sum(2).argmax(-1)

    def logits(self, embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = (-1, *(1,) * (embeddings.ndim - 2))
        out = torch.einsum("cd,bd...->bc...", weight.flatten(1), embeddings)
        return out if bias is None else out + bias.view(shape)


def refused_kind(module: nn.Module) -> str | None:
    """Why a module is not of a kind that can be a head; None if it is."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{kind} overrides forward, so it may not be linear in its input"
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        is_padded = not isinstance(module.padding, str) and any(module.padding)  # "same" and "valid" add nothing to 1x1
        if {*module.kernel_size, *module.stride, module.groups} != {1} or is_padded:
            how = f"kernel {module.kernel_size}, stride {module.stride}, {module.groups} groups"
            return f"{kind} is not a 1x1 convolution: {how}"
    else:
        return f"{kind} is neither a linear layer nor a 1x1 convolution"
    weight = next(iter(module.parametrizations["weight"].parameters())) if _parametrised(module) else module.weight  # type: ignore[index,union-attr]
    if not weight.is_floating_point():
        return f"{kind} has a weight of {weight.dtype}: packed, quantised and complex weights are not supported"
    return None


def layer_of(module: nn.Module) -> Linear:
    """The head's layer. The module must not be refused by `refused_kind`."""
    make = getattr(type(module), "watched_layer", None)  # a stand-in for another library's layer has this method
    if make is not None:
        return make(module)  # type: ignore[no-any-return]
    features, classes = sizes_of(module)
    return (Linear if isinstance(module, nn.Linear) else Pointwise)(module, classes, features)


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Number of features and of classes of a layer that is not refused by `refused_kind`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), refused_kind(module)
    return module.in_channels, module.out_channels


def shape_of(module: nn.Module) -> str:
    """A layer's width as text, such as "64 -> 10"."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features", "in_channels", "out_channels")]
    return " -> ".join(str(size) for size in sizes if size is not None)


def _evaluated(module: nn.Module) -> Tensor:
    """A parametrised weight, computed in eval mode: in training mode computing it could change it."""
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
