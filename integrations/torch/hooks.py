"""Hooks on a module that the compiler notices, and that no copy of the module carries.

torch.compile does not notice hooks: it takes a module that had none when it was first compiled, or another module of
the same class, for the same thing, and runs the graph without our probe, or with it where it does not belong. What it does
notice is a `forward` in the module's own `__dict__`. So there we put the module's own forward, which changes nothing else.

Copies and pickles are made by `__reduce_ex__`, DataParallel's replicas by `_replicate_for_data_parallel`, and `_apply` moves a
module to another device. While the hooks are on, the module has its own ones, which do what they always do, without
anything of ours in the result, and tell us.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Attachment:
    """Hooks on one module, until `remove`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        after: Callable[..., Any],
        before: Callable[..., Any] | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        """Calls `before(module, args, kwargs)` and `after(module, args, kwargs, output)`, as PyTorch's hooks, and `moved()`."""
        self._module = module
        self._moved = moved
        self._handles = [module.register_forward_hook(after, with_kwargs=True)]
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        original = module.forward
        self._own = {
            # A new function each time, unless it is the class's: the compiler compares functions.
            "forward": original
            if isinstance(original, MethodType)
            else lambda *args, **kwargs: original(*args, **kwargs),
            "__reduce_ex__": self._reduce,
            "_apply": self._apply,
            "_replicate_for_data_parallel": self._replicate,
        }
        self._before = {name: module.__dict__[name] for name in self._own if name in module.__dict__}
        module.__dict__.update(self._own)

    def remove(self) -> None:
        """Takes everything off that is still ours."""
        for handle in self._handles:
            handle.remove()
        attributes = self._module.__dict__
        above = getattr(attributes.get("__reduce_ex__"), "__self__", None)
        while isinstance(above, Attachment) and above is not self:  # another one, which must not put ours back later
            self._restore(above._before)
            above = getattr(above._before.get("__reduce_ex__"), "__self__", None)
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
        state = dict(reduced[2])
        self._restore(state)
        ours = {handle.id for handle in self._handles}
        for name in _HOOKS:
            if name in state:
                kept = {key: hook for key, hook in state[name].items() if key not in ours}
                state[name] = type(state[name])(kept)
        return (*reduced[:2], state, *reduced[3:])

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As ever; then tells that parameters may be somewhere else."""
        moved: nn.Module = type(self._module)._apply(self._module, *args, **kwargs)
        if self._moved is not None:
            self._moved()
        return moved

    def _replicate(self) -> nn.Module:
        """A replica that lives for one pass: it keeps the hooks, so that its samples count, but not our forward."""
        replica: nn.Module = type(self._module)._replicate_for_data_parallel(self._module)
        self._restore(replica.__dict__)
        return replica
