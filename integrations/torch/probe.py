"""The probe: hooks at the classifier head that see the terms of the score in an ordinary backward pass.

In eager mode they are hooks on the gradients of the logits and the embeddings, and the user's graph and tensors stay as they
are. In a compiled model the probe becomes a part of the graph: see `compiled_probe`.

The numerator of the score has two forms, see `scores`. delta . (z - b) keeps the logits until the backward pass. (dL/dh) . h
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
from gwa_logging.integrations.torch.compiled_probe import CompiledProbe, inputs_of
from gwa_logging.integrations.torch.compiled_terms import terms_of
from gwa_logging.integrations.torch.distributed import is_distributed, is_freed, is_split
from gwa_logging.integrations.torch.forward_tracker import ForwardTracker, is_exporting
from gwa_logging.integrations.torch.head_layers import Linear, Pointwise, by_input, ghost_norms, terms_of_inputs
from gwa_logging.integrations.torch.module_patch import (
    ModulePatch,
    after_in_script,
    before_in_script,
    is_tracing,
    scripted_as,
    unchecked,
)
from gwa_logging.integrations.torch.rows import FIRST
from gwa_logging.integrations.torch.scores import Terms, frobenius_norm
from gwa_logging.integrations.torch.tags import Tag
from gwa_logging.integrations.torch.units import Unit, pooled_prediction
from gwa_logging.integrations.torch.watched_weights import register
from gwa_logging.integrations.torch.weight_node import is_executed, weight_node


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_transform() -> bool:
    """Returns True inside torch.func's grad, vmap and the like, whose tensors do not outlive them.

    The compiler evaluates this while it traces, and keeps the answer.
    """
    return torch._C._functorch.maybe_current_level() is not None


class HeadProbe:
    """The hooks on one head. Holds only a weak reference to the head, so a watched model can be garbage-collected.

    Attributes:
        enabled: False after `close`.
        saw_call: True if the head was called, or its loss computed by `linear_cross_entropy`, outside a compiled graph.
        saw_evaluation: True if a pass would have counted if the head had been in training mode.
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
        self.terms = terms_of(layer, faults)
        self.tags = accumulator.tags
        self.saw_call = self.saw_evaluation = False
        self.accumulator = accumulator
        self.on_step = on_step
        self.unit = unit
        self._faults = faults
        self._forward_tracker = forward_tracker
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
        if is_in_transform():
            self.record_transform()
            return
        try:
            untapped = getattr(embeddings, "_gwa_tapped", None)
            if node is not None:
                bias: Any = module.bias
                with torch.no_grad():
                    logits = self.layer.logits(embeddings, self.layer.weight(module), bias)
                taken = _Pass(self, module, embeddings, logits, node)
                taken.keep(module, logits)
                node.register_prehook(taken.node_arrived)
            elif untapped is not None:
                taken = _Pass(self, module, untapped, logits, logits.grad_fn)
                logits.register_hook(taken.delta_arrived)
                embeddings.register_hook(taken.embeddings_gradient_arrived)
            else:
                taken = _Pass(self, module, embeddings, logits, logits.grad_fn)
                taken.keep(module, logits)
                logits.register_hook(taken.all_arrived)
            self.head_called(self.layer.rows(logits), is_grouped=taken.groups > 0)
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
            if type(getattr(module, "weight", None)).__name__ == "ExpandedWeight":
                self._faults.record(
                    "ExpandedWeights",
                    "passes of call_for_per_sample_grads are not observed: their weights cannot be read",
                )
            else:
                self.fault(error)

    def groups(self, logits: Tensor) -> int:
        """The number of inputs if each of them may be one sample with several rows; else 0."""
        tracker = self._forward_tracker
        has_positions = logits.ndim > 2 or tracker is not None  # else, as in most steps, each row is an input
        if not has_positions or self.unit.pools is False or isinstance(self.layer, Pointwise) or is_split(logits):
            return 0
        rows = logits.numel() // self.layer.classes
        inputs = inputs_of(logits) or (0 if tracker is None else tracker.inputs_of(rows))
        return inputs if inputs < rows else 0

    def head_called(self, rows: int, *, is_grouped: bool = False) -> None:
        """Counts an eager training pass of the head; see `ForwardTracker.head_called`."""
        if self._forward_tracker is not None:
            self._forward_tracker.head_called(rows, is_grouped=is_grouped)
            if not self._forward_tracker.is_open:
                self._forward_tracker = None

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
        if self._forward_tracker is not None:
            self._forward_tracker.close()
        self.terms.close()


