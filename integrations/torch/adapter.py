"""The PyTorch adapter: the head, its probe, and what they gather."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gwa_logging.checkpoint import HeadShape
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import TorchSnapshot
from gwa_logging.integrations.torch.distributed import (
    RankAccumulator,
    board,
    is_distributed,
    ledger_over_ranks,
    merged_over_ranks,
    nothing_like,
    rank,
    ranks,
    replica_group,
    unsharded,
)
from gwa_logging.integrations.torch.find_head import FirstPass, Head, HeadCall, find_head, inside_adapters, unwrapped
from gwa_logging.integrations.torch.forwards import Forwards
from gwa_logging.integrations.torch.head_layers import layer_of
from gwa_logging.integrations.torch.probe import HeadProbe
from gwa_logging.integrations.torch.replacement import HeadPlace
from gwa_logging.integrations.torch.step_watchdog import StepWatchdog
from gwa_logging.ledger import Ledger, TaggedBatch
from gwa_logging.monitor import logger
from gwa_logging.ranks import Attendance, Identity, first_scores
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary

_EARLY = 16
"""How many snapshots are kept to tell this rank's first scores; one is enough unless all its scores are equal."""


def attach(model: nn.Module, settings: WatchSettings, faults: Faults) -> "TorchAdapter":
    """Puts a probe at the head of a model; it begins to observe on `start`.

    Raises:
        HeadNotFoundError: see `find_head`.
        InvalidInputError: windows by samples are asked for in a run of several processes, or the head has no parameter.
    """
    if settings.samples_per_epoch is not None and ranks() > 1:
        raise InvalidInputError(
            f"samples_per_epoch={settings.samples_per_epoch}: {ranks()} ranks would close their windows at different "
            "moments; call monitor.end_epoch() on every rank instead"
        )
    head = find_head(model, settings.head)
    if head is not None:
        _check(head)
    return TorchAdapter(model, head, settings.num_samples, faults, Attendance(settings.name, board))


def _check(head: Head) -> None:
    if next(head.module.parameters(), None) is None:
        raise InvalidInputError(
            f"{head}: its weight is not a parameter of its own. FullyShardedDataParallel needs use_orig_params=True; "
            "or take fully_shard"
        )


