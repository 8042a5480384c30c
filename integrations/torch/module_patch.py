"""Hooks on a module that torch.compile notices, and that no copy of the module contains.

torch.compile does not guard on hooks: it reuses a graph that it compiled before the hooks were registered, or for another
module of the same class, so the probe would be missing or run at the wrong module. But it guards on a `forward` in the
module's `__dict__`. So we put the module's own forward there, which changes nothing else.

`__deepcopy__` and `__reduce_ex__` make copies and pickles, `_replicate_for_data_parallel` makes DataParallel's replicas, and
`_apply` and `_load_from_state_dict` may move parameters to another device. While the hooks are registered, we override these
methods on the instance: each calls the original, removes our attributes from the result and notifies us.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Returns True inside torch.jit.trace, whose graph must not contain the probe."""

# Calls a function that assigns attributes, also where the compiler forbids that, such as in a checkpointed region. That is safe
# if the attributes have the same values in the end as before.
try:
    from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer

    unchecked: Callable[..., Any] = _disable_side_effect_safety_checks_for_current_subtracer
except ImportError:  # in an older PyTorch the compiler breaks the graph there

    def unchecked(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def before_in_script(self: Any, input: tuple[Tensor]) -> None:
    """torch.jit.script compiles this instead of the pre-forward hook of a layer with one input."""
    return


def after_in_script(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """torch.jit.script compiles this instead of the forward hook."""
    return


def scripted_as(substitute: Callable[..., Any]) -> Callable[[Hook], Hook]:
    """Makes torch.jit.script, which compiles hooks from their source, compile another function instead."""

    def decorate(hook: Hook) -> Hook:
        hook.__wrapped__ = substitute  # type: ignore[attr-defined]
        return hook

    return decorate


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class ModulePatch:
    """Hooks on one module, until `remove`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        after: Callable[..., Any],
        before: Callable[..., Any] | None = None,
        moved: Callable[[nn.Module], None] | None = None,
        copied: Callable[[Any, nn.Module], None] | None = None,
        scripted: Callable[[], None] | None = None,
    ) -> None:
        """Calls `before(module, args, kwargs)`, `after(module, args, kwargs, output)` as PyTorch does, and `moved(module)`.

        After each deep copy it calls `copied(memo, copy)`, with the memo of `copy.deepcopy`; and `scripted()` before
        torch.jit.script looks at the module.
        """
        self._module = module
        self._moved = moved
        self._copied = copied
        self._scripted = scripted
        # First of all hooks, so that it gets the layer's own output before the hooks of sharded training free the weight.
        self._handles = [module.register_forward_hook(after, with_kwargs=True, prepend=True)]
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        original = module.forward
        self._overrides = {
            # A new function each time unless it is the class's, since the compiler guards on the function's identity.
            "forward": original
            if isinstance(original, MethodType)
            else lambda *args, **kwargs: original(*args, **kwargs),
            "__reduce_ex__": self._reduce,
            "__deepcopy__": self._deepcopy,
            "__prepare_scriptable__": self._prepare,
            "_apply": self._apply,
            "_load_from_state_dict": self._load,
            "_replicate_for_data_parallel": self._replicate,
        }
        self._before = {name: module.__dict__[name] for name in self._overrides if name in module.__dict__}
        module.__dict__.update(self._overrides)

    def remove(self) -> None:
        """Removes the hooks and the overrides."""
        for handle in self._handles:
            handle.remove()
        attributes = self._module.__dict__
        above = _latest_patch(attributes)
        while above is not None and above is not self:  # a later patch must not restore this one's overrides
            self._restore(above._before)
            above = _latest_patch(above._before)
        self._restore(attributes)
        self._overrides, self._before = {}, {}  # they refer to the module and to this object: a cycle

    def _restore(self, attributes: dict[str, Any]) -> None:
        for name, value in self._overrides.items():
            if attributes.get(name) is value:
                del attributes[name]
                if name in self._before:
                    attributes[name] = self._before[name]

    def _reduce(self, protocol: Any) -> Any:
        """The class's own result, without our attributes."""
        reduced = type(self._module).__reduce_ex__(self._module, protocol)
        if not (isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict)):
            return reduced
        return (*reduced[:2], _unpatched(reduced[2]), *reduced[3:])

    def _deepcopy(self, memo: Any) -> Any:
        """A copy without our attributes, which are removed first: some classes, such as parametrised ones, copy `__dict__`."""
        module = self._module
        attributes = dict(module.__dict__)
        try:
            module.__dict__.clear()
            module.__dict__.update(_unpatched(attributes))
            copied = copy.deepcopy(module, memo)
        finally:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        if self._copied is not None:
            self._copied(memo, copied)
        return copied

    def _prepare(self) -> nn.Module:
        """The class's own result; notifies first. Called by torch.jit.script."""
        if self._scripted is not None:
            self._scripted()
        prepare = getattr(type(self._module), "__prepare_scriptable__", None)
        return self._module if prepare is None else prepare(self._module)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Calls the original, then notifies that parameters may have moved."""
        moved: nn.Module = type(self._module)._apply(self._module, *args, **kwargs)
        if self._moved is not None:
            self._moved(moved)
        return moved

    def _load(self, *args: Any, **kwargs: Any) -> None:
        """Calls the original, then notifies that parameters may have moved: they may have been assigned."""
        type(self._module)._load_from_state_dict(self._module, *args, **kwargs)
        if self._moved is not None:
            self._moved(self._module)

    def _replicate(self) -> nn.Module:
        """A replica for one pass. It keeps the hooks, so that its samples count, but not the overrides."""
        replica: nn.Module = type(self._module)._replicate_for_data_parallel(self._module)
        above = _latest_patch(replica.__dict__)
        while above is not None:
            above._restore(replica.__dict__)
            above = _latest_patch(replica.__dict__)
        return replica


def _latest_patch(attributes: dict[str, Any]) -> ModulePatch | None:
    """The latest patch of a module with these attributes."""
    owner = getattr(attributes.get("__reduce_ex__"), "__self__", None)
    return owner if isinstance(owner, ModulePatch) else None


def _unpatched(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without those of patches."""
    unpatched = dict(attributes)
    patch_hooks: set[int] = set()
    while (above := _latest_patch(unpatched)) is not None:
        above._restore(unpatched)
        patch_hooks.update(handle.id for handle in above._handles)
    for name in _HOOKS:
        if name in unpatched:
            hooks = unpatched[name]
            unpatched[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in patch_hooks)
    return unpatched
