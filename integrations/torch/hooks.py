"""Hooks that stay behind when a model is copied or pickled."""

from collections.abc import Callable
from typing import Any


class Hook:
    """Calls through to a hook of ours. A copy or a pickle of the model has an inert function in its place."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:  # deepcopy asks this as well
        return (_inert, ())


def no_hook(*args: Any) -> None:
    """What a copied model has in place of a hook of ours."""


def _inert() -> Callable[..., None]:
    return no_hook
