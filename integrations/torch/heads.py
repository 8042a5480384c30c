"""Finds the classifier head: the linear layer, or 1x1 convolution, that the model's output comes from.

The last linear layer of a model, or one with as many outputs as there are classes, is the wrong one often enough. So the
output is walked back, through whatever has no parameters of its own (dropout, softmax, pooling, reshaping, scaling), to the
layer that made it: on the symbolic trace of the model, if `torch.fx` can trace it. If it cannot, the model's own library may
say which one it is (timm, transformers); else it is walked back on the autograd graph of the first training pass.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.hooks import Attachment
from gwa_logging.integrations.torch.layers import refusal, shape_of

Node = TypeVar("Node", bound=Hashable)

COSINE = (
    "a normalised vector (a cosine head): its scores are zero whatever is learnt, since the output does not change with the "
    "length of the weight"
)
FUNCTIONAL = "a weight that is not called as a layer of its own (F.linear on a parameter, a custom module)"


class Head(NamedTuple):
    """A head that was found: its dotted path, the module, and why it is the one."""

    path: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        name = repr(self.path) if self.path else "(the model itself)"
        return f"head {name} ({type(self.module).__name__} {shape_of(self.module)}): {self.reason}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside of torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def find_head(model: nn.Module, wanted: Any = None) -> Head | None:
    """The classifier head of a model, or None if only a training pass can tell.

    Args:
        model: the model.
        wanted: a dotted path or a module of the model; None finds the head.

    Raises:
        HeadNotFoundError: there is no such head, nothing that could be one, or several that make the output.
    """
    model = unwrapped(model)
    if wanted is not None:
        return _explicit(model, wanted)
    if not candidates(model):
        raise HeadNotFoundError(
            f"{type(model).__name__} has no linear layer and no 1x1 convolution, so no classifier head", _refused(model)
        )
    makers = _trace_back(model)
    if makers is not None:
        return chosen(makers, model, "the output comes from it (traced)")
    return _by_library(model)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Everything in a model that could be a head, by its path."""
    return {path: module for path, module in model.named_modules() if refusal(module) is None}


def chosen(makers: Iterable[nn.Module | str], model: nn.Module, reason: str) -> Head:
    """The one head among the makers of the output.

    Args:
        makers: what the output was walked back to: modules, or a phrase for something that is none.
        model: the model that they belong to.
        reason: what to say of the choice.

    Raises:
        HeadNotFoundError: there is none, or more than one.
    """
    makers = list(dict.fromkeys(makers))
    paths = {module: path for path, module in model.named_modules()}
    modules = [maker for maker in makers if isinstance(maker, nn.Module)]
    name = type(model).__name__
    if len(makers) == 1 and modules and refusal(modules[0]) is None:
        return Head(paths[modules[0]], modules[0], reason)
    if len(modules) == len(makers) > 1 and not any(map(refusal, modules)):
        found = ", ".join(sorted(repr(paths[module]) for module in modules))
        raise HeadNotFoundError(
            f"the output of {name} comes from several layers: {found}. To watch them all, each by itself: head=[{found}].",
            _lines(candidates(model)),
        )
    others = [
        maker if isinstance(maker, str) else f"{paths[maker]!r} ({refusal(maker) or 'a layer'})" for maker in makers
    ]
    raise HeadNotFoundError(
        f"the output of {name} does not come from one linear layer, but from {'; '.join(others) or 'no layer at all'}.",
        _lines(candidates(model)),
    )


def _explicit(model: nn.Module, wanted: Any) -> Head:
    modules = dict(model.named_modules())
    if isinstance(wanted, str):
        path = wanted.removeprefix("module.") if wanted not in modules else wanted
        if path not in modules:
            raise HeadNotFoundError(
                f"head={wanted!r}: {type(model).__name__} has no such module.", _lines(candidates(model))
            )
    elif isinstance(wanted, nn.Module):
        found = [p for p, m in modules.items() if m is wanted]
        if not found:
            raise HeadNotFoundError(
                f"head={type(wanted).__name__}: this module is not part of {type(model).__name__}.",
                _lines(candidates(model)),
            )
        path = found[0]
    else:
        raise InvalidInputError(
            f"head={wanted!r}: expected a dotted path such as 'fc', a module of the model, or a list of them, found "
            f"{type(wanted).__name__}"
        )
    reason = refusal(modules[path])
    if reason:
        raise HeadNotFoundError(f"head={path!r}: {reason}.", _lines(candidates(model)))
    return Head(path, modules[path], "named by head=")


def _lines(modules: dict[str, nn.Module]) -> list[str]:
    return [f"{path or '(the model itself)'!r}: {type(m).__name__} {shape_of(m)}" for path, m in modules.items()]


def _refused(model: nn.Module) -> list[str]:
    """Layers that would be candidates but for a reason."""
    layers = [(path, module) for path, module in model.named_modules() if "Linear" in type(module).__name__]
    return [f"{path!r}: {refusal(module)}" for path, module in layers]


