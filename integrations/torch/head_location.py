"""Notices when the head is replaced by another module.

A head is replaced when a model is fine-tuned (`model.fc = nn.Linear(...)`, timm's `reset_classifier`), and moved or switched
when an adapter is added, disabled or merged (PEFT). A probe on the old module would then see nothing.
"""

import weakref
from typing import Any, NamedTuple

from torch import nn

from gwa_logging.integrations.torch.candidates import check_is_linear, display_path, is_adapter, refusal
from gwa_logging.integrations.torch.head_layers import shape_of


class HeadChange(NamedTuple):
    """What is at the head's path instead of the watched head.

    Attributes:
        module: the module to observe from now on; None if there is nothing to observe.
        what: a sentence about the change.
    """

    module: nn.Module | None
    what: str


class HeadLocation:
    """The path of a head, and a weak reference to the module that was last found there."""

    def __init__(self, model: nn.Module, path: str, head: nn.Module) -> None:
        self.path = path
        self._names = path.split(".") if path else []
        self._last: weakref.ref[nn.Module] | None = weakref.ref(head)
        if module_at(model, self._names) is not head:  # the path starts at a wrapper of the model
            path = next((path for path, module in model.named_modules() if module is head), "")
            self._names = path.split(".") if path else []
        self._checkable = module_at(model, self._names) is head  # a stand-in for another library's layer has no path

    def check(self, model: nn.Module) -> HeadChange | None:
        """Returns the change since the last check, or None. Costs a microsecond if there is none."""
        if not self._checkable:
            return None
        found = module_at(model, self._names)
        last = self._last() if self._last is not None else None
        if found is last and (found is not None or self._last is None):
            return None
        self._last = None if found is None else weakref.ref(found)
        return self._change(model, last, found)

    def _change(self, model: nn.Module, last: nn.Module | None, found: nn.Module | None) -> HeadChange | None:
        before = f" ({_described(last)})" if last is not None else ""
        if found is not None and is_adapter(found):
            return HeadChange(
                None, f"the head {display_path(self.path)}{before} was given an adapter after watch(): {refusal(found)}"
            )
        moved = next((path for path, module in model.named_modules() if module is last), None)
        if last is not None and moved is not None and not _is_inactive_copy(model, moved):
            # The head was wrapped, or taken out of its wrapper, and is still used.
            self.path, self._names, self._last = moved, moved.split(".") if moved else [], weakref.ref(last)
            return None
        if found is None:
            return HeadChange(
                None, f"the head {display_path(self.path)}{before} was removed from the model after watch()"
            )
        now = f"the head {display_path(self.path)}{before} was replaced by another module ({_described(found)}) after watch()"
        refused = refusal(found) or check_is_linear(found)
        return HeadChange(None, f"{now}: {refused}") if refused else HeadChange(found, now)


def module_at(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The module that runs at a path, or None. Of PEFT's `modules_to_save` it is the active copy."""
    module: Any = model
    remaining = list(names)
    while remaining:
        module = module._modules.get(remaining.pop(0))
        if module is None:
            return None
        if "modules_to_save" in module._modules and "original_module" in module._modules:
            module = _active_copy(module)
            # The path continues with "original_module", or with "modules_to_save" and the name of a copy.
            del remaining[: 2 if remaining[:1] == ["modules_to_save"] else 1]
    return module  # type: ignore[no-any-return]


def _active_copy(wrapper: Any) -> nn.Module:
    adapters = wrapper.active_adapters
    if wrapper.disable_adapters or not adapters or adapters[0] not in wrapper.modules_to_save:
        return wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.modules_to_save[adapters[0]]  # type: ignore[no-any-return]


def _is_inactive_copy(model: nn.Module, path: str) -> bool:
    """Returns True if the module at a path is one of PEFT's copies that are not active."""
    modules = dict(model.named_modules())
    return module_at(model, path.split(".") if path else []) is not modules[path]


def _described(module: nn.Module) -> str:
    return f"{type(module).__name__} {shape_of(module)}".strip()
