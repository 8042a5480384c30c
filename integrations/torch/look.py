"""Evaluates the model on the inputs of a look, and leaves no trace of it.

The model runs in evaluation mode and without gradients. Afterwards everything is as before: the training mode of every
module, its buffers, and the streams of random numbers of Python, NumPy, PyTorch's CPU and the model's accelerators. Nothing is
compiled: a compiled model would be compiled once more for evaluation, and its training graph could be made dynamic by another
batch size. Autocast is off, because its cache would otherwise keep weights without gradients for the next training pass.
Floating-point inputs are converted to the dtype of the model's parameters.

If the average of the weights is kept, the average is evaluated. It is copied into the model's parameters, and the weights are
copied back afterwards. The parameters keep their storage, which sharded models, recurrent layers and compiled graphs refer to.

In a distributed run the look of rank 0 counts. Where every rank has the whole model (DDP), only rank 0 evaluates it, and the
others wait for its result. Where the parameters are split (FSDP, tensor parallelism), every rank evaluates it; the ranks
first make sure that all have inputs of the same shapes, since one that fails alone would block the others.
"""

import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.torch.distributed import (
    REPLICATED,
    broadcast_array,
    full_tensor,
    gather_vectors,
    is_distributed,
    needs_all_ranks,
    rank,
    reshard,
)
from gwa_logging.integrations.torch.find_head import unwrapped
from gwa_logging.integrations.torch.look_inputs import DatasetInputs
from gwa_logging.integrations.torch.weights import TorchWeights
from gwa_logging.settings import WatchSettings

