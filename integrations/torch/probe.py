"""The probe: hooks at the classifier head that see the terms of the score in an ordinary backward pass.

In eager mode they are hooks on the gradients of the logits and the embeddings, and the user's graph and tensors stay as they
are. In a compiled model the probe becomes a part of the graph: see `compiled_probe`.

The numerator of the score has two forms, see `scores`. delta . (z - b) keeps z - b until the backward pass. (dL/dh) . h
needs a tap on the head's input as well, but keeps nothing that the head does not keep itself. It is used for heads with more
classes than features.

This code runs in every step, and steps may take only a millisecond: keep operations and calls few.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.autograd_nodes import is_executed, register_gradient_hook
from gwa_logging.integrations.torch.compiled_probe import CompiledProbe, inputs_of
from gwa_logging.integrations.torch.distributed import is_split
from gwa_logging.integrations.torch.eager_pass import EagerPass
from gwa_logging.integrations.torch.forward_tracker import ForwardTracker, is_exporting
from gwa_logging.integrations.torch.head_layers import Linear, Pointwise
from gwa_logging.integrations.torch.module_patch import (
    ModulePatch,
    after_in_script,
    before_in_script,
    is_tracing,
    scripted_as,
    unchecked,
)
from gwa_logging.integrations.torch.rows import FIRST
from gwa_logging.integrations.torch.tags import Tag
from gwa_logging.integrations.torch.units import Unit
from gwa_logging.integrations.torch.watched_weights import register

# In every step, so without the Python code around them.
_transform_level = torch._C._functorch.maybe_current_level
_set_grad_enabled = torch._C._set_grad_enabled


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_transform() -> bool:
    """Returns True inside torch.func's grad, vmap and the like, whose tensors do not outlive them.

    The compiler evaluates this while it traces, and keeps the answer.
    """
    return _transform_level() is not None


class HeadProbe:
    """The hooks on one head. Holds only a weak reference to the head, so a watched model can be garbage-collected.

    Attributes:
        enabled: False after `close`.
        saw_call: True if the head was called, or its loss computed by `linear_cross_entropy`, outside a compiled graph.
        saw_evaluation: True if a pass would have counted if the head had been in training mode.
        forward_tracker: counts the head's calls as long as it is open; then None.
    """

    def __init__(
        self,
        layer: Linear,
        accumulator: Accumulator,
        on_step: Callable[[], None],
        faults: Faults,
        unit: Unit,
        forward_tracker: ForwardTracker | None = None,
        copied: Callable[[Any, nn.Module], None] | None = None,
    ) -> None:
        """Calls `on_step` after each observed backward pass, and `copied` as a `ModulePatch` does."""
        self.enabled = True
        self.layer = layer
        self.tags = accumulator.tags
        self.saw_call = self.saw_evaluation = False
        self.accumulator = accumulator
        self.on_step = on_step
        self.unit = unit
        self._faults = faults
        self.forward_tracker = forward_tracker
        self.compiled = CompiledProbe(
            layer, accumulator.tags, self.rows_arrived, keeps_samples=accumulator.keeps_samples
        )
        self._head_moved(layer.module)
        register(self)
        before = self.before if layer.taps_input else None
        self._patch = weakref.ref(
            ModulePatch(layer.module, before=before, after=self.after, moved=self._head_moved, copied=copied)
        )

    def _head_moved(self, head: nn.Module) -> None:
        self.compiled.move_to(next(head.parameters()).device)

    def swap_slots(self) -> None:
        """Stops counting compiled passes, or resumes."""
        self.compiled.swap_slots()

    @scripted_as(before_in_script)
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Taps the head's input: a view, whose gradient comes from this head alone."""
        if not self.enabled or not module.training or not torch.is_grad_enabled():
            return None
        if not torch.compiler.is_compiling() and is_tracing():
            return None
        embeddings = _input(args, kwargs)
        if not isinstance(embeddings, Tensor) or not embeddings.requires_grad:
            return None
        if torch.compiler.is_compiling():
            if is_exporting() or is_in_transform():
                return None
            tapped = self.compiled.tap_input(module, embeddings)
            if tapped is None:
                return None
        elif self.unit.pools:
            return None  # the ghost norm needs delta and h together
        else:
            tapped = embeddings.view_as(embeddings)
            tapped._gwa_tapped = embeddings  # type: ignore[attr-defined]
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tapped})

    @scripted_as(after_in_script)
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Any) -> Tensor | None:
        """Taps the logits of a training pass."""
        if not self.enabled or not isinstance(logits, Tensor) or not logits.requires_grad:
            return None
        if not module.training:
            unchecked(self.set_saw_evaluation)
            return None
        if torch.compiler.is_compiling():
            if is_exporting() or is_in_transform():
                return None
            return self.compiled.tap_logits(module, _input(args, kwargs), logits)
        if not is_tracing():
            self.observe_call(module, _input(args, kwargs), logits)
        return None

    def set_saw_evaluation(self) -> None:
        """Notes a pass that would have counted in training mode."""
        self.saw_evaluation = True

    def rows_arrived(self, rows: Tensor, tag: Tag, has_positions: bool) -> None:
        """Takes the encoded rows of a compiled backward pass."""
        try:
            if not self.enabled:
                return
            if self.tags.paused:
                if tag.samples is not None:
                    self.tags.give_back(tag)
                return
            if has_positions:
                self.unit.note_compiled()
            elif rows.shape[1] > FIRST:
                rows = rows[:, :FIRST]  # every row is the first of its input
            self.accumulator.add_rows(rows, tag.samples)
            self.on_step()
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.fault(error)

    def observe_call(self, module: nn.Module, embeddings: Tensor, logits: Tensor, node: Any = None) -> None:
        """Registers hooks on the gradients of one eager forward pass, unless counting is paused.

        Args:
            module: the head, or a replica of it.
            embeddings: its input.
            logits: its output.
            node: the output's node in the autograd graph, if the output has been changed in place since.
        """
        self.saw_call = True
        if self.tags.paused:
            return
        if _transform_level() is not None:
            self.record_transform()
            return
        is_grad_enabled = torch.is_grad_enabled()
        try:
            _set_grad_enabled(False)
            untapped = getattr(embeddings, "_gwa_tapped", None) if self.layer.taps_input else None
            if node is not None:
                bias: Any = module.bias
                logits = self.layer.logits(embeddings, self.layer.weight(module), bias)
                taken = EagerPass(self, module, logits, node)
                taken.keep(module, embeddings, logits)
                node.register_prehook(taken.node_arrived)
            elif untapped is not None:
                taken = EagerPass(self, module, logits, logits.grad_fn)
                taken.keep_embeddings(untapped)
                logits.register_hook(taken.delta_arrived)
                embeddings.register_hook(taken.embeddings_gradient_arrived)
            else:
                own_node = logits.grad_fn
                taken = EagerPass(self, module, logits, own_node)
                taken.keep(module, embeddings, logits)
                register_gradient_hook(logits, own_node, taken.all_arrived)
            if self.forward_tracker is not None:
                self.head_called(self.layer.rows(logits), is_grouped=taken.groups > 0)
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
            if type(getattr(module, "weight", None)).__name__ == "ExpandedWeight":
                self._faults.record(
                    "ExpandedWeights",
                    "passes of call_for_per_sample_grads are not observed: their weights cannot be read",
                )
            else:
                self.fault(error)
        finally:
            _set_grad_enabled(is_grad_enabled)

    def groups(self, logits: Tensor) -> int:
        """The number of inputs if each of them may be one sample with several rows; else 0."""
        tracker = self.forward_tracker
        if self.unit.pools is False or isinstance(self.layer, Pointwise) or is_split(logits):
            return 0
        rows = logits.numel() // self.layer.classes
        inputs = inputs_of(logits) or (0 if tracker is None else tracker.inputs_of(rows))
        return inputs if inputs < rows else 0

    def head_called(self, rows: int, *, is_grouped: bool = False) -> None:
        """Counts an eager training pass of the head; see `ForwardTracker.head_called`."""
        if self.forward_tracker is not None:
            self.forward_tracker.head_called(rows, is_grouped=is_grouped)
            if not self.forward_tracker.is_open:
                self.forward_tracker = None

    def counts(self, tag: Tag, weight_node: Any) -> bool:
        """Returns True if a backward pass that has arrived counts. Else its ids go to the next pass.

        Args:
            tag: the ids of the pass.
            weight_node: see `weight_node`.
        """
        if not self.enabled:
            return False
        is_counted = not self.tags.paused and is_executed(weight_node)
        if tag.samples is not None:
            (self.tags.use if is_counted else self.tags.give_back)(tag)
        return is_counted

    def record_transform(self) -> None:
        """Records that a pass inside a transform of torch.func is not observed."""
        self._faults.record("torch.func", "passes inside its transforms (grad, vmap and the like) are not observed")

    def fault(self, error: Exception) -> None:
        """Counts an error instead of raising it in the user's training step."""
        self._faults.record("probe", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Removes the hooks. Passes that wait for their backward pass are no longer observed."""
        self.enabled = False
        patch = self._patch()
        if patch is not None:
            patch.remove()
        if self.forward_tracker is not None:
            self.forward_tracker.close()
        self.layer.close()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
