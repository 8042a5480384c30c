"""The JAX adapter: `value_and_grad` with scores, and what `update` gathers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gwa_logging.checkpoint import HeadShape
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.jax.accumulate import (
    AlignmentState,
    DeviceLedger,
    JaxSnapshot,
    copied,
    enter,
    global_update,
    merge,
    update,
)
from gwa_logging.integrations.jax.distributed import board
from gwa_logging.integrations.jax.find_head import find_head, library_of
from gwa_logging.integrations.jax.probe import Call, Tapping, apart
from gwa_logging.ledger import Ledger, TaggedBatch
from gwa_logging.monitor import logger
from gwa_logging.ranks import Attendance, Identity, counted
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary


def subject(model: Any) -> Any:
    """What is watched when a model is given: itself, if something can refer to it weakly; of Haiku's pairs, apply."""
    return getattr(model, "apply") if isinstance(model, tuple) else model  # noqa: B009 - a named tuple of Haiku's


def attach(model: Any, settings: WatchSettings, faults: Faults) -> "JaxAdapter":
    """Watches a Flax Linen module, or a function that calls `tap`.

    Raises:
        InvalidInputError: head= is not a dotted path, or is given for a function.
    """
    if isinstance(settings.head, str | None):
        attendance = Attendance(settings.name, board)
        return JaxAdapter(model, settings.head, settings.num_samples, faults, attendance)
    raise InvalidInputError(
        f"head={settings.head!r}: expected a dotted path such as 'head', found {type(settings.head).__name__}"
    )


