"""The probe: an identity at the classifier head that sees every term of the score pass by during an ordinary backward.

In eager mode it is a hook on the gradient of the logits: the user's graph and tensors stay what they are. Under
`torch.compile` a hook would break the graph, so there the probe is an `autograd.Function` with one extra input, a leaf
whose gradient is defined as the scores; the leaf's own hook runs in the autograd engine, outside of the compiled graph,
and takes them away. Gradients of one leaf are added up, so each pass has another leaf, in turn.

The numerator of the score has two forms. -delta . (z - b) keeps the logits until the backward pass. -(dL/dh) . h needs
a tap on the head's input as well, and keeps nothing that the head does not keep itself; it is taken for heads with more
classes than features.

In a step of a millisecond every line here counts, since the processor meets it cold: few operations, few calls.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import PASSES, Accumulator, Terms, coded
from gwa_logging.integrations.torch.distributed import is_distributed, is_freed, is_split
from gwa_logging.integrations.torch.forwards import Forwards, is_exporting
from gwa_logging.integrations.torch.head_layers import Linear, Pointwise, norm
from gwa_logging.integrations.torch.module_patch import (
    ModulePatch,
    after_in_script,
    before_in_script,
    is_tracing,
    scripted_as,
    unchecked,
)
from gwa_logging.integrations.torch.tags import UNTAGGED, Tag

# Leaves are views of a single number: they cost no memory, whatever their length. A gradient does, so the shortest leaf
# that fits the batch is taken; factors of four keep both the waste and the number of recompilations small.
_LEAF_ROWS = tuple(4**k for k in range(3, 13))

_will_execute = torch._C._will_engine_execute_node


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_transform() -> bool:
    """Whether this is inside of torch.func's grad, vmap or the like, whose tensors do not outlive them.

    The compiler asks while it traces, and keeps the answer.
    """
    return torch._C._functorch.maybe_current_level() is not None


class LogitsProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `leaf`, float32 [rows, 2 or 4], is defined as the coded scores."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, embeddings: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, layer: Linear
    ) -> Tensor:
        # The weight's norm, not the weight: it may change before the backward pass.
        ctx.save_for_backward(logits, embeddings, bias, norm(weight))
        ctx.layer, ctx.columns = layer, leaf.shape[1]
        return logits.clone()  # a view could not be changed in place by the user; the compiler removes the copy

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        logits, embeddings, bias, weight_norm = ctx.saved_tensors
        terms = ctx.layer.by_logits(delta, logits, embeddings, bias, weight_norm)
        is_known = ctx.columns > 2 and not is_split(logits)  # of split logits, nobody has all of a row
        predicted = ctx.layer.predicted(logits) if is_known else None
        return delta, None, None, None, coded(terms, predicted, ctx.columns, _inputs(logits)), None


class InputProbe(torch.autograd.Function):
    """Identity on the embeddings, for heads whose logits are wide. Its second output must be given to a `DeltaProbe`."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, leaf: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(embeddings, norm(weight))
        ctx.layer = layer
        ctx.columns = leaf.shape[1]
        return embeddings.clone(), leaf.new_zeros(leaf.shape[0], 2 if ctx.columns > 2 else 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, kept: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, weight_norm = ctx.saved_tensors
        delta_norms, predicted = kept[:, 0], kept[:, 1] if kept.shape[1] > 1 else None
        terms = ctx.layer.by_input_terms(delta_norms, grad, embeddings, weight_norm)
        return grad, None, coded(terms, predicted, ctx.columns, _inputs(embeddings)), None


class DeltaProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `link` is what an `InputProbe` needs of theirs, and so comes before it runs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, link: Tensor, layer: Linear) -> Tensor:
        ctx.save_for_backward(*([layer.predicted(logits)] if link.shape[1] > 1 else []))
        ctx.layer = layer
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        delta_norms = ctx.layer.by_input(delta)
        columns = [delta_norms, *(predicted.to(delta_norms.dtype) for predicted in ctx.saved_tensors)]
        return delta, torch.stack(columns, dim=1), None


def _inputs(rows: Tensor) -> int:
    """How many inputs the rows [inputs, ..., K] belong to; 0 if each row is one, or there is no batch."""
    return rows.shape[0] if rows.ndim > 2 else 0


