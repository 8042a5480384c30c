"""Finds the classifier head: the linear layer that the model's output comes from.

The last linear layer of a model, or one with as many outputs as there are classes, is the wrong one often enough. So the
output is walked back, through whatever has no parameters of its own (dropout, softmax, reshaping, scaling), to the
linear layer that made it: on the symbolic trace of the model where `torch.fx` can trace it, else on the autograd graph
of the first training pass.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.hooks import Attachment

Node = TypeVar("Node", bound=Hashable)


class Head(NamedTuple):
    """A head that was found: its dotted path, the module, and why it is the one."""

    path: str
    module: nn.Linear
    reason: str

    def __str__(self) -> str:
        m = self.module
        return f"head {self.path or '(the model itself)'!r} ({m.in_features} features, {m.out_features} classes): {self.reason}"


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
        wanted: a dotted path or a module of the model; None finds the head by dataflow.

    Raises:
        HeadNotFoundError: there is no such head, no linear layer, or several that make the output.
    """
    model = unwrapped(model)
    if wanted is not None:
        return _explicit(model, wanted)
    linears = _linears(model)
    if not linears:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no linear layer, so no classifier head; a head must be an nn.Linear"
        )
    makers = _trace_back(model)
    return None if makers is None else chosen(makers, model, "the output comes from it (traced)")


def chosen(makers: Iterable[nn.Module | None], model: nn.Module, reason: str) -> Head:
    """The one linear layer among the makers of the output.

    Args:
        makers: modules that the output was walked back to; None for something else with parameters.
        model: the model that they belong to.
        reason: what to say of the choice.

    Raises:
        HeadNotFoundError: there is none, or more than one.
    """
    linears = _linears(model)
    makers = list(dict.fromkeys(makers))
    if len(makers) == 1 and isinstance(makers[0], nn.Linear):
        return Head(next(path for path, m in linears.items() if m is makers[0]), makers[0], reason)
    paths = [path for path, module in linears.items() if module in makers]
    if len(paths) > 1:
        found = f"the output of {type(model).__name__} comes from several linear layers: {', '.join(map(repr, paths))}."
    else:
        others = ", ".join(sorted({type(m).__name__ for m in makers if m is not None})) or "something"
        found = f"the output of {type(model).__name__} does not come from a linear layer alone, but from {others}."
    raise HeadNotFoundError(found, _candidates(linears))


def _explicit(model: nn.Module, wanted: Any) -> Head:
    modules = dict(model.named_modules())
    linears = _linears(model)
    if isinstance(wanted, str):
        if wanted not in modules:
            raise HeadNotFoundError(
                f"head={wanted!r}: {type(model).__name__} has no such module.", _candidates(linears)
            )
        path, module = wanted, modules[wanted]
    elif isinstance(wanted, nn.Module):
        path = next((p for p, m in modules.items() if m is wanted), None)  # type: ignore[assignment]
        if path is None:
            raise HeadNotFoundError(
                f"head={type(wanted).__name__}: this module is not part of {type(model).__name__}.",
                _candidates(linears),
            )
        module = wanted
    else:
        raise InvalidInputError(
            f"head={wanted!r}: expected a dotted path such as 'fc', or a module of the model, found {type(wanted).__name__}"
        )
    if not isinstance(module, nn.Linear):
        raise HeadNotFoundError(
            f"head={path!r} is a {type(module).__name__}; a head must be an nn.Linear.", _candidates(linears)
        )
    return Head(path, module, "named by head=")


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def _candidates(linears: dict[str, nn.Linear]) -> list[str]:
    return [f"{path or '(the model itself)'!r}: {m.in_features} -> {m.out_features}" for path, m in linears.items()]


def walk_back(
    outputs: Iterable[Node],
    maker: Callable[[Node], nn.Module | None],
    parametric: Callable[[Node], bool],
    sources: Callable[[Node], Iterable[Node]],
) -> list[nn.Module | None]:
    """Follows a graph from its outputs to the modules that made them.

    Args:
        outputs: where to start.
        maker: the module that made a node, where the walk ends.
        parametric: whether a node has parameters of its own but no module; the walk ends there with None.
        sources: the nodes that a node was computed from.
    """
    found: list[nn.Module | None] = []
    todo, seen = list(outputs), set[Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        module = maker(node)
        if module is not None:
            found.append(module)
        elif parametric(node):
            found.append(None)
        else:
            todo.extend(sources(node))
    return found


def _trace_back(model: nn.Module) -> list[nn.Module | None] | None:
    """Walks back on the symbolic trace; None if the model cannot be traced."""
    if isinstance(model, nn.Linear):
        return [model]
    kept = {module: dict(module.__dict__) for module in model.modules()}
    try:
        graph = _Tracer().trace(model)
    except Exception:  # noqa: BLE001 - whatever a model's forward may raise on symbols: it is not traceable
        return None
    finally:
        for module, attributes in kept.items():  # a forward that keeps something on itself has kept a symbol
            if module.__dict__ != attributes:
                module.__dict__.clear()
                module.__dict__.update(attributes)
    modules = dict(model.named_modules())

    def maker(node: fx.Node) -> nn.Module | None:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return module if module is not None and any(True for _ in module.parameters()) else None

    output = next(node for node in graph.nodes if node.op == "output")
    return walk_back(
        output.all_input_nodes,
        maker,
        lambda node: node.op in ("get_attr", "placeholder"),
        lambda node: node.all_input_nodes,
    )


class _Tracer(fx.Tracer):
    """Looks into containers, and takes a module whole if there is no linear layer in it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or not any(isinstance(child, nn.Linear) for child in m.modules())


class HeadCall(NamedTuple):
    """One call of a linear layer, with what went in and what came out."""

    module: nn.Linear
    embeddings: Tensor
    output: Tensor


class FirstPass:
    """Watches the first training pass of a model that could not be traced, and tells its head.

    The calls of all linear layers are noted; when the model returns, its output is walked back on the autograd graph.
    """

    def __init__(self, model: nn.Module, tell: Callable[[Head, list[HeadCall]], None]) -> None:
        self._tell = tell
        self._calls: list[HeadCall] = []  # keep the autograd nodes alive, and with them their identity
        linears = _linears(model).values()
        self._attachments = [Attachment(linear, after=self._called) for linear in linears]
        self._attachments.append(Attachment(model, after=self._returned))

    def _called(self, linear: nn.Linear, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and args and isinstance(output, Tensor) and output.grad_fn is not None:
            self._calls.append(HeadCall(linear, args[0], output))

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        calls, self._calls = self._calls, []
        outputs = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
        if not outputs:
            return
        made: dict[Any, nn.Module] = {call.output.grad_fn: call.module for call in calls}
        makers = walk_back(
            outputs,
            made.get,
            lambda node: any(type(f).__name__ == "AccumulateGrad" for f, _ in node.next_functions),
            lambda node: [f for f, _ in node.next_functions if f is not None],
        )
        self.close()
        head = chosen(makers, model, "the output of the first pass comes from it")
        self._tell(head, [call for call in calls if call.module is head.module])

    def close(self) -> None:
        """Takes the hooks off."""
        for attachment in self._attachments:
            attachment.remove()
        self._attachments = []


def _tensors(value: Any) -> Sequence[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
