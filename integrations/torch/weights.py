"""The weights of a PyTorch model, or their running average, for `watch(keep_best=)`.

The average is an exponential moving average with a horizon of one epoch, after torch.optim.swa_utils: at each optimizer step it
moves by 1/N towards the weights, where N is the number of steps of the epoch before. In the first epoch N is the number of
steps so far, so the average is the plain mean. Averages of weights of 16 bits or fewer are float32, which 1/N needs.

Batch normalisation's running mean and variance are averaged as the weights are. All other buffers, and parameters without
gradients, are those at the end of the epoch.

A sharded model (`fully_shard`) is averaged shard by shard, without communication. Its tensors are gathered one at a time.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gwa_logging.best_weights import FAULT
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.distributed import (
    full_tensor,
    is_distributed,
    is_flattened,
    is_partitioned,
    is_split,
    rank,
    reshard,
)


class WeightAverage:
    """The running average of a model's weights.

    Attributes:
        steps: number of updates since the last `end_epoch`.
    """

    def __init__(self) -> None:
        """Begins at the first `update`."""
        self.steps = 0
        self._horizon: int | None = None  # steps of the last epoch; None in the first
        self._averages: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # by the id of what is averaged

    def update(self, model: nn.Module) -> None:
        """Moves the average towards the present weights. Does not wait for the device.

        Raises:
            RuntimeError: a weight has moved to another device, or has another shape.
        """
        self.steps += 1
        if not self._averages:
            self._start(model)
            return
        decay = 1 - 1 / (self._horizon or self.steps)
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        with torch.no_grad():
            for reference, average in self._averages.values():
                source = reference()
                if source is None:  # a replaced layer; `end_epoch` drops it
                    continue
                if average.dtype != source.dtype:  # one at a time, because each needs a copy of this size
                    get_ema_multi_avg_fn(decay)([average], [_local(source).to(average.dtype)], None)
                    continue
                averages, sources = groups.setdefault((average.device, average.dtype), ([], []))
                averages.append(average)
                sources.append(_local(source))
            for averages, sources in groups.values():
                get_ema_multi_avg_fn(decay)(averages, sources, None)

    def end_epoch(self, model: nn.Module) -> None:
        """Notes how many steps an epoch has. Averages of parameters that are new begin with their present values."""
        if self.steps:
            self._horizon, self.steps = self.steps, 0
            self._start(model)

    def clear(self) -> None:
        """Starts again from the present weights, at the next step."""
        self._averages.clear()
        self._horizon, self.steps = None, 0

    def of(self, tensor: Tensor) -> Tensor | None:
        """The average of a parameter or buffer, of its type and shape; None if it is not averaged."""
        reference, average = self._averages.get(id(tensor), (lambda: None, tensor))
        if reference() is not tensor:
            return None
        average = average.to(tensor.dtype)
        if not is_split(tensor):
            return average
        split: Any = tensor
        return type(split).from_local(  # type: ignore[no-any-return]  # a DTensor
            *(average, split.device_mesh, split.placements),
            run_check=False,
            shape=split.shape,
            stride=split.stride(),
        )

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The averages are in the model's parameters and buffers; afterwards the weights are as before, bit for bit.

        Needs memory for another copy of them. Version counters do not change, so a graph of the weights that is still alive
        can be used afterwards. Has no effect before the first `update`.
        """
        with torch.no_grad():
            sources = [(reference(), average) for reference, average in self._averages.values()]
            pairs = [(_local(source).data, average) for source, average in sources if source is not None]
            copies = [weights.clone() for weights, _ in pairs]
            try:
                for weights, average in pairs:
                    weights.copy_(torch.where(average.isfinite(), average, weights))  # as `_start` repairs them
                yield
            finally:
                for (weights, _), original in zip(pairs, copies, strict=True):
                    weights.copy_(original)

    def _start(self, model: nn.Module) -> None:
        """Averages exactly the present weights: earlier averages are kept, others begin with the present value.

        So do elements that are not finite: otherwise, after a divergence, they would never recover.
        """
        with torch.no_grad():
            kept = {}
            for tensor in _averaged(model):
                reference, average = self._averages.get(id(tensor), (lambda: None, tensor))
                local = _local(tensor)
                if reference() is tensor:
                    average.copy_(torch.where(average.isfinite(), average, local))
                else:
                    average = local.to(torch.promote_types(local.dtype, torch.float32), copy=True)
                kept[id(tensor)] = (weakref.ref(tensor), average)
            self._averages = kept


