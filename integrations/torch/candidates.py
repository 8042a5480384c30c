"""Which layers of a model could be its head, which layers only look like one, and why."""

import copy
import math
import random

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gwa_logging.integrations.torch.head_layers import refused_kind, shape_of

_TRIAL_ROWS = 32
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def refusal(module: nn.Module) -> str | None:
    """Returns why a module cannot be a head; None if it can, as far as is known without running it.

    A subclass that overrides forward may still compute W h + b: see `check_is_linear`.
    """
    kind = type(module).__name__
    if is_adapter(module):
        return (
            f"{kind} is an adapter: it adds terms to the layer that it wraps, and their sum cannot be read as one weight. "
            "Train the head itself: exclude it from the adapted layers, and with PEFT name it in modules_to_save"
        )
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and any(map(is_lazy, module.parameters())):
        return f"{kind} has no shape yet: run one forward pass before watch()"
    if isinstance(module, nn.Linear) and _overrides_forward(module):
        weight = module.weight
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            return f"{kind} has a weight that is packed or quantised, which is not supported"
        return _extra_parameters(module)
    reason = refused_kind(module)
    return _extra_parameters(module) if reason is None and _overrides_forward(module) else reason


def check_is_linear(module: nn.Module) -> str | None:
    """Runs a candidate that overrides forward. Returns why it is not a head; None if it computes W h + b.

    A copy is run, in training mode, since that is the mode that is observed: it may behave differently there than in eval mode,
    and change its weight and buffers.
    """
    if not _overrides_forward(module):
        return None
    assert isinstance(module, nn.Linear | _CONVOLUTIONS)
    kind = type(module).__name__
    parameter = next(module.parameters())
    if parameter.is_meta:
        return f"{kind} overrides forward, and cannot be tested on the meta device"
    devices, state = [parameter.device] if parameter.is_cuda else [], random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            gap = _distance_from_linear(copy.deepcopy(module).train())
    except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
        return f"{kind} overrides forward, and running it failed: {type(error).__name__}: {error}"
    finally:
        random.setstate(state)
    if gap <= 8 * torch.finfo(parameter.dtype).eps ** 0.75:
        return None
    return f"{kind} overrides forward, and does not compute W h + b in training mode"


def _distance_from_linear(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> float:
    """The largest difference between a layer's output and W h + b, relative to the size of the terms of W h + b.

    The rows have very different lengths, so that clipped or capped outputs are noticed.
    """
    weight, bias = module.weight, module.bias
    features = weight.shape[1]
    rows = torch.arange(_TRIAL_ROWS * features, device=weight.device, dtype=torch.float32).cos()
    lengths = torch.logspace(-2, 2, _TRIAL_ROWS, device=weight.device)
    rows = (rows.view(_TRIAL_ROWS, features) * lengths[:, None]).to(weight.dtype)
    found = module.forward(rows.view(_TRIAL_ROWS, features, *(1,) * (weight.ndim - 2)))
    weight = module.weight.flatten(1)  # after the forward pass, which may change it
    expected = nn.functional.linear(rows, weight, bias)
    if not isinstance(found, torch.Tensor) or found.shape[:2] != expected.shape:
        return math.inf
    size = nn.functional.linear(rows.abs(), weight.abs(), None if bias is None else bias.abs()).double()
    gap = (found.reshape(expected.shape).double() - expected.double()).abs().amax(1)
    return float((gap / size.amax(1).clamp(min=torch.finfo(weight.dtype).tiny)).max())


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that could be a head, by path; without parts of adapters."""
    inside = {part for module in model.modules() if is_adapter(module) for part in module.modules()}
    return {path: m for path, m in model.named_modules() if m not in inside and refusal(m) is None}


def leaf_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that end a walk: the candidates, and all other modules with parameters that contain no candidate."""
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
    """The layers that look like candidates and are refused: the reasons, by path."""
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


def describe_candidates(model: nn.Module) -> list[str]:
    """One line for each candidate of a model, for messages."""
    return [f"{display_path(path)}: {type(m).__name__} {shape_of(m)}" for path, m in candidates(model).items()]


def display_path(path: str) -> str:
    """A dotted path, for messages."""
    return repr(path) if path else "(the model itself)"


def outputs_of(module: nn.Module) -> int:
    """The number of outputs of a candidate, or of the layer that an adapter wraps."""
    if is_adapter(module):
        module = next((part for part in module.children() if isinstance(part, nn.Linear | _CONVOLUTIONS)), module)
    return int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))


def _overrides_forward(module: nn.Module) -> bool:
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            return type(module).forward is not kind.forward
    return False


def _extra_parameters(module: nn.Module) -> str | None:
    """Refuses an overridden forward that could use more than a weight and a bias: it might be linear only at this moment."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    others = ", ".join(repr(name) for name in names if name not in ("weight", "bias"))
    if others:
        return f"{type(module).__name__} overrides forward, with {others} besides its weight"
    return None
