"""Losses of other libraries that use the head's weight without calling the head: which one a model uses, and its replacement.

Known from the function that runs as a module's `forward`: each of these libraries replaces it. Nothing of them is imported.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, TracebackType
from typing import Any

from torch import Tensor, nn

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.torch.find_head import inside_adapters
from gwa_logging.integrations.torch.linear_cross_entropy import linear_cross_entropy

LIGER_LOSS = "LigerForCausalLMLoss"
"""The global that the patched forwards of Liger's models call."""

_HIDES = "computes the loss of {model} without calling the head, so nothing is observed. "

_REMEDIES = {
    "liger_kernel": (
        "Liger " + _HIDES + "Call patch_fused_loss(model) of gwa_logging.integrations.torch, or turn this loss off: "
        "liger_kernel_config={{'fused_linear_cross_entropy': False}}"
    ),
    "trl": ("TRL " + _HIDES + "Set SFTConfig(loss_type='nll'), or use TRL 1.16 or newer, whose fused head is observed"),
    "unsloth": "Unsloth " + _HIDES + "Set the environment variable UNSLOTH_RETURN_LOGITS=1 before training",
    "cut_cross_entropy": (
        "cut-cross-entropy "
        + _HIDES
        + "Use linear_cross_entropy of gwa_logging.integrations.torch instead, which takes the "
        "same first three arguments"
    ),
    "torch": ("nn.LinearCrossEntropyLoss " + _HIDES + "Call patch_fused_loss(model) of gwa_logging.integrations.torch"),
}
"""What to do about the loss of each package."""

_DEPTH = 6
"""How many wrappers around a `forward` are looked through: those of autocast, of hooks, of accelerate."""


def culprit(model: nn.Module, head: nn.Module | None, *, is_called: bool) -> str:
    """A sentence about the loss that uses the head's weight without calling the head, with the remedy; "" if none is found.

    Args:
        model: the watched model.
        head: its head; None if it is unknown.
        is_called: True if the head has been called in training.
    """
    found = _known_loss(model, head)
    if found is not None:
        return _sentence(*found)
    if head is None or is_called or not _is_used_directly(model, head):
        return ""
    loaded = [name for name in ("unsloth", "cut_cross_entropy", "liger_kernel") if name in sys.modules]
    possible = f" ({' and '.join(loaded)} is loaded)" if loaded else ""
    return (
        "The head's weight gets a gradient, but the head was never called: F.linear or a fused loss uses its weight"
        f"{possible}, or the model was compiled before watch(). Call linear_cross_entropy(hidden, head.weight, target) of "
        "gwa_logging.integrations.torch instead, or call the head as a module"
    )


def silent_loss(model: nn.Module, head: nn.Module | None) -> str:
    """The same sentence if it is certain before training, when `patch_fused_loss` can still be called; else ""."""
    found = _known_loss(model, head)
    return _sentence(*found) if found is not None and found[0] in ("liger_kernel", "torch") else ""


def _sentence(package: str, module: nn.Module) -> str:
    return _REMEDIES[package].format(model=type(module).__name__)


def _known_loss(model: nn.Module, head: nn.Module | None) -> tuple[str, nn.Module] | None:
    """The package of a fused loss, and the module whose forward computes it; None if there is none."""
    for module in model.modules():
        if isinstance(module, _torch_loss()):
            if "forward" not in module.__dict__ and module.linear is head:
                return "torch", module
            continue
        for function in _functions(module.forward):
            package = _package_of_loss(function)
            if package:
                return package, module
    return None


def _package_of_loss(function: FunctionType) -> str:
    """The package that has put a fused loss into a forward; "" if there is none."""
    used, code = function.__globals__, function.__code__
    package = str(used.get("__name__", "")).partition(".")[0]
    if package == "liger_kernel":  # its forwards of other layers have no loss
        return package if LIGER_LOSS in used and not isinstance(used[LIGER_LOSS], _Replacement) else ""
    if package == "trl":
        return package if code.co_name == "_chunked_ce_forward" else ""  # up to TRL 1.14
    if package.startswith("unsloth"):  # also unsloth_zoo, and the modules that its compiler writes
        return "unsloth" if "CausalLM" in code.co_qualname else ""
    called = [value for name in code.co_names if isinstance(value := used.get(name), FunctionType)]
    packages = {value.__module__.partition(".")[0] for value in called}
    return "cut_cross_entropy" if "cut_cross_entropy" in packages | {package} else ""


def _functions(forward: Any, depth: int = _DEPTH) -> Iterator[FunctionType]:
    """The Python functions that a `forward` consists of: itself, and what it wraps."""
    if depth == 0:
        return
    if isinstance(forward, MethodType):
        forward = forward.__func__
    inner = [getattr(forward, "__wrapped__", None), getattr(forward, "func", None)]
    if isinstance(forward, FunctionType):
        yield forward
        for cell in forward.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
    for each in inner:
        if isinstance(each, FunctionType | MethodType):
            yield from _functions(each, depth - 1)


def _is_used_directly(model: nn.Module, head: nn.Module) -> bool:
    """Returns True if the head's weight has a gradient that no other module with this weight can have given it."""
    weight = head._parameters.get("weight")
    if weight is None or weight.grad is None:
        return False
    return not any(
        parameter is weight for part in model.modules() if part is not head for parameter in part._parameters.values()
    )