def _averaged(model: nn.Module) -> Iterator[Tensor]:
    """The parameters that are trained, and the statistics of batch normalisation."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter
    for module in model.modules():
        if isinstance(module, _NormBase) and isinstance(module.running_mean, Tensor):
            yield module.running_mean
            if isinstance(module.running_var, Tensor):
                yield module.running_var


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_split(tensor) else tensor.detach()
    return local


class TorchWeights:
    """Copies, writes and restores the weights of one model. See `gwa_logging.best_weights.ModelWeights`."""

    suffix = ".pt"

    def __init__(
        self,
        model: Callable[[], nn.Module | None],
        missing: Callable[[], tuple[int, ...]],
        faults: Faults,
        *,
        averaged: bool,
    ) -> None:
        """Copies nothing yet.

        Args:
            model: returns the model without its wrappers; None once it was deleted.
            missing: returns the ranks that take no part, so that nothing may be exchanged.
            faults: records an average that has to start again.
            averaged: keeps the running average instead of the weights.

        Raises:
            InvalidInputError: FullyShardedDataParallel has flattened the model.
        """
        self._model, self._missing, self._faults = model, missing, faults
        self._average = WeightAverage() if averaged else None
        self._has_part: bool | None = None
        self._existing()

    def check(self, params: Any) -> None:
        """Refuses parameters."""
        raise InvalidInputError("params= is for JAX; in PyTorch keep_best copies the weights of the model itself")

    observe = check

    def after_step(self) -> None:
        """Updates the average. Does not wait for the device. Never raises: it is called by the user's optimizer."""
        model = self._model()
        if self._average is None or model is None or not self._is_needed(model):
            return
        try:
            self._average.update(model)
        except Exception as error:  # noqa: BLE001 - nothing may reach the optimizer
            self._average.clear()
            self._faults.record(FAULT, f"their average starts again at the next step: {type(error).__name__}: {error}")

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has its averaged weights; without effect if there is no average."""
        return nullcontext() if self._average is None else self._average.in_model()

    def _is_needed(self, model: nn.Module) -> bool:
        """Returns True on the rank that writes, and on all ranks if the model is sharded. Decided at the first step."""
        if self._has_part is None:
            self._has_part = rank() == 0 or any(is_split(parameter) for parameter in model.parameters())
        return self._has_part

    def end_epoch(self, params: Any, *, is_best: bool) -> dict[str, Any] | None:
        """If the epoch is the best: the state_dict on the host, on rank 0. If the model is sharded, every rank must call this.

        Raises:
            InvalidInputError: the model was deleted or cannot be copied, or the epoch had no step to average.
        """
        model = self._model() if not is_best else self._existing()
        if model is None or not self._is_needed(model):
            return None
        if self._average is not None:
            steps = self._average.steps
            reshard(model)  # a validation pass leaves gathered parameters in the model, which are freed later
            self._average.end_epoch(model)
            if not steps and is_best:
                raise InvalidInputError(
                    "keep_best='averaged': no step of a torch.optim optimizer has followed an observed backward pass"
                )
        return self._snapshot(model) if is_best else None

    def _snapshot(self, model: nn.Module) -> dict[str, Any] | None:
        """The state_dict on the host, on rank 0; None on the others. Tensors that have several names are copied once."""
        copies: dict[int, Tensor] = {}
        state: dict[str, Any] = {}
        with torch.no_grad():
            for name, value in model.state_dict(keep_vars=True).items():
                if isinstance(value, Tensor):
                    if id(value) not in copies:
                        copies[id(value)] = self._copied(value)
                    state[name] = copies[id(value)]
                else:
                    state[name] = copy.deepcopy(value)
        return state if rank() == 0 else None

    def _copied(self, tensor: Tensor) -> Tensor:
        """The whole tensor, or its average, on the host on rank 0."""
        average = self._average.of(tensor) if self._average is not None else None
        if is_split(tensor) and (missing := self._missing()):
            raise InvalidInputError(f"the weights are sharded, and ranks {list(missing)} have not called watch()")
        whole = full_tensor(tensor if average is None else average).detach()
        return whole.to("cpu", copy=True) if rank() == 0 else whole.new_empty(0)

    def write(self, snapshot: dict[str, Any], file: BinaryIO) -> None:
        """Writes a state_dict that `torch.load` reads."""
        torch.save(snapshot, file)

    def read(self, path: Path) -> dict[str, Any]:
        """Reads it, without executing code."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def share(self, value: Any) -> Any:
        """The value of rank 0 on all ranks (a collective)."""
        if not is_distributed() or self._missing():
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def restore(self, weights: dict[str, Any] | None) -> None:
        """Loads the state_dict of rank 0 into the model of every rank (a collective). The average starts again from it.

        Raises:
            InvalidInputError: the model was deleted, or has other parameters by now.
        """
        model = self._existing()
        misfits = self.share(None if weights is None else _misfits(weights, model.state_dict()))
        if misfits:
            raise InvalidInputError(f"restore_best(): the weights do not fit the model as it is now: {misfits}")
        if is_distributed() and not self._missing():
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, weights or {}, options=options)
        else:
            model.load_state_dict(weights or {})
        if self._average is not None:
            self._average.clear()

    def _existing(self) -> nn.Module:
        """The model.

        Raises:
            InvalidInputError: it was deleted, or its parameters are no separate tensors.
        """
        model = self._model()
        if model is None:
            raise InvalidInputError("keep_best: the model was deleted; monitor.best_weights() still has its weights")
        if is_flattened(model):
            raise InvalidInputError("keep_best: FullyShardedDataParallel is not supported; use fully_shard")
        if any(map(is_partitioned, model.parameters())):
            raise InvalidInputError(
                "keep_best: DeepSpeed ZeRO-3 keeps the parameters in parts; leave it out, and call engine.save_checkpoint() "
                "when a report has is_best"
            )
        return model


def _misfits(weights: dict[str, Any], present: dict[str, Any]) -> str:
    """The first tensor that one of two state_dicts lacks, or that has another shape; empty if they fit each other.

    Checked first, because `load_state_dict` loads all tensors that fit before it raises.
    """
    for name in [*weights, *present]:
        own, other = (getattr(state[name], "shape", ()) if name in state else None for state in (weights, present))
        if own is None:
            return f"it has {name!r}, which the file lacks"
        if other is None:
            return f"it has no {name!r}"
        if own != other:
            return f"{name!r} has the shape {tuple(other)}, in the file {tuple(own)}"
    return ""
