"""The probe: an identity at the classifier head that sees every term of the score pass by during an ordinary backward.

In eager mode it is a hook on the gradient of the logits: the user's graph and tensors stay what they are. Under
`torch.compile` a hook would break the graph, so there the probe is an `autograd.Function` with one extra input, a leaf
whose gradient is defined as the scores; the leaf's own hook runs in the autograd engine, outside of the compiled graph,
and takes them away.

The numerator of the score has two forms. -delta . (z - b) keeps the logits until the backward pass. -(dL/dh) . h needs
a tap on the head's input as well, and keeps nothing that the head does not keep itself; it is taken for heads with more
classes than features.

In a step of a millisecond every line here counts, since the processor meets it cold: few operations, few calls.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import Accumulator, Terms
from gwa_logging.integrations.torch.hooks import Attachment
from gwa_logging.integrations.torch.layers import Linear, norm

# Leaves are views of a single number: they cost no memory, whatever their length. A gradient does, so the shortest leaf
# that fits the batch is taken; factors of four keep both the waste and the number of recompilations small.
_LEAF_ROWS = tuple(4**k for k in range(3, 13))

SCORE, VALID = 0, 1


class LogitsProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `leaf`, float32 [rows, 2], is defined as (score, 1) per row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, embeddings: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, layer: Linear
    ) -> Tensor:
        ctx.save_for_backward(logits, embeddings, weight, bias)
        ctx.layer = layer
        return logits.clone()  # a view could not be changed in place by the user; the compiler removes the copy

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        logits, embeddings, weight, bias = ctx.saved_tensors
        terms = ctx.layer.by_logits(delta, logits, embeddings, bias, norm(weight))
        return delta, None, None, None, _leaf_gradient(terms), None


class InputProbe(torch.autograd.Function):
    """Identity on the embeddings, for heads whose logits are wide. Its second output must be given to a `DeltaProbe`."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, leaf: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(embeddings, weight)
        ctx.layer = layer
        return embeddings.clone(), leaf.new_zeros(leaf.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, kept: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, weight = ctx.saved_tensors
        return grad, None, _leaf_gradient(ctx.layer.by_input_terms(kept, grad, embeddings, norm(weight))), None


class DeltaProbe(torch.autograd.Function):
    """Identity on the logits. The gradient of `link` is what an `InputProbe` needs of theirs, and so comes before it runs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, link: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        return delta, ctx.layer.by_input(delta), None


def _leaf_gradient(terms: Terms) -> Tensor:
    scores = terms.scores()
    return torch.stack([scores, torch.ones_like(scores)], dim=-1)


class HeadProbe:
    """The hooks on one head."""

    def __init__(self, layer: Linear, accumulator: Accumulator, on_step: Callable[[], None], faults: Faults) -> None:
        self.enabled = True
        self.layer = layer
        self._accumulator = accumulator
        self._on_step = on_step
        self._faults = faults
        self._link: Tensor | None = None  # from `before` to `after`, while a graph is being compiled
        self._leaves: list[Tensor] = []
        self._make_leaves()
        before = self.before if layer.taps_input else None
        self._attachment = Attachment(layer.module, before=before, after=self.after, moved=self._make_leaves)

    def _make_leaves(self) -> None:
        """Leaves where the head is; anew when it has moved."""
        device = next(self.layer.module.parameters()).device
        self._leaves = []
        for rows in _LEAF_ROWS if device.type != "meta" else ():
            leaf = torch.zeros(1, 1, device=device).expand(rows, 2).requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._arrived)
            self._leaves.append(leaf)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Taps the head's input: a view, so that its gradient is this head's alone."""
        if not self.enabled or not torch.is_grad_enabled():
            return None
        embeddings = _input(args, kwargs)
        if not isinstance(embeddings, Tensor) or not embeddings.requires_grad:
            return None
        if torch.compiler.is_compiling():
            leaf = None if torch.compiler.is_exporting() else self._leaf(embeddings.numel() // self.layer.features)
            if leaf is None:
                return None
            tapped, self._link = InputProbe.apply(embeddings, module.weight, leaf, self.layer)  # type: ignore[no-untyped-call]
        else:
            tapped = embeddings.view_as(embeddings)
            tapped._gwa_tapped = True  # type: ignore[attr-defined]
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tapped})

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Any) -> Tensor | None:
        """Taps the logits of a training pass."""
        if not self.enabled or not isinstance(logits, Tensor) or not logits.requires_grad:
            return None
        if torch.compiler.is_compiling():
            return None if torch.compiler.is_exporting() else self._trace(module, _input(args, kwargs), logits)
        self.listen(module, _input(args, kwargs), logits)
        return None

    def _trace(self, module: nn.Module, embeddings: Tensor, logits: Tensor) -> Tensor | None:
        """Puts the probe into a graph that is being compiled."""
        if self._link is not None:
            link, self._link = self._link, None
            return DeltaProbe.apply(logits, link, self.layer)  # type: ignore[no-any-return,no-untyped-call]
        leaf = self._leaf(self.layer.rows(logits))
        if leaf is None:
            return None
        weight = self.layer.weight(module)
        return LogitsProbe.apply(logits, embeddings, weight, module.bias, leaf, self.layer)  # type: ignore[no-any-return,no-untyped-call]

    def _leaf(self, rows: int) -> Tensor | None:
        for leaf in self._leaves:
            if rows <= leaf.shape[0]:
                return leaf[:rows]
        return None

    def _arrived(self, leaf: Tensor) -> None:
        """The scores of a compiled backward pass have arrived as the leaf's gradient, padded with zeros."""
        rows, leaf.grad = leaf.grad, None
        try:
            if self.enabled and rows is not None:
                sample_ids = self._accumulator.take_tag()
                self._accumulator.add_scores(rows[:, SCORE], sample_ids, valid=rows[:, VALID])
                self._on_step()
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.fault(error)

    def listen(self, module: nn.Module, embeddings: Tensor, logits: Tensor) -> None:
        """Hooks on to the gradients of one forward pass."""
        try:
            taken = _Pass(self, module, embeddings)
            if hasattr(embeddings, "_gwa_tapped"):
                logits.register_hook(taken.delta_arrived)
                embeddings.register_hook(taken.grad_embeddings_arrived)
            else:
                taken.keep(module, logits)
                logits.register_hook(taken.all_arrived)
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
            self.fault(error)

    def fault(self, error: Exception) -> None:
        """Counts what would otherwise have reached the user's training step."""
        self._faults.record("probe", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Takes the hooks off; passes under way are no longer observed."""
        self.enabled = False
        self._attachment.remove()
        self.layer.close()


class _Pass:
    """One eager forward pass of the head, waiting for its gradients.

    The gradients' hooks are kept by the logits' node in the autograd graph, and keep this. So nothing here may lead back to
    that node, or neither would ever be freed: the logits are detached; the embeddings are upstream of it. The norm of the
    weight is taken now: it is the weight that the gradient belongs to, and sharded training frees it after the pass.
    """

    __slots__ = ("bias", "embeddings", "kept", "logits", "probe", "sample_ids", "version", "weight", "weight_norm")

    def __init__(self, probe: HeadProbe, module: nn.Module, embeddings: Tensor) -> None:
        self.probe = probe
        self.embeddings = embeddings
        self.weight = weight = probe.layer.weight(module).detach()
        self.weight_norm = norm(weight)
        self.bias: Tensor | None = None
        self.logits: Tensor | None = None
        self.version = 0
        self.kept: Tensor | None = None
        self.sample_ids = probe._accumulator.take_tag()

    def keep(self, module: nn.Module, logits: Tensor) -> None:
        """For the form by the logits: keeps them."""
        self.logits, self.version = logits.detach(), logits._version
        bias = module.bias
        self.bias = bias.detach() if isinstance(bias, Tensor) else None

    def all_arrived(self, delta: Tensor) -> None:
        """The gradient of the logits, in the form by the logits: it is all there."""
        if torch.is_grad_enabled():  # a backward pass that is itself differentiated
            with torch.no_grad():
                return self.all_arrived(delta)
        try:
            layer, logits = self.probe.layer, self.logits
            if logits is None or logits._version != self.version:  # changed in place since: compute them again
                logits = layer.logits(self.embeddings, self.weight, self.bias)
            self.observe(layer.by_logits(delta, logits, self.embeddings, self.bias, self.weight_norm))
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.probe.fault(error)

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
        """Takes the terms in, if the probe is still on."""
        if self.probe.enabled:
            self.probe._accumulator.add_terms(terms, self.sample_ids)
            self.probe._on_step()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
