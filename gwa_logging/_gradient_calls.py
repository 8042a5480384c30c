"""The part of `Monitor` that differentiates (JAX)."""

from typing import Any

from gwa_logging.errors import InvalidInputError
from gwa_logging.forks import Owned
from gwa_logging.protocols import Adapter


class GradientCalls(Owned):
    """Base class of `Monitor`."""

    _adapter: Adapter

    def value_and_grad(
        self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any
    ) -> Any:
        """Like `jax.value_and_grad`, with the scores added to the value: `(value, scores), grads` (JAX only).

        Args:
            fun: the loss function, unchanged; it must run the watched model.
            argnums: as in `jax.value_and_grad`.
            has_aux: as in `jax.value_and_grad`; the first result is then `((value, aux), scores)`.
            **options: as in `jax.value_and_grad`.

        Returns:
            A function with the same arguments; it may be jitted. Scores are float32 [...], one for each row of the
            head's output. While `jax_debug_nans` or `jax_debug_infs` is on, samples without a score are marked by 64, 128
            and -128 instead of values that are not finite.

        Raises:
            HeadNotFoundError: while tracing, if `fun` does not run the head exactly once.
        """
        make = getattr(self._adapter, "value_and_grad", None)
        if make is None:
            raise InvalidInputError("value_and_grad and grad are for JAX models; in PyTorch call loss.backward()")
        return make(fun, argnums=argnums, has_aux=has_aux, **options)

    def grad(self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any) -> Any:
        """Like `jax.grad`, with the scores: `grads, scores`, or `grads, (aux, scores)`. See `value_and_grad` (JAX only)."""
        value_and_grad = self.value_and_grad(fun, argnums, has_aux, **options)

        def gradient(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            (value, scores), grads = value_and_grad(*args, **kwargs)
            return grads, ((value[1], scores) if has_aux else scores)

        return gradient
