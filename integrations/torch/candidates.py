"""Which layers of a model could be its head, which only look like one, and what to say of each."""

import copy
import math
import random

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gwa_logging.integrations.torch.head_layers import refusal as refused_kind
from gwa_logging.integrations.torch.head_layers import shape_of

_TRIAL_ROWS = 32
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be a head; None if it can, as far as can be told without running it.

    A subclass that has a forward of its own may still compute W h + b, and no more: see `untrue`.
    """
    kind = type(module).__name__
    if is_adapter(module):
        return (
            f"{kind} is an adapter: the layer in it, and terms that are added to it; their sum is no weight that could be read."
            " Train the head itself: leave it out of the adapted layers, and with PEFT name it in modules_to_save"
        )
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and any(map(is_lazy, module.parameters())):
        return f"{kind} has no shape yet: run one forward pass before watch()"
    if isinstance(module, nn.Linear) and _own_forward(module):
        weight = module.weight
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            return f"{kind} has a weight that is packed or quantised, which is not read"
        return _more_than_a_layer(module)
    reason = refused_kind(module)
    return _more_than_a_layer(module) if reason is None and _own_forward(module) else reason


def untrue(module: nn.Module) -> str | None:
    """Why a candidate with a forward of its own is no head after all; None if it is one.

    A copy of it is tried in training mode, which is the mode that is observed: there it may do other things than in evaluation,
    and change its own weight and buffers.
    """
    if not _own_forward(module):
        return None
    assert isinstance(module, nn.Linear | _CONVOLUTIONS)
    kind = type(module).__name__
    parameter = next(module.parameters())
    if parameter.is_meta:
        return f"{kind} has a forward of its own, and on the meta device it cannot be tried whether it is linear"
    devices, state = [parameter.device] if parameter.is_cuda else [], random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            gap = _distance_from_linear(copy.deepcopy(module).train())
    except Exception as error:  # noqa: BLE001 - whatever somebody's forward may raise
        return f"{kind} has a forward of its own, which could not be tried: {type(error).__name__}: {error}"
    finally:
        random.setstate(state)
    if gap <= 8 * torch.finfo(parameter.dtype).eps ** 0.75:
        return None
    return f"{kind} has a forward of its own, which does not compute W h + b in training mode"


def _distance_from_linear(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> float:
    """The largest difference between a layer's output and W h + b, relative to the size of the terms of W h + b.

    Rows of very different lengths show a layer that clips or caps its output.
    """
    weight, bias = module.weight, module.bias
    features = weight.shape[1]
    rows = torch.arange(_TRIAL_ROWS * features, device=weight.device, dtype=torch.float32).cos()
    lengths = torch.logspace(-2, 2, _TRIAL_ROWS, device=weight.device)
    rows = (rows.view(_TRIAL_ROWS, features) * lengths[:, None]).to(weight.dtype)
    found = module.forward(rows.view(_TRIAL_ROWS, features, *(1,) * (weight.ndim - 2)))
    weight = module.weight.flatten(1)  # what the forward pass has made of it
    expected = nn.functional.linear(rows, weight, bias)
    if not isinstance(found, torch.Tensor) or found.shape[:2] != expected.shape:
        return math.inf
    size = nn.functional.linear(rows.abs(), weight.abs(), None if bias is None else bias.abs()).double()
    gap = (found.reshape(expected.shape).double() - expected.double()).abs().amax(1)
    return float((gap / size.amax(1).clamp(min=torch.finfo(weight.dtype).tiny)).max())


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Everything in a model that could be a head, by its path; no parts of adapters."""
    inside = {part for module in model.modules() if is_adapter(module) for part in module.modules()}
    return {path: m for path, m in model.named_modules() if m not in inside and refusal(m) is None}


def wholes(model: nn.Module) -> list[nn.Module]:
    """The candidates, and all other modules that have parameters but no candidate in them: layers that end a walk."""
    possible = set(candidates(model).values())
    inside = {
        part for module in model.modules() if is_adapter(module) for part in module.modules() if part is not module
    }
    return [
        module
        for module in model.modules()
        if module in possible
        or (module not in inside and any(True for _ in module.parameters()) and possible.isdisjoint(module.modules()))
    ]


def lookalikes(model: nn.Module) -> dict[str, str]:
    """Layers that would be candidates but for a reason: the reasons, by path."""
    possible = set(candidates(model).values())
    return {
        path: refusal(module) or "part of an adapter"
        for path, module in model.named_modules()
        if module not in possible
        and (isinstance(module, nn.Linear) or "Linear" in type(module).__name__ or is_adapter(module))
    }


def is_adapter(module: nn.Module) -> bool:
    """Returns True if a module adds terms to a layer that it wraps, as the adapters of PEFT do."""
    if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):  # every adapter of PEFT
        return True
    adds = any(name.startswith("lora_") for name in (*module._modules, *module._parameters))
    return adds and any(isinstance(part, nn.Linear | _CONVOLUTIONS) for part in module.children())


def lines(model: nn.Module) -> list[str]:
    """The candidates of a model, for people: a line for each."""
    return [f"{shown(path)}: {type(m).__name__} {shape_of(m)}" for path, m in candidates(model).items()]


def shown(path: str) -> str:
    """A dotted path, for people."""
    return repr(path) if path else "(the model itself)"


def width(module: nn.Module) -> int:
    """How many outputs a candidate has, or the layer that an adapter wraps."""
    if is_adapter(module):
        module = next((part for part in module.children() if isinstance(part, nn.Linear | _CONVOLUTIONS)), module)
    return int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))


def _own_forward(module: nn.Module) -> bool:
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            return type(module).forward is not kind.forward
    return False


def _more_than_a_layer(module: nn.Module) -> str | None:
    """A forward of its own that has more to work with than a weight and a bias: it would be linear only today."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    others = ", ".join(repr(name) for name in names if name not in ("weight", "bias"))
    if others:
        return f"{type(module).__name__} has a forward of its own, with {others} besides its weight"
    return None
