"""Finds the classifier head: the linear layer, or 1x1 convolution, that the model's output comes from.

The last linear layer of a model, or one with as many outputs as there are classes, is the wrong one often enough. So the
output is walked back, through whatever has no weights of its own (dropout, softmax, pooling, reshaping, scaling), to the
layer that made it: on the symbolic trace of the model, if `torch.fx` can trace it. If it cannot, the model's own library may
say which one it is (timm, transformers); else it is walked back on the autograd graph of the first training pass.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.candidates import (
    candidates,
    is_adapter,
    lines,
    lookalikes,
    refusal,
    shown,
    untrue,
    wholes,
    width,
)
from gwa_logging.integrations.torch.distributed import WRAPPERS
from gwa_logging.integrations.torch.graph_walk import Maker, differentiated_makers, traced_makers
from gwa_logging.integrations.torch.head_layers import shape_of
from gwa_logging.integrations.torch.module_patch import ModulePatch, is_tracing


class Head(NamedTuple):
    """A head that was found: its dotted path, the module, and why it is the one."""

    path: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"head {shown(self.path)} ({type(self.module).__name__} {shape_of(self.module)}): {self.reason}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside of the wrappers of torch.compile and of parallel training."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, WRAPPERS):
            model = model.module
        else:
            return model


def inside_adapters(model: nn.Module) -> nn.Module:
    """The user's own module as PEFT got it, which outlives PEFT's wrapper (`merge_and_unload`) and has the same output."""
    model = unwrapped(model)
    if any(base.__module__.startswith("peft.") for base in type(model).__mro__):
        inside = getattr(model, "get_base_model", lambda: None)()
        if isinstance(inside, nn.Module):
            return inside
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
    if any(base.__module__ == "keras.src.models.model" for base in type(model).__mro__):
        from gwa_logging.integrations.torch.keras_dense import find_dense  # here, because it needs Keras

        return Head(*find_dense(model, wanted))
    if wanted is not None:
        return _explicit(model, wanted)
    possible = candidates(model)
    if not possible:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no linear layer and no 1x1 convolution, so no classifier head",
            [f"{shown(path)}: {reason}" for path, reason in lookalikes(model).items()],
        )
    if "" in possible:
        return chosen([model], model, "the output comes from it (traced)")
    core = inside_adapters(model)
    declared = _declared(core)
    if declared is not None and not declared.parts:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no classifier: so its own {declared.by} says", lines(model)
        )
    makers = traced_makers(core, wholes(core))
    if makers is not None:
        return chosen(makers, model, "the output comes from it (traced)")
    return _by_library(model, declared)


def chosen(makers: Iterable[Maker], model: nn.Module, reason: str) -> Head:
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
    refusals = {maker: refusal(maker) or untrue(maker) for maker in makers if isinstance(maker, nn.Module)}
    fit = len(refusals) == len(makers) and not any(refusals.values())
    if fit and len(makers) == 1:
        (module,) = refusals
        return Head(paths[module], module, reason)
    if fit and makers:
        found = ", ".join(sorted(repr(paths[module]) for module in refusals))
        raise HeadNotFoundError(
            f"the output of {type(model).__name__} comes from several layers: {found}. "
            f"To watch them all, each by itself: head=[{found}].",
            lines(model),
        )
    others = [m if isinstance(m, str) else f"{shown(paths[m])} ({refusals[m] or 'a layer'})" for m in makers]
    raise HeadNotFoundError(
        f"the output of {type(model).__name__} does not come from one linear layer, but from "
        f"{'; '.join(others) or 'no layer at all'}.",
        lines(model),
    )


def _explicit(model: nn.Module, wanted: Any) -> Head:
    modules = dict(model.named_modules())
    if isinstance(wanted, str):
        path = wanted.removeprefix("module.") if wanted not in modules else wanted
        if path not in modules:
            raise HeadNotFoundError(f"head={wanted!r}: {type(model).__name__} has no such module.", lines(model))
    elif isinstance(wanted, nn.Module):
        found = [p for p, m in modules.items() if m is wanted]
        if not found:
            raise HeadNotFoundError(
                f"head={type(wanted).__name__}: this module is not part of {type(model).__name__}.", lines(model)
            )
        path = found[0]
    else:
        raise InvalidInputError(
            f"head={wanted!r}: expected a dotted path such as 'fc', a module of the model, or a list of them, found "
            f"{type(wanted).__name__}"
        )
    reason = refusal(modules[path]) or untrue(modules[path])
    if reason:
        raise HeadNotFoundError(f"head={path!r}: {reason}.", lines(model))
    return Head(path, modules[path], "named by head=")


# --- the library's own word -------------------------------------------------------------------------------------------


class _Declared(NamedTuple):
    """What a model's own interface calls its classifier.

    Attributes:
        by: the method or attribute that says so.
        parts: the classifier, or several of them; none if the model has been built without.
        classes: how many outputs it has; None if that is not known.
    """

    by: str
    parts: list[nn.Module]
    classes: int | None


def _declared(model: nn.Module) -> _Declared | None:
    """What timm's or transformers' own interface says."""
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "transformers.PreTrainedModel" in bases:
        embeddings = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(embeddings, nn.Module):
            return _Declared("get_output_embeddings()", [embeddings], None)
        for name in ("classifier", "score", "logits_proj", "classification_head"):
            if isinstance(part := getattr(model, name, None), nn.Module):
                classes = getattr(getattr(model, "config", None), "num_labels", None)
                return _Declared(f".{name}", [part], classes if isinstance(classes, int) else None)
    elif callable(ask := getattr(model, "get_classifier", None)):
        try:
            said = ask()
        except TypeError:  # a method of the same name that wants an argument
            return None
        parts = list(said) if isinstance(said, tuple | list | nn.ModuleList) else [said]
        parts = [part for part in parts if not (part is None or isinstance(part, nn.Identity))]
        classes = getattr(model, "num_classes", None)
        if all(isinstance(part, nn.Module) for part in parts):
            return _Declared("get_classifier()", parts, classes if isinstance(classes, int) else None)
    return None


def _by_library(model: nn.Module, declared: _Declared | None) -> Head | None:
    """The head that a library declares, if each part of it has one layer with as many outputs as there are classes."""
    if declared is None:
        return None
    found: list[Maker] = []
    for part in declared.parts:
        inside = [*candidates(part).values(), *(module for module in part.modules() if is_adapter(module))]
        inside = [layer for layer in inside if declared.classes is None or width(layer) == declared.classes]
        if len(inside) != 1:
            return None
        found += inside
    return chosen(found, model, f"the model's own {declared.by} says so")


# --- the first training pass ------------------------------------------------------------------------------------------


class HeadCall(NamedTuple):
    """One call of a layer, with what went in and what came out.

    Attributes:
        module, embeddings, output: the layer, its input, and its output.
        node: of an output that has been changed in place since, its node in the autograd graph; else None.
    """

    module: nn.Module
    embeddings: Tensor
    output: Tensor
    node: Any = None


class FirstPass:
    """Watches the first training pass of a model that could not be traced, and tells its head.

    The calls of all layers are noted; when the model returns, its output is walked back on the autograd graph.
    """

    def __init__(
        self,
        model: nn.Module,
        tell: Callable[[Head, list[HeadCall]], None],
        copied: Callable[[Any, nn.Module], None] | None = None,
    ) -> None:
        """Calls `tell(head, calls)` after the first training pass, and `copied` as an `ModulePatch` does."""
        self._tell = tell
        self._model = weakref.ref(model)
        self._copied = copied
        self._attachments: list[ModulePatch] = []
        self._told = False
        self._calls: dict[Any, HeadCall] = {}  # by the output's node in the autograd graph, which is kept alive by it
        self.resume()

    def resume(self) -> None:
        """Puts the hooks on, if they are not. torch.jit.script takes them off, since it could not compile them."""
        model = self._model()
        if model is None or self._attachments or self._told:
            return
        for layer in wholes(model):
            self._attachments.append(ModulePatch(layer, after=self._called, scripted=self.close))
        self._attachments.append(ModulePatch(model, after=self._returned, copied=self._copied, scripted=self.close))

    def _called(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        embeddings = args[0] if args else kwargs.get("input")
        if (
            torch.compiler.is_compiling()
            or is_tracing()
            or not (isinstance(output, Tensor) and isinstance(embeddings, Tensor))
        ):
            return
        if output.grad_fn is not None:
            self._calls[output.grad_fn] = HeadCall(layer, embeddings, output)

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or is_tracing():
            return
        calls, self._calls = self._calls, {}
        makers = differentiated_makers(output, {node: call.module for node, call in calls.items()})
        if makers is None:
            return
        self._told = True
        self.close()
        head = chosen(makers, model, "the output of the first pass comes from it")
        # An output that was changed in place since is another tensor: its gradient is not delta, but that of its node is.
        own = ((node, call) for node, call in calls.items() if call.module is head.module)
        self._tell(head, [call if call.output.grad_fn is node else call._replace(node=node) for node, call in own])

    def close(self) -> None:
        """Takes the hooks off."""
        for attachment in self._attachments:
            attachment.remove()
        self._attachments = []


# --- for people -------------------------------------------------------------------------------------------------------


def describe(model: nn.Module, wanted: Any = None, inputs: Sequence[Any] = ()) -> str:
    """The finder's view of a model, as a plain-text table: every candidate, and what became of it.

    Args:
        model: the model.
        wanted: as in `find_head`, or a list of such.
        inputs: none; they are for JAX.

    Returns:
        A line for each layer that could be the head or looks like one, and a last line that says which it is and why, or why
        there is none.

    Raises:
        InvalidInputError: there are inputs.
    """
    if inputs:
        raise InvalidInputError(
            f"{type(model).__name__}: a PyTorch model is looked at without inputs; name the model alone"
        )
    model = unwrapped(model)
    heads: list[Head | None] = []
    try:
        several = isinstance(wanted, list | tuple)
        heads = [find_head(model, each) for each in wanted] if several else [find_head(model, wanted)]
        verdicts = [str(head) if head else "head: the first training pass will tell" for head in heads]
    except HeadNotFoundError as error:
        verdicts = [f"no head: {str(error).splitlines()[0]}"]
    chosen_paths = {head.path: head.reason for head in heads if head is not None}
    refused = lookalikes(model)
    rows = [("path", "type", "shape", "")]
    for path, module in model.named_modules():
        if path in refused or refusal(module) is None:
            said = f"refused: {refused[path]}" if path in refused else "candidate"
            if path in chosen_paths:
                said = f"HEAD: {chosen_paths[path]}"
            rows.append((path or "(itself)", type(module).__name__, shape_of(module), said))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
    return "\n".join(
        [f"{type(model).__name__}: {len(rows) - 1} layers that could be the head, or look like it", *table, *verdicts]
    )
