"""The JAX adapter: `value_and_grad` with scores, and what `update` accumulates."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, Mesh, NamedSharding

from gwa_logging.checkpoint import HeadShape
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults, logger
from gwa_logging.integrations.jax.accumulate import (
    AlignmentState,
    JaxSnapshot,
    copy_state,
    global_update,
    merge_states,
    transfers_allowed,
    update_state,
    update_state_with_steps,
)
from gwa_logging.integrations.jax.distributed import Processes, shared_store
from gwa_logging.integrations.jax.find_head import find_head, library_of
from gwa_logging.integrations.jax.ledger import DeviceLedger, add_steps_to_ledger
from gwa_logging.integrations.jax.pending_steps import PendingSteps, Step, is_deleted, owned, side_by_side
from gwa_logging.integrations.jax.probe import ProbeSession
from gwa_logging.integrations.jax.sessions import LayerCall, fresh_trace
from gwa_logging.integrations.jax.weights import JaxWeights
from gwa_logging.ledger import LedgerPart, TaggedBatch
from gwa_logging.protocols import Evaluated
from gwa_logging.ranks import Attendance, check_windows
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary

P = ParamSpec("P")
R = TypeVar("R")

LEFT_OUT = "steps left out"
"""Fault: steps whose scores could not be added up."""


def subject(model: Any) -> Any:
    """The object that identifies a watched model: the model, or `apply` of Haiku's pairs, which cannot be referenced weakly."""
    return getattr(model, "apply") if isinstance(model, tuple) else model  # noqa: B009 - a named tuple of Haiku's


def attach(model: Any, settings: WatchSettings, faults: Faults) -> "JaxAdapter":
    """Watches a model of Flax (Linen or NNX), Equinox, Haiku or Keras, or a function that calls `tap`.

    Raises:
        InvalidInputError: head= is not a dotted path, or there are several processes and `samples_per_epoch` is set.
    """
    if not isinstance(settings.head, str | None):
        raise InvalidInputError(
            f"head={settings.head!r}: expected a dotted path such as 'head', found {type(settings.head).__name__}"
        )
    if settings.look is not None:
        raise InvalidInputError(
            "look: in JAX the monitor does not have the parameters; call monitor.look(logits) before monitor.end_epoch()"
        )
    check_windows(settings.samples_per_epoch, jax.process_count())
    return JaxAdapter(model, settings, faults, Attendance.for_settings(settings, shared_store))


