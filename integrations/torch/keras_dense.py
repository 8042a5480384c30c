"""Keras 3 on its PyTorch backend: a Dense layer, made to look like a linear one.

Keras calls its layers past PyTorch's hooks. So while a Dense layer is watched, its `call` runs a module of ours that computes
the same by the same operations, and that the probe can be put on; the activation is applied after it. The `call` is in the
layer's own `__dict__`, which neither Keras's configuration nor a pickle or copy of the model carries.
"""

from collections.abc import Iterator
from typing import Any

import keras
from torch import Tensor, nn

from gwa_logging.errors import HeadNotFoundError
from gwa_logging.integrations.torch.head_layers import Linear


class Dense(nn.Linear):
    """What a Dense layer computes before its activation."""

    dense: Any
    """The layer."""

    def __init__(self, dense: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__["dense"] = dense  # not as a submodule: parameters and buffers stay where they are
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
        """Those of the Dense layer."""
        yield from self.dense.parameters()

    def forward(self, input: Tensor) -> Tensor:
        dense = self.dense
        products = keras.ops.matmul(input, dense.kernel)
        return products if dense.bias is None else keras.ops.add(products, dense.bias)  # type: ignore[no-any-return]

    def watched_layer(self) -> "DenseLayer":
        """The layer for a probe; from now on the Dense layer runs this module."""
        return DenseLayer(self)


class DenseLayer(Linear):
    """A Dense layer, which runs its stand-in until `close`."""

    def __init__(self, products: Dense) -> None:
        super().__init__(products, products.out_features, products.in_features)
        dense = products.dense

        def call(inputs: Any, training: bool | None = None) -> Any:
            logits = products(inputs)
            return logits if dense.activation is None else dense.activation(logits)

        self._dense, self._call = dense, call
        dense.__dict__["call"] = call

    def close(self) -> None:
        """Has the Dense layer run by itself again."""
        if self._dense.__dict__.get("call") is self._call:
            del self._dense.__dict__["call"]


def find_dense(model: Any, wanted: Any = None) -> tuple[str, Dense, str]:
    """The classifier head of a Keras model: its path, what the probe is put on, and why it is the one.

    Args:
        model: a `keras.Model`, built.
        wanted: name or path of a Dense layer, or the layer itself; None walks back from the model's output.

    Raises:
        HeadNotFoundError: there is no such layer, or not one Dense layer that makes the output.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    lines = [f"{layer.path!r}: Dense {layer.kernel.shape if layer.built else '(not built)'}" for layer in layers]
    if wanted is not None:
        found = [layer for layer in layers if layer is wanted or wanted in (layer.path, layer.name)]
        why = "named by head="
    else:
        if not getattr(model, "outputs", None):
            raise HeadNotFoundError(
                f"{type(model).__name__} has no graph from its inputs to its output (a subclass, or not built yet).",
                lines,
            )
        found, why = _makers(model.outputs), "the output comes from it"
    if len(found) != 1 or (refused := _refusal(found[0])):
        what = ", ".join(repr(maker.path) for maker in found) or "nothing"
        reason = refused if len(found) == 1 else f"found {len(found)} of them"
        raise HeadNotFoundError(f"the head of {model.name!r} should be one Dense layer; found {what}: {reason}.", lines)
    return found[0].path, Dense(found[0]), why


def _refusal(layer: Any) -> str | None:
    """Why a layer cannot be the head; None if it can."""
    if not isinstance(layer, keras.layers.Dense) or type(layer).call is not keras.layers.Dense.call:
        return f"{type(layer).__name__} is no Dense layer, or has a call of its own"
    if not layer.built:
        return "it has no shape yet: build the model first"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return "its kernel is adapted (LoRA) or quantised"
    return None


def _makers(outputs: Any) -> list[Any]:
    """The layers with weights that come first on the way back from the outputs."""
    found: list[Any] = []
    todo = list(keras.tree.flatten(outputs))
    while todo:
        operation, node, index = todo.pop()._keras_history
        if getattr(operation, "outputs", None) and operation._inbound_nodes and hasattr(operation, "layers"):
            todo.append(operation.outputs[index])  # a model inside of the model
        elif getattr(operation, "weights", None):
            found.append(operation)
        elif operation._inbound_nodes:
            todo.extend(operation._inbound_nodes[node].input_tensors)
    return list({id(maker): maker for maker in found}.values())
