"""The probe at the language-model head of TRL's trainers, which is fused with the loss: the head module is never called.

TRL patches the model's `forward` (`trl.trainer.utils.add_fused_lm_head`). The patched forward returns the log-probability of
each label instead of the logits. For logits z = c (W h + b) / T, with TRL's factor c and temperature T, and a label y

    dL/d(W h + b) = (c / T) s (p - e_y)          s = dL/d(log p_y) of the row, which any loss on log p_y may choose
    score         = -(dL/dh) . h / (|s (c / T)| |p - e_y| |h| |W|)

so a hook on the backbone's last hidden state h and one on the log-probabilities complete the score without the logits. TRL
can also return log(sum_c p_c^2), which we request, and

    |p - e_y|^2 = (1 - p_y)^2 + (sum_c p_c^2 - p_y^2)

In float32 the second term is lost where p_y is almost 1, and so is the gradient that TRL computes. So the rows with p_y above
`CONFIDENT` are projected again, in tiles and without a graph, and their terms are sums over the other classes only:

    |p - e_y|^2 = sum_{c != y} p_c^2 + (sum_{c != y} p_c)^2        (p - e_y) . W h = sum_{c != y} p_c (w_c - w_y) . h

So are all rows of a model that caps its logits, z = k tanh(c (W h + b) / k) / T, whose derivative differs between classes.
"""

import weakref
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.distributed import full_tensor, is_freed
from gwa_logging.integrations.torch.forward_tracker import ForwardTracker
from gwa_logging.integrations.torch.module_patch import ModulePatch
from gwa_logging.integrations.torch.probe import HeadProbe
from gwa_logging.integrations.torch.scores import at_least_float32, flat, frobenius_norm, terms_by_embeddings

CONFIDENT = 0.9
"""Probability of the label from which the terms are computed from the logits of the row. At 0.9 the formula with the sum of
squares has a relative error of about 1e-5 in float32; at 0.999 it would be 10 %."""

_SUM_OF_SQUARES = "log_sum_sq_probs"
_TILE = 512, 16384  # rows and classes that are projected at once: 32 MB of float32


class FusedForward(NamedTuple):
    """A model that TRL has patched.

    Attributes:
        owner: the model; inside PEFT's wrapper, if there is one.
        cells: the variables of the patched forward, by name.
    """

    owner: Any
    cells: dict[str, CellType]

    def value(self, name: str, default: Any = None) -> Any:
        """A variable of the patched forward."""
        return self.cells[name].cell_contents if name in self.cells else default

    @property
    def backbone(self) -> nn.Module:
        """The module that computes the last hidden state."""
        return getattr(self.owner, self.value("backbone_attr", "base_model"))  # type: ignore[no-any-return]


def find_fused_forward(model: nn.Module) -> FusedForward | None:
    """The module in a model whose forward TRL has patched; None if there is none."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        while forward is not None:
            function = getattr(forward, "__func__", forward)
            if _is_fused(function):
                return FusedForward(module, dict(zip(function.__code__.co_freevars, function.__closure__, strict=True)))
            forward = getattr(forward, "__wrapped__", None)  # mixed precision wraps the forward once more
    return None


def _is_fused(function: Any) -> bool:
    """Returns True for the forward that TRL's `add_fused_lm_head` makes."""
    return (
        isinstance(function, FunctionType)
        and function.__code__.co_name == "_fused_forward"
        and function.__globals__.get("__name__") == "trl.trainer.utils"
        and function.__closure__ is not None
    )


def watch_fused_head(
    model: nn.Module, probe: HeadProbe, tracker: ForwardTracker | None, faults: Faults
) -> "FusedHead | None":
    """Observes TRL's fused passes if a model has them and their head is the probe's.

    Args:
        model: the outermost module whose `__call__` runs: PEFT calls the `forward` of the module that it wraps directly.
        probe: the probe of the head, whose accumulator takes the scores.
        tracker: of the model.
        faults: where problems during training are recorded.
    """
    found = find_fused_forward(model)
    if found is None or getattr(found.owner.get_output_embeddings(), "weight", None) is not probe.layer.module.weight:
        return None
    return FusedHead(model, found, probe, tracker, faults)