def _is_tracing() -> bool:
    """Returns True inside a transformation such as jit."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _explicit_mesh(scores: Any) -> Mesh | None:
    """The mesh of scores that are sharded over explicit axes, else None."""
    mesh = getattr(getattr(scores, "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


@lru_cache(maxsize=8)
def _with_auto_axes(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _allows_transfers(
    method: Callable[Concatenate["JaxAdapter", P], R],
) -> Callable[Concatenate["JaxAdapter", P], R]:
    """Exempts a method from `jax.transfer_guard`: what it copies between host and device is copied on purpose."""

    @wraps(method)
    def allowed(self: "JaxAdapter", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with transfers_allowed():
            return method(self, *args, **kwargs)

    return allowed


class JaxAdapter:
    """Watches one model. See `gwa_logging.protocols.Adapter`."""

    def __init__(self, model: Any, settings: WatchSettings, faults: Faults, attendance: Attendance) -> None:
        head: str | None = settings.head
        self.head = f"head {head!r}: named by head=" if head else "head: found when the loss is first traced"
        self.notes: tuple[str, ...] = ()
        self.is_detached = False  # scores come from the user, even if the model no longer exists
        self.is_language_model = False  # not known
        self._attendance = attendance
        self._processes = Processes(attendance, faults)
        self._library = library_of(model)
        self._model = weakref.ref(subject(model))
        self._wanted = head
        self._num_samples = settings.num_samples
        self._pools_rows = settings.unit == "sample"
        self._state: AlignmentState | None = None  # made on the devices of the first scores
        self._ledger: DeviceLedger | None = None
        self._pending = PendingSteps(settings.log_every_n_steps)
        self._faults = faults
        self._untagged = 0
        self._call: LayerCall | None = None  # of the head, once it has been traced
        self._mesh: Mesh | None = None
        self._is_global = False
        self._on_step: Callable[[], None] = lambda: None

    @property
    def writes(self) -> bool:
        """Returns True in the first process, which writes."""
        return jax.process_index() == 0

    @property
    def path(self) -> str:
        """The head's path; empty while it is not known."""
        return self._call.path if self._call else self._wanted or ""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return int(jax.process_count())

    @property
    def shape(self) -> tuple[int, int] | None:
        """Features and classes of the head; None while it is not known."""
        return (self._call.features, self._call.logits.shape[-1]) if self._call else None

    @_allows_transfers
    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary over all processes. Every process must call it, with scores of the same kind.

        Scores in global arrays have been reduced on the devices already. Scores in each process's own arrays are gathered.
        """
        if self._is_global or jax.process_count() == 1:
            return summary
        head = "" if self.shape is None else str(HeadShape(self.path, *self.shape))
        summary, problems = self._processes.merge_summaries(summary, head)
        self.notes = tuple(problems.values())
        return summary

    def start(self, on_step: Callable[[], None]) -> None:
        """Starts observing."""
        self._on_step = on_step
        self._attendance.enter()

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, **options: Any
    ) -> Callable[..., Any]:
        """See `Monitor.value_and_grad`."""

        is_jitted = False

        def with_scores(*args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Any]:
            nonlocal is_jitted
            if is_jitted and not _is_tracing():
                return jitted(*args, **kwargs)  # type: ignore[no-any-return]
            args, kwargs = self._library.bind_arguments(fun, args, kwargs)  # type: ignore[assignment]
            head, is_inner, is_jitted = find_head(self._library, self._wanted, fun, args, kwargs, has_aux, argnums)
            self._set_head(head)
            if is_inner and not _is_tracing():
                if is_jitted:
                    return jitted(*args, **kwargs)  # type: ignore[no-any-return]
                raise InvalidInputError(
                    f"value_and_grad: the loss runs {head.path!r} inside a function that is jitted or checkpointed, so JAX "
                    "would compile it again at every step. Jit the whole step: jax.jit(monitor.value_and_grad(loss))"
                )

            def probed(probe: Any, *args: Any, **kwargs: Any) -> Any:
                with fresh_trace() if is_inner else nullcontext():
                    return self._library.run(ProbeSession(head, probe, pools_rows=pools_rows), fun, args, kwargs)

            pools_rows = self._pools_rows
            differentiated = self._library.value_and_grad(probed, argnums, has_aux, options)
            value, scores, grads = differentiated(head.empty_probe(pools_rows=pools_rows), *args, **kwargs)
            return (value, scores), grads

        jitted = self._library.jit(with_scores)  # for a loss that is jitted itself, in a step that is not
        return with_scores

    def _set_head(self, head: LayerCall) -> None:
        self._call = head
        if not self._wanted and not self.head.startswith(f"head {head.path!r}"):
            self.head = f"head {head}: the loss comes from it"
            logger.info("gwa_logging: %s", self.head)

    @_allows_transfers
    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
        """Adds the scores of one step."""
        if isinstance(scores, AlignmentState):
            self._observe_state(scores)
        else:
            self._observe_scores(scores, samples)
        self._on_step()

    def _observe_state(self, state: AlignmentState) -> None:
        if isinstance(state.numbers, jax.core.Tracer):
            raise InvalidInputError(
                "scores: found a tracer; return the state from the jitted loop and call update outside"
            )
        # A copy, because the user's own arrays must not be donated.
        self._state = copy_state(state) if self._state is None else merge_states(self._state, state)

    def _observe_scores(self, scores: Any, samples: TaggedBatch | None) -> None:
        if isinstance(scores, jax.core.Tracer):
            raise InvalidInputError(
                "scores: found a tracer; return the scores from the jitted step and call update outside"
            )
        is_array = isinstance(scores, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(scores.dtype, jnp.floating) or not scores.ndim:
            found = f"{scores.dtype} of shape {scores.shape}" if is_array else type(scores).__name__
            raise InvalidInputError(f"scores: expected a floating-point array [batch], found {found}")
        if samples is not None:
            samples.check(scores.shape, self._num_samples)
            samples = owned(samples)
        elif self._num_samples is not None:
            self._untagged += scores.size
        mesh = _explicit_mesh(scores)
        if mesh is not None:  # with explicit axes each of our operations would have to name its sharding
            mesh = _with_auto_axes(mesh)
            scores = jax.device_put(scores, NamedSharding(mesh, scores.sharding.spec))
            samples = None if samples is None else jax.tree.map(np.asarray, samples)
        if isinstance(scores, jax.Array) and not scores.is_fully_addressable:
            self._mesh = mesh or self._mesh
            self._observe_global(scores, samples)
            return
        if isinstance(scores, np.ndarray):
            scores = jnp.asarray(scores.copy())  # JAX itself copies later, when the user may have changed the array
        step = Step(scores, samples)
        if not self._pending.accepts(step):
            self._add_pending()
        self._mesh = mesh or self._mesh
        self._pending.append(step)
        if self._pending.is_full:
            self._add_pending()

    def _add_pending(self) -> None:
        """Adds the pending steps to the summary and the ledger. A step that cannot be added is a fault."""
        steps, length = self._pending.take()
        deleted = sum(map(is_deleted, steps))
        if deleted:
            self._pending.add_at_once()
            self._faults.record(
                LEFT_OUT,
                f"the scores or ids of {deleted} steps were deleted or donated to another function after update(); from now on "
                "each step is added at once, which takes longer",
                deleted,
            )
            steps = [step for step in steps if not is_deleted(step)]
        if not steps:
            return
        try:
            self._add(steps, length)
        except Exception as error:  # noqa: BLE001 - training must continue
            reason = str(error).partition("\n")[0][:200]
            self._faults.record(LEFT_OUT, f"{len(steps)} steps: {type(error).__name__}: {reason}", len(steps))
            # A call that failed may have taken the memory of its arguments.
            self._state = None if is_deleted(self._state) else self._state
            self._ledger = None if is_deleted(self._ledger) else self._ledger

    def _add(self, steps: list[Step], length: int) -> None:
        number = np.int32(len(steps))
        steps = steps + steps[-1:] * (length - len(steps))  # the rest is not counted
        scores = tuple(step.scores for step in steps)
        samples = [step.samples for step in steps if step.samples is not None]
        with self._auto_mesh_context():
            if samples:
                ledger = self._device_ledger().prepared_for(samples[0], scores[0].shape)
                self._ledger = add_steps_to_ledger(ledger, side_by_side(samples), scores, number)
            state = self._state or AlignmentState.empty()
            self._state = (
                update_state(state, scores[0]) if length == 1 else update_state_with_steps(state, scores, number)
            )

    def _observe_global(self, scores: jax.Array, samples: TaggedBatch | None) -> None:
        """Adds scores of which this process holds a part."""
        if samples is not None:
            raise InvalidInputError(
                "sample_ids: there is no ledger for scores that are distributed over several processes; pass each process's "
                "own scores and ids, or no ids"
            )
        self._is_global = True
        with self._auto_mesh_context():
            state = self._state or AlignmentState.empty_on_host()
            self._state = global_update(scores.sharding.mesh)(state, scores)  # type: ignore[attr-defined]

    def _auto_mesh_context(self) -> AbstractContextManager[Any]:
        """A mesh without explicit axes, if the scores came on a mesh with them."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def tag(self, samples: TaggedBatch) -> None:
        """Refuses: it is for PyTorch."""
        raise InvalidInputError(
            "tag() is for PyTorch; in JAX pass the ids to monitor.update(scores, sample_ids) instead"
        )

    def pause(self, paused: bool) -> None:
        """Does nothing: only `update` counts, and the monitor passes no scores on while it is paused."""

    @_allows_transfers
    def snapshot(self) -> JaxSnapshot:
        """Returns what has accumulated since the last snapshot, and starts an empty summary."""
        self._add_pending()
        with self._auto_mesh_context():
            state, self._state = self._state or AlignmentState.empty(), None
        return JaxSnapshot(state)

    def _device_ledger(self) -> DeviceLedger:
        if self._ledger is None:
            self._ledger = DeviceLedger.empty(self._num_samples or 0)
        return self._ledger

    @_allows_transfers
    def ledger(self) -> LedgerPart:
        """The ledger over all processes, on the host; each process keeps all of it. Every process must call it."""
        self._add_pending()
        own = self._device_ledger().to_host(self._untagged)
        return LedgerPart(own if jax.process_count() == 1 else self._processes.merge_ledgers(own)).checked()

    def own_samples(self, num_samples: int) -> range:
        """All ids."""
        return range(num_samples)

    def gather(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array itself, since every process keeps the whole ledger."""
        return own

    @_allows_transfers
    def load_ledger(self, part: LedgerPart) -> None:
        """Restores what `ledger` returned, in the first process, so that the sum over processes is the same."""
        self._add_pending()
        if self.writes:
            self._ledger, self._untagged = DeviceLedger.from_host(part.ledger), part.ledger.untagged
        else:
            self._ledger, self._untagged = None, 0

    def evaluate(self, inputs: Any) -> Evaluated | None:
        """Refuses: `attach` has refused `watch(look=)` already."""
        raise InvalidInputError("look: in JAX call monitor.look(logits)")

    def weights(self, *, averaged: bool) -> JaxWeights:
        """The parameters that users pass; see `protocols.Adapter`."""
        return JaxWeights(self._model(), averaged=averaged)

    def to_checkpoint_array(self, array: np.ndarray) -> np.ndarray:
        """Returns the array unchanged."""
        return array

    def no_observation_hint(self) -> str:
        """What to check when no scores have arrived."""
        return (
            "In JAX, use value_and_grad = monitor.value_and_grad(loss_fn) instead of jax.value_and_grad(loss_fn), return the "
            "scores from the jitted step, and call monitor.update(scores) after each step."
        )

    def close(self) -> None:
        """Does nothing: the model was not changed."""
