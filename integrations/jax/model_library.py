"""What differs between JAX's model libraries: how a loss is run so that a session hears of its linear layers, and how it is
differentiated. This one serves functions that call `tap`; each library has a room of its own beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.probe import Session, entered


class Library:
    """Hand-written nets, which call `tap`.

    Attributes:
        model: the watched model.
        name: of its class, or of the function.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = getattr(model, "__name__", type(model).__name__)

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Runs a loss so that `session` hears of the linear layers in it."""
        with entered(session):
            return fun(*args, **kwargs)

    def run_apart(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The same, inside of an abstract trace, where nothing of the user's may be changed."""
        return self.run(session, fun, args, kwargs)

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Jits a function of the model, as the library has it."""
        return jax.jit(fun)

    def forward(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        """A function that runs the model in evaluation, and its arguments; traced only, never run."""
        return self.model, inputs

    def positional(
        self, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments as the library's own value_and_grad would call the loss with them."""
        return args, kwargs

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any]
    ) -> Callable[..., tuple[Any, Array, Any]]:
        """Differentiates fun(probe, *args).

        Returns:
            A function of (probe, *args) that returns the value, the probe's gradient and the gradients by `argnums`.
        """
        wanted = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        def differentiated(probe: Array, *args: Any, **kwargs: Any) -> tuple[Any, Array, Any]:
            beyond = [n for n in wanted if not -len(args) <= n < len(args)]
            if beyond:
                raise InvalidInputError(
                    f"argnums={argnums!r}: the loss was called with {len(args)} positional arguments"
                )
            shifted = (0, *(1 + n % len(args) for n in wanted))
            value, (scores, *grads) = jax.value_and_grad(fun, argnums=shifted, has_aux=has_aux, **options)(
                probe, *args, **kwargs
            )
            return value, scores, grads[0] if isinstance(argnums, int) else tuple(grads)

        return differentiated

    def is_model(self, value: Any) -> bool:
        """Whether an argument of the loss is the watched model, or what training has made of it."""
        return type(value) is type(self.model)


def zeros(shapes: Any) -> Any:
    """Arrays of the shapes of a pytree, for a trace."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def named(tree: Any) -> dict[str, Array]:
    """The floating-point arrays of a pytree, by their dotted paths."""
    return {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def path_of(keys: Sequence[Any]) -> str:
    """The dotted path of a leaf of a pytree."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in keys)