def walk_back(
    outputs: Iterable[Node],
    maker: Callable[[Node], nn.Module | str | None],
    sources: Callable[[Node], Iterable[Node]],
) -> list[nn.Module | str]:
    """Follows a graph from its outputs to what made them.

    Args:
        outputs: where to start.
        maker: the module that made a node, or a phrase if the walk must end there all the same; None goes on.
        sources: the nodes that a node was computed from.
    """
    found: list[nn.Module | str] = []
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
    return found


def _trace_back(model: nn.Module) -> list[nn.Module | str] | None:
    """Walks back on the symbolic trace; None if the model cannot be traced."""
    if refusal(model) is None:
        return [model]
    kept = {module: dict(module.__dict__) for module in model.modules()}
    try:
        graph = _Tracer(candidates(model).values()).trace(model)
    except Exception:  # noqa: BLE001 - whatever a model's forward may raise on symbols: it is not traceable
        return None
    finally:
        for module, attributes in kept.items():  # a forward that keeps something on itself has kept a symbol
            module.__dict__.clear()
            module.__dict__.update(attributes)
    modules = dict(model.named_modules())

    def maker(node: fx.Node) -> nn.Module | str | None:
        if node.op == "call_module":
            module = modules[str(node.target)]
            return module if any(True for _ in module.parameters()) else None
        if node.op == "get_attr":
            return FUNCTIONAL
        if node.op == "placeholder":
            return "the input"
        return COSINE if node.target in _NORMALISING else None

    output = next(node for node in graph.nodes if node.op == "output")
    primary = _primary(output.args[0])
    nodes = [leaf for leaf in torch.utils._pytree.tree_leaves(primary) if isinstance(leaf, fx.Node)]
    return walk_back(nodes, maker, lambda node: node.all_input_nodes)


_NORMALISING = {nn.functional.normalize, nn.functional.cosine_similarity, torch.cosine_similarity}


class _Tracer(fx.Tracer):
    """Looks into containers, and takes a module whole if there is no candidate in it."""

    def __init__(self, candidates: Iterable[nn.Module]) -> None:
        super().__init__()
        self._candidates = set(candidates)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._candidates or self._candidates.isdisjoint(m.modules())


def _by_library(model: nn.Module) -> Head | None:
    """What timm's or transformers' own interface says, if it leads to one layer."""
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "transformers.PreTrainedModel" in bases:
        embeddings = model.get_output_embeddings()  # type: ignore[operator]
        named = [("get_output_embeddings()", embeddings)]
        named += [(f".{name}", getattr(model, name, None)) for name in ("classifier", "score", "logits_proj")]
    elif callable(getattr(model, "get_classifier", None)):
        named = [("get_classifier()", model.get_classifier())]  # type: ignore[operator]
    else:
        return None
    for name, part in named:
        if isinstance(part, nn.Module):
            inside = [module for module in part.modules() if refusal(module) is None]
            if len(inside) == 1:
                path = next(path for path, module in model.named_modules() if module is inside[0])
                return Head(path, inside[0], f"the model's own {name} says so")
    return None


class HeadCall(NamedTuple):
    """One call of a layer, with what went in and what came out."""

    module: nn.Module
    embeddings: Tensor
    output: Tensor


class FirstPass:
    """Watches the first training pass of a model that could not be traced, and tells its head.

    The calls of all layers that could be it are noted; when the model returns, its output is walked back on the autograd
    graph.
    """

    def __init__(self, model: nn.Module, tell: Callable[[Head, list[HeadCall]], None]) -> None:
        self._tell = tell
        self._calls: list[HeadCall] = []  # keep the autograd nodes alive, and with them their identity
        self._attachments = [Attachment(layer, after=self._called) for layer in candidates(model).values()]
        self._attachments.append(Attachment(model, after=self._returned))

    def _called(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and args and isinstance(output, Tensor) and output.grad_fn is not None:
            self._calls.append(HeadCall(layer, args[0], output))

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        calls, self._calls = self._calls, []
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(_primary(output)) if isinstance(leaf, Tensor)]
        outputs = [t.grad_fn for t in tensors if t.grad_fn is not None]
        if not outputs:
            return
        made: dict[Any, nn.Module] = {call.output.grad_fn: call.module for call in calls}

        def maker(node: Any) -> nn.Module | str | None:
            if node in made:
                return made[node]
            if any(type(f).__name__ == "AccumulateGrad" for f, _ in node.next_functions):
                return f"{FUNCTIONAL}, by {type(node).__name__}"
            return COSINE if "VectorNorm" in type(node).__name__ else None

        makers = walk_back(outputs, maker, lambda node: [f for f, _ in node.next_functions if f is not None])
        self.close()
        head = chosen(makers, model, "the output of the first pass comes from it")
        self._tell(head, [call for call in calls if call.module is head.module])

    def close(self) -> None:
        """Takes the hooks off."""
        for attachment in self._attachments:
            attachment.remove()
        self._attachments = []


def _primary(output: Any) -> Any:
    """The part of a model's output that is the logits, where it says so: `logits` of a mapping, a record or a named tuple."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    logits = (
        getattr(output, "logits", None)
        if not isinstance(output, Sequence | Tensor) or hasattr(output, "_fields")
        else None
    )
    return output if logits is None else logits