_HALF = 2**16
"""An id is sent as two numbers below this, which float32 has exactly."""

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the model."""


def check_look(settings: WatchSettings) -> None:
    """Checks that the stop rule's look exists, and the data set that it takes its inputs from.

    Raises:
        InvalidInputError: the rule watches "consensus", and there is no look; or look="auto", and there is no data set.
    """
    if isinstance(settings.look, str) and settings.dataset is None:
        raise InvalidInputError(
            "look='auto': the inputs are chosen from the training set; add dataset=<the training set>"
        )
    if settings.early_stop is not None and settings.early_stop.statistic == "consensus" and settings.look is None:
        raise InvalidInputError(
            "early_stop=EarlyStop(statistic='consensus'): there is no look; add look=<a few hundred training inputs>"
        )


class ModelLook:
    """Evaluates one model. Holds only a weak reference to it."""

    def __init__(self, model: nn.Module, dataset: Any = None) -> None:
        """Takes the model as the user passed it, with its wrappers, and the training set for the inputs "auto"."""
        self._from_dataset = None if dataset is None else DatasetInputs(lambda: dataset)
        self._model = weakref.ref(unwrapped(model, REPLICATED))  # a call needs the other wrappers

    def evaluate(
        self, inputs: Any, problems: Mapping[str, str], weights: TorchWeights | None = None
    ) -> npt.NDArray[np.float32] | None:
        """The logits of rank 0, float32 [inputs, classes], on the host; None on other ranks if that failed. See the module.

        Args:
            inputs: what `watch(look=)` received, or a trainer's `DatasetInputs`.
            problems: what prevents collectives; each rank then evaluates alone, unless the parameters are split.
            weights: what keeps the weights. If they are averaged, the averages are evaluated.
        """
        if isinstance(inputs, DatasetInputs):
            self._from_dataset = inputs
        elif isinstance(inputs, str):
            inputs = self._from_dataset
        model = self._model()
        if model is None:
            raise InvalidInputError("look: the model no longer exists")
        if not is_distributed():
            return _evaluate(model, inputs, weights)
        if needs_all_ranks(model):
            return None if problems else self._evaluate_together(model, inputs, weights)
        if problems:
            return _evaluate(model, inputs, weights)
        logits, error = None, None
        if rank() == 0:
            try:
                logits = _evaluate(model, inputs, weights)
            except Exception as raised:  # noqa: BLE001 - the other ranks wait for the result
                error = raised
        logits = broadcast_array(logits)
        if error is not None:
            raise error
        return logits

    def ids(self, num_samples: int | None, problems: Mapping[str, str]) -> npt.NDArray[np.int64] | None:
        """The ids of inputs that were chosen from the training set, those of rank 0; None if they are unknown.

        Args:
            num_samples: size of the ledger, if there is one.
            problems: what prevents collectives.
        """
        if self._from_dataset is None:
            return None
        if not is_distributed() or problems:
            return self._from_dataset.ids(num_samples)
        parts, error = None, None
        if rank() == 0:
            try:
                found = self._from_dataset.ids(num_samples)
                parts = None if found is None else np.stack(np.divmod(found, _HALF), axis=1).astype(np.float32)
            except Exception as raised:  # noqa: BLE001 - the other ranks wait for the result
                error = raised
        parts = broadcast_array(parts)
        if error is not None:
            raise error
        return None if parts is None else parts.astype(np.int64) @ np.array([_HALF, 1])

    def close(self) -> None:
        """Frees the inputs that were chosen from the training set."""
        if self._from_dataset is not None:
            self._from_dataset.clear()

    def _evaluate_together(
        self, model: nn.Module, inputs: Any, weights: TorchWeights | None
    ) -> npt.NDArray[np.float32] | None:
        batches: list[Batch] = []
        logits, error = None, None
        with _unchanged(model), ExitStack() as stack:
            try:
                batches = _batches(inputs, model)
                stack.enter_context(_with_averages(model, weights))
            except Exception as raised:  # noqa: BLE001 - the other ranks must learn of it first
                error = raised
            signature = float(crc32(repr([_shapes(batch) for batch in batches]).encode()))
            signatures = gather_vectors(np.array([float(error is None), signature]))
            if error is not None:
                raise error
            if any(tuple(other) != tuple(signatures[0]) for other in signatures):
                raise InvalidInputError(
                    "look: the ranks have inputs of different shapes; where the parameters are split, all need the same"
                )
            try:
                logits = _run(model, batches, inputs)
            except Exception as raised:  # noqa: BLE001 - see above
                error = raised
        failed = gather_vectors(np.array([float(error is not None)]))
        if error is not None:
            raise error
        return None if any(map(any, failed)) else broadcast_array(logits)


def _evaluate(model: nn.Module, inputs: Any, weights: TorchWeights | None) -> npt.NDArray[np.float32]:
    with _unchanged(model):
        batches = _batches(inputs, model)
        with _with_averages(model, weights):
            return _run(model, batches, inputs)


def _run(model: nn.Module, batches: Sequence[Batch], inputs: Any) -> npt.NDArray[np.float32]:
    try:
        parts = [_logits(model(*args, **kwargs)) for args, kwargs in batches]
    except Exception as error:
        if isinstance(inputs, DatasetInputs):
            raise inputs.rejection(error) from error
        raise
    if len({part.shape[1:] for part in parts}) > 1:
        raise InvalidInputError(f"look: the batches give logits of the shapes {[part.shape for part in parts]}")
    return np.concatenate(parts)


def _logits(output: Any) -> npt.NDArray[np.float32]:
    """float32 [inputs, classes] or [inputs], on the host, from what a model returned."""
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, tuple | list):
        found = next((each for each in found if isinstance(each, Tensor)), None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim not in (1, 2) or not len(found):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise InvalidInputError(
            f"look: expected the model to return logits [inputs, classes], as a tensor, as the first one of a tuple, or as "
            f"`logits`; found {what}"
        )
    logits: npt.NDArray[np.float32] = full_tensor(found).float().cpu().numpy()
    return logits


# --- inputs -----------------------------------------------------------------------------------------------------------


def _batches(inputs: Any, model: nn.Module) -> list[Batch]:
    """The batches of a look on the model's device, with floating-point numbers in the model's dtype."""
    if isinstance(inputs, DatasetInputs):
        inputs = inputs.batches(model)
    elif callable(inputs):
        inputs = inputs()
    parameters = list(model.parameters())
    device = next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))
    dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.element_size() > 1), None)

    def moved(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            return value.detach().to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {key: moved(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(moved(inner) for inner in value)
        return value

    batches: list[Batch] = []
    for batch in inputs if isinstance(inputs, list) else [inputs]:
        if isinstance(batch, Mapping):
            batches.append(((), moved(batch)))
        else:
            batches.append((moved(batch) if isinstance(batch, tuple) else (moved(batch),), {}))
    if not batches:
        raise InvalidInputError("look: the function has returned no batch")
    return batches


def _shapes(batch: Any) -> Any:
    """What must be the same on all ranks."""
    if isinstance(batch, Tensor):
        return [*batch.shape, str(batch.dtype)]
    if isinstance(batch, Mapping):
        return {str(key): _shapes(value) for key, value in batch.items()}
    return [_shapes(value) for value in batch] if isinstance(batch, list | tuple) else type(batch).__name__


# --- leaving no trace -------------------------------------------------------------------------------------------------


@contextmanager
def _with_averages(model: nn.Module, weights: TorchWeights | None) -> Iterator[None]:
    """The model has its averaged weights, if they are averaged. No gathered copy stays in a sharded model."""
    reshard(model)
    with nullcontext() if weights is None else weights.averaged():
        try:
            yield
        finally:
            reshard(model)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model and the random numbers are as before at the end."""
    kinds: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type not in ("cpu", "meta") and tensor.device.index is not None:
            kinds.setdefault(tensor.device.type, set()).add(tensor.device.index)
    with ExitStack() as stack:
        python, numpy = random.getstate(), np.random.get_state()
        stack.callback(np.random.set_state, numpy)
        stack.callback(random.setstate, python)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in kinds.items():
            _keep_random_numbers(kind, indices, stack)
        stack.callback(_restore_modes, [(module, module.training) for module in model.modules()])
        stack.callback(_restore_buffers, _copies_of_buffers(model))
        for module in model.modules():
            module.training = False  # not by eval(), which some modules override to merge their weights
        stack.enter_context(torch.no_grad())
        for kind in filter(torch.amp.is_autocast_available, ("cpu", *kinds)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _keep_random_numbers(kind: str, indices: set[int], stack: ExitStack) -> None:
    """Restores the random numbers of a kind of accelerator at the end."""
    accelerator = getattr(torch, kind, None)
    if kind == "mps":  # it has a single device, and its functions take no index
        stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
    elif hasattr(accelerator, "get_rng_state"):  # some third-party devices lack one
        stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _copies_of_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor, int]]:
    """Each buffer with its module, its name, a copy and its version."""
    return [
        (module, name, buffer, buffer.detach().clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]


def _restore_buffers(copies: list[tuple[nn.Module, str, Tensor, Tensor, int]]) -> None:
    """Restores what was changed in place or replaced by a tensor of the same shape.

    A tensor of another shape is a cache that has grown, together with attributes that describe it: it stays.
    """
    with torch.no_grad():
        for module, name, buffer, copy, version in copies:
            if buffer._version != version:
                buffer.copy_(copy)
            present = module._buffers.get(name)
            if (
                present is not None
                and present is not buffer
                and (present.shape, present.dtype) == (buffer.shape, buffer.dtype)
            ):
                module._buffers[name] = buffer