class Slot:
    """The leaves of one compiled pass, the ids of its samples, and the slot of the next pass.

    The leaves' hooks are kept by the autograd engine, where Python's garbage collector cannot follow: so they do not keep
    anything that leads back to the leaves.
    """

    def __init__(self, probe: "HeadProbe", device: torch.device, *, counts: bool = True) -> None:
        self.next = self
        self.tag = UNTAGGED
        self.has_positions = False  # several rows for each input
        self.leaves: list[Tensor] = []
        slot, owner = weakref.ref(self), weakref.ref(probe)

        def arrived(leaf: Tensor) -> None:
            rows, leaf.grad = leaf.grad, None
            mine, listener = slot(), owner()
            if counts and mine is not None and listener is not None and rows is not None:
                listener.arrived(rows, mine.tag, mine.has_positions)

        for rows in _LEAF_ROWS:
            leaf = torch.zeros(1, 1, device=device).expand(rows, probe.columns).requires_grad_()
            leaf.register_post_accumulate_grad_hook(arrived)
            self.leaves.append(leaf)


class HeadProbe:
    """The hooks on one head. It does not keep the head: a model that nobody else has may go, watched or not."""

    def __init__(
        self,
        layer: Linear,
        accumulator: Accumulator,
        on_step: Callable[[], None],
        faults: Faults,
        forwards: Forwards | None = None,
        copied: Callable[[Any, nn.Module], None] | None = None,
    ) -> None:
        self.enabled = True
        self.layer = layer
        self.tags = accumulator.tags
        self.saw_evaluation = False  # a pass that would have counted if the head were in training mode
        self._accumulator = accumulator
        self.columns = 4 if accumulator.keeps_samples else 2  # of a compiled pass's coded rows
        self.on_step = on_step
        self._faults = faults
        self._forwards = forwards
        self._link: Tensor | None = None  # from `before` to `after`, while a graph is being compiled
        self._slot: Slot | None = None
        self._idle: Slot | None = None  # swapped with `_slot` while paused
        self._device = torch.device("meta")
        head = layer.module
        self._moved(head)
        before = self.before if layer.taps_input else None
        self._attachment = weakref.ref(
            ModulePatch(head, before=before, after=self.after, moved=self._moved, copied=copied)
        )

    def _moved(self, head: nn.Module) -> None:
        """Makes the leaves, where the head is now."""
        device = next(head.parameters()).device
        if device == self._device:
            return
        self._device = device
        slots = [Slot(self, device) for _ in range(PASSES)]
        for slot, following in zip(slots, slots[1:] + slots[:1], strict=True):
            slot.next = following
        self._slot, self._idle = slots[0], Slot(self, device, counts=False)
        if self.tags.paused:
            self.exchange_slots()

    def exchange_slots(self) -> None:
        """Has compiled passes counted no longer, or again: the compiler does not notice that the slots are others."""
        self._slot, self._idle = self._idle, self._slot

    @scripted_as(before_in_script)
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Taps the head's input: a view, so that its gradient is this head's alone."""
        if not self.enabled or not module.training or not torch.is_grad_enabled():
            return None
        if not torch.compiler.is_compiling() and is_tracing():
            return None
        embeddings = _input(args, kwargs)
        if not isinstance(embeddings, Tensor) or not embeddings.requires_grad:
            return None
        if torch.compiler.is_compiling():
            if is_exporting() or _in_transform() or is_split(module.weight):
                return None
            leaf = self._leaf(embeddings.numel() // self.layer.features, self._has_positions(embeddings))
            if leaf is None:
                return None
            tapped, link = InputProbe.apply(embeddings, module.weight, leaf, self.layer)  # type: ignore[no-untyped-call]
            unchecked(self._exchange_link, link)
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
            unchecked(self._evaluated)
            return None
        if torch.compiler.is_compiling():
            if is_exporting() or _in_transform():
                return None
            return self._trace(module, _input(args, kwargs), logits)
        if not is_tracing():
            self.listen(module, _input(args, kwargs), logits)
        return None

    def _evaluated(self) -> None:
        self.saw_evaluation = True

    def _trace(self, module: nn.Module, embeddings: Tensor, logits: Tensor) -> Tensor | None:
        """Puts the probe into a graph that is being compiled."""
        link = unchecked(self._exchange_link, None) if self.layer.taps_input else None
        if link is not None:
            return DeltaProbe.apply(logits, link, self.layer)  # type: ignore[no-any-return,no-untyped-call]
        leaf = self._leaf(self.layer.rows(logits), self._has_positions(logits))
        if leaf is None:
            return None
        weight = self.layer.weight(module)
        return LogitsProbe.apply(logits, embeddings, weight, module.bias, leaf, self.layer)  # type: ignore[no-any-return,no-untyped-call]

    def _has_positions(self, rows: Tensor) -> bool:
        """Whether there are several rows for each input."""
        return not isinstance(self.layer, Pointwise) and any(size != 1 for size in rows.shape[1:-1])

    def _leaf(self, rows: int, has_positions: bool) -> Tensor | None:
        """The leaf of the pass that is being compiled, cut to its rows."""
        slot = unchecked(self._next_slot, has_positions)
        if slot is not None:
            for leaf in slot.leaves:
                if rows <= leaf.shape[0]:
                    return leaf[:rows]  # type: ignore[no-any-return]
        return None

    def _next_slot(self, has_positions: bool) -> Slot | None:
        """Goes on to the next slot. The compiler repeats it in each pass, since it changes what it finds, and what it finds
        is of the same kind each time."""
        slot = self._slot
        if slot is not None:
            self._slot = slot.next
            slot.tag, slot.has_positions = self.tags.take_next(), has_positions
        return slot

    def _exchange_link(self, link: Tensor | None) -> Tensor | None:
        before, self._link = self._link, link
        return before

    def arrived(self, rows: Tensor, tag: Tag, has_positions: bool) -> None:
        """The scores of a compiled backward pass have arrived, coded, as the gradient of a leaf."""
        try:
            if not self.enabled:
                return
            if self.tags.paused:
                if tag.samples is not None:
                    self.tags.give_back(tag)
                return
            if has_positions:
                self._faults.note(
                    "the head saw several rows for each input. Each row with a gradient (a token, a view, a clip) counts as a "
                    "sample"
                )
            if rows.shape[1] > 3 and not has_positions:
                rows = rows[:, :3]
            self._accumulator.add_coded(rows, tag.samples)
            self.on_step()
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.fault(error)

    def listen(self, module: nn.Module, embeddings: Tensor, logits: Tensor, node: Any = None) -> None:
        """Hooks on to the gradients of one forward pass, unless nothing is to be counted.

        Args:
            module: the head, or a replica of it.
            embeddings: its input.
            logits: its output.
            node: the output's node in the autograd graph, if the output has been changed in place since.
        """
        if self.tags.paused:
            return
        if _in_transform():
            self._faults.record(
                "torch.func", "passes inside of its transforms (grad, vmap and the like) are not observed"
            )
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
                embeddings.register_hook(taken.grad_embeddings_arrived)
            else:
                taken = _Pass(self, module, embeddings, logits, logits.grad_fn)
                taken.keep(module, logits)
                logits.register_hook(taken.all_arrived)
            if self._forwards is not None:
                self._forwards.head_called(self.layer.rows(logits))
                if not self._forwards.is_open:
                    self._forwards = None
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
            if type(getattr(module, "weight", None)).__name__ == "ExpandedWeight":
                self._faults.record(
                    "ExpandedWeights",
                    "passes of call_for_per_sample_grads are not observed: their weights cannot be read",
                )
            else:
                self.fault(error)

    def fault(self, error: Exception) -> None:
        """Counts what would otherwise have reached the user's training step."""
        self._faults.record("probe", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Takes the hooks off; passes under way are no longer observed."""
        self.enabled = False
        attachment = self._attachment()
        if attachment is not None:
            attachment.remove()
        if self._forwards is not None:
            self._forwards.close()
        self.layer.close()


class _Pass:
    """One eager forward pass of the head, waiting for its gradients.

    The gradients' hooks are kept by the logits' node in the autograd graph, and keep this. So nothing here may lead back to
    that node, or neither would ever be freed: the logits are detached; the embeddings are upstream of it, before the tap. The
    norm of the weight is taken now: it is the weight that the gradient belongs to, and sharded training frees it after the
    pass.
    """

    __slots__ = (
        "bias",
        "embeddings",
        "inputs",
        "kept",
        "logits",
        "logits_version",
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
        # One token of all would keep the others alive until the backward pass.
        self.embeddings = embeddings.detach().clone() if _is_small_part(embeddings) else embeddings
        self.versions = self.embeddings._version
        self.weight = weight = probe.layer.weight(module).detach()
        self.weight_norm = norm(weight)
        self.bias: Tensor | None = None
        self.logits: Tensor | None = None
        self.logits_version = 0
        self.kept: Tensor | None = None
        self.weight_node = _weight_node(node)
        self.tag = probe.tags.take()
        self.samples = self.tag.samples
        self.inputs = 0
        if self.samples is not None:
            self.inputs = _inputs(logits)
            if not is_split(logits):
                self.samples = self.samples._replace(predicted=probe.layer.predicted(logits))

    def keep(self, module: nn.Module, logits: Tensor) -> None:
        """For the form by the logits: keeps them."""
        # Of a split head the caller gets another tensor with the same numbers, whose changes would go unnoticed.
        self.logits = logits.detach().clone() if is_split(logits) else logits.detach()
        self.logits_version = self.logits._version
        bias = module.bias
        if isinstance(bias, Tensor):
            # Sharding frees it after the pass. Else it is kept as it is: it lies before the logits in the graph, not after.
            self.bias = bias.detach().clone() if is_distributed() else bias
            self.versions += self.bias._version

    def all_arrived(self, delta: Tensor) -> None:
        """The gradient of the logits, in the form by the logits: it is all there."""
        if torch.is_grad_enabled():  # a backward pass that is itself differentiated
            with torch.no_grad():
                return self.all_arrived(delta)
        try:
            layer, logits = self.probe.layer, self.logits
            if logits is None or logits._version != self.logits_version:  # changed in place since: compute them again
                if is_freed(self.weight):
                    raise RuntimeError(
                        "logits were changed in place, and sharding has freed the weight to compute them anew"
                    )
                logits = layer.logits(self.embeddings, self.weight, self.bias)
            self.observe(layer.by_logits(delta, logits, self.embeddings, self.bias, self.weight_norm))
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.probe.fault(error)

    def node_arrived(self, gradients: tuple[Tensor | None, ...]) -> None:
        """The gradients of the logits' node."""
        if gradients[0] is not None:
            self.all_arrived(gradients[0])

    def delta_arrived(self, delta: Tensor) -> None:
        """The gradient of the logits, in the form by the input: that of the embeddings will follow."""
        try:
            self.kept = self.probe.layer.by_input(delta.detach())
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def grad_embeddings_arrived(self, grad: Tensor) -> None:
        """The gradient of the embeddings."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.grad_embeddings_arrived(grad)
        try:
            kept, self.kept = self.kept, None
            if kept is not None:
                self.observe(self.probe.layer.by_input_terms(kept, grad, self.embeddings, self.weight_norm))
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def observe(self, terms: Terms) -> None:
        """Takes the terms in, if the probe is still on and this is a pass that counts."""
        probe = self.probe
        if not probe.enabled:
            return
        if probe.tags.paused or not _is_executed(self.weight_node):
            if self.samples is not None:
                probe.tags.give_back(self.tag)
            return
        bias = self.bias
        if self.embeddings._version + (0 if bias is None else bias._version) != self.versions:
            # PyTorch itself notices only what the user's own gradients need: neither the bias, nor the input of a frozen head.
            raise RuntimeError(
                "the head's input or bias was changed in place between the forward and the backward pass"
            )
        if self.samples is not None:
            probe.tags.use(self.tag)
        probe._accumulator.add_terms(terms, self.samples, self.inputs)
        probe.on_step()


def _weight_node(node: Any) -> Any:
    """The node of the autograd graph through which the head's weight gets its gradient, from the node of its logits.

    None if the weight gets none, or if it is not known which one it is: PyTorch's linear layers and convolutions have their
    parameters last.
    """
    edges: Any = () if node is None else node.next_functions
    while len(edges) == 1 and edges[0][0] is not None:  # the logits of [..., D] are a view of those of [rows, D]
        edges = edges[0][0].next_functions
    return edges[-1][0] if len(edges) > 1 else None


def _is_executed(node: Any) -> bool:
    """Whether the backward pass that is running reaches a node; True if it cannot be known.

    One that is asked for the gradient of other tensors only, by autograd.grad or backward(inputs=), does not.
    """
    if node is None:
        return True
    try:
        return _will_execute(node)
    except RuntimeError:  # the node is a leaf that autograd.grad was asked for, or the backward pass is compiled
        return True


def _is_small_part(tensor: Tensor) -> bool:
    """Whether a tensor is a view of something much larger."""
    return tensor._is_view() and type(tensor) is Tensor and tensor.untyped_storage().nbytes() > 4 * tensor.nbytes


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
