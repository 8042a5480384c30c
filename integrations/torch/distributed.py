"""Distributed training: every rank observes its own samples, rank 0 writes, and one reduction per epoch merges the ranks.

The reduction gathers the ranks' summaries, 6 KB each, and every rank merges them in the same order. So the report and the
decision to stop are bit-identical on all ranks, and nothing has to be broadcast. It runs once per epoch, never per step, since
ranks may have different numbers of steps.

The exception is a head that is itself split over ranks (tensor parallelism). Every rank then has a part of delta . (z - b),
|delta| and |W|, so these are summed over the ranks in each step, as in the head's own forward and backward pass.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from gwa_logging.ranks import Identity, RankSelection, select_ranks
from gwa_logging.summary import AlignmentSummary

REPLICATED: tuple[type[Any], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
WRAPPERS = REPLICATED
"""Modules that wrap the user's model, as their attribute `module`. In those of `REPLICATED` it can be called alone."""

_SPLIT: tuple[type, ...] = ()
_SHARDED: tuple[type, ...] = ()
_FLAT: tuple[type, ...] = ()
if distributed.is_available():  # some builds of PyTorch lack it
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    WRAPPERS += (FullyShardedDataParallel,)
    _SPLIT, _SHARDED, _FLAT = (DTensor,), (FSDPModule,), (FullyShardedDataParallel,)


def is_deepspeed_engine(module: nn.Module) -> bool:
    """Returns True for the engine of DeepSpeed, which wraps the user's model, as its attribute `module`."""
    return any(
        base.__module__ == "deepspeed.runtime.engine" and base.__name__ == "DeepSpeedEngine"
        for base in type(module).__mro__
    )


def is_partitioned(parameter: Any) -> bool:
    """Returns True for a parameter of DeepSpeed ZeRO-3, which is empty except while its module is called."""
    return hasattr(parameter, "ds_id")


def rank() -> int:
    """This process's rank; 0 if there is only one. Before `init_process_group` it is read from torchrun's variables."""
    return distributed.get_rank() if _is_initialized() else _from_environment("RANK", 0)


def ranks() -> int:
    """The number of processes, also before `init_process_group`."""
    return distributed.get_world_size() if _is_initialized() else _from_environment("WORLD_SIZE", 1)


def is_distributed() -> bool:
    """Returns True if a process group with other processes exists."""
    return _is_initialized() and distributed.get_world_size() > 1


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


class ProcessGroupStore(NamedTuple):
    """A `gwa_logging.ranks.SharedStore` in the process group's store."""

    store: Any

    def count_watch(self, name: str) -> int:
        """Counts the calls of watch() under this name."""
        watches = _watches.setdefault(self.store, Counter())
        watches[name] += 1
        return watches[name]

    def publish(self, key: str) -> None:
        """Stores the key for this rank."""
        self.store.set(f"{key}/{rank()}", "")

    def find_missing(self, key: str, within: float) -> list[int]:
        """The ranks that have not stored the key in time."""
        keys = [f"{key}/{number}" for number in range(ranks())]
        try:
            self.store.wait(keys, timedelta(seconds=within))
        except RuntimeError:  # timed out
            return [number for number, each in enumerate(keys) if not self.store.check([each])]
        return []

    def store_once(self, key: str, value: str) -> str:
        """Stores a value, unless a rank has done so before."""
        settled: bytes = self.store.compare_set(key, "", value)
        return settled.decode()


_watches: "WeakKeyDictionary[Any, Counter[str]]" = WeakKeyDictionary()


def shared_store() -> ProcessGroupStore | None:
    """The store of the process group; None if there is no group or no other rank in it."""
    store = distributed.distributed_c10d._get_default_store() if is_distributed() else None
    return None if store is None else ProcessGroupStore(store)


def is_split(tensor: Any) -> bool:
    """Returns True for a DTensor, of which other ranks have parts."""
    return isinstance(tensor, _SPLIT)


def is_flattened(model: nn.Module) -> bool:
    """Returns True if FullyShardedDataParallel has replaced parameters of the model by parts of flat ones."""
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())


def is_first_owner(tensor: Any) -> bool:
    """Returns True if this rank is the first of those that share a DTensor."""
    return not any(tensor.device_mesh.get_coordinate())


def full_tensor(tensor: Any) -> Tensor:
    """The tensor with the parts of all ranks that share it (a collective)."""
    whole: Tensor = tensor.full_tensor() if is_split(tensor) else tensor
    return whole


def is_freed(weight: Any) -> bool:
    """Returns True if sharded training has freed a tensor's storage, so that reading it would crash."""
    local = weight.to_local() if is_split(weight) else weight
    return bool(local.untyped_storage().nbytes() == 0 < local.numel())


