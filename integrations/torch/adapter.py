"""The PyTorch adapter: connects a model's head, its probe and the scores that it accumulates to the monitor."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gwa_logging.checkpoint import HeadShape
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.distributed import (
    is_distributed,
    rank,
    ranks,
    replica_group,
    shared_store,
    unsharded,
)
from gwa_logging.integrations.torch.find_head import (
    NOT_FOUND_YET,
    Head,
    find_head,
    inside_adapters,
    predicts_tokens,
    unwrapped,
)
from gwa_logging.integrations.torch.first_pass import FirstPass, HeadCall
from gwa_logging.integrations.torch.forward_tracker import ForwardTracker
from gwa_logging.integrations.torch.fused_losses import silent_loss
from gwa_logging.integrations.torch.head_layers import layer_of, sizes_of
from gwa_logging.integrations.torch.head_location import HeadLocation
from gwa_logging.integrations.torch.look import ModelLook, check_look
from gwa_logging.integrations.torch.no_observation import no_observation_hint
from gwa_logging.integrations.torch.probe import HeadProbe
from gwa_logging.integrations.torch.rank_calls import RankCalls
from gwa_logging.integrations.torch.step_watchdog import StepWatchdog
from gwa_logging.integrations.torch.tagged_tensors import TaggedTensors
from gwa_logging.integrations.torch.trl_head import FusedHead, watch_fused_head
from gwa_logging.integrations.torch.units import Unit
from gwa_logging.integrations.torch.weights import TorchWeights
from gwa_logging.ledger import TaggedBatch
from gwa_logging.protocols import Evaluated, Snapshot
from gwa_logging.ranks import Attendance, Identity, check_windows, first_scores
from gwa_logging.settings import WatchSettings

logger = logging.getLogger("gwa_logging")

_EARLY = 16
"""Number of snapshots kept to identify this rank by its first scores. One is enough unless all its scores are equal."""


def attach(model: nn.Module, settings: WatchSettings, faults: Faults) -> "TorchAdapter":
    """Finds the head of a model. Nothing is observed until `TorchAdapter.start`.

    Raises:
        HeadNotFoundError: see `find_head`.
        InvalidInputError: `samples_per_epoch` was given in a distributed run, or the head has no parameters.
    """
    check_windows(settings.samples_per_epoch, ranks())
    check_look(settings)
    head = find_head(model, settings.head)
    if head is not None:
        _check_parameters(head)
    return TorchAdapter(model, head, settings, faults, Attendance.for_settings(settings, shared_store))


def _check_parameters(head: Head) -> None:
    if next(head.module.parameters(), None) is None:
        raise InvalidInputError(
            f"{head}: its weight is not a separate parameter. Pass use_orig_params=True to FullyShardedDataParallel, or use "
            "fully_shard"
        )


class TorchAdapter(RankCalls):
    """Watches one model. See `gwa_logging.protocols.Adapter`."""

    def __init__(
        self, model: nn.Module, head: Head | None, settings: WatchSettings, faults: Faults, attendance: Attendance
    ) -> None:
        self.head = str(head) if head else NOT_FOUND_YET
        self.path = head.path if head else ""
        self._model = weakref.ref(inside_adapters(model))
        self._wrapped = weakref.ref(unwrapped(model))
        self.is_language_model = head is not None and predicts_tokens(model, head)
        self._found = head  # only until `start`: it keeps the head of a model alive
        self._num_samples = settings.num_samples
        self._samples = TaggedTensors(settings.num_samples)
        self._look = ModelLook(model, settings.dataset)
        self._attendance = attendance
        self._accumulator = Accumulator(settings.num_samples, faults, attendance, sliced=not settings.samples_per_epoch)
        self._unit = Unit(settings.unit, faults)
        self._early: list[Snapshot] = []  # until the first scores are known
        self._first = Identity().first
        self.notes: tuple[str, ...] = ()
        self._faults = faults
        self._on_step: Callable[[], None] = lambda: None
        self._watching: HeadProbe | FirstPass | None = None
        self._fused: FusedHead | None = None
        self._watchdog: StepWatchdog | None = None
        self._location: HeadLocation | None = None
        self._weights: TorchWeights | None = None
        self._copies: list[weakref.ref[nn.Module]] = []
        self._changes = ""  # a sentence about the last replacement of the head
        self.passes = 0

    @property
    def writes(self) -> bool:
        """Returns True on rank 0, which writes the journal and the trackers."""
        return rank() == 0

    @property
    def shape(self) -> tuple[int, int] | None:
        """Number of features and of classes of the head; None until they are known."""
        watching = self._watching
        if isinstance(watching, HeadProbe):
            return watching.layer.features, watching.layer.classes
        return None if self._found is None else sizes_of(self._found.module)

    def _identity(self) -> Identity:
        """What this rank reports about itself to the others."""
        if self._first == Identity().first:
            self._first = first_scores([snapshot.result() for snapshot in self._early])
        if self._first != Identity().first:
            self._early.clear()
        shape, model = self.shape, self._model()
        head = "" if shape is None else str(HeadShape(self.path, *shape))
        return Identity(head, self._first, rank() if model is None else replica_group(model))

    def start(self, on_step: Callable[[], None]) -> None:
        """Starts observing; calls `on_step` after each observed backward pass."""
        self._on_step = on_step
        self._attendance.enter()
        model = self._model()
        if model is not None:
            self._watchdog = StepWatchdog(model, self)
        found, self._found = self._found, None
        wrapped = self._wrapped()
        if wrapped is not None and (silent := silent_loss(wrapped, found and found.module)):
            self._faults.note(silent)
        if found is not None:
            self._watching = self._probe(found)
        elif wrapped is not None:
            self._watching = FirstPass(wrapped, self._on_head_found, self._on_copied)

    def _on_head_found(self, head: Head, calls: list[HeadCall]) -> None:
        _check_parameters(head)
        self.head = str(head)
        logger.info("gwa_logging: %s", self.head)
        self._watching = probe = self._probe(head)
        model = self._model()
        if model is not None:
            tags = self._accumulator.tags
            with unsharded(model, head.module):
                tags.begin_forward()
                for call in calls:  # the first pass is observed too
                    if call.module.training:
                        probe.observe_call(*call)
                    else:
                        probe.saw_evaluation = True
                tags.end_forward()

    def _probe(self, head: Head) -> HeadProbe:
        model, wrapped, accumulator, tracker = self._model(), self._wrapped(), self._accumulator, None
        if model is not None:
            self._location = HeadLocation(model, head.path, head.module)
        if wrapped is not None:
            tracker = ForwardTracker(
                wrapped,
                accumulator.tags,
                self._faults,
                keeps_samples=accumulator.keeps_samples,
                notes_rows=self._unit.pools is not False,  # the user has not asked for positions
            )
        layer = layer_of(head.module)
        if self._unit.pools:
            layer.pool_rows()
        probe = HeadProbe(layer, accumulator, self._on_observed, self._faults, self._unit, tracker, self._on_copied)
        self._watch_fused_head(probe, tracker)
        return probe

    def _watch_fused_head(self, probe: HeadProbe, tracker: ForwardTracker | None = None) -> bool:
        """Observes the head also where TRL has fused it with the loss. Returns True if it does so from now on."""
        wrapped = self._wrapped()
        if self._fused is not None:
            self._fused.close()
        self._fused = None if wrapped is None else watch_fused_head(wrapped, probe, tracker, self._faults)
        if self._fused is not None and self._unit.pools:
            self._unit.note_fused()
        return self._fused is not None

    def _on_observed(self) -> None:
        self.passes += 1
        self._on_step()

    def _on_copied(self, memo: dict[int, Any], copied: nn.Module) -> None:
        """Notes the copy if a layer was deep-copied, perhaps as a part of the model."""
        copied = memo.get(id(self._model()), copied)
        known = [reference for reference in self._copies if reference() not in (None, copied)]
        self._copies = [*known[-7:], weakref.ref(copied)]

    # --- `step_watchdog.Watched` ----------------------------------------------------------------------------------

    def on_timeout(self, steps: int) -> None:
        """Reports that the model was trained without an observation."""
        self._faults.record("silence", f"{steps} optimizer steps and no observation. {self.no_observation_hint()}")

    def on_copy_trained(self, steps: int) -> None:
        """Reports that a copy of the model was trained instead of the model."""
        self._faults.record(
            "copy",
            f"{steps} optimizer steps have trained a deep copy of the watched model, and the model itself was not observed "
            "meanwhile. Copies are not observed: call watch(copy) after copy.deepcopy(model)",
        )

    def after_step(self) -> None:
        """Updates the average of the weights."""
        if self._weights is not None:
            self._weights.after_step()

    def copies(self) -> list[nn.Module]:
        """Deep copies of the model that still exist."""
        return [copied for reference in self._copies if (copied := reference()) is not None]

    def on_error(self, error: Exception) -> None:
        """Counts an error of the watchdog."""
        self._faults.record("watchdog", f"{type(error).__name__}: {error}")

    def check_head(self, steps: int = 0) -> bool:
        """Observes another head if the head was replaced. Returns True if so; see `step_watchdog.Watched`."""
        if isinstance(self._watching, FirstPass):
            self._watching.resume()
        model, location = self._model(), self._location
        if model is None or location is None:
            return False
        try:
            change = location.check(model)
            if change is None:
                return bool(steps) and self._check_fused_head(steps)
            if self._watching is not None:
                self._watching.close()
            self._watching = None
            unseen = f"; {steps} optimizer steps before this were not observed" if steps else ""
            if change.module is None:
                self._changes = (
                    f"{change.what}. Nothing is observed until a linear layer or 1x1 convolution is there again"
                )
            else:
                head = Head(location.path, change.module, "it was put there after watch()")
                _check_parameters(head)
                self._watching = self._probe(head)
                self.head = str(head)
                self._changes = f"{change.what}. The new module is observed from now on, and the ledger is kept"
            self._faults.record("head", f"{self._changes}{unseen}")
        except Exception as error:  # noqa: BLE001 - it is called in the middle of training
            self.on_error(error)
            return False
        return change.module is not None

    def _check_fused_head(self, steps: int) -> bool:
        """Observes TRL's fused head if it was added after watch(). Returns True if so."""
        if self._fused is not None or not isinstance(self._watching, HeadProbe):
            return False
        if not self._watch_fused_head(self._watching):
            return False
        self._faults.record(
            "head",
            "TRL has fused the head with the loss after watch(); the fused head is observed from now on. "
            f"{steps} optimizer steps before this were not observed: call watch() after the trainer is made",
        )
        return True

    @property
    def is_paused(self) -> bool:
        """Returns True inside `Monitor.paused`."""
        return self._accumulator.tags.paused

    def observe(self, scores: Any, samples: TaggedBatch | None) -> None:
        """Takes the scores of one step, float [...], from the user's own training loop."""
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.ndim == 0:
            found = (
                f"{scores.dtype} of shape {tuple(scores.shape)}"
                if isinstance(scores, Tensor)
                else type(scores).__name__
            )
            raise InvalidInputError(f"scores: expected a floating-point tensor [batch], found {found}")
        if samples is not None:
            samples = self._samples.read(samples, tuple(scores.shape))
        self._accumulator.add_scores(scores.detach(), samples)
        self._on_observed()

    def tag(self, samples: TaggedBatch) -> None:
        """Sets which samples the next forward pass is about."""
        self.check_head()
        self._accumulator.tags.put(self._samples.read(samples))

    def pause(self, paused: bool) -> None:
        """Stops counting passes, or resumes."""
        if paused:
            self._accumulator.tags.pause()
        else:
            self._accumulator.tags.resume()
        if isinstance(self._watching, HeadProbe):
            self._watching.swap_slots()

    def snapshot(self) -> Snapshot:
        """Returns what has accumulated since the last snapshot."""
        self.check_head()
        snapshot = self._accumulator.snapshot()
        if is_distributed() and len(self._early) < _EARLY and self._first == Identity().first:
            self._early.append(snapshot)
        return snapshot

    def evaluate(self, inputs: Any) -> Evaluated | None:
        """The logits of rank 0 for the inputs of a look (a collective: every rank must call it)."""
        problems = self._attendance.problems() if is_distributed() else {}
        logits = self._look.evaluate(inputs, problems, self._weights)
        return None if logits is None else Evaluated(logits, self._look.ids(self._num_samples, problems))

    def weights(self, *, averaged: bool) -> TorchWeights:
        """The weights of the model; see `protocols.Adapter`."""
        self._weights = TorchWeights(self._wrapped, self._attendance.missing, self._faults, averaged=averaged)
        return self._weights

    def to_checkpoint_array(self, array: np.ndarray) -> Tensor:
        """Converts an array to a tensor, since `torch.load` refuses NumPy arrays."""
        return torch.from_numpy(array)

    def no_observation_hint(self) -> str:
        """What to check when no step has passed the probe."""
        self.check_head()
        probe = self._watching if isinstance(self._watching, HeadProbe) else None
        return no_observation_hint(self.head, self._changes, probe, self._wrapped())

    def close(self) -> None:
        """Removes the probe from the model."""
        self._look.close()
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._location = None
        if self._fused is not None:
            self._fused.close()
            self._fused = None
        if self._watching is not None:
            self._watching.close()
            self._watching = None