class FusedHead:
    """The hooks on one model, until `close`."""

    def __init__(
        self, model: nn.Module, fused: FusedForward, probe: HeadProbe, tracker: ForwardTracker | None, faults: Faults
    ) -> None:
        self.probe = probe
        self.faults = faults
        self._temperature = fused.value("temperature", 1.0)
        self._logit_scale = fused.value("logit_scale", 1.0)
        self._cap = fused.value("final_logit_softcapping")
        self._casts = bool(fused.value("cast_lm_head_to_fp32", False))
        self._owner = weakref.ref(fused.owner)
        self._tracker = tracker
        self._hidden: Tensor | None = None  # from the end of the backbone's forward to the end of the model's
        self._dtype: torch.dtype | None = None  # of the projection, where autocast sets it
        self._outputs = fused.cells.get("outputs")
        self._before: tuple[str, ...] | None = None
        if self._outputs is not None and _SUM_OF_SQUARES not in self._outputs.cell_contents:
            self._before = self._outputs.cell_contents
            self._outputs.cell_contents = (*self._before, _SUM_OF_SQUARES)
        # A compiled model's graph ends before each hook. The hooks need the autograd graph, which the compiler does not show.
        after_backbone, after_forward = map(torch.compiler.disable, (self._after_backbone, self._after_forward))
        self._patches = [
            weakref.ref(ModulePatch(fused.backbone, after=after_backbone)),
            weakref.ref(ModulePatch(model, after=after_forward)),
        ]

    def close(self) -> None:
        """Removes the hooks, and requests from TRL what it computed before."""
        for reference in self._patches:
            patch = reference()
            if patch is not None:
                patch.remove()
        outputs, before = self._outputs, self._before
        if outputs is not None and before is not None and outputs.cell_contents == (*before, _SUM_OF_SQUARES):
            outputs.cell_contents = before
        self._before = self._hidden = None

    def _after_backbone(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Keeps the last hidden state of a training pass. If the backbone is frozen, replaces it by one with a gradient."""
        hidden, owner = getattr(output, "last_hidden_state", None), self._owner()
        if not isinstance(hidden, Tensor) or not torch.is_grad_enabled() or owner is None or not self.probe.enabled:
            return None
        is_frozen = not hidden.requires_grad
        if is_frozen:
            head = owner.get_output_embeddings()
            if not (head.training and head.weight.requires_grad and hidden.is_floating_point()):
                return None
            hidden = output.last_hidden_state = hidden.detach().requires_grad_()
        kind = hidden.device.type
        self._hidden = hidden
        self._dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return output if is_frozen else None

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Registers hooks on the gradients of one fused pass."""
        hidden, self._hidden = self._hidden, None
        log_probs, mask = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        if hidden is None or not isinstance(log_probs, Tensor) or mask is None or not log_probs.requires_grad:
            return
        owner, probe = self._owner(), self.probe
        if owner is None or not probe.enabled or probe.tags.paused:
            return
        head = owner.get_output_embeddings()
        if not head.training:
            probe.saw_evaluation = True
            return
        try:
            taken = self._taken(head, hidden, output, kwargs)
            log_probs.register_hook(taken.log_probs_arrived)
            hidden.register_hook(taken.hidden_arrived)
            entropy = output.entropy
            if isinstance(entropy, Tensor) and entropy.requires_grad:
                entropy.register_hook(taken.entropy_arrived)
            if self._tracker is not None and self._tracker.is_open:
                self._tracker.head_called(hidden.shape[0] * hidden.shape[1])
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's forward pass
            probe.fault(error)

    @torch.no_grad()
    def _taken(self, head: Any, hidden: Tensor, output: Any, kwargs: dict[str, Any]) -> "_FusedPass":
        """Everything of a pass except for its gradients."""
        own: Tensor = head.weight.detach()
        if is_freed(own) or own.numel() == 0:
            raise RuntimeError(
                "the head's weight is not gathered in the forward pass of TRL's fused head, as under DeepSpeed ZeRO-3"
            )
        weight, bias = full_tensor(own), head.bias
        bias = None if head.bias is None else full_tensor(head.bias.detach())
        norms, products = self._unit_terms(hidden.detach(), weight, bias, output, kwargs)
        node = get_gradient_edge(head.weight).node if head.weight.requires_grad else None
        scale = self._logit_scale / self._temperature
        return _FusedPass(self, hidden, _Unit(norms * abs(scale), products * scale, frobenius_norm(weight)), node)

    def _unit_terms(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, output: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Two float32 [B, rows]: |p - e_y| of the rows with a label, and (p - e_y) . W h of those that were projected.

        The products of other rows are NaN. Both include the slopes of capped logits.
        """
        mask, log_probs = output.label_mask, at_least_float32(output.log_probs.detach())
        squares, missing = output.log_sum_sq_probs, -torch.expm1(log_probs)  # 1 - p_y
        norms, products, is_projected = missing, torch.full_like(missing, torch.nan), mask
        if self._cap is None and squares is not None:
            others = (squares.exp() - (2 * log_probs).exp()).clamp(min=0)
            norms = (missing**2 + torch.minimum(others, missing**2)).sqrt()
            is_projected = mask & (missing < 1 - CONFIDENT)
        rows = is_projected.flatten().nonzero().flatten()
        if rows.numel():
            target, log_p = _aligned_labels(kwargs, mask).flatten()[rows], log_probs.flatten()[rows]
            states = hidden[:, : mask.shape[1]].reshape(-1, hidden.shape[-1])[rows.to(hidden.device)]
            found = self._projected(states.to(weight.device), weight, bias, target, log_p)
            norms, products = (
                each.flatten().index_put((rows,), values).reshape(mask.shape)
                for each, values in zip((norms, products), found, strict=True)
            )
        return norms, products

    def _projected(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two float32 [rows]: |p - e_y| and (p - e_y) . W h from the logits of the rows, in tiles.

        Args:
            hidden: float [rows, D].
            weight, bias: [V, D] and [V].
            target: int64 [rows], the labels.
            log_probs: float32 [rows], their log-probabilities.
        """
        dtype = torch.float32 if self._casts else self._dtype or hidden.dtype
        height, width = _TILE
        terms = []
        for states, labels, log_p in zip(
            hidden.to(dtype).split(height), target.split(height), log_probs.split(height), strict=True
        ):
            of_label = torch.linalg.vecdot(at_least_float32(states), at_least_float32(weight[labels].to(dtype)))
            label_logits, label_slopes = self._logits(of_label.to(dtype), None if bias is None else bias[labels])
            others, squares, products = (torch.zeros_like(log_p) for _ in range(3))
            for start in range(0, weight.shape[0], width):
                part = weight[start : start + width].to(dtype)
                outputs = states @ part.T
                logits, slopes = self._logits(outputs, None if bias is None else bias[start : start + width])
                p = (logits - (label_logits - log_p)[:, None]).exp()
                column = labels[:, None] - start
                is_inside = (column >= 0) & (column < part.shape[0])
                column = column.clamp(0, part.shape[0] - 1)
                p.scatter_(1, column, p.gather(1, column).masked_fill(is_inside, 0.0))
                sloped = p * slopes
                others += p.sum(1)
                squares += (sloped**2).sum(1)
                products += (sloped * outputs - p * (label_slopes * of_label)[:, None]).sum(1)
            terms.append(((squares + (others * label_slopes) ** 2).sqrt(), products))
        norms, all_products = zip(*terms, strict=True)
        return torch.cat(norms), torch.cat(all_products)

    def _logits(self, outputs: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits of the loss from W h and b, and the slopes of their cap; 1 without a cap."""
        if bias is not None:
            outputs = outputs + bias.to(outputs.dtype)
        scaled = at_least_float32(outputs) * self._logit_scale
        slopes = scaled.new_ones(())
        if self._cap is not None:
            bent = torch.tanh(scaled / self._cap)
            scaled, slopes = bent * self._cap, 1 - bent**2
        return scaled / self._temperature, slopes


class _Unit(NamedTuple):
    """The terms of a pass for a gradient of 1 at each log-probability.

    Attributes:
        norms: float32 [B, rows], the norms of the logit gradients.
        products: float32 [B, rows], their products with W h; NaN where the gradient of the hidden state gives them.
        weight_norm: float32 [].
    """

    norms: Tensor
    products: Tensor
    weight_norm: Tensor


def _aligned_labels(kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    """int64, of the shape of the mask: the label of each row. Anything where the mask is False.

    Learned prompts of PEFT precede the inputs, so the labels are aligned at the end.
    """
    labels, is_shifted = kwargs.get("shift_labels"), True
    if labels is None:
        labels, is_shifted = kwargs.get("labels"), False
    if labels is None:
        raise RuntimeError("TRL's fused head was called without the keyword arguments labels and shift_labels")
    missing = mask.shape[1] + (not is_shifted) - labels.shape[1]
    labels = nn.functional.pad(labels, (missing, 0)).to(mask.device).clamp(min=0)
    return labels if is_shifted else labels[:, 1:]


class _FusedPass:
    """One fused forward pass that waits for its gradients.

    The graph references this object, so it references no tensor of the graph: the hidden state is detached.
    """

    __slots__ = (
        "factors",
        "has_entropy",
        "head",
        "hidden",
        "inputs",
        "tag",
        "unit",
        "version",
        "weight_node",
    )

    def __init__(self, head: FusedHead, hidden: Tensor, unit: _Unit, weight_node: Any) -> None:
        self.head = head
        self.hidden = hidden.detach()
        self.version = self.hidden._version
        self.unit = unit
        self.weight_node = weight_node
        self.factors: Tensor | None = None
        self.has_entropy = False
        self.tag = head.probe.tags.take()
        self.inputs = hidden.shape[0]

    def log_probs_arrived(self, gradient: Tensor | None) -> None:
        """Takes the gradient of the log-probabilities, [B, rows]. The gradient of the hidden state follows.

        Compiled passes call the hooks of tensors that the loss does not use, with None or zeros.
        """
        self.factors = None if gradient is None else gradient.detach()

    def entropy_arrived(self, gradient: Tensor | None) -> None:
        """Notes that the loss depends on the entropy as well, which changes the gradient of the logits."""
        self.has_entropy = gradient is not None and bool(gradient.any())

    def hidden_arrived(self, gradient: Tensor | None) -> None:
        """Takes the gradient of the hidden state, the last missing term."""
        with torch.no_grad():
            try:
                factors, self.factors = self.factors, None
                has_entropy, self.has_entropy = self.has_entropy, False
                if has_entropy:
                    self.head.faults.record(
                        "entropy",
                        "the loss depends on the entropy that TRL's fused head returns; such passes are not observed. Set the "
                        "coefficient of the entropy to 0",
                    )
                elif factors is not None and gradient is not None:
                    self._observe(factors, gradient)
            except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
                self.head.probe.fault(error)

    def _observe(self, factors: Tensor, gradient: Tensor) -> None:
        probe, samples = self.head.probe, self.tag.samples
        if not probe.counts(self.tag, self.weight_node):
            return
        if self.hidden._version != self.version:
            raise RuntimeError(
                "the backbone's last hidden state was changed in place between the forward and the backward pass"
            )
        # The gradient of a probability that rises is negative, so a factor of -1 belongs to a usual loss.
        after = self.hidden.shape[1] - factors.shape[1]  # 1: the last position has no label
        norms, products = (
            nn.functional.pad(each.to(gradient.device), (0, after))
            for each in (factors.abs() * self.unit.norms, -factors * self.unit.products)
        )
        terms = terms_by_embeddings(flat(norms), gradient, self.hidden, self.unit.weight_norm.to(gradient.device))
        products = flat(products)
        terms = terms._replace(product=torch.where(products.isnan() | (norms == 0).flatten(), terms.product, products))
        probe.accumulator.add_terms(terms, samples, self.inputs)
        probe.on_step()
