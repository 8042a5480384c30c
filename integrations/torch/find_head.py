"""Finds the classifier head: the linear layer, or 1x1 convolution, that the model's output comes from.

Neither the last linear layer nor the one with as many outputs as classes is reliably the head. So the finder walks back from
the output, through operations without weights (dropout, softmax, pooling, reshaping, scaling), to the layer that produced it,
in the symbolic trace of the model if `torch.fx` can trace it. If it cannot, the model's library may declare the head (timm,
transformers). Otherwise `first_pass` walks back in the autograd graph of the first training pass.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.torch.candidates import (
    candidates,
    check_is_linear,
    describe_candidates,
    display_path,
    is_adapter,
    leaf_layers,
    lookalikes,
    outputs_of,
    refusal,
)
from gwa_logging.integrations.torch.distributed import WRAPPERS, is_deepspeed_engine
from gwa_logging.integrations.torch.graph_walk import Producer, traced_producers
from gwa_logging.integrations.torch.head_layers import shape_of

NOT_FOUND_YET = "head: will be found in the first training pass"
"""The description of a head that only a training pass can find."""


class Head(NamedTuple):
    """A head that was found: its dotted path, the module, and the reason for the choice."""

    path: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"head {display_path(self.path)} ({type(self.module).__name__} {shape_of(self.module)}): {self.reason}"


def unwrapped(model: nn.Module, wrappers: tuple[type[Any], ...] = WRAPPERS) -> nn.Module:
    """The user's model without the wrappers of torch.compile and of parallel training; those in `wrappers` only."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, wrappers):
            model = model.module
        elif is_deepspeed_engine(model):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def inside_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped. It has the same output, and outlives PEFT's wrapper (`merge_and_unload`)."""
    model = unwrapped(model)
    if any(base.__module__.startswith("peft.") for base in type(model).__mro__):
        inside = getattr(model, "get_base_model", lambda: None)()
        if isinstance(inside, nn.Module):
            return inside
    return model


