"""What a training loop tells the monitor: scores, and which samples they are of."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gwa_logging.errors import InvalidInputError
from gwa_logging.forks import Owned
from gwa_logging.ledger import TaggedBatch
from gwa_logging.protocols import Adapter


class Intake(Owned):
    """The part of a monitor that is called at every training step. Nothing in it waits for the device."""

    heads: Mapping[str, "Intake"]
    _adapter: Adapter
    _closed: bool
    _pauses: int = 0

    def update(self, scores: Any, sample_ids: Any = None, *, weights: Any = None, predicted: Any = None) -> None:
        """Takes the scores of one training step (JAX, and PyTorch loops that make their own). Does not wait for them.

        Args:
            scores: float [...] on the device, as `value_and_grad` returns them; values that are not finite are
                samples without a score. In JAX also a `gwa_logging.integrations.jax.AlignmentState`, for loops inside of scan.
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`), or None; of mixed samples int [batch, m].
            weights: the shares of mixed samples, see `tag`.
            predicted: int [batch], the classes that the model predicts, for the list of suspects; such as `logits.argmax(-1)`
                out of the loss's aux.

        Raises:
            InvalidInputError: scores or ids of a wrong type, shape or dtype, or a tracer (call it outside jit).
        """
        if sample_ids is None and not (weights is None and predicted is None):
            raise InvalidInputError("weights and predicted are entered by sample id: update(scores, sample_ids, ...)")
        if not self._closed and not self._is_refused("update()") and not self._pauses:
            self._adapter.observe(scores, None if sample_ids is None else TaggedBatch(sample_ids, weights, predicted))

    def tag(self, sample_ids: Any, weights: Any = None) -> None:
        """Says which samples the next forward pass is about (PyTorch).

        Where inputs are mixed out of several samples (mixup, CutMix), say which and how much of each; the score is shared out
        by these weights: `tag(torch.stack([ids, ids[order]], 1), weights=(lam, 1 - lam))`.

        All calls of the head in one forward of the model get the ids. Where its logits are [batch, rows, classes], there may be
        an id for each row or for each input. Rows without a gradient are then no samples; of several with one, the mean score
        is entered.

        Where the head's pass is itself repeated in the backward pass (reentrant checkpointing of the whole model), of several
        passes before one backward only the last keeps its ids.

        Args:
            sample_ids: int [batch] into the ledger (`watch(num_samples=)`); of mixed samples int [batch, m]. On any device.
            weights: float [m], the same for every sample of the batch, or [batch, m]; at least 0.
        """
        if self.is_copy and self._is_refused("tag()"):
            return
        for monitor in (self, *self.heads.values()):
            monitor._adapter.tag(TaggedBatch(sample_ids, weights))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in the body of a `with` statement, for passes that are not training.

        Examples are the passes that make adversarial examples, and a generator's step through a watched discriminator. A
        forward or backward pass in the body is not counted, compiled or not, nor is `update`; ids from `tag` wait for the
        next counted pass. It holds for all heads and all threads, and may be nested.
        """
        monitors = (self, *self.heads.values())
        for monitor in monitors:
            monitor._pause(1)
        try:
            yield
        finally:
            for monitor in monitors:
                monitor._pause(-1)

    def _pause(self, change: int) -> None:
        was_paused, self._pauses = self._pauses > 0, self._pauses + change
        if was_paused != (self._pauses > 0):
            self._adapter.pause(self._pauses > 0)

    def value_and_grad(
        self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any
    ) -> Any:
        """Like `jax.value_and_grad`, but the value gains the scores: `(value, scores), grads` (JAX only).

        Args:
            fun: the loss function, untouched; it must run the watched model.
            argnums: as in `jax.value_and_grad`.
            has_aux: as there; the first result is then `((value, aux), scores)`.
            options: further arguments of `jax.value_and_grad`.

        Returns:
            A function of the same arguments; it may be jitted. Scores are float32 [...], one for each row of the
            head's output. While `jax_debug_nans` or `jax_debug_infs` is on, samples without a score are marked by 64, 128
            and -128 instead of values that are not finite.

        Raises:
            HeadNotFoundError: when it is traced, if `fun` does not run the head once.
        """
        make = getattr(self._adapter, "value_and_grad", None)
        if make is None:
            raise InvalidInputError(
                "value_and_grad and grad are for JAX models; this one is PyTorch: call loss.backward() as ever"
            )
        return make(fun, argnums=argnums, has_aux=has_aux, **options)

    def grad(self, fun: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any) -> Any:
        """Like `jax.grad`, but the scores come along: `grads, scores`, or `grads, (aux, scores)` (JAX only).

        Arguments, scores and errors are those of `value_and_grad`.
        """
        value_and_grad = self.value_and_grad(fun, argnums, has_aux, **options)

        def gradient(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            (value, scores), grads = value_and_grad(*args, **kwargs)
            return grads, ((value[1], scores) if has_aux else scores)

        return gradient
