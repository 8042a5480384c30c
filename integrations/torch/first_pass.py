"""Finds the head of a model that cannot be traced, in the autograd graph of its first training pass."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gwa_logging.integrations.torch.candidates import leaf_layers
from gwa_logging.integrations.torch.find_head import Head, choose_head
from gwa_logging.integrations.torch.graph_walk import autograd_producers
from gwa_logging.integrations.torch.module_patch import ModulePatch, is_tracing


class HeadCall(NamedTuple):
    """One call of a layer.

    Attributes:
        module, embeddings, output: the layer, its input and its output.
        node: the output's node in the autograd graph if the output has been changed in place since; else None.
    """

    module: nn.Module
    embeddings: Tensor
    output: Tensor
    node: Any = None


class FirstPass:
    """Hooks that record all calls of layers, until the first training pass has shown which layer is the head."""

    def __init__(
        self,
        model: nn.Module,
        found: Callable[[Head, list[HeadCall]], None],
        copied: Callable[[Any, nn.Module], None] | None = None,
    ) -> None:
        """Calls `found(head, calls)` after the first training pass, and `copied` as a `ModulePatch` does."""
        self._found = found
        self._model = weakref.ref(model)
        self._copied = copied
        self._patches: list[ModulePatch] = []
        self._is_done = False
        self._calls: dict[Any, HeadCall] = {}  # by the output's node in the autograd graph
        self.resume()

    def resume(self) -> None:
        """Registers the hooks if they are not. torch.jit.script cannot compile them, so they are removed for it."""
        model = self._model()
        if model is None or self._patches or self._is_done:
            return
        for layer in leaf_layers(model):
            self._patches.append(ModulePatch(layer, after=self._on_call, scripted=self.close))
        self._patches.append(ModulePatch(model, after=self._on_return, copied=self._copied, scripted=self.close))

    def _on_call(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        embeddings = args[0] if args else kwargs.get("input")
        if (
            torch.compiler.is_compiling()
            or is_tracing()
            or not (isinstance(output, Tensor) and isinstance(embeddings, Tensor))
        ):
            return
        if output.grad_fn is not None:
            self._calls[output.grad_fn] = HeadCall(layer, embeddings, output)

    def _on_return(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or is_tracing():
            return
        calls, self._calls = self._calls, {}
        producers = autograd_producers(output, {node: call.module for node, call in calls.items()})
        if producers is None:
            return
        self._is_done = True
        self.close()
        head = choose_head(producers, model, "the output of the first pass comes from it")
        # If an output was changed in place since, its gradient is not delta. The gradient of its former node is.
        own = ((node, call) for node, call in calls.items() if call.module is head.module)
        self._found(head, [call if call.output.grad_fn is node else call._replace(node=node) for node, call in own])

    def close(self) -> None:
        """Removes the hooks."""
        for patch in self._patches:
            patch.remove()
        self._patches = []
