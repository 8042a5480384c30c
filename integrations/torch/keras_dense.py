"""Keras 3 on its PyTorch backend: presents a Dense layer as a linear layer.

Keras does not run PyTorch's hooks when it calls its layers. So while a Dense layer is watched, its `call` runs a stand-in that
computes the same by the same operations and has the probe's hooks; then it applies the activation. This `call` is in the
layer's `__dict__`, which is not part of Keras's configuration, nor of a pickle or copy of the model.
"""

from collections.abc import Iterator
from typing import Any

import keras
from torch import Tensor, nn

from gwa_logging.errors import HeadNotFoundError
from gwa_logging.integrations.torch.head_layers import Linear


class Dense(nn.Linear):
    """The stand-in: computes the output of a Dense layer before its activation."""

    dense: Any
    """The Dense layer."""

    def __init__(self, dense: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__["dense"] = dense  # not a submodule, so parameters and buffers stay where they are
        self.in_features, self.out_features = dense.kernel.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """float [C, D]."""
        return self.dense.kernel.value.mT  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """float [C]."""
        return None if self.dense.bias is None else self.dense.bias.value

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the Dense layer."""
        yield from self.dense.parameters()

    def forward(self, input: Tensor) -> Tensor:
        dense = self.dense
        products = keras.ops.matmul(input, dense.kernel)
        return products if dense.bias is None else keras.ops.add(products, dense.bias)  # type: ignore[no-any-return]

    def watched_layer(self) -> "DenseLayer":
        """The layer for a probe. Its Dense layer runs this module from now on."""
        return DenseLayer(self)


class DenseLayer(Linear):
    """A Dense layer that runs its stand-in until `close`."""

    def __init__(self, products: Dense) -> None:
        super().__init__(products, products.out_features, products.in_features)
        dense = products.dense

        def call(inputs: Any, training: bool | None = None) -> Any:
            logits = products(inputs)
            return logits if dense.activation is None else dense.activation(logits)

        self._dense, self._call = dense, call
        dense.__dict__["call"] = call

    def close(self) -> None:
        """Restores the Dense layer's own `call`."""
        if self._dense.__dict__.get("call") is self._call:
            del self._dense.__dict__["call"]


def find_dense(model: Any, wanted: Any = None) -> tuple[str, Dense, str]:
    """The classifier head of a Keras model: its path, the stand-in for the probe, and the reason why it was chosen.

    Args:
        model: a `keras.Model`, built.
        wanted: name or path of a Dense layer, or the layer itself; None walks back from the model's output.

    Raises:
        HeadNotFoundError: the layer is unknown, or the output does not come from exactly one Dense layer.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    descriptions = [f"{layer.path!r}: Dense {layer.kernel.shape if layer.built else '(not built)'}" for layer in layers]
    if wanted is not None:
        found = [layer for layer in layers if layer is wanted or wanted in (layer.path, layer.name)]
        why = "named by head="
    else:
        if not getattr(model, "outputs", None):
            raise HeadNotFoundError(
                f"{type(model).__name__} has no graph from its inputs to its output (a subclass, or not built yet).",
                descriptions,
            )
        found, why = _producers(model.outputs), "the output comes from it"
    if len(found) != 1 or (refused := _refusal(found[0])):
        what = ", ".join(repr(layer.path) for layer in found) or "nothing"
        reason = refused if len(found) == 1 else f"found {len(found)} of them"
        raise HeadNotFoundError(
            f"the head of {model.name!r} should be one Dense layer; found {what}: {reason}.", descriptions
        )
    return found[0].path, Dense(found[0]), why


def _refusal(layer: Any) -> str | None:
    """Why a layer cannot be the head; None if it can."""
    if not isinstance(layer, keras.layers.Dense) or type(layer).call is not keras.layers.Dense.call:
        return f"{type(layer).__name__} is not a Dense layer, or overrides call"
    if not layer.built:
        return "it has no shape yet: build the model first"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return "its kernel is adapted (LoRA) or quantised"
    return None


def _producers(outputs: Any) -> list[Any]:
    """The last layers with weights before the outputs."""
    found: list[Any] = []
    todo = list(keras.tree.flatten(outputs))
    while todo:
        operation, node, index = todo.pop()._keras_history
        if getattr(operation, "outputs", None) and operation._inbound_nodes and hasattr(operation, "layers"):
            todo.append(operation.outputs[index])  # a nested model
        elif getattr(operation, "weights", None):
            found.append(operation)
        elif operation._inbound_nodes:
            todo.extend(operation._inbound_nodes[node].input_tensors)
    return list({id(layer): layer for layer in found}.values())
