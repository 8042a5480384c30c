"""What differs between JAX's model libraries: how a session learns of the linear layers in a loss, and differentiation.

`ModelLibrary` serves functions that call `tap`. `linen`, `nnx`, `equinox`, `haiku` and `keras_model` have a subclass for each
library.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.sessions import Session, session_entered


class ModelLibrary:
    """Hand-written nets, which call `tap`.

    Attributes:
        model: the watched model.
        name: of its class, or of the function.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = getattr(model, "__name__", type(model).__name__)

    def run(self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Runs a loss; calls the session for each linear layer in it."""
        with session_entered(session):
            return fun(*args, **kwargs)

    def run_without_effects(
        self, session: Session, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Like `run`, in an abstract trace; the user's objects are not changed."""
        return self.run(session, fun, args, kwargs)

    def jit(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Jits a function of the model by the library's own jit."""
        return jax.jit(fun)

    def evaluation(self, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        """A function that evaluates the model, and its arguments. It is only traced."""
        return self.model, inputs

    def bind_arguments(
        self, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments as the library's own value_and_grad would pass them to the loss."""
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
            if any(not -len(args) <= n < len(args) for n in wanted):
                raise InvalidInputError(
                    f"argnums={argnums!r}: the loss was called with {len(args)} positional arguments"
                )
            shifted = (0, *(1 + n % len(args) for n in wanted))
            gradient = jax.value_and_grad(fun, argnums=shifted, has_aux=has_aux, **options)
            value, (scores, *grads) = gradient(probe, *args, **kwargs)
            return value, scores, grads[0] if isinstance(argnums, int) else tuple(grads)

        return differentiated

    def is_model(self, value: Any) -> bool:
        """Returns True if an argument of the loss is the watched model, or a trained copy of it."""
        return type(value) is type(self.model)


@contextmanager
def substituted_classes(instances: Iterable[Any], subclass_of: Callable[[Any], type]) -> Iterator[None]:
    """Changes the class of each instance to `subclass_of` its class, and back at the end."""
    originals: list[tuple[Any, type]] = [(instance, type(instance)) for instance in instances]
    for instance, original in originals:
        object.__setattr__(instance, "__class__", subclass_of(original))
    try:
        yield
    finally:
        for instance, original in originals:
            object.__setattr__(instance, "__class__", original)


def zeros_of(shapes: Any) -> Any:
    """A pytree of zeros with the shapes and types of another pytree."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def named_arrays(tree: Any) -> dict[str, Array]:
    """The floating-point arrays of a pytree, by their dotted paths."""
    return {
        dotted_path(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def dotted_path(keys: Sequence[Any]) -> str:
    """The dotted path of a leaf of a pytree."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in keys)
