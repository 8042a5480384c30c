"""What the probe needs of the autograd graph: a hook, and whether a backward pass computes the gradient of the weight."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_will_execute = torch._C._will_engine_execute_node


def register_gradient_hook(tensor: Tensor, node: Any, hook: Callable[[Tensor], None]) -> None:
    """`Tensor.register_hook` without its handle, which takes three times as long: it is in every training step.

    Args:
        tensor: whose gradient the hook receives.
        node: its node in the autograd graph.
        hook: the hook.
    """
    if type(tensor) is not Tensor or node is None or tensor._backward_hooks is not None:
        tensor.register_hook(hook)
        return
    hooks: OrderedDict[object, Callable[[Tensor], None]] = OrderedDict({hook: hook})
    tensor._backward_hooks = hooks  # type: ignore[assignment]
    node._register_hook_dict(tensor)


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