@contextmanager
def unsharded(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Gathers a head's weight again if fully_shard or ZeRO-3 has already freed it, and reshards it at the end (a collective).

    Needed once, when the first pass has shown which layer is the head.
    """
    partitioned = [parameter for parameter in head.parameters() if is_partitioned(parameter)]
    if partitioned:
        deepspeed: Any = sys.modules["deepspeed"]  # its parameters exist, so it is imported
        with deepspeed.zero.GatheredParameters(partitioned):
            yield
        return
    owner = _sharded_in(model, head) if is_distributed() else None
    if owner is None:
        yield
        return
    owner.unshard()
    yield
    owner.reshard()


def _sharded_in(model: nn.Module, head: nn.Module) -> Any:
    """The innermost fully sharded module that contains the head; None if there is none."""
    owners = [part for part in model.modules() if isinstance(part, _SHARDED) and head in part.modules()]
    return owners[-1] if owners else None


def needs_all_ranks(model: nn.Module) -> bool:
    """Returns True if a pass of the model needs all ranks, because its parameters are split."""
    if any(isinstance(part, (*_SHARDED, *_FLAT)) for part in model.modules()):
        return True
    return any(is_split(parameter) or is_partitioned(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Frees the parameters that fully_shard keeps after a forward pass without a backward pass."""
    for part in model.modules():
        if isinstance(part, _SHARDED):
            part.reshard()  # type: ignore[operator]


def replica_group(model: nn.Module) -> int:
    """The lowest of the ranks that see the same samples as this one, as far as the model's layout tells.

    They are the ranks that a tensor-parallel dimension of a device mesh splits parameters over. The dimension over which
    fully_shard splits them, the first one that is not replicated, has other samples on each rank.
    """
    lowest = rank()
    managed = {part for owner in model.modules() if isinstance(owner, _SHARDED) for part in owner.modules()}
    for module in model.modules():
        split: list[Any] = [parameter for parameter in module.parameters(recurse=False) if is_split(parameter)]
        for parameter in split:
            placed = [i for i, placement in enumerate(parameter.placements) if not placement.is_replicate()]
            mesh = parameter.device_mesh
            dimensions = range(placed[0] + 1, mesh.ndim) if placed and module in managed else placed
            coordinate = mesh.get_coordinate()
            if dimensions and coordinate is not None:
                line = tuple(slice(None) if i in dimensions else at for i, at in enumerate(coordinate))
                lowest = min(lowest, int(mesh.mesh[line].min()))
    return lowest


def merged_over_ranks(summary: AlignmentSummary, identity: Identity) -> tuple[AlignmentSummary, RankSelection]:
    """The summary of all ranks that count, the same on each rank (a collective)."""
    packed = summary.to_vector()
    size = packed.size
    gathered = gather_vectors(np.concatenate([packed, identity.to_vector()]))
    summaries = [AlignmentSummary.from_vector(vector[:size]) for vector in gathered]
    found = select_ranks([Identity.from_vector(vector[size:]) for vector in gathered], summaries)
    return AlignmentSummary.merge_all(summaries[number] for number in found.ranks), found


def broadcast_array(array: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
    """The array of rank 0, or None if it has none (a collective).

    Args:
        array: float32 [N] or [N, M] on rank 0; ignored on the others.
    """
    shape = () if array is None else array.shape
    # -1: no array; a second number of 0: it has one dimension
    header = torch.tensor([*shape, 0, 0][:2] if shape else [-1, 0], device=exchange_device())
    wait_for(distributed.broadcast(header, 0, async_op=True))
    rows, columns = header.tolist()
    if rows < 0:
        return None
    own = array if array is not None and rank() == 0 else np.empty((rows, columns) if columns else rows, np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(own)).to(exchange_device())
    wait_for(distributed.broadcast(tensor, 0, async_op=True))
    shared: npt.NDArray[np.float32] = tensor.cpu().numpy()
    return shared


def gather_vectors(own: np.ndarray) -> list[np.ndarray]:
    """The vectors of all ranks, float64 of the same length (a collective)."""
    vector = torch.from_numpy(own).to(exchange_device())
    gathered = [torch.empty_like(vector) for _ in range(distributed.get_world_size())]
    wait_for(distributed.all_gather(gathered, vector, async_op=True))
    return [part.cpu().numpy() for part in gathered]


_finished: list[Any] = []


def wait_for(collective: Any) -> None:
    """Waits for a collective that was started with `async_op=True`, and keeps it until `forget_finished`.

    A thread of gloo drops a collective some time after it has finished. If that is the last reference, the thread needs the
    interpreter lock, since the tensors are Python objects. A process that ends right after the collective holds this lock while
    it waits for the thread: it would never end. With a reference here, the thread does not need the lock.
    """
    collective.wait()
    _finished.append(collective)


def forget_finished() -> None:
    """Frees the memory of finished collectives. For the middle of training, when the process is not about to end."""
    _finished.clear()


def exchange_device() -> torch.device:
    """Where the ranks can exchange tensors: on the host if their backend supports it, else on the accelerator."""
    kinds = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
