"""The probe in a graph that torch.compile makes.

A hook would break the graph, so here the probe is an `autograd.Function` with one extra input, a leaf whose gradient is defined
as the scores. The leaf's own hook runs in the autograd engine, not in the compiled graph, and takes them. The gradients of
one leaf are summed, so each of `PASSES` forward passes that wait for a backward pass has its own leaf: its `Slot`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.integrations.torch.distributed import is_split
from gwa_logging.integrations.torch.head_layers import Linear
from gwa_logging.integrations.torch.module_patch import unchecked
from gwa_logging.integrations.torch.rows import COLUMNS, COLUMNS_FOR_LEDGER, PASSES, encode_rows
from gwa_logging.integrations.torch.scores import frobenius_norm
from gwa_logging.integrations.torch.tags import UNTAGGED, Tag, Tags

# Leaves are views of a single number, so they take no memory, whatever their length. Their gradients do, so the shortest leaf
# that fits the batch is taken. Steps of a factor of four keep both the memory and the number of recompilations small.
_LEAF_ROWS = tuple(4**k for k in range(3, 13))

Arrived = Callable[[Tensor, Tag, bool], None]
"""Receives the encoded rows of a backward pass, their ids, and True if there are several rows per input."""


class LogitsProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `leaf`, float32 [rows, columns], is defined as the encoded rows."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, embeddings: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, layer: Linear
    ) -> Tensor:
        # The weight's norm, not the weight: that may change before the backward pass.
        ctx.save_for_backward(logits, embeddings, bias, frobenius_norm(weight))
        ctx.layer, ctx.columns = layer, leaf.shape[1]
        return logits.clone()  # users could not change a view in place; the compiler removes the copy

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        logits, embeddings, bias, weight_norm = ctx.saved_tensors
        terms = ctx.layer.terms_by_logits(delta, logits, embeddings, bias, weight_norm)
        needs_predicted = ctx.columns > COLUMNS and not is_split(logits)  # no rank has all logits of a split head
        predicted = ctx.layer.predicted(logits) if needs_predicted else None
        return delta, None, None, None, encode_rows(terms, predicted, ctx.columns, inputs_of(logits)), None


class InputProbe(torch.autograd.Function):
    """Identity on the embeddings, for heads whose logits are wide. Its second output must be passed to a `DeltaProbe`."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, leaf: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(embeddings, frobenius_norm(weight))
        ctx.layer = layer
        ctx.columns = leaf.shape[1]
        return embeddings.clone(), leaf.new_zeros(leaf.shape[0], 2 if ctx.columns > COLUMNS else 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, link_gradient: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, weight_norm = ctx.saved_tensors
        delta_norms = link_gradient[:, 0]
        predicted = link_gradient[:, 1] if link_gradient.shape[1] > 1 else None
        terms = ctx.layer.terms_by_embeddings(delta_norms, gradient, embeddings, weight_norm)
        return gradient, None, encode_rows(terms, predicted, ctx.columns, inputs_of(embeddings)), None


class DeltaProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `link` is |delta| and the predicted class, which the `InputProbe` needs.

    The link makes autograd run this backward pass before that of the `InputProbe`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, link: Tensor, layer: Linear) -> Tensor:
        ctx.save_for_backward(*([layer.predicted(logits)] if link.shape[1] > 1 else []))
        ctx.layer = layer
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        delta_norms = ctx.layer.delta_norms(delta)
        columns = [delta_norms, *(predicted.to(delta_norms.dtype) for predicted in ctx.saved_tensors)]
        return delta, torch.stack(columns, dim=1), None


def inputs_of(rows: Tensor) -> int:
    """The number of inputs that the rows [inputs, ..., K] belong to; 0 if each row is one, or there is no batch."""
    return rows.shape[0] if rows.ndim > 2 else 0