def _torch_loss() -> tuple[type, ...]:
    """`nn.LinearCrossEntropyLoss`, where PyTorch has it."""
    found = getattr(nn, "LinearCrossEntropyLoss", None)
    return () if found is None else (found,)


# --- replacing a loss -------------------------------------------------------------------------------------------------


def patch_fused_loss(model: nn.Module) -> "FusedLossPatch":
    """Puts `linear_cross_entropy` in the place of a model's fused loss, so that its head can be watched.

    Supported are models of transformers whose loss Liger computes (`use_liger_kernel=True`, `apply_liger_kernel_to_...`; call
    this afterwards), and `nn.LinearCrossEntropyLoss` modules, whose layer is then watched by its path:
    `watch(model, head="criterion.linear")`. Other kernels of Liger stay in use. Calls with options that only the original loss
    has (soft-capping, class weights, token accuracy, the z-loss) still go to the original loss, and are not observed.

    Args:
        model: the model, which may be wrapped by PEFT or for parallel training.

    Returns:
        The patch. Its `remove()` puts the original loss back; it is also a context manager.

    Raises:
        InvalidInputError: no loss of the model can be replaced, or it caps its logits.
    """
    core = inside_adapters(model)
    removals: list[Callable[[], None]] = []
    for module in core.modules():
        if isinstance(module, _torch_loss()):
            removals.append(_patch_torch_loss(module))
            continue
        for function in _functions(module.forward):
            if LIGER_LOSS in function.__globals__:
                removals.append(_patch_liger(module, function.__globals__))
                break
    if not removals:
        found = culprit(core, None, is_called=True)
        raise InvalidInputError(
            f"model: {type(core).__name__} has no loss that patch_fused_loss can replace. "
            + (
                found
                or "If it calls a fused loss itself, such as F.linear_cross_entropy, call linear_cross_entropy there"
            )
        )
    return FusedLossPatch(removals)


class FusedLossPatch:
    """A replaced loss, until `remove`."""

    def __init__(self, removals: list[Callable[[], None]]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Puts the original loss back. May be called twice."""
        removals, self._removals = self._removals, []
        for undo in removals:
            undo()

    def __enter__(self) -> "FusedLossPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Replacement:
    """Stands in for Liger's loss in one of its modules, which all models of an architecture share."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __call__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        labels: Tensor | None,
        hidden_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The loss of one batch: ours for a patched model, Liger's for any other."""
        if self._is_original(lm_head_weight, options):
            return self.original(
                hidden_states,
                lm_head_weight,
                labels,
                hidden_size,
                num_items_in_batch,
                ignore_index,
                shift_labels,
                **options,
            )
        if shift_labels is None:
            assert labels is not None  # Liger's models call a loss only with labels
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy(
            hidden_states,
            lm_head_weight,
            shift_labels.to(hidden_states.device).view(hidden_states.shape[:-1]),
            options.get("bias"),
            ignore_index=ignore_index,
            label_smoothing=options.get("label_smoothing") or 0.0,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _is_original(self, weight: Tensor, options: dict[str, Any]) -> bool:
        if any(options.get(name) for name in _ONLY_LIGER) or options.get("ce_weight") is not None:
            return True
        return not any(weight is parameter for model in self.models for parameter in model.parameters())


_ONLY_LIGER = (
    *("final_logit_softcapping", "softcap", "lse_square_scale", "return_z_loss", "use_token_scaling"),
    *("return_token_accuracy", "return_predicted_tokens"),
)
"""Options of Liger's loss that change what it computes or returns."""


def _patch_liger(module: nn.Module, of_module: dict[str, Any]) -> Callable[[], None]:
    config = getattr(module, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    cap = getattr(text, "final_logit_softcapping", None)
    if cap:
        raise InvalidInputError(
            f"model: {type(module).__name__} caps its logits (final_logit_softcapping={cap}), which linear_cross_entropy does "
            "not. Turn Liger's fused loss off: liger_kernel_config={'fused_linear_cross_entropy': False}"
        )
    found = of_module[LIGER_LOSS]
    replacement = found if isinstance(found, _Replacement) else _Replacement(found)
    of_module[LIGER_LOSS] = replacement
    replacement.models.add(module)
    patched = weakref.ref(module)

    def undo() -> None:
        model = patched()
        if model is not None:
            replacement.models.discard(model)
        if not replacement.models and of_module.get(LIGER_LOSS) is replacement:
            of_module[LIGER_LOSS] = replacement.original

    return undo


def _patch_torch_loss(module: Any) -> Callable[[], None]:
    if module.weight is not None or module.out_features:
        raise InvalidInputError(
            f"model: its {module} has class weights or out_features, which linear_cross_entropy has not"
        )
    loss: Any = weakref.ref(module)

    def forward(input: Tensor, target: Tensor) -> Tensor:
        module = loss()
        if target.is_floating_point():
            return type(module).forward(module, input, target)  # type: ignore[no-any-return]
        return linear_cross_entropy(
            input,
            module.linear.weight,
            target,
            module.linear.bias,
            ignore_index=-100 if module.ignore_index is None else module.ignore_index,
            label_smoothing=module.label_smoothing,
            reduction=module.reduction,
        )

    module.forward = forward

    def undo() -> None:
        module = loss()
        if module is not None and module.__dict__.get("forward") is forward:
            del module.forward

    return undo
