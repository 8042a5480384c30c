"""The JAX adapter: `value_and_grad` with scores, and what `update` gathers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.jax.accumulate import AlignmentState, JaxSnapshot, enter, global_update, merge, update
from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Call, Discovery, Tapping, apart, makers, places
from gwa_logging.monitor import logger
from gwa_logging.registry import import_room
from gwa_logging.samples import check_sample_ids
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary


def subject(model: Any) -> Any:
    """What is watched when a model is given: itself, if something can refer to it weakly; of Haiku's pairs, apply."""
    return getattr(model, "apply") if isinstance(model, tuple) else model  # noqa: B009 - a named tuple of Haiku's


def describe(model: Any, wanted: str | None = None) -> str:
    """What can be said of a model's head without its loss: nothing yet."""
    named = (
        f"head {wanted!r} is taken, if the loss runs it once" if wanted else "it is told when the loss is first traced"
    )
    return f"{type(model).__name__}: a JAX model's head is found by dataflow from the loss; {named}."


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


def _explicit_mesh(scores: Any) -> Mesh | None:
    """The mesh of scores that are sharded over explicit axes."""
    mesh = getattr(getattr(scores, "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


@lru_cache(maxsize=8)
def _auto_mesh(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


_LIBRARIES = {"flax.linen": "Linen", "flax.nnx": "NNX", "equinox": "Equinox", "haiku": "Haiku"}


def _library_of(model: Any) -> Library:
    """The room of the library that a model is made with; hand-written if it is a function."""
    homes = [base.__module__ for base in type(model).__mro__]
    for home, name in _LIBRARIES.items():
        if any(module == home or module.startswith(home + ".") for module in homes):
            package, _, part = home.rpartition(".")
            room = import_room(f"gwa_logging.integrations.jax.{part}", package or part, "jax")
            return getattr(room, name)(model)  # type: ignore[no-any-return]
    return Library(model)


class JaxAdapter:
    """Watches one model. See `gwa_logging.types.Adapter`."""

    def __init__(self, model: Any, head: str | None, num_samples: int | None) -> None:
        self.head = f"head {head!r}: named by head=" if head else "head: the first trace of the loss will tell"
        self._library = _library_of(model)
        self._model_name = getattr(model, "__name__", type(model).__name__)
        self._wanted = head
        self._num_samples = num_samples
        self._state: AlignmentState | None = None  # made where the scores are
        self._ledger: tuple[Any, Any] | None = None
        self._mesh: Mesh | None = None
        self._is_global = False
        self._on_step: Callable[[], None] = lambda: None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes: the first."""
        return jax.process_index() == 0

    @property
    def path(self) -> str:
        """The head's path; empty while it is not known."""
        return self._wanted or ""

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary of all processes. Every one must call it, and all must have given scores of the same kind.

        Scores in global arrays have been reduced on the devices already; scores that are each process's own are gathered.
        """
        if jax.process_count() == 1 or self._is_global:
            return summary
        gathered = multihost_utils.process_allgather(np.frombuffer(summary.to_bytes(), np.uint8), tiled=False)
        return AlignmentSummary.merge_all(AlignmentSummary.from_bytes(part.tobytes()) for part in np.asarray(gathered))

    def start(self, on_step: Callable[[], None]) -> None:
        """Begins to observe."""
        self._on_step = on_step

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, **options: Any
    ) -> Callable[..., Any]:
        """See `Monitor.value_and_grad`."""

        def with_scores(*args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Any]:
            head, is_inner = self._find(fun, args, kwargs, has_aux)

            def probed(probe: Any, *args: Any, **kwargs: Any) -> Any:
                with apart() if is_inner else nullcontext():
                    return self._library.run(Tapping(head, probe), fun, args, kwargs)

            differentiated = self._library.value_and_grad(probed, argnums, has_aux, options)
            value, scores, grads = differentiated(head.probe(), *args, **kwargs)
            return (value, scores), grads

        return with_scores

    def _find(self, fun: Callable[..., Any], args: Any, kwargs: Any, has_aux: bool) -> tuple[Call, bool]:
        """Traces the loss once, abstractly, and finds the head's call in it; and whether an inner function makes it."""
        discovery = Discovery()

        def loss() -> Any:
            out = self._library.run_apart(discovery, fun, args, kwargs)
            return out[0] if has_aux else out

        with apart():
            jaxpr = jax.make_jaxpr(loss)()
        calls = discovery.calls
        if not calls:
            raise HeadNotFoundError(
                f"the loss does not run a linear layer of {self._model_name}. Check that the loss calls the watched "
                "model (the very one given to watch()), or, in a hand-written net, gwa_logging.integrations.jax.tap"
            )
        paths = {self._wanted} if self._wanted else makers(jaxpr)
        found = [call for call in calls if call.path in paths]
        runs = places(jaxpr.jaxpr, found[0].path) if found else []  # more than calls, if an inner jit runs twice
        if len(found) == 1 and len(runs) <= 1:
            around = frozenset[str]().union(*runs)
            if around & {"scan", "while"}:
                raise HeadNotFoundError(
                    f"{found[0].path!r} runs in a loop (lax.scan, lax.map, fori_loop) inside of the loss, once for each part "
                    "of the batch; a head must run once. Take value_and_grad of the loss of one part, and loop over that"
                )
            if not self._wanted and not self.head.startswith(f"head {found[0].path!r}"):
                self.head = f"head {found[0]}: the loss comes from it"
                logger.info("gwa_logging: %s", self.head)
            return found[0], bool(around)
        if not found:
            problem = (
                f"head={self._wanted!r}: the loss runs no such layer of {self._model_name}."
                if self._wanted
                else f"the loss does not come from a linear layer of {self._model_name}."
            )
        elif len({call.path for call in found}) == 1:
            problem = f"{found[0].path!r} runs {max(len(found), len(runs))} times in one loss; a head must run once."
        else:
            problem = f"the loss comes from several linear layers: {', '.join(sorted(repr(c.path) for c in found))}."
        raise HeadNotFoundError(problem, dict.fromkeys(map(str, calls)))

    def observe(self, scores: Any, sample_ids: Any) -> None:
        """Takes in the scores of one step."""
        if isinstance(scores, jax.core.Tracer):
            raise InvalidInputError(
                "scores: found a tracer; return the scores from the jitted step and call update outside"
            )
        if isinstance(scores, AlignmentState):
            if isinstance(scores.numbers, jax.core.Tracer):
                raise InvalidInputError(
                    "scores: found a tracer; return the state from the jitted loop and call update outside"
                )
            self._state = scores if self._state is None else merge(self._state, scores)
            self._on_step()
            return
        is_array = isinstance(scores, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(scores.dtype, jnp.floating) or not scores.ndim:
            found = f"{scores.dtype} of shape {scores.shape}" if is_array else type(scores).__name__
            raise InvalidInputError(f"scores: expected a floating-point array [batch], found {found}")
        if sample_ids is not None:
            check_sample_ids(sample_ids, scores.size, self._num_samples)
        mesh = _explicit_mesh(scores)
        if mesh is not None:  # with explicit axes each of our operations would have to name its sharding
            self._mesh = _auto_mesh(mesh)
            scores = jax.device_put(scores, NamedSharding(self._mesh, scores.sharding.spec))
            sample_ids = None if sample_ids is None else np.asarray(sample_ids)
        if isinstance(scores, jax.Array) and not scores.is_fully_addressable:
            self._observe_global(scores, sample_ids)
            return
        with self._at_ease():
            if sample_ids is not None:
                self._ledger = enter(*self._ledger_arrays(), sample_ids, scores)
            self._state = update(self._state or AlignmentState.empty(), scores)
        self._on_step()

    def _observe_global(self, scores: jax.Array, sample_ids: Any) -> None:
        """Takes in scores of which this process holds a part."""
        if sample_ids is not None:
            raise InvalidInputError(
                "sample_ids: a ledger over scores that are spread over several processes is not kept; pass each process's own "
                "scores and ids, or none"
            )
        self._is_global = True
        with self._at_ease():
            state = self._state or AlignmentState.empty_on_host()
            self._state = global_update(scores.sharding.mesh)(state, scores)  # type: ignore[attr-defined]
        self._on_step()

    def _at_ease(self) -> AbstractContextManager[Any]:
        """A mesh without explicit axes, if the scores came on one with them."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def tag(self, sample_ids: Any) -> None:
        """Is for PyTorch."""
        raise InvalidInputError("tag() is for PyTorch; in JAX pass the ids along: monitor.update(scores, sample_ids)")

    def snapshot(self) -> JaxSnapshot:
        """Hands over what was gathered since the last one."""
        with self._at_ease():
            state, self._state = self._state or AlignmentState.empty(), None
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
