"""Hooks on a module that the compiler notices, and that no copy of the module carries.

torch.compile does not notice hooks: it takes a module that had none when it was first compiled, or another module of
the same class, for the same thing, and runs the graph without our probe, or with it where it does not belong. What it does
notice is a `forward` in the module's own `__dict__`. So there we put the module's own forward, which changes nothing else.

Copies and pickles are made by `__deepcopy__` and `__reduce_ex__`, DataParallel's replicas by `_replicate_for_data_parallel`;
`_apply` moves a module to another device, and `_load_from_state_dict` may. While the hooks are on, the module has its own
ones, which do what they always do, without anything of ours in the result, and tell us.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Returns True inside torch.jit.trace, whose graph must not contain our operations."""

# Calls a function that keeps something on an object, also inside of a compiled region where the compiler allows no such
# thing, like a checkpointed one. That is safe if what is kept in the end was there before.
try:
    from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer

    unchecked: Callable[..., Any] = _disable_side_effect_safety_checks_for_current_subtracer
except ImportError:  # an older PyTorch: there the compiler breaks the graph

    def unchecked(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def before_in_script(self: Any, input: tuple[Tensor]) -> None:
    """What torch.jit.script compiles instead of our hook before the call of a layer with one input."""
    return


def after_in_script(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """The same after the call."""
    return


def scripted_as(substitute: Callable[..., Any]) -> Callable[[Hook], Hook]:
    """Has torch.jit.script, which compiles hooks from their source, compile another function instead of a hook."""

    def marked(hook: Hook) -> Hook:
        hook.__wrapped__ = substitute  # type: ignore[attr-defined]
        return hook

    return marked


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
        # First of all hooks, on the layer's own output: those of sharded training would free the weight before.
        self._handles = [module.register_forward_hook(after, with_kwargs=True, prepend=True)]
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        original = module.forward
        self._own = {
            # A new function each time, unless it is the class's: the compiler compares functions.
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
        self._before = {name: module.__dict__[name] for name in self._own if name in module.__dict__}
        module.__dict__.update(self._own)

    def remove(self) -> None:
        """Takes everything off that is still ours."""
        for handle in self._handles:
            handle.remove()
        attributes = self._module.__dict__
        above = _top(attributes)
        while above is not None and above is not self:  # another one, which must not put ours back later
            self._restore(above._before)
            above = _top(above._before)
        self._restore(attributes)

    def _restore(self, attributes: dict[str, Any]) -> None:
        for name, value in self._own.items():
            if attributes.get(name) is value:
                del attributes[name]
                if name in self._before:
                    attributes[name] = self._before[name]

    def _reduce(self, protocol: Any) -> Any:
        """What the module's class makes of it, without us."""
        reduced = type(self._module).__reduce_ex__(self._module, protocol)
        if not (isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict)):
            return reduced
        return (*reduced[:2], _bare(reduced[2]), *reduced[3:])

    def _deepcopy(self, memo: Any) -> Any:
        """What it is without us: a class may copy the attributes by itself, as that of a parametrised module does."""
        module = self._module
        attributes = dict(module.__dict__)
        try:
            module.__dict__.clear()
            module.__dict__.update(_bare(attributes))
            copied = copy.deepcopy(module, memo)
        finally:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        if self._copied is not None:
            self._copied(memo, copied)
        return copied

    def _prepare(self) -> nn.Module:
        """Called by torch.jit.script. Returns what the module's class makes of itself for that."""
        if self._scripted is not None:
            self._scripted()
        prepare = getattr(type(self._module), "__prepare_scriptable__", None)
        return self._module if prepare is None else prepare(self._module)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As ever; then tells that parameters may be somewhere else."""
        moved: nn.Module = type(self._module)._apply(self._module, *args, **kwargs)
        if self._moved is not None:
            self._moved(moved)
        return moved

    def _load(self, *args: Any, **kwargs: Any) -> None:
        """As ever; then tells the same: parameters may have been taken over as they are."""
        type(self._module)._load_from_state_dict(self._module, *args, **kwargs)
        if self._moved is not None:
            self._moved(self._module)

    def _replicate(self) -> nn.Module:
        """A replica that lives for one pass: it keeps the hooks, so that its samples count, but not our forward."""
        replica: nn.Module = type(self._module)._replicate_for_data_parallel(self._module)
        above = _top(replica.__dict__)
        while above is not None:
            above._restore(replica.__dict__)
            above = _top(replica.__dict__)
        return replica


def _top(attributes: dict[str, Any]) -> ModulePatch | None:
    """The attachment that came last to a module with these attributes."""
    owner = getattr(attributes.get("__reduce_ex__"), "__self__", None)
    return owner if isinstance(owner, ModulePatch) else None


def _bare(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without anything of ours."""
    bare = dict(attributes)
    ours: set[int] = set()
    while (above := _top(bare)) is not None:
        above._restore(bare)
        ours.update(handle.id for handle in above._handles)
    for name in _HOOKS:
        if name in bare:
            bare[name] = type(bare[name])((key, hook) for key, hook in bare[name].items() if key not in ours)
    return bare
