"""Pipeline parallelism: each rank has a part of the model, and the classifier head is on the last one only.

The ranks of the head observe it as in any run, one microbatch after the other. One of them writes the journal and the trackers.
The other ranks have no probe. They count their backward passes, so that all ranks agree on steps and epochs, and take part in
the reductions with empty summaries. So `end_epoch` gives all ranks the same report.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, distributed, nn

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch import adapter
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.adapter import TorchAdapter
from gwa_logging.integrations.torch.distributed import (
    is_deepspeed_engine,
    rank,
    ranks,
    shared_store,
)
from gwa_logging.integrations.torch.find_head import find_head, inside_adapters, predicts_tokens
from gwa_logging.integrations.torch.rank_calls import RankCalls
from gwa_logging.ledger import TaggedBatch
from gwa_logging.protocols import Evaluated
from gwa_logging.ranks import Attendance, Identity, check_windows
from gwa_logging.settings import DEFAULT_EARLY_STOP, WatchSettings
from gwa_logging.summary import AlignmentSummary

_REMEDY = (
    "If this rank has a part of a pipeline without the classifier head, pass the PipelineStage to watch(), or "
    "head=HeadOnRanks(<the ranks with the head>), on every rank"
)


@dataclass(frozen=True, init=False)
class HeadOnRanks:
    """States which ranks of a pipeline have the classifier head, for `watch(model, head=HeadOnRanks(3))`.

    Every rank passes the same value, and the part of the model that it trains. `torch.distributed.pipelining` does not need
    it: there, pass the `PipelineStage` to `watch`.

    Attributes:
        ranks: the global ranks with the head, ascending; several if the pipeline is replicated. The first one writes the
            journal and the trackers.
        head: the head's dotted path in the part of the model on these ranks; None to find it.
    """

    ranks: tuple[int, ...]
    head: str | None

    def __init__(self, ranks: int | Sequence[int], head: str | None = None) -> None:
        """Takes one rank or several.

        Raises:
            InvalidInputError: a rank is not an integer of at least 0, there is none, or the head is not a path.
        """
        numbers = tuple(ranks) if isinstance(ranks, Sequence) and not isinstance(ranks, str) else (ranks,)
        if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise InvalidInputError(
                f"HeadOnRanks(ranks={ranks!r}): expected the rank with the classifier head, or a list of them, such as 3"
            )
        if not isinstance(head, str | None):
            raise InvalidInputError(
                f"HeadOnRanks(head=<{type(head).__name__}>): expected a dotted path such as 'fc', or None to find the head"
            )
        object.__setattr__(self, "ranks", tuple(sorted(set(numbers))))
        object.__setattr__(self, "head", head)


class _Place(NamedTuple):
    """Where the head is, as this rank sees it.

    Attributes:
        module: the part of the model on this rank.
        has_head: True if the head is in it.
        writes: True if this rank writes the journal and the trackers.
        head: as in `watch`.
        where: the ranks with the head that this rank knows of.
        stage: the stage of `torch.distributed.pipelining`; None if the module was watched.
    """

    module: nn.Module
    has_head: bool
    writes: bool
    head: Any
    where: tuple[int, ...]
    stage: Any = None


def is_stage(model: Any) -> bool:
    """Returns True for a stage of `torch.distributed.pipelining`."""
    return any(
        base.__module__ == "torch.distributed.pipelining.stage" and base.__name__ == "_PipelineStageBase"
        for base in type(model).__mro__
    )


def subject(model: Any) -> nn.Module:
    """The object that identifies what is watched: the model without its wrappers; of a stage, its module."""
    return inside_adapters(model.submod if is_stage(model) else model)


def attach(model: Any, settings: WatchSettings, faults: Faults) -> "TorchAdapter | StageWithoutHead":
    """Finds the head of a model, or of this rank's part of it. Nothing is observed until the adapter's `start`.

    Raises:
        HeadNotFoundError: see `find_head`.
        InvalidInputError: the settings do not fit the model, a pipeline, or the number of processes.
    """
    place = _place(model, settings.head)
    if place is None:
        try:
            return adapter.attach(model, settings, faults)
        except HeadNotFoundError as error:
            if ranks() > 1:
                error.add_note(_REMEDY)
            raise
    check_windows(settings.samples_per_epoch, ranks())
    _check_settings(settings)
    attendance = Attendance.for_settings(settings, shared_store)
    if not place.has_head:
        return StageWithoutHead(place.module, place.where, settings, faults, attendance)
    head = find_head(place.module, place.head)
    if head is not None and settings.early_stop is DEFAULT_EARLY_STOP and predicts_tokens(place.module, head):
        raise InvalidInputError(
            f"early_stop: {head} is a language model's, which gets no stop alert by default, but the other ranks of the "
            "pipeline cannot know that; pass early_stop=None or early_stop=EarlyStop(...) on every rank"
        )
    return StageWithHead(place, head, settings, faults, attendance)


def _check_settings(settings: WatchSettings) -> None:
    """Refuses what needs the whole model in one process.

    Raises:
        InvalidInputError: `look` or `keep_best` is set.
    """
    if settings.look is not None:
        raise InvalidInputError("look: a stage of a pipeline cannot be evaluated alone; leave it out")
    if settings.keep_best:
        raise InvalidInputError(
            f"keep_best={settings.keep_best!r}: no rank of a pipeline has the weights of the whole model; leave it out, and "
            "save a checkpoint on every rank when a report has is_best"
        )


def _place(model: Any, head: Any) -> _Place | None:
    """Where the head of a pipeline is; None if the model is not part of one.

    Raises:
        InvalidInputError: both the stage and the head name the ranks, a rank does not exist, or another stage of this rank
            has the head.
    """
    if not isinstance(head, HeadOnRanks):
        return _place_of_stage(model, head) if is_stage(model) else None
    if is_stage(model):
        raise InvalidInputError(f"head={head}: the PipelineStage knows which rank has the head; pass a path or nothing")
    if head.ranks[-1] >= ranks():
        raise InvalidInputError(f"head={head}: this run has {ranks()} ranks, from 0 to {ranks() - 1}")
    model = model.module if is_deepspeed_engine(model) else model  # its pipeline engine calls the module directly
    return _Place(model, rank() in head.ranks, rank() == head.ranks[0], head.head, head.ranks)


def _place_of_stage(stage: Any, head: Any) -> _Place:
    members = list(range(ranks())) if stage.group is None else distributed.get_process_group_ranks(stage.group)
    last = members[stage.stage_index_to_group_rank[stage.num_stages - 1]]
    if stage.is_last != (last == rank()):
        raise InvalidInputError(
            f"model: this is stage {stage.stage_index} of {stage.num_stages}, and rank {last} has the last one. If a rank has "
            "several stages, pass the last one where it is. Create the schedule before watch(): it places the stages"
        )
    # If there are several copies of the pipeline, the one with rank 0 writes.
    return _Place(stage.submod, stage.is_last, stage.is_last and 0 in members, head, (last,), stage)


class StageWithHead(TorchAdapter):
    """Watches the head on the last stage of a pipeline, which sees a batch in several microbatches."""

    def __init__(
        self, place: _Place, head: Any, settings: WatchSettings, faults: Faults, attendance: Attendance
    ) -> None:
        super().__init__(place.module, head, settings, faults, attendance)
        self._writes = place.writes
        self._module = weakref.ref(place.module)
        self._stage: Callable[[], Any] = weakref.ref(place.stage) if place.stage is not None else lambda: None
        self._waiting: TaggedBatch | None = None  # ids of the microbatches that have not begun
        self._hook: Any = None

    @property
    def writes(self) -> bool:
        """Returns True on the first rank with the head, which writes the journal and the trackers."""
        return self._writes

    def tag(self, samples: TaggedBatch) -> None:
        """Sets which samples the next batch has. Each microbatch takes as many ids as it has inputs, in order."""
        self.check_head()
        self._waiting = self._samples.read(samples, None)
        module = self._module()
        if self._hook is None and module is not None:  # only now, since a hook is noticeable in a compiled stage
            self._hook = module.register_forward_pre_hook(self._tag_microbatch, with_kwargs=True)

    def _tag_microbatch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stage = self._stage()
        if (
            stage is not None and not stage.args_recv_info
        ):  # this pass only finds out the shapes that the stages exchange
            return
        waiting, inputs = self._waiting, _inputs_of(args, kwargs)
        if waiting is None or not inputs or not module.training or not torch.is_grad_enabled() or self.is_paused:
            return
        ids, weights = waiting.ids, waiting.weights
        by_input = weights is not None and weights.ndim == 2
        self._accumulator.tags.put(TaggedBatch(ids[:inputs], weights[:inputs] if by_input else weights))
        rest = TaggedBatch(ids[inputs:], weights[inputs:] if by_input else weights)
        self._waiting = rest if len(rest.ids) else None

    def close(self) -> None:
        """Removes the probe from the stage."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        super().close()