def find_head(model: nn.Module, wanted: Any = None) -> Head | None:
    """The classifier head of a model, or None if only a training pass can show it.

    Args:
        model: the model.
        wanted: a dotted path or a module of the model; None finds the head.

    Raises:
        HeadNotFoundError: the path or module is unknown, the model has no candidate, or the output comes from several layers.
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
            [f"{display_path(path)}: {reason}" for path, reason in lookalikes(model).items()],
        )
    if "" in possible:
        return choose_head([model], model, "the output comes from it (traced)")
    core = inside_adapters(model)
    declared = _declared(core)
    if declared is not None and not declared.parts:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no classifier, according to its {declared.by}", describe_candidates(model)
        )
    producers = traced_producers(core, leaf_layers(core))
    if producers is not None:
        return choose_head(producers, model, "the output comes from it (traced)")
    return _by_library(model, declared)


def choose_head(producers: Iterable[Producer], model: nn.Module, reason: str) -> Head:
    """The head, if the output has exactly one producer and this can be a head.

    Args:
        producers: of the output; see `graph_walk.Producer`.
        model: the model that they belong to.
        reason: the reason for the choice, for messages.

    Raises:
        HeadNotFoundError: no producer can be a head, or there are several.
    """
    producers = list(dict.fromkeys(producers))
    paths = {module: path for path, module in model.named_modules()}
    refusals = {each: refusal(each) or check_is_linear(each) for each in producers if isinstance(each, nn.Module)}
    can_be_heads = len(refusals) == len(producers) and not any(refusals.values())
    if can_be_heads and len(producers) == 1:
        (module,) = refusals
        return Head(paths[module], module, reason)
    if can_be_heads and producers:
        found = ", ".join(sorted(repr(paths[module]) for module in refusals))
        raise HeadNotFoundError(
            f"the output of {type(model).__name__} comes from several layers: {found}. "
            f"To watch all of them: head=[{found}].",
            describe_candidates(model),
        )
    others = [
        each if isinstance(each, str) else f"{display_path(paths[each])} ({refusals[each] or 'a layer'})"
        for each in producers
    ]
    raise HeadNotFoundError(
        f"the output of {type(model).__name__} does not come from one linear layer, but from "
        f"{'; '.join(others) or 'no layer at all'}.",
        describe_candidates(model),
    )


def _explicit(model: nn.Module, wanted: Any) -> Head:
    modules = dict(model.named_modules())
    if isinstance(wanted, str):
        path = wanted.removeprefix("module.") if wanted not in modules else wanted
        if path not in modules:
            raise HeadNotFoundError(
                f"head={wanted!r}: {type(model).__name__} has no module of this path.", describe_candidates(model)
            )
    elif isinstance(wanted, nn.Module):
        found = [p for p, m in modules.items() if m is wanted]
        if not found:
            raise HeadNotFoundError(
                f"head={type(wanted).__name__}: this module is not part of {type(model).__name__}.",
                describe_candidates(model),
            )
        path = found[0]
    else:
        raise InvalidInputError(
            f"head={wanted!r}: expected a dotted path such as 'fc', a module of the model, or a list of them, found "
            f"{type(wanted).__name__}"
        )
    reason = refusal(modules[path]) or check_is_linear(modules[path])
    if reason:
        raise HeadNotFoundError(f"head={path!r}: {reason}.", describe_candidates(model))
    return Head(path, modules[path], "named by head=")


# --- what the model's library declares --------------------------------------------------------------------------------


class _Declared(NamedTuple):
    """What a model's interface declares to be its classifier.

    Attributes:
        by: the method or attribute that declares it.
        parts: one or several classifiers; empty if the model was built without one.
        classes: number of outputs; None if unknown.
    """

    by: str
    parts: list[nn.Module]
    classes: int | None


def _declared(model: nn.Module) -> _Declared | None:
    """What the interface of timm or transformers declares; None if the model is from neither."""
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "transformers.PreTrainedModel" in bases:
        embeddings = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(embeddings, nn.Module):
            return _Declared("get_output_embeddings()", [embeddings], None)
        for name in ("classifier", "score", "logits_proj", "classification_head"):
            if isinstance(part := getattr(model, name, None), nn.Module):
                classes = getattr(getattr(model, "config", None), "num_labels", None)
                return _Declared(f".{name}", [part], classes if isinstance(classes, int) else None)
    elif callable(get_classifier := getattr(model, "get_classifier", None)):
        try:
            classifier = get_classifier()
        except TypeError:  # another method of this name, with arguments
            return None
        parts = list(classifier) if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
        parts = [part for part in parts if not (part is None or isinstance(part, nn.Identity))]
        classes = getattr(model, "num_classes", None)
        if all(isinstance(part, nn.Module) for part in parts):
            return _Declared("get_classifier()", parts, classes if isinstance(classes, int) else None)
    return None


def predicts_tokens(model: nn.Module, head: Head) -> bool:
    """Returns True if a model of transformers declares that the head predicts tokens."""
    declared = _declared(inside_adapters(model))
    return (
        declared is not None
        and declared.by == "get_output_embeddings()"
        and any(_trained_copy(part) is head.module for part in declared.parts)
    )


def _by_library(model: nn.Module, declared: _Declared | None) -> Head | None:
    """The head that the library declares, if each part has exactly one layer with as many outputs as classes."""
    if declared is None:
        return None
    found: list[Producer] = []
    for part in map(_trained_copy, declared.parts):
        inside = [*candidates(part).values(), *(module for module in part.modules() if is_adapter(module))]
        inside = [layer for layer in inside if declared.classes is None or outputs_of(layer) == declared.classes]
        if len(inside) != 1:
            return None
        found += inside
    return choose_head(found, model, f"declared by the model's {declared.by}")


def _trained_copy(part: nn.Module) -> nn.Module:
    """The copy that PEFT trains (`modules_to_save`) where it keeps the original beside it; any other module unchanged."""
    copies: Any = getattr(part, "modules_to_save", None)
    names: Any = getattr(part, "active_adapters", None)
    is_copied = type(part).__module__.startswith("peft.") and isinstance(copies, nn.ModuleDict) and names
    return copies[names[0]] if is_copied and names[0] in copies else part


# --- the command line -------------------------------------------------------------------------------------------------


def describe(model: nn.Module, wanted: Any = None, inputs: Sequence[Any] = ()) -> str:
    """What the head finder sees in a model, as a plain-text table.

    Args:
        model: the model.
        wanted: as in `find_head`, or a list of paths and modules.
        inputs: must be empty; only JAX models need them.

    Returns:
        One line for each layer that could be the head or looks like one, and a last line with the head and the reason for the
        choice, or the reason why there is no head.

    Raises:
        InvalidInputError: inputs were given.
    """
    if inputs:
        raise InvalidInputError(
            f"{type(model).__name__} is a PyTorch model, for which no inputs are needed; leave them out"
        )
    model = unwrapped(model)
    heads: list[Head | None] = []
    try:
        several = isinstance(wanted, list | tuple)
        heads = [find_head(model, each) for each in wanted] if several else [find_head(model, wanted)]
        verdicts = [str(head) if head else NOT_FOUND_YET for head in heads]
    except HeadNotFoundError as error:
        verdicts = [f"no head: {str(error).splitlines()[0]}"]
    chosen_paths = {head.path: head.reason for head in heads if head is not None}
    refused = lookalikes(model)
    rows = [("path", "type", "shape", "")]
    for path, module in model.named_modules():
        if path in refused or refusal(module) is None:
            status = f"refused: {refused[path]}" if path in refused else "candidate"
            if path in chosen_paths:
                status = f"HEAD: {chosen_paths[path]}"
            rows.append((path or "(itself)", type(module).__name__, shape_of(module), status))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
    return "\n".join(
        [f"{type(model).__name__}: {len(rows) - 1} layers that could be the head, or look like it", *table, *verdicts]
    )