class Slot:
    """The leaves of one compiled pass, the ids of its samples, and the slot of the next pass.

    The autograd engine keeps the leaves' hooks where Python's garbage collector cannot follow. So the hooks must not hold a
    reference that leads back to the leaves.
    """

    def __init__(self, device: torch.device, columns: int, arrived: Arrived | None) -> None:
        """Calls the method `arrived` with each backward pass, without keeping its object alive; None ignores them."""
        self.next = self
        self.tag = UNTAGGED
        self.has_positions = False  # several rows for each input
        self.leaves: list[Tensor] = []
        this, receiver = weakref.ref(self), weakref.WeakMethod(arrived) if arrived is not None else None

        def take_gradient(leaf: Tensor) -> None:
            rows, leaf.grad = leaf.grad, None
            slot, receive = this(), receiver() if receiver is not None else None
            if slot is not None and receive is not None and rows is not None:
                receive(rows, slot.tag, slot.has_positions)

        for rows in _LEAF_ROWS:
            leaf = torch.zeros(1, 1, device=device).expand(rows, columns).requires_grad_()
            leaf.register_post_accumulate_grad_hook(take_gradient)
            self.leaves.append(leaf)


class CompiledProbe:
    """The slots of one head, and what the compiler traces at it.

    The compiler repeats the changes that a traced function makes to objects, in each pass, and guards what it reads. So every
    object found in a place is of the same kind each time.
    """

    def __init__(self, layer: Linear, tags: Tags, arrived: Arrived, *, keeps_samples: bool) -> None:
        self._layer = layer
        self._tags = tags
        self._arrived = weakref.WeakMethod(arrived)
        self._columns = COLUMNS_FOR_LEDGER if keeps_samples else COLUMNS
        self._link: Tensor | None = None  # from `tap_input` to `tap_logits`, while a graph is being compiled
        self._slot: Slot | None = None
        self._idle: Slot | None = None  # swapped with `_slot` while paused
        self._device = torch.device("meta")

    def move_to(self, device: torch.device) -> None:
        """Makes new leaves if the head has moved to another device."""
        if device == self._device:
            return
        self._device = device
        slots = [Slot(device, self._columns, self._arrived()) for _ in range(PASSES)]
        for slot, following in zip(slots, slots[1:] + slots[:1], strict=True):
            slot.next = following
        self._slot, self._idle = slots[0], Slot(device, self._columns, None)
        if self._tags.paused:
            self.swap_slots()

    def swap_slots(self) -> None:
        """Stops counting compiled passes, or resumes. The compiler does not notice that the slots have changed."""
        self._slot, self._idle = self._idle, self._slot

    def tap_input(self, module: nn.Module, embeddings: Tensor) -> Tensor | None:
        """Puts the first half of the probe into the graph; None if it cannot be."""
        if is_split(module.weight):
            return None
        leaf = self._leaf(embeddings.numel() // self._layer.features, self._has_positions(embeddings))
        if leaf is None:
            return None
        tapped, link = InputProbe.apply(embeddings, module.weight, leaf, self._layer)  # type: ignore[no-untyped-call]
        unchecked(self._swap_link, link)
        return tapped  # type: ignore[no-any-return]

    def tap_logits(self, module: nn.Module, embeddings: Tensor, logits: Tensor) -> Tensor | None:
        """Puts the probe, or its second half, into the graph; None if it cannot be."""
        link = unchecked(self._swap_link, None) if self._layer.taps_input else None
        if link is not None:
            return DeltaProbe.apply(logits, link, self._layer)  # type: ignore[no-any-return,no-untyped-call]
        leaf = self._leaf(self._layer.rows(logits), self._has_positions(logits))
        if leaf is None:
            return None
        weight = self._layer.weight(module)
        return LogitsProbe.apply(logits, embeddings, weight, module.bias, leaf, self._layer)  # type: ignore[no-any-return,no-untyped-call]

    def _has_positions(self, rows: Tensor) -> bool:
        """Returns True if there are several rows for each input."""
        return not self._layer.pools_rows and any(size != 1 for size in rows.shape[1:-1])

    def _leaf(self, rows: int, has_positions: bool) -> Tensor | None:
        """The leaf of the pass that is being compiled, cut to its rows."""
        slot = unchecked(self._next_slot, has_positions)
        if slot is not None:
            for leaf in slot.leaves:
                if rows <= leaf.shape[0]:
                    return leaf[:rows]  # type: ignore[no-any-return]
        return None

    def _next_slot(self, has_positions: bool) -> Slot | None:
        """Moves on to the next slot, in each pass."""
        slot = self._slot
        if slot is not None:
            self._slot = slot.next
            slot.tag, slot.has_positions = self._tags.take_next(), has_positions
        return slot

    def _swap_link(self, link: Tensor | None) -> Tensor | None:
        before, self._link = self._link, link
        return before