def _is_traced() -> bool:
    """Whether somebody is tracing at the moment, such as jit."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _narrow(array: Any) -> Any:
    """What JAX would cut off from 64 bits is put out of range instead."""
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu":
        return np.where((array < 0) | (array >= 2**31), -1, array).astype(np.int32)
    return array


def _explicit_mesh(scores: Any) -> Mesh | None:
    """The mesh of scores that are sharded over explicit axes."""
    mesh = getattr(getattr(scores, "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


@lru_cache(maxsize=8)
def _auto_mesh(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


LOST = "lost processes"
"""Fault: a process of jax.distributed has died."""

P = ParamSpec("P")
R = TypeVar("R")


def _deliberate(
    method: Callable[Concatenate["JaxAdapter", P], R],
) -> Callable[Concatenate["JaxAdapter", P], R]:
    """What this method moves between host and device is moved on purpose, so `jax.transfer_guard` does not apply to it."""

    @wraps(method)
    def moving(self: "JaxAdapter", /, *args: P.args, **kwargs: P.kwargs) -> R:
        config: Any = jax.config
        guards = (
            config.jax_transfer_guard_host_to_device,
            config.jax_transfer_guard_device_to_device,
            config.jax_transfer_guard_device_to_host,
        )
        with jax.transfer_guard("allow") if {*guards} - {None, "allow"} else nullcontext():
            return method(self, *args, **kwargs)

    return moving


class JaxAdapter:
    """Watches one model. See `gwa_logging.protocols.Adapter`."""

    def __init__(
        self, model: Any, head: str | None, num_samples: int | None, faults: Faults, attendance: Attendance
    ) -> None:
        self.head = f"head {head!r}: named by head=" if head else "head: the first trace of the loss will tell"
        self._faults = faults
        self._attendance = attendance
        self.notes: tuple[str, ...] = ()
        self._lost: dict[str, str] = {}  # the fault, once a process has died
        self.is_detached = False  # scores come from the user, whatever has become of the model
        self._library = library_of(model)
        self._wanted = head
        self._num_samples = num_samples
        self._state: AlignmentState | None = None  # made where the scores are
        self._ledger: DeviceLedger | None = None
        self._untagged = 0
        self._call: Call | None = None  # of the head, once it has been traced
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
        return self._call.path if self._call else self._wanted or ""

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return int(jax.process_count())

    @property
    def shape(self) -> tuple[int, int] | None:
        """Features and classes of the head; None while it is not known."""
        return (self._call.features, self._call.logits.shape[-1]) if self._call else None

    @_deliberate
    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary of all processes. Every one must call it, and all must have given scores of the same kind.

        Scores in global arrays have been reduced on the devices already; scores that are each process's own are gathered.
        """
        if self._is_global or jax.process_count() == 1:
            return summary
        problems = self._attendance.problems()
        if not problems:
            summary, problems = self._merged_over_processes(summary)
        self._faults.record_once(problems)
        self.notes = tuple(problems.values())
        return summary

    def _merged_over_processes(self, summary: AlignmentSummary) -> tuple[AlignmentSummary, dict[str, str]]:
        """The summary of all processes, and what is wrong with them."""
        head = "" if self.shape is None else str(HeadShape(self.path, *self.shape))
        own, identity = summary.to_vector(), Identity(head, group=jax.process_index()).to_vector()
        # As bytes: JAX would turn float64 into float32.
        gathered = self._gathered(np.concatenate([own, identity]).view(np.uint8))
        if gathered is None:
            return summary, self._lost
        parts = [np.frombuffer(part.tobytes()) for part in np.asarray(gathered)]
        summaries = [AlignmentSummary.from_vector(part[: len(own)]) for part in parts]
        found = counted([Identity.from_vector(part[len(own) :]) for part in parts], summaries)
        return AlignmentSummary.merge_all(summaries[number] for number in found.ranks), found.problems

    def _gathered(self, value: Any) -> Any:
        """What all processes give, stacked; None once one of them has died, which would fail again, or never return."""
        if self._lost:
            return None
        try:
            return multihost_utils.process_allgather(value, tiled=False)
        except (ValueError, RuntimeError) as error:  # which of them depends on the moment of the death
            reason = str(error).partition("\n")[0][:200]
            self._lost = {
                LOST: f"another process no longer answers ({reason}); from now on each process reports its own samples only"
            }
            return None

    def start(self, on_step: Callable[[], None]) -> None:
        """Begins to observe."""
        self._on_step = on_step
        self._attendance.enter()

    def value_and_grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, **options: Any
    ) -> Callable[..., Any]:
        """See `Monitor.value_and_grad`."""

        is_jitted = False

        def with_scores(*args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Any]:
            nonlocal is_jitted
            if is_jitted and not _is_traced():
                return jitted(*args, **kwargs)  # type: ignore[no-any-return]
            args, kwargs = self._library.positional(fun, args, kwargs)  # type: ignore[assignment]
            head, is_inner, is_jitted = find_head(self._library, self._wanted, fun, args, kwargs, has_aux, argnums)
            self._tell(head)
            if is_inner and not _is_traced():
                if is_jitted:
                    return jitted(*args, **kwargs)  # type: ignore[no-any-return]
                raise InvalidInputError(
                    f"value_and_grad: the loss runs {head.path!r} inside of a function that is jitted or checkpointed, and "
                    "JAX would compile that anew at every step. Jit the whole step: jax.jit(monitor.value_and_grad(loss))"
                )

            def probed(probe: Any, *args: Any, **kwargs: Any) -> Any:
                with apart() if is_inner else nullcontext():
                    return self._library.run(Tapping(head, probe), fun, args, kwargs)

            differentiated = self._library.value_and_grad(probed, argnums, has_aux, options)
            value, scores, grads = differentiated(head.probe(), *args, **kwargs)
            return (value, scores), grads

        jitted = self._library.jit(with_scores)  # for a loss that is jitted itself, in a step that is not
        return with_scores

    def _tell(self, head: Call) -> None:
        self._call = head
        if not self._wanted and not self.head.startswith(f"head {head.path!r}"):
            self.head = f"head {head}: the loss comes from it"
            logger.info("gwa_logging: %s", self.head)

    @_deliberate
    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
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
            self._state = copied(scores) if self._state is None else merge(self._state, scores)  # never the user's own
            self._on_step()
            return
        is_array = isinstance(scores, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(scores.dtype, jnp.floating) or not scores.ndim:
            found = f"{scores.dtype} of shape {scores.shape}" if is_array else type(scores).__name__
            raise InvalidInputError(f"scores: expected a floating-point array [batch], found {found}")
        if samples is not None:
            samples.check(scores.size, self._num_samples)
            samples = TaggedBatch(*map(_narrow, samples))
        elif self._num_samples is not None:
            self._untagged += scores.size
        mesh = _explicit_mesh(scores)
        if mesh is not None:  # with explicit axes each of our operations would have to name its sharding
            self._mesh = _auto_mesh(mesh)
            scores = jax.device_put(scores, NamedSharding(self._mesh, scores.sharding.spec))
            samples = None if samples is None else jax.tree.map(np.asarray, samples)
        if isinstance(scores, jax.Array) and not scores.is_fully_addressable:
            self._observe_global(scores, samples)
            return
        with self._at_ease():
            if samples is not None:
                ledger = self._device_ledger()
                ledger = ledger if samples.predicted is None else ledger.with_predictions()
                self._ledger = enter(ledger, samples, scores)
            self._state = update(self._state or AlignmentState.empty(), scores)
        self._on_step()

    def _observe_global(self, scores: jax.Array, samples: TaggedBatch | None) -> None:
        """Takes in scores of which this process holds a part."""
        if samples is not None:
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

    def tag(self, samples: TaggedBatch) -> None:
        """Is for PyTorch."""
        raise InvalidInputError("tag() is for PyTorch; in JAX pass the ids along: monitor.update(scores, sample_ids)")

    def pause(self, paused: bool) -> None:
        """Does nothing: only `update` counts, and the monitor does not hand on its scores while paused."""

    @_deliberate
    def snapshot(self) -> JaxSnapshot:
        """Hands over what was gathered since the last one."""
        with self._at_ease():
            state, self._state = self._state or AlignmentState.empty(), None
        return JaxSnapshot(state)

    def _device_ledger(self) -> DeviceLedger:
        if self._ledger is None:
            self._ledger = DeviceLedger.empty(self._num_samples or 0)
        return self._ledger

    @_deliberate
    def ledger(self) -> Ledger:
        """The ledger of all processes, on the host. Every one must call it."""
        own = self._device_ledger().to_host(self._untagged)
        if jax.process_count() == 1:
            return own
        missing = self._attendance.problems()
        if missing:
            self._faults.record_once(missing)
            return own
        every = self._gathered(own)
        if every is None:
            self._faults.record_once(self._lost)
            return own
        parts = [Ledger(*(np.asarray(array)[i] for array in every)) for i in range(jax.process_count())]
        merged = reduce(Ledger.merge, parts)
        return merged._replace(invalid_ids=int(merged.invalid_ids), untagged=int(merged.untagged))

    @_deliberate
    def load_ledger(self, ledger: Ledger) -> None:
        """Puts back what `ledger` gave: in the first process, so that the sum is what it was."""
        if self.writes:
            self._ledger, self._untagged = DeviceLedger.from_host(ledger), ledger.untagged
        else:
            self._ledger, self._untagged = None, 0

    def to_checkpoint_array(self, array: np.ndarray) -> np.ndarray:
        """As it is."""
        return array

    def no_observation_hint(self) -> str:
        """What to check when no step has been seen."""
        return (
            "In JAX, take value_and_grad = monitor.value_and_grad(loss_fn) in place of jax.value_and_grad(loss_fn), return "
            "the scores from the jitted step, and call monitor.update(scores) after each step."
        )

    def close(self) -> None:
        """Nothing of the model was changed."""