def _inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of inputs of a microbatch: the length of the first tensor argument; 0 if there is none."""
    return next((len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim), 0)


class _NoScores:
    """The snapshot of a rank without the head. See `gwa_logging.protocols.Snapshot`."""

    def ready(self) -> bool:
        """Returns True: nothing is copied from a device."""
        return True

    def result(self) -> AlignmentSummary:
        """An empty summary."""
        return AlignmentSummary()


class StageWithoutHead(RankCalls):
    """Takes part in the reductions of a pipeline on a rank without the head. See `gwa_logging.protocols.Adapter`.

    It keeps its part of the ledger. It counts the backward passes of its stage, one per microbatch, as the last stage does. So
    both have the same number of steps, and agree on whether an epoch has begun.
    """

    writes = False
    path = ""
    shape = None
    is_language_model = False

    def __init__(
        self,
        module: nn.Module,
        head_ranks: tuple[int, ...],
        settings: WatchSettings,
        faults: Faults,
        attendance: Attendance,
    ) -> None:
        self.head = f"head: on rank {', '.join(map(str, head_ranks))}"
        self.notes: tuple[str, ...] = ()
        self._model = weakref.ref(module)
        self._num_samples = settings.num_samples
        self._accumulator = Accumulator(settings.num_samples, faults, attendance)
        self._faults = faults
        self._attendance = attendance
        self._on_step: Callable[[], None] = lambda: None
        self._is_paused = False
        self._hook: Any = None

    def start(self, on_step: Callable[[], None]) -> None:
        """Starts counting; calls `on_step` after each backward pass of the stage."""
        self._on_step = on_step
        self._attendance.enter()
        module = self._model()
        if module is not None:
            self._hook = module.register_forward_hook(self._after_forward)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or self._is_paused:
            return
        outputs = (
            output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
        )
        for each in outputs:
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._after_backward)
                return

    def _after_backward(self, gradient: Tensor) -> None:
        if self._hook is not None:
            self._on_step()

    def observe(self, scores: Any, samples: TaggedBatch | None) -> NoReturn:
        """Refuses scores.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(f"update(): this rank has no scores ({self.head}); call it there only")

    def tag(self, samples: TaggedBatch) -> None:
        """Checks the ids, and ignores them: the rank with the head enters them."""
        samples.check(None, self._num_samples)

    def pause(self, paused: bool) -> None:
        """Stops counting passes, or resumes."""
        self._is_paused = paused

    def snapshot(self) -> _NoScores:
        """An empty snapshot."""
        return _NoScores()

    def _identity(self) -> Identity:
        """This rank has no head, and samples of its own that count: none."""
        return Identity(group=rank())

    def evaluate(self, inputs: Any) -> Evaluated | None:
        """Returns None: `attach` refuses a look."""
        return None

    def weights(self, *, averaged: bool) -> NoReturn:
        """Refuses to keep weights.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError("keep_best: no rank of a pipeline has the weights of the whole model; leave it out")

    def to_checkpoint_array(self, array: np.ndarray) -> Tensor:
        """Converts an array to a tensor, since `torch.load` refuses NumPy arrays."""
        return torch.from_numpy(array)

    def no_observation_hint(self) -> str:
        """What to check when no step has passed the probe."""
        return f"This rank has no head ({self.head}). {' '.join(self.notes) or 'Check the warnings of the rank with the head'}"

    def close(self) -> None:
        """Stops counting."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