class _Pass:
    """One eager forward pass of the head that waits for its gradients.

    The logits' node in the autograd graph references the gradients' hooks, and they reference this object. So nothing here
    may reference that node, or neither would ever be freed: the logits are detached, and the embeddings are upstream of it,
    before the tap. The norm of the weight is computed now, since the weight may be updated before the backward pass, and
    sharded training frees it after the forward pass.
    """

    __slots__ = (
        "bias",
        "embeddings",
        "groups",
        "inputs",
        "logits",
        "logits_version",
        "norms",
        "probe",
        "samples",
        "tag",
        "versions",
        "weight",
        "weight_node",
        "weight_norm",
    )

    def __init__(self, probe: HeadProbe, module: nn.Module, embeddings: Tensor, logits: Tensor, node: Any) -> None:
        self.probe = probe
        # A view of one token would keep the memory of all tokens until the backward pass.
        self.embeddings = embeddings.detach().clone() if _is_small_part(embeddings) else embeddings
        self.versions = self.embeddings._version
        self.weight = weight = probe.layer.weight(module).detach()
        self.weight_norm = frobenius_norm(weight)
        self.bias: Tensor | None = None
        self.logits: Tensor | None = None
        self.logits_version = 0
        self.norms: tuple[Tensor, ...] = ()  # of delta, or of pooled rows
        self.weight_node = weight_node(node)
        self.tag = probe.tags.take()
        self.samples = self.tag.samples
        self.inputs = 0
        self.groups = probe.groups(logits)
        if self.samples is not None:
            self.inputs = inputs_of(logits)
            is_pooled = self.groups and probe.unit.pools
            if not is_split(logits) and not is_pooled and not self.samples.is_by_position:
                self.samples = self.samples._replace(predicted=probe.layer.predicted(logits))

    def keep(self, module: nn.Module, logits: Tensor) -> None:
        """Keeps the logits and the bias, for the numerator delta . (z - b)."""
        # The caller of a split head gets another tensor with the same numbers, whose changes would go unnoticed.
        self.logits = logits.detach().clone() if is_split(logits) else logits.detach()
        self.logits_version = self.logits._version
        bias = module.bias
        if isinstance(bias, Tensor):
            # Sharding frees the bias after the pass, so it is copied. It is upstream of the logits, so keeping it is safe.
            self.bias = bias.detach().clone() if is_distributed() else bias
            self.versions += self.bias._version

    def all_arrived(self, delta: Tensor) -> None:
        """Takes the gradient of the logits, the last missing term of the numerator delta . (z - b)."""
        if torch.is_grad_enabled():  # a backward pass that is itself differentiated
            with torch.no_grad():
                return self.all_arrived(delta)
        try:
            layer, logits = self.probe.layer, self.logits
            if logits is None or logits._version != self.logits_version:  # changed in place since: compute them again
                if is_freed(self.weight):
                    raise RuntimeError(
                        "the logits were changed in place and cannot be computed again: sharding has freed the weight"
                    )
                logits = layer.logits(self.embeddings, self.weight, self.bias)
            if self.groups and self.probe.unit.decide(delta, self.groups, self.weight_norm):
                delta, logits, embeddings = (by_input(x, self.groups) for x in (delta, logits, self.embeddings))
                terms = terms_of_inputs(delta, logits, embeddings, self.bias, self.weight_norm)
                self.set_predicted(pooled_prediction(delta, logits))
            else:
                terms = self.probe.terms.terms_by_logits(delta, logits, self.embeddings, self.bias, self.weight_norm)
            self.observe(terms)
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.probe.fault(error)

    def node_arrived(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Takes the gradients of the logits' node."""
        if gradients[0] is not None:
            self.all_arrived(gradients[0])

    def delta_arrived(self, delta: Tensor) -> None:
        """Takes the gradient of the logits, for the numerator (dL/dh) . h. The gradient of the embeddings follows."""
        try:
            delta, layer = delta.detach(), self.probe.layer
            if self.groups and self.probe.unit.decide(delta, self.groups, self.weight_norm):
                self.norms = ghost_norms(by_input(delta, self.groups), by_input(self.embeddings, self.groups))
                self.set_predicted(None)
            else:
                self.norms = (layer.delta_norms(delta),)
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def embeddings_gradient_arrived(self, gradient: Tensor) -> None:
        """Takes the gradient of the embeddings, the last missing term of the numerator (dL/dh) . h."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.embeddings_gradient_arrived(gradient)
        try:
            norms, self.norms = self.norms, ()
            if len(norms) == 2:
                product = (by_input(gradient, self.groups) * by_input(self.embeddings, self.groups)).sum((1, 2))
                self.observe(Terms(product, *norms, self.weight_norm))
            elif norms:
                terms = self.probe.terms
                self.observe(terms.terms_by_embeddings(norms[0], gradient, self.embeddings, self.weight_norm))
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def set_predicted(self, predicted: Tensor | None) -> None:
        """Sets the predicted class of each input once it is known that an input is a sample."""
        if self.samples is not None:
            self.samples = self.samples._replace(predicted=predicted)

    def observe(self, terms: Terms) -> None:
        """Adds the terms if the probe is still on and this pass counts."""
        probe = self.probe
        if not probe.counts(self.tag, self.weight_node):
            return
        bias = self.bias
        if self.embeddings._version + (0 if bias is None else bias._version) != self.versions:
            # PyTorch checks only what the user's gradients need: neither the bias nor the input of a frozen head.
            raise RuntimeError(
                "the head's input or bias was changed in place between the forward and the backward pass"
            )
        probe.accumulator.add_terms(terms, self.samples, self.inputs)
        probe.on_step()


def _is_small_part(tensor: Tensor) -> bool:
    """Returns True if a tensor is a view of a much larger one."""
    return tensor._is_view() and type(tensor) is Tensor and tensor.untyped_storage().nbytes() > 4 * tensor.nbytes


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
