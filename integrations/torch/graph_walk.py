"""Walks a model's output back, through whatever has no weights of its own, to the layers that made it.

Two graphs can be walked: the symbolic trace of `torch.fx`, for which nothing is run, and the autograd graph of a pass that
has been run.
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
Maker = nn.Module | str
"""A module, or a phrase for something that made the output but is none."""

COSINE = (
    "a normalised vector (a cosine head): its scores are zero whatever is learnt, since the output does not change with the "
    "length of the weight"
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
_FORM_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize", "nbytes"}
_FORM_CALLS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "element_size"),
    *("new_zeros", "new_ones", "new_empty"),
    *(torch.numel, torch.zeros_like, torch.ones_like, torch.empty_like),
}
_TAKE_THE_FORM_OF_AN_ARGUMENT = {"view_as", "reshape_as", "expand_as", "type_as", "to"}


def functional(shape: Sequence[int], name: str = "") -> str:
    """What to say of a weight that is used without a layer."""
    what = (
        f"the parameter {name!r} ({' x '.join(map(str, shape))})"
        if name
        else f"a weight ({' x '.join(map(str, shape))})"
    )
    return f"{what} that is not called as a layer of its own (F.linear on a parameter, a custom module)"


def walk_back(
    outputs: Iterable[Node],
    maker: Callable[[Node], Maker | None],
    sources: Callable[[Node], Iterable[Node]],
) -> list[Maker]:
    """Follows a graph from its outputs to what made them.

    Args:
        outputs: where to start.
        maker: what made a node, if the walk must end there; None goes on.
        sources: the nodes that a node was computed from.
    """
    found: list[Maker] = []
    todo, seen = list(outputs), set[Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        made = maker(node)
        if made is not None:
            found.append(made)
        else:
            todo.extend(sources(node))
    return list(dict.fromkeys(found))


def primary(output: Any) -> Any:
    """The part of a model's output that is the logits, where it says so: `logits` of a mapping, a record or a named tuple."""
    if isinstance(output, fx.Node):
        return _primary_of_node(output)
    if isinstance(output, Mapping):
        return output.get("logits", output)
    named = not isinstance(output, Sequence | Tensor) or hasattr(output, "_fields")
    logits = getattr(output, "logits", None) if named else None
    return output if logits is None else logits


def _primary_of_node(node: fx.Node) -> Any:
    """The same of a record in a symbolic trace, where it is a call of its class."""
    if isinstance(node.target, type) and node.op == "call_function":
        names = [*getattr(node.target, "_fields", ()), *getattr(node.target, "__dataclass_fields__", ())]
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("logits", node)
    return node


# --- the symbolic trace -----------------------------------------------------------------------------------------------


def traced_makers(model: nn.Module, layers: Iterable[nn.Module]) -> list[Maker] | None:
    """What made the output, by the symbolic trace; None if the model cannot be traced, or the trace leaves it open.

    Args:
        model: the model; it is left as it was.
        layers: the layers that are taken whole, and end the walk.
    """
    layers = list(layers)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled by torch.jit
        return None
    optional = {p.name: None for p in parameters if p.default is None}
    if all(p.default is not p.empty for p in parameters):
        return None  # without an argument there would be nothing to trace
    usual = _makers(model, layers, optional)
    # `mask is None` cannot be left open in a trace: with symbols for all arguments it must come to the same.
    other = _makers(model, layers, {}) if optional else None
    return usual if usual is None or other is None or set(other) == set(usual) else None


def _makers(model: nn.Module, layers: list[nn.Module], known: dict[str, Any]) -> list[Maker] | None:
    with _left_as_it_was(model):
        try:
            graph = _Tracer(layers).trace(model, known or None)
        except Exception:  # noqa: BLE001 - whatever a model's forward may raise on symbols: it is not traceable
            return None
    modules, whole = dict(model.named_modules()), set(layers)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def maker(node: fx.Node) -> Maker | None:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.CosineSimilarity):
                return COSINE
            return module if module in whole else None
        if node.op == "get_attr":  # a buffer, a scale or an offset goes with any head
            weight = parameters.get(str(node.target))
            return None if weight is None or weight.ndim < 2 else functional(weight.shape, str(node.target))
        if node.op == "placeholder":
            return "the input"
        return COSINE if node.target in _NORMALISING else None

    output = next(node for node in graph.nodes if node.op == "output")
    leaves = torch.utils._pytree.tree_leaves(primary(output.args[0]))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    return walk_back(nodes, maker, _data_sources)


def _data_sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data a node was computed from: not those of which it only uses sizes, dtype or device."""
    sources = node.all_input_nodes
    if node.op == "call_method" and node.target in _TAKE_THE_FORM_OF_AN_ARGUMENT:
        sources = [source for source in sources if source is node.args[0]]
    return [source for source in sources if not _is_form(source)]


def _is_form(node: fx.Node) -> bool:
    """Returns True for sizes, dtype and device of a tensor, and for constants that are made in its form."""
    if node.target is getattr:
        return node.args[1] in _FORM_ATTRIBUTES
    return node.target in _FORM_CALLS


class _Tracer(fx.Tracer):
    """Looks into containers, and takes a module whole if there is no layer in it."""

    proxy_buffer_attributes = True  # else what a forward does to a buffer would be done

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self._layers = set(layers)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._layers or self._layers.isdisjoint(m.modules())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a module past hooks and wrappers, which are not made for symbols: those of sharding would gather weights."""
        while isinstance(m, WRAPPERS):
            m = m.module
        return super().call_module(m, m.forward, args, kwargs)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Takes back what a forward on symbols has kept on its modules, and what it has drawn of the random numbers."""
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


def differentiated_makers(output: Any, made: Mapping[Any, nn.Module]) -> list[Maker] | None:
    """What made the output, by the autograd graph; None if the output has none.

    Args:
        output: what the model has returned.
        made: the layers' outputs, as nodes of the graph, and the layers.
    """
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(primary(output)) if isinstance(leaf, Tensor)]
    outputs = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]

    def maker(node: Any) -> Maker | None:
        if node in made:
            return made[node]
        kind = type(node).__name__
        if "VectorNorm" in kind or "CosineSimilarity" in kind:
            return COSINE
        leaves = [f.variable for f, _ in node.next_functions if type(f).__name__ == "AccumulateGrad"]
        if leaves and "Norm" in kind:
            return f"a normalisation ({kind})"
        shapes = [leaf.shape for leaf in leaves if leaf.ndim >= 2]
        return functional(shapes[0]) if shapes else None

    def sources(node: Any) -> list[Any]:
        return [f for f, _ in node.next_functions if f is not None and type(f).__name__ != "AccumulateGrad"]

    return walk_back(outputs, maker, sources) if outputs else None
