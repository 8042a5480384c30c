"""Several processes: every rank counts, rank 0 writes, and one small reduction per epoch makes all of them agree.

The reduction gathers the ranks' summaries, 4 KB each, and every rank merges them in the same order: so the report, and with
it the decision to stop, is the same to the bit everywhere, and nothing need be broadcast. It is called once per epoch, never
per step: ranks may have different numbers of steps.

Only a head that is itself split over ranks (tensor parallelism) has something to add up in each step, as its own forward
and backward passes do: of delta . (z - b), |delta| and |W| every rank has a part.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gwa_logging.integrations.torch.accumulate import Accumulator, Terms, pack, unpack
from gwa_logging.samples import Ledger, Samples
from gwa_logging.summary import AlignmentSummary

WRAPPERS: tuple[type[Any], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Modules around the user's own one, which is their `module`."""

_SPLIT: tuple[type, ...] = ()
_SHARDED: tuple[type, ...] = ()
if distributed.is_available():  # there are builds of PyTorch without it
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    WRAPPERS += (FullyShardedDataParallel,)
    _SPLIT, _SHARDED = (DTensor,), (FSDPModule,)


def rank() -> int:
    """This process's rank; 0 if there is only one. Before `init_process_group` it is what torchrun says."""
    return distributed.get_rank() if _is_initialized() else _from_environment("RANK", 0)


def ranks() -> int:
    """How many processes there are, or will be."""
    return distributed.get_world_size() if _is_initialized() else _from_environment("WORLD_SIZE", 1)


def is_distributed() -> bool:
    """Whether there are other processes that can be reached."""
    return _is_initialized() and distributed.get_world_size() > 1


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


class RankAccumulator(Accumulator):
    """Gathers what this rank sees.

    The ranks that share a split head all see the same samples. They make the terms whole together, and the first of them
    counts the samples.
    """

    def add_terms(self, terms: Terms, samples: Samples | None, inputs: int = 0) -> None:
        """Adds the terms of an eager backward pass."""
        if is_split(terms.product):
            counts, terms = _comes_first(terms.product), Terms(*map(_whole, terms))
            if not counts:
                return
        super().add_terms(terms, samples, inputs)

    def add_coded(self, rows: Tensor, samples: Samples | None) -> None:
        """Adds the coded rows of a compiled backward pass."""
        if is_split(rows):
            counts, rows = _comes_first(rows), _whole(rows)[:, :2]  # of split logits, nobody knows the largest
            if not counts:
                return
        super().add_coded(rows, samples)

    def add_scores(self, scores: Tensor, samples: Samples | None) -> None:
        """Adds scores from the user."""
        if is_split(scores):
            counts, scores = _comes_first(scores), _whole(scores)
            if not counts:
                return
        super().add_scores(scores, samples)


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: other ranks have the rest of it."""
    return isinstance(tensor, _SPLIT)


def _comes_first(tensor: Any) -> bool:
    """Whether this rank is the first of those that share a DTensor."""
    return not any(tensor.device_mesh.get_coordinate())


def _whole(tensor: Any) -> Tensor:
    """A tensor with the parts of all ranks that share it; a collective."""
    whole: Tensor = tensor.full_tensor() if is_split(tensor) else tensor
    return whole


def is_freed(weight: Any) -> bool:
    """Whether sharded training has taken the numbers away from under a tensor; whoever read it would crash."""
    local = weight.to_local() if is_split(weight) else weight
    return bool(local.untyped_storage().nbytes() == 0 < local.numel())


@contextmanager
def unsharded(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Brings a head's weight back if fully_shard has already taken it apart, and takes it apart again.

    A collective: it is for the one pass that tells which head it is, after its call.
    """
    owner = _sharded_in(model, head) if is_distributed() else None
    if owner is None:
        yield
        return
    owner.unshard()
    yield
    owner.reshard()


def _sharded_in(model: nn.Module, head: nn.Module) -> Any:
    """The innermost module given to fully_shard that a head is part of; None if there is none."""
    owners = [part for part in model.modules() if isinstance(part, _SHARDED) and head in part.modules()]
    return owners[-1] if owners else None


def merged_over_ranks(summary: AlignmentSummary) -> AlignmentSummary:
    """The summary of all ranks, the same on each. Waits for all of them, as any collective does."""
    if not is_distributed():
        return summary
    vector = pack(summary).to(_meeting_device())
    gathered = [torch.empty_like(vector) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, vector)
    return AlignmentSummary.merge_all(unpack(part.cpu()) for part in gathered)


def ledger_over_ranks(ledger: Ledger) -> Ledger:
    """The ledger of all ranks, the same on each. Waits for all of them.

    What they have predicted is that of the highest rank that has seen the sample.
    """
    if not is_distributed():
        return ledger
    device = _meeting_device()
    counts = torch.tensor([ledger.strays, ledger.untagged], dtype=torch.int64, device=device)
    sums, seen = torch.from_numpy(ledger.sums).to(device), torch.from_numpy(ledger.seen).to(device)
    predicted = torch.from_numpy(ledger.predicted).to(device, torch.int64)
    ranked = torch.where(predicted < 0, -1, (rank() << 32) + predicted)  # the highest rank wins
    for tensor in (sums, seen, counts):
        distributed.all_reduce(tensor)
    distributed.all_reduce(ranked, op=distributed.ReduceOp.MAX)
    predicted = torch.where(ranked < 0, -1, ranked & 0xFFFFFFFF).to(torch.int32)
    strays, untagged = counts.tolist()
    return Ledger(sums.cpu().numpy(), seen.cpu().numpy(), predicted.cpu().numpy(), strays, untagged)


def _meeting_device() -> torch.device:
    """Where the ranks can exchange tensors: the host if their backend can, else their accelerator."""
    kinds = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
