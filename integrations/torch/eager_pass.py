"""An eager forward pass of the head: what it keeps for the scores, and how the gradients complete them."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.autograd_nodes import weight_node
from gwa_logging.integrations.torch.compiled_probe import inputs_of
from gwa_logging.integrations.torch.distributed import is_split
from gwa_logging.integrations.torch.forward_tracker import ForwardTracker
from gwa_logging.integrations.torch.head_layers import Linear, by_input, ghost_norms, terms_of_inputs
from gwa_logging.integrations.torch.scores import PendingTerms, Terms, frobenius_norm, row_norms, terms_by_products
from gwa_logging.integrations.torch.small_batches import FEW_LOGITS
from gwa_logging.integrations.torch.tags import UNTAGGED, Tag, Tags
from gwa_logging.integrations.torch.units import Unit, pooled_prediction
from gwa_logging.ledger import TaggedBatch


class Observer(Protocol):
    """The probe, as a pass sees it; see `probe.HeadProbe`."""

    accumulator: Accumulator
    forward_tracker: ForwardTracker | None
    layer: Linear
    on_step: Callable[[], None]
    tags: Tags
    unit: Unit

    def groups(self, logits: Tensor) -> int:
        """The number of inputs if each of them may be one sample with several rows; else 0."""
        ...

    def counts(self, tag: Tag, weight_node: Any) -> bool:
        """Returns True if a backward pass that has arrived counts."""
        ...

    def fault(self, error: Exception) -> None:
        """Counts an error instead of raising it in the user's training step."""
        ...


