"""One forward pass of a loss that uses a watched head's weight without calling the head."""

from typing import Any

import torch
from torch import Tensor

from gwa_logging.integrations.torch.compiled_probe import inputs_of
from gwa_logging.integrations.torch.distributed import is_first_owner, is_split
from gwa_logging.integrations.torch.forward_tracker import is_exporting
from gwa_logging.integrations.torch.module_patch import is_tracing, unchecked
from gwa_logging.integrations.torch.probe import HeadProbe
from gwa_logging.integrations.torch.scores import Terms
from gwa_logging.integrations.torch.watched_weights import probe_of


class FusedPass:
    """An eager pass that waits for its backward pass.

    Attributes:
        needs_predicted: True if the predicted classes are of use.
    """

    __slots__ = ("inputs", "is_counted", "needs_predicted", "probe", "samples", "tag", "weight_node")

    def __init__(self, probe: HeadProbe, hidden: Tensor, weight: Tensor) -> None:
        self.probe = probe
        self.tag = probe.tags.take()
        self.samples = self.tag.samples
        self.inputs = inputs_of(hidden)
        # The ranks that share a weight all have the scores of the same rows: the first of them counts.
        self.is_counted = not is_split(weight) or is_first_owner(weight)
        # A document has no predicted class.
        rows = hidden.numel() // hidden.shape[-1]
        has_row_ids = self.samples is not None and tuple(self.samples.ids.shape[:1]) == (rows,)
        self.needs_predicted = has_row_ids and not is_split(weight)
        self.weight_node: Any = None

    def arrived(self, terms: Terms, predicted: Tensor) -> None:
        """Takes the terms of the backward pass."""
        probe, samples = self.probe, self.samples
        try:
            if samples is not None and self.needs_predicted:
                samples = samples._replace(predicted=predicted)
            if probe.counts(self.tag, self.weight_node):
                if self.is_counted:
                    probe.accumulator.add_terms(terms, samples, self.inputs)
                probe.on_step()
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            probe.fault(error)


def observed_pass(hidden: Tensor, weight: Tensor) -> tuple[FusedPass | None, Tensor | None]:
    """What takes the scores of a pass: an object if it is eager, and the leaf of a slot if it is compiled; else None twice.

    Args:
        hidden: [..., D].
        weight: [V, D], as the user has passed it.
    """
    probe: HeadProbe | None = probe_of(weight)
    if probe is None or is_exporting():
        return None, None
    if not probe.layer.module.training:
        unchecked(probe.set_saw_evaluation)
        return None, None
    if torch.compiler.is_compiling():
        return None, probe.compiled.fused_leaf(hidden)
    probe.saw_call = True
    if probe.unit.pools and hidden.ndim > 2:
        probe.unit.note_fused()
    if probe.tags.paused or is_tracing():
        return None, None
    try:
        return FusedPass(probe, hidden, weight), None
    except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
        probe.fault(error)
        return None, None


def called(fused_pass: FusedPass, losses: Tensor, rows: int) -> None:
    """Completes an eager pass with the autograd graph of its losses."""
    node: Any = losses.grad_fn
    fused_pass.weight_node = None if node is None else node.next_functions[1][0]
    fused_pass.probe.head_called(rows)


def note_transform(weight: Tensor) -> None:
    """Records that a pass inside a transform of torch.func is not observed."""
    if not torch.compiler.is_compiling():
        probe = probe_of(weight)
        if probe is not None:
            probe.record_transform()
