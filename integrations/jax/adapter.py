"""The JAX adapter: `value_and_grad` with scores, and what `update` gathers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.jax.accumulate import AlignmentState, JaxSnapshot, enter, update
from gwa_logging.integrations.jax.probe import Call, Discovery, Session, Tapping, entered, makers
from gwa_logging.monitor import logger
from gwa_logging.registry import import_room
from gwa_logging.samples import check_sample_ids
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary


def subject(model: Any) -> Any:
    """What is watched when a model is given: itself."""
    return model


def attach(model: Any, settings: WatchSettings, faults: Faults) -> "JaxAdapter":
    """Watches a Flax Linen module, or a function that calls `tap`.

    Raises:
        InvalidInputError: head= is not a dotted path, or is given for a function.
    """
    if isinstance(settings.head, str | None):
        return JaxAdapter(model, settings.head, settings.num_samples)
    raise InvalidInputError(
        f"head={settings.head!r}: expected a dotted path such as 'head', found {type(settings.head).__name__}"
    )


class JaxAdapter:
    """Watches one model. See `gwa_logging.types.Adapter`."""

    def __init__(self, model: Any, head: str | None, num_samples: int | None) -> None:
        self.head = f"head {head!r}: named by head=" if head else "head: the first trace of the loss will tell"
        self._listening: Callable[[Session], AbstractContextManager[None]] = entered
        if any(base.__module__.startswith("flax.linen.") for base in type(model).__mro__):
            linen = import_room("gwa_logging.integrations.jax.linen", "flax", "jax")
            self._listening = lambda session: linen.listening(model, session)
        self._model_name = getattr(model, "__name__", type(model).__name__)
        self._wanted = head
        self._num_samples = num_samples
        self._state = AlignmentState.empty()
        self._ledger: tuple[Any, Any] | None = None
        self._on_step: Callable[[], None] = lambda: None

    writes = True

    @property
    def path(self) -> str:
        """The head's path; empty while it is not known."""
        return self._wanted or ""

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """One process: nothing to do."""
        return summary

    def start(self, on_step: Callable[[], None]) -> None:
        """Begins to observe."""
        self._on_step = on_step

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, **options: Any
    ) -> Callable[..., Any]:
        """See `Monitor.value_and_grad`."""
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        def with_scores(*args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Any]:
            head = self._find(fun, args, kwargs, has_aux)

            def probed(probe: Any, *args: Any, **kwargs: Any) -> Any:
                with self._listening(Tapping(head.path, probe)):
                    return fun(*args, **kwargs)

            shifted = (0, *(1 + n % len(args) for n in chosen))
            differentiated = jax.value_and_grad(probed, argnums=shifted, has_aux=has_aux, **options)
            probe = jnp.zeros(head.logits_shape[:-1], jnp.float32)
            value, (scores, *grads) = differentiated(probe, *args, **kwargs)
            return (value, scores), grads[0] if isinstance(argnums, int) else tuple(grads)

        return with_scores

    def _find(self, fun: Callable[..., Any], args: Any, kwargs: Any, has_aux: bool) -> Call:
        """Traces the loss once, abstractly, and finds the head's call in it."""
        discovery = Discovery()

        def loss() -> Any:
            with self._listening(discovery):
                out = fun(*args, **kwargs)
            return out[0] if has_aux else out

        jaxpr = jax.make_jaxpr(loss)()
        calls = discovery.calls
        if not calls:
            raise HeadNotFoundError(
                f"the loss does not run a linear layer of {self._model_name}. Check that the loss calls the watched "
                "model (the very one given to watch()), or, in a hand-written net, gwa_logging.integrations.jax.tap"
            )
        paths = {self._wanted} if self._wanted else makers(jaxpr)
        found = [call for call in calls if call.path in paths]
        if len(found) == 1:
            if not self._wanted and not self.head.startswith(f"head {found[0].path!r}"):
                self.head = f"head {found[0]}: the loss comes from it"
                logger.info("gwa_logging: %s", self.head)
            return found[0]
        if not found:
            problem = (
                f"head={self._wanted!r}: the loss runs no such layer of {self._model_name}."
                if self._wanted
                else f"the loss does not come from a linear layer of {self._model_name}."
            )
        elif len({call.path for call in found}) == 1:
            problem = f"{found[0].path!r} runs {len(found)} times in one loss; a head must run once."
        else:
            problem = f"the loss comes from several linear layers: {', '.join(sorted(repr(c.path) for c in found))}."
        raise HeadNotFoundError(problem, dict.fromkeys(map(str, calls)))

    def observe(self, scores: Any, sample_ids: Any) -> None:
        """Takes in the scores of one step."""
        if isinstance(scores, jax.core.Tracer):
            raise InvalidInputError(
                "scores: found a tracer; return the scores from the jitted step and call update outside"
            )
        is_array = isinstance(scores, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(scores.dtype, jnp.floating) or not scores.ndim:
            found = f"{scores.dtype} of shape {scores.shape}" if is_array else type(scores).__name__
            raise InvalidInputError(f"scores: expected a floating-point array [batch], found {found}")
        if sample_ids is not None:
            check_sample_ids(sample_ids, scores.size, self._num_samples)
            self._ledger = enter(*self._ledger_arrays(), sample_ids, scores)
        self._state = update(self._state, scores)
        self._on_step()

    def tag(self, sample_ids: Any) -> None:
        """Is for PyTorch."""
        raise InvalidInputError("tag() is for PyTorch; in JAX pass the ids along: monitor.update(scores, sample_ids)")

    def snapshot(self) -> JaxSnapshot:
        """Hands over what was gathered since the last one."""
        state, self._state = self._state, AlignmentState.empty()
        return JaxSnapshot(state)

    def _ledger_arrays(self) -> tuple[Any, Any]:
        if self._ledger is None:
            size = (self._num_samples or 0) + 1
            self._ledger = jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.int32)
        return self._ledger

    def ledger(self) -> tuple[Any, Any]:
        """Sums and counts per sample, on the host."""
        sums, seen = self._ledger_arrays()
        return np.array(sums), np.array(seen)

    def load_ledger(self, sums: Any, seen: Any) -> None:
        """Puts back what `ledger` gave."""
        self._ledger = jnp.asarray(sums, jnp.float32), jnp.asarray(seen, jnp.int32)

    def nothing_seen(self) -> str:
        """What to check when no step has been seen."""
        return (
            "In JAX, take value_and_grad = monitor.value_and_grad(loss_fn) in place of jax.value_and_grad(loss_fn), return "
            "the scores from the jitted step, and call monitor.update(scores) after each step."
        )

    def close(self) -> None:
        """Nothing of the model was changed."""
