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

# Leaves are views of a single number: they cost no memory, whatever their length. A gradient does, so the shortest leaf
# that fits the batch is taken; factors of four keep both the waste and the number of recompilations small.
_LEAF_ROWS = tuple(4**k for k in range(3, 13))

SCORE, VALID = 0, 1


class Probe(torch.autograd.Function):
    """Identity on the logits. The gradient of `leaf`, float32 [rows, 2], is defined as (score, 1) per row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, embeddings: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor
    ) -> Tensor:
        ctx.save_for_backward(logits, embeddings, weight, bias)
        return logits.clone()  # a view could not be changed in place by the user; the compiler removes the copy

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        logits, embeddings, weight, bias = ctx.saved_tensors
        scores = logit_terms(delta, logits, embeddings, weight, bias).scores()
        return delta, None, None, None, torch.stack([scores, torch.ones_like(scores)], dim=-1)


def logit_terms(delta: Tensor, logits: Tensor, embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> Terms:
    """The terms by -delta . (z - b). delta, logits: [..., C]; embeddings: [..., D]; weight: [C, D]; bias: [C] or None."""
    if logits.dtype.itemsize < 4 or delta.dtype.itemsize < 4:
        logits, delta = logits.float(), delta.float()
    product = torch.linalg.vecdot(delta, logits if bias is None else logits - bias)
    return Terms(flat(product), row_norms(delta), row_norms(embeddings), norm(weight))


def input_terms(delta_norms: Tensor, grad_embeddings: Tensor, embeddings: Tensor, weight: Tensor) -> Terms:
    """The terms by -(dL/dh) . h. grad_embeddings, embeddings: [..., D]; weight: [C, D]; delta_norms: [rows]."""
    product = torch.linalg.vecdot(grad_embeddings.float(), embeddings.float())
    return Terms(flat(product), delta_norms, row_norms(embeddings), norm(weight))


def row_norms(x: Tensor) -> Tensor:
    """float32 [rows]: Euclidean norms over the last dimension of [..., K]."""
    return flat(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32))


def flat(x: Tensor) -> Tensor:
    """[rows] of [...]."""
    return x if x.ndim == 1 else x.reshape(-1)


def norm(weight: Tensor) -> Tensor:
    """float32 []: the Frobenius norm."""
    frobenius: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return frobenius


class HeadProbe:
    """The hooks on one head."""

    def __init__(self, head: nn.Linear, accumulator: Accumulator, on_step: Callable[[], None], faults: Faults) -> None:
        self.enabled = True
        self._accumulator = accumulator
        self._on_step = on_step
        self._faults = faults
        self._leaves: list[Tensor] = []
        device = head.weight.device
        for rows in _LEAF_ROWS:
            leaf = torch.zeros(1, 1, device=device).expand(rows, 2).requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._arrived)
            self._leaves.append(leaf)
        by_input = head.out_features > head.in_features
        self._attachment = Attachment(head, before=self.before if by_input else None, after=self.after)

    def before(self, head: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Taps the head's input: a view, so that its gradient is this head's alone."""
        if torch.compiler.is_compiling() or not (self.enabled and torch.is_grad_enabled()):
            return None
        embeddings = _input(args, kwargs)
        if not isinstance(embeddings, Tensor) or not embeddings.requires_grad:
            return None
        tapped = embeddings.view_as(embeddings)
        tapped._gwa_tapped = True  # type: ignore[attr-defined]
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tapped})

    def after(self, head: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Any) -> Tensor | None:
        """Taps the logits of a training pass."""
        if not self.enabled or not isinstance(logits, Tensor) or not logits.requires_grad:
            return None
        if torch.compiler.is_compiling():
            return None if torch.compiler.is_exporting() else self._trace(head, _input(args, kwargs), logits)
        self.listen(head, _input(args, kwargs), logits)
        return None

    def _trace(self, head: nn.Linear, embeddings: Tensor, logits: Tensor) -> Tensor | None:
        """Puts the probe into a graph that is being compiled."""
        rows = logits.numel() // logits.shape[-1]
        for leaf in self._leaves:
            if rows <= leaf.shape[0]:
                return Probe.apply(logits, embeddings, head.weight, head.bias, leaf[:rows])  # type: ignore[no-any-return,no-untyped-call]
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

    def listen(self, head: nn.Linear, embeddings: Tensor, logits: Tensor) -> None:
        """Hooks on to the gradients of one forward pass."""
        try:
            taken = _Pass(self, head, embeddings)
            if hasattr(embeddings, "_gwa_tapped"):
                logits.register_hook(taken.delta_arrived)
                embeddings.register_hook(taken.grad_embeddings_arrived)
            else:
                taken.logits, taken.version = logits.detach(), logits._version
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


class _Pass:
    """One eager forward pass of the head, waiting for its gradients.

    The gradients' hooks are kept by the logits' node in the autograd graph, and keep this. So nothing here may lead back to
    that node, or neither would ever be freed: the logits are detached; the embeddings are upstream of it.
    """

    __slots__ = ("delta_norms", "embeddings", "head", "logits", "probe", "sample_ids", "version")

    def __init__(self, probe: HeadProbe, head: nn.Linear, embeddings: Tensor) -> None:
        self.probe = probe
        self.head = head
        self.embeddings = embeddings
        self.logits: Tensor | None = None
        self.version = 0
        self.delta_norms: Tensor | None = None
        self.sample_ids = probe._accumulator.take_tag()

    def all_arrived(self, delta: Tensor) -> None:
        """The gradient of the logits, in the form by the logits: it is all there."""
        if torch.is_grad_enabled():  # a backward pass that is itself differentiated
            with torch.no_grad():
                return self.all_arrived(delta)
        try:
            logits, head = self.logits, self.head
            if logits is None or logits._version != self.version:  # changed in place since: compute them again
                logits = nn.functional.linear(self.embeddings, head.weight, head.bias)
            self.observe(logit_terms(delta, logits, self.embeddings, head.weight, head.bias))
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.probe.fault(error)

    def delta_arrived(self, delta: Tensor) -> None:
        """The gradient of the logits, in the form by the input: that of the embeddings will follow."""
        try:
            self.delta_norms = row_norms(delta.detach())
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def grad_embeddings_arrived(self, grad: Tensor) -> None:
        """The gradient of the embeddings."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.grad_embeddings_arrived(grad)
        try:
            if self.delta_norms is not None:
                terms = input_terms(self.delta_norms, grad, self.embeddings, self.head.weight)
                self.delta_norms = None
                self.observe(terms)
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def observe(self, terms: Terms) -> None:
        """Takes the terms in, if the probe is still on."""
        if self.probe.enabled:
            self.probe._accumulator.add_terms(terms, self.sample_ids)
            self.probe._on_step()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