class TorchAdapter:
    """Watches one model. See `gwa_logging.protocols.Adapter`."""

    def __init__(
        self, model: nn.Module, head: Head | None, num_samples: int | None, faults: Faults, attendance: Attendance
    ) -> None:
        self.head = str(head) if head else "head: the first training pass will tell"
        self.path = head.path if head else ""
        self._model = weakref.ref(inside_adapters(model))
        self._wrapped = weakref.ref(unwrapped(model))
        self._found = head  # until the start: it would keep the head of a model that is dropped
        self._num_samples = num_samples
        self._attendance = attendance
        self._accumulator = RankAccumulator(num_samples, faults, attendance)
        self._early: list[TorchSnapshot] = []  # until the first scores are known
        self._first = Identity().first
        self.notes: tuple[str, ...] = ()
        self._faults = faults
        self._on_step: Callable[[], None] = lambda: None
        self._watching: HeadProbe | FirstPass | None = None
        self._silence: StepWatchdog | None = None
        self._place: HeadPlace | None = None
        self._copies: list[weakref.ref[nn.Module]] = []
        self._changes = ""  # what has become of the head since it was found
        self.passes = 0

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes: rank 0."""
        return rank() == 0

    @property
    def is_detached(self) -> bool:
        """Whether the model no longer exists."""
        return self._model() is None

    @property
    def processes(self) -> int:
        """How many ranks there are."""
        return ranks()

    @property
    def shape(self) -> tuple[int, int] | None:
        """Features and classes of the head; None while it is not known."""
        watching = self._watching
        return (watching.layer.features, watching.layer.classes) if isinstance(watching, HeadProbe) else None

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary of all ranks that count. Every rank must call it; the others wait."""
        if not is_distributed():
            return summary
        problems = self._attendance.problems()
        if not problems:
            summary, (_, problems) = merged_over_ranks(summary, self._identity())
        self._faults.record_once(problems)
        self.notes = tuple(problems.values())
        return summary

    def _identity(self) -> Identity:
        """What this rank reports of itself to the others."""
        if self._first == Identity().first:
            self._first = first_scores([snapshot.result() for snapshot in self._early])
        if self._first != Identity().first:
            self._early.clear()
        shape, model = self.shape, self._model()
        head = "" if shape is None else str(HeadShape(self.path, *shape))
        return Identity(head, self._first, rank() if model is None else replica_group(model))

    def start(self, on_step: Callable[[], None]) -> None:
        """Begins to observe."""
        self._on_step = on_step
        self._attendance.enter()
        model = self._model()
        if model is not None:
            self._silence = StepWatchdog(model, self)
        found, self._found = self._found, None
        if found is not None:
            self._watching = self._probe(found)
        elif (wrapped := self._wrapped()) is not None:
            self._watching = FirstPass(wrapped, self._tell, self._copied)

    def _tell(self, head: Head, calls: list[HeadCall]) -> None:
        _check(head)
        self.head = str(head)
        logger.info("gwa_logging: %s", self.head)
        self._watching = probe = self._probe(head)
        model = self._model()
        if model is not None:
            tags = self._accumulator.tags
            with unsharded(model, head.module):
                tags.begin_forward()
                for call in calls:  # of the pass that told the head
                    if call.module.training:
                        probe.listen(*call)
                    else:
                        probe.saw_evaluation = True
                tags.end_forward()

    def _probe(self, head: Head) -> HeadProbe:
        model, whole, accumulator, forwards = self._model(), self._wrapped(), self._accumulator, None
        if model is not None:
            self._place = HeadPlace(model, head.path, head.module)
        if whole is not None:
            forwards = Forwards(whole, accumulator.tags, self._faults, keeps_samples=accumulator.keeps_samples)
        return HeadProbe(layer_of(head.module), accumulator, self._observed, self._faults, forwards, self._copied)

    def _observed(self) -> None:
        """Called by the probe after each pass that it has seen."""
        self.passes += 1
        self._on_step()

    # --- for the watchdog -----------------------------------------------------------------------------------------

    def silent(self, steps: int) -> None:
        """See `silence.Watched`."""
        self._faults.record("silence", f"{steps} optimizer steps and no observation. {self.no_observation_hint()}")

    def copy_trained(self, steps: int) -> None:
        """See `silence.Watched`."""
        self._faults.record(
            "copy",
            f"{steps} optimizer steps have trained a deep copy of the watched model, and the model itself was not observed "
            "meanwhile. A copy is not observed: call watch(copy) after copy.deepcopy(model)",
        )

    def copies(self) -> list[nn.Module]:
        """See `silence.Watched`."""
        return [copy for reference in self._copies if (copy := reference()) is not None]

    def _copied(self, memo: Any, head: nn.Module) -> None:
        """A layer was deep-copied, perhaps as a part of the model."""
        copy = memo.get(id(self._model()), head)
        known = [reference for reference in self._copies if reference() not in (None, copy)]
        self._copies = [*known[-7:], weakref.ref(copy)]

    def fault(self, error: Exception) -> None:
        """See `silence.Watched`."""
        self._faults.record("watchdog", f"{type(error).__name__}: {error}")

    def check_head(self, steps: int = 0) -> bool:
        """See `silence.Watched`."""
        if isinstance(self._watching, FirstPass):
            self._watching.resume()
        model, place = self._model(), self._place
        if model is None or place is None:
            return False
        try:
            finding = place.check(model)
            if finding is None:
                return False
            if self._watching is not None:
                self._watching.close()
            self._watching = None
            unseen = f"; {steps} optimizer steps before this were not observed" if steps else ""
            if finding.module is None:
                self._changes = (
                    f"{finding.what}. Nothing is observed until a linear layer or 1x1 convolution is there again"
                )
            else:
                head = Head(place.path, finding.module, "it was put there after watch()")
                _check(head)
                self._watching = self._probe(head)
                self.head = str(head)
                self._changes = f"{finding.what}. It is observed from now on; the ledger goes on"
            self._faults.record("head", f"{self._changes}{unseen}")
        except Exception as error:  # noqa: BLE001 - it is called in the middle of training
            self.fault(error)
            return False
        return finding.module is not None

    @property
    def is_paused(self) -> bool:
        """See `silence.Watched`."""
        return self._accumulator.tags.paused

    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
        """Takes in scores of the user's own making."""
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.ndim == 0:
            found = (
                f"{scores.dtype} of shape {tuple(scores.shape)}"
                if isinstance(scores, Tensor)
                else type(scores).__name__
            )
            raise InvalidInputError(f"scores: expected a floating-point tensor [batch], found {found}")
        if samples is not None:
            samples = self._checked(samples, scores.numel())
        self._accumulator.add_scores(scores.detach(), samples)
        self._observed()

    def tag(self, samples: TaggedBatch) -> None:
        """Notes which samples the next forward pass is about."""
        self.check_head()
        self._accumulator.tag(self._checked(samples, None))

    def pause(self, paused: bool) -> None:
        """Counts no pass from now on, or counts them again."""
        if paused:
            self._accumulator.tags.pause()
        else:
            self._accumulator.tags.resume()
        if isinstance(self._watching, HeadProbe):
            self._watching.exchange_slots()

    def _checked(self, samples: TaggedBatch, count: int | None) -> TaggedBatch:
        samples.check(count, self._num_samples)
        # Copies: a buffer may be filled with the next batch before these are entered into the ledger.
        tensors = TaggedBatch(*(None if array is None else torch.as_tensor(array).clone() for array in samples))
        if tensors.ids.device.type == "meta":
            raise InvalidInputError("sample_ids: expected numbers, found a tensor on the device 'meta'")
        return tensors

    def snapshot(self) -> TorchSnapshot:
        """Hands over what was gathered since the last one."""
        self.check_head()
        snapshot = self._accumulator.snapshot()
        if is_distributed() and len(self._early) < _EARLY and self._first == Identity().first:
            self._early.append(snapshot)
        return snapshot

    def ledger(self) -> Ledger:
        """The ledger of all ranks that count, on the host. Every rank must call it; the others wait."""
        ledger = self._accumulator.ledger()
        if not is_distributed():
            return ledger
        problems = self._attendance.problems()
        if not problems:
            ledger, (_, problems) = ledger_over_ranks(ledger, self._identity())
        self._faults.record_once(problems)
        return ledger

    def load_ledger(self, ledger: Ledger) -> None:
        """Puts back what `ledger` gave: on rank 0, so that the sum over ranks is what it was."""
        if rank() != 0:
            ledger = nothing_like(ledger)
        model = self._model()
        parameter = next(iter(model.parameters()), None) if model is not None else None
        self._accumulator.load_ledger(ledger, parameter.device if parameter is not None else torch.device("cpu"))

    def to_checkpoint_array(self, array: np.ndarray) -> Tensor:
        """As a tensor: `torch.load` refuses NumPy."""
        return torch.from_numpy(array)

    def no_observation_hint(self) -> str:
        """What to check when no step has passed the probe."""
        self.check_head()
        changes = f"{self._changes}. " if self._changes else ""
        evaluation = ""
        if isinstance(self._watching, HeadProbe) and self._watching.saw_evaluation:
            evaluation = (
                "There were passes with the head in eval mode, which are not counted: call model.train(), or train() of "
                "the head alone. "
            )
        return (
            f"Watched: {self.head}. {changes}{evaluation}Check that loss.backward() runs on the output of this model in "
            "training mode with gradients enabled; that the head is called as a module (not through F.linear on its weight, "
            "nor inside a "
            "fused loss); and that watch() came before the first call of a compiled model. A compiled model whose head "
            "only a first pass can tell needs watch(model, head='dotted.path'). Gradients taken in a compiled model by "
            "torch.autograd.grad or backward(inputs=), or inside of torch.func transforms, are not seen."
        )

    def close(self) -> None:
        """Takes the probe off."""
        if self._silence is not None:
            self._silence.close()
        self._place = None
        if self._watching is not None:
            self._watching.close()
            self._watching = None