class EagerPass:
    """One eager forward pass of the head that waits for its gradients.

    What its scores need is computed now as far as possible, since anything may change before the backward pass: the weight may
    be updated, or freed by sharded training, and the logits and embeddings may be changed in place.

    The logits' node in the autograd graph references the gradients' hooks, and they reference this object. So nothing here
    may reference that node, or neither would ever be freed. What is computed here has no graph, so create it with gradients
    switched off; and the embeddings are upstream of the node, before the tap.
    """

    __slots__ = (
        "bias",
        "delta_norms",
        "embedding_norms",
        "embeddings",
        "groups",
        "inputs",
        "probe",
        "products",
        "samples",
        "tag",
        "version",
        "weight_node",
        "weight_norm",
    )

    def __init__(self, probe: Observer, module: nn.Module, logits: Tensor, node: Any) -> None:
        self.probe = probe
        self.weight_norm = frobenius_norm(probe.layer.weight(module))
        self.weight_node = weight_node(node)
        self.embeddings: Any = None
        self.delta_norms: tuple[Tensor, ...] = ()  # or those of pooled rows and of their gradients
        self.tag = probe.tags.take() if probe.accumulator.keeps_samples else UNTAGGED
        self.samples = self.tag.samples
        self.inputs = self.groups = 0
        if logits.ndim > 2 or probe.forward_tracker is not None:  # else, as in most steps, each row is an input
            self.groups = probe.groups(logits)
        if self.samples is not None:
            self._predict(self.samples, logits)

    def _predict(self, samples: TaggedBatch, logits: Tensor) -> None:
        """Finds the predicted classes, and how many inputs the rows belong to."""
        is_simple = logits.ndim == 2 and type(logits) is Tensor and samples.ids.ndim == 1  # as in most steps
        if not is_simple:
            self.inputs = inputs_of(logits)
            if is_split(logits) or samples.is_by_position:
                return
        if not (self.groups and self.probe.unit.pools):
            self.samples = TaggedBatch(samples.ids, samples.weights, self.probe.layer.predicted(logits))

    def keep(self, module: nn.Module, embeddings: Tensor, logits: Tensor) -> None:
        """Keeps W h = z - b for the numerator delta . (W h), and |h|, or h if the layer needs it."""
        bias: Any = module.bias
        products = self.probe.layer.without_bias(logits, bias)
        self.products = products.clone() if bias is None else products  # the user may change the logits
        if self.groups or self.probe.layer.pools_rows:
            self.keep_embeddings(embeddings)
            self.bias = None if bias is None else bias.clone()
        else:
            self.embedding_norms = row_norms(embeddings)

    def keep_embeddings(self, embeddings: Tensor) -> None:
        """Keeps h."""
        # A view of one token would keep the memory of all tokens until the backward pass.
        self.embeddings = embeddings.detach().clone() if _is_small_part(embeddings) else embeddings
        self.version = self.embeddings._version

    def all_arrived(self, delta: Tensor) -> None:
        """Takes the gradient of the logits, the last missing term of the numerator delta . (W h)."""
        if torch.is_grad_enabled():  # a backward pass that is itself differentiated
            with torch.no_grad():
                return self.all_arrived(delta)
        try:
            embeddings, weight_norm = self.embeddings, self.weight_norm
            if embeddings is None:
                is_plain = delta.ndim == 2 and self.products.dtype is torch.float32 and type(delta) is Tensor
                if is_plain and delta.numel() <= FEW_LOGITS:
                    self.observe(PendingTerms(delta, self.products, self.embedding_norms, weight_norm))
                else:
                    self.observe(terms_by_products(delta, self.products, self.embedding_norms, weight_norm))
            elif self.groups and self.probe.unit.decide(delta, self.groups, weight_norm):
                delta, products, embeddings = (by_input(x, self.groups) for x in (delta, self.products, embeddings))
                self.set_predicted(pooled_prediction(delta, products if self.bias is None else products + self.bias))
                self.observe(terms_of_inputs(delta, products, embeddings, None, weight_norm))
            else:
                self.observe(self.probe.layer.terms_by_logits(delta, self.products, embeddings, None, weight_norm))
        except Exception as error:  # noqa: BLE001 - nothing may reach the user's backward pass
            self.probe.fault(error)

    def node_arrived(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Takes the gradients of the logits' node."""
        if gradients[0] is not None:
            self.all_arrived(gradients[0])

    def delta_arrived(self, delta: Tensor) -> None:
        """Takes the gradient of the logits, for the numerator (dL/dh) . h. The gradient of the embeddings follows."""
        try:
            delta, embeddings = delta.detach(), self.embeddings
            if self.groups and self.probe.unit.decide(delta, self.groups, self.weight_norm):
                self.delta_norms = ghost_norms(by_input(delta, self.groups), by_input(embeddings, self.groups))
                self.set_predicted(None)
            else:
                self.delta_norms = (self.probe.layer.delta_norms(delta),)
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def embeddings_gradient_arrived(self, gradient: Tensor) -> None:
        """Takes the gradient of the embeddings, the last missing term of the numerator (dL/dh) . h."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.embeddings_gradient_arrived(gradient)
        try:
            norms, self.delta_norms = self.delta_norms, ()
            if len(norms) == 2:
                product = (by_input(gradient, self.groups) * by_input(self.embeddings, self.groups)).sum((1, 2))
                self.observe(Terms(product, *norms, self.weight_norm))
            elif norms:
                terms = self.probe.layer.terms_by_embeddings(norms[0], gradient, self.embeddings, self.weight_norm)
                self.observe(terms)
        except Exception as error:  # noqa: BLE001 - as above
            self.probe.fault(error)

    def set_predicted(self, predicted: Tensor | None) -> None:
        """Sets the predicted class of each input once it is known that an input is a sample."""
        if self.samples is not None:
            self.samples = self.samples._replace(predicted=predicted)

    def observe(self, terms: Terms | PendingTerms) -> None:
        """Adds the terms if the probe is still on and this pass counts."""
        probe = self.probe
        if not probe.counts(self.tag, self.weight_node):
            return
        if self.embeddings is not None and self.embeddings._version != self.version:
            # PyTorch checks only what the user's gradients need: not the input of a frozen head.
            raise RuntimeError("the head's input was changed in place between the forward and the backward pass")
        probe.accumulator.add_terms(terms, self.samples, self.inputs)
        probe.on_step()


def _is_small_part(tensor: Tensor) -> bool:
    """Returns True if a tensor is a view of a much larger one."""
    return tensor._is_view() and type(tensor) is Tensor and tensor.untyped_storage().nbytes() > 4 * tensor.nbytes
