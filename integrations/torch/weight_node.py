"""The autograd node of a head's weight: whether a backward pass computes the gradient of the weight."""

from typing import Any

import torch

_will_execute = torch._C._will_engine_execute_node


def weight_node(node: Any) -> Any:
    """The autograd node that accumulates the gradient of the head's weight, found from the node of its logits.

    None if the weight gets no gradient or the node is unknown. PyTorch's linear layers and convolutions have their parameters
    last.
    """
    edges: Any = () if node is None else node.next_functions
    while len(edges) == 1 and edges[0][0] is not None:  # the logits of [..., D] are a view of those of [rows, D]
        edges = edges[0][0].next_functions
    return edges[-1][0] if len(edges) > 1 else None


def is_executed(node: Any) -> bool:
    """Returns True if the running backward pass reaches a node, or if that is unknown.

    A pass that computes the gradients of other tensors only, by autograd.grad or backward(inputs=), does not.
    """
    if node is None:
        return True
    try:
        return _will_execute(node)
    except RuntimeError:  # the node is a leaf that autograd.grad was asked for, or the backward pass is compiled
        return True
