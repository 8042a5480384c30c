"""Walks back from a model's output, through operations without weights, to the layers that produced it.

Two graphs can be walked: the symbolic trace of `torch.fx`, for which nothing is run, and the autograd graph of a forward pass.
"""

import inspect
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gwa_logging.integrations.torch.distributed import WRAPPERS

Node = TypeVar("Node", bound=Hashable)
Producer = nn.Module | str
"""A module, or a phrase for something else that the output comes from."""

COSINE = (
    "a normalised vector (a cosine head): its scores would always be zero, since the output does not depend on the length of "
    "the weight"
)
_NORMALISING = {
    nn.functional.normalize,
    nn.functional.cosine_similarity,
    torch.cosine_similarity,
    torch.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    "norm",
}
_METADATA_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize", "nbytes"}
_METADATA_CALLS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "element_size"),
    *("new_zeros", "new_ones", "new_empty"),
    *(torch.numel, torch.zeros_like, torch.ones_like, torch.empty_like),
}
_USE_METADATA_OF_ARGUMENTS = {"view_as", "reshape_as", "expand_as", "type_as", "to"}


def describe_functional(shape: Sequence[int], name: str = "") -> str:
    """The phrase for a weight that is used without a layer."""
    weight = f"the parameter {name!r}" if name else "a weight"
    return f"{weight} ({' x '.join(map(str, shape))}) that is not called as a layer (F.linear on a parameter, a custom module)"


def walk_back(
    outputs: Iterable[Node],
    producer: Callable[[Node], Producer | None],
    sources: Callable[[Node], Iterable[Node]],
) -> list[Producer]:
    """Follows a graph from its outputs to their producers.

    Args:
        outputs: where to start.
        producer: the producer of a node, if the walk ends there; None continues it.
        sources: the nodes that a node was computed from.
    """
    found: list[Producer] = []
    todo, seen = list(outputs), set[Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        produced_by = producer(node)
        if produced_by is not None:
            found.append(produced_by)
        else:
            todo.extend(sources(node))
    return list(dict.fromkeys(found))


def logits_in(output: Any) -> Any:
    """The item or attribute `logits` of a model's output, if it has one; else the output."""
    if isinstance(output, fx.Node):
        return _logits_in_node(output)
    if isinstance(output, Mapping):
        return output.get("logits", output)
    named = not isinstance(output, Sequence | Tensor) or hasattr(output, "_fields")
    logits = getattr(output, "logits", None) if named else None
    return output if logits is None else logits


def _logits_in_node(node: fx.Node) -> Any:
    """The same in a symbolic trace, where a dataclass or named tuple is a call of its class."""
    if isinstance(node.target, type) and node.op == "call_function":
        names = [*getattr(node.target, "_fields", ()), *getattr(node.target, "__dataclass_fields__", ())]
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("logits", node)
    return node


# --- the symbolic trace -----------------------------------------------------------------------------------------------


def traced_producers(model: nn.Module, layers: Iterable[nn.Module]) -> list[Producer] | None:
    """The producers of the output in the symbolic trace; None if the model cannot be traced, or the trace is ambiguous.

    Args:
        model: the model, which is not changed.
        layers: the layers that are not traced into, and end the walk.
    """
    layers = list(layers)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled by torch.jit
        return None
    optional = {p.name: None for p in parameters if p.default is None}
    if all(p.default is not p.empty for p in parameters):
        return None  # without an argument there is nothing to trace
    without_optional = _producers(model, layers, optional)
    # A trace takes one branch of `if mask is None`, so tracing with all arguments must give the same producers.
    with_all = _producers(model, layers, {}) if optional else None
    if without_optional is None or with_all is None or set(with_all) == set(without_optional):
        return without_optional
    return None


def _producers(model: nn.Module, layers: list[nn.Module], known: dict[str, Any]) -> list[Producer] | None:
    with _unchanged(model):
        try:
            graph = _Tracer(layers).trace(model, known or None)
        except Exception:  # noqa: BLE001 - a forward may raise anything on symbols; it is not traceable
            return None
    modules, leaves = dict(model.named_modules()), set(layers)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def producer(node: fx.Node) -> Producer | None:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.CosineSimilarity):
                return COSINE
            return module if module in leaves else None
        if node.op == "get_attr":  # a buffer, a scale or an offset does not produce logits
            weight = parameters.get(str(node.target))
            return None if weight is None or weight.ndim < 2 else describe_functional(weight.shape, str(node.target))
        if node.op == "placeholder":
            return "the input"
        return COSINE if node.target in _NORMALISING else None

    output = next(node for node in graph.nodes if node.op == "output")
    outputs = torch.utils._pytree.tree_leaves(logits_in(output.args[0]))
    return walk_back([node for node in outputs if isinstance(node, fx.Node)], producer, _data_sources)


def _data_sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data a node was computed from, without those of which it only uses sizes, dtype or device."""
    sources = node.all_input_nodes
    if node.op == "call_method" and node.target in _USE_METADATA_OF_ARGUMENTS:
        sources = [source for source in sources if source is node.args[0]]
    return [source for source in sources if not _is_metadata(source)]


def _is_metadata(node: fx.Node) -> bool:
    """Returns True for sizes, dtype and device of a tensor, and for constants of the same shape or dtype."""
    if node.target is getattr:
        return node.args[1] in _METADATA_ATTRIBUTES
    return node.target in _METADATA_CALLS


class _Tracer(fx.Tracer):
    """Traces into containers, but not into layers and modules that contain no layer."""

    proxy_buffer_attributes = True  # else a forward that changes a buffer would really change it

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self._layers = set(layers)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._layers or self._layers.isdisjoint(m.modules())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a module without its hooks and wrappers, which do not support symbols: sharding would gather weights."""
        while isinstance(m, WRAPPERS):
            m = m.module
        return super().call_module(m, m.forward, args, kwargs)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undoes what a forward on symbols changes: attributes of modules, and the state of the random number generators."""
    parts = ("_parameters", "_buffers", "_modules")
    kept = {m: ({**vars(m)}, {p: {**vars(m)[p]} for p in parts if p in vars(m)}) for m in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(state)
        for module, (attributes, inside) in kept.items():
            vars(module).clear()
            vars(module).update(attributes)
            for part, content in inside.items():
                vars(module)[part].clear()
                vars(module)[part].update(content)


# --- the autograd graph -----------------------------------------------------------------------------------------------


def autograd_producers(output: Any, layers: Mapping[Any, nn.Module]) -> list[Producer] | None:
    """The producers of the output in the autograd graph; None if the output has no graph.

    Args:
        output: what the model has returned.
        layers: the layers, by the nodes of their outputs.
    """
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(logits_in(output)) if isinstance(leaf, Tensor)]
    outputs = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]

    def producer(node: Any) -> Producer | None:
        if node in layers:
            return layers[node]
        kind = type(node).__name__
        if "VectorNorm" in kind or "CosineSimilarity" in kind:
            return COSINE
        leaves = [f.variable for f, _ in node.next_functions if type(f).__name__ == "AccumulateGrad"]
        if leaves and "Norm" in kind:
            return f"a normalisation ({kind})"
        shapes = [leaf.shape for leaf in leaves if leaf.ndim >= 2]
        return describe_functional(shapes[0]) if shapes else None

    def sources(node: Any) -> list[Any]:
        return [f for f, _ in node.next_functions if f is not None and type(f).__name__ != "AccumulateGrad"]

    return walk_back(outputs, producer, sources) if outputs else None
