"""The per-sample ledger of a distributed run: each rank keeps the samples of a range of ids.

So a rank keeps num_samples / ranks samples, however many there are. It scores samples of any id, and these entries wait until
all ranks meet, at the end of an epoch at the latest. Then each entry is sent to the rank that keeps its sample: every rank
sends and receives what it scored since the last time, and no rank ever has the whole ledger unless the user asks for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from gwa_logging.integrations.torch.distributed import exchange_device, gather_vectors, rank, ranks, wait_for
from gwa_logging.integrations.torch.ledger_entries import EMPTY, Entries
from gwa_logging.ranks import Identity, RankSelection, select_ranks


def samples_of_rank(number: int, world: int, num_samples: int) -> range:
    """The ids that a rank keeps: equally many on each rank, fewer on the last ones."""
    each = -(-num_samples // world)
    return range(min(number * each, num_samples), min((number + 1) * each, num_samples))


def own_samples(num_samples: int) -> range:
    """The ids that this rank keeps."""
    return samples_of_rank(rank(), ranks(), num_samples)


def exchange(
    own: Entries, num_samples: int, counts: Sequence[int], identity: Identity
) -> tuple[Entries, list[int], RankSelection]:
    """Sends each entry to the rank that keeps its sample (a collective).

    The entries of ranks that do not count, because another rank has the same samples, are dropped.

    Args:
        own: of this rank, compact.
        num_samples: size of the ledger.
        counts: numbers of this rank.
        identity: of this rank.

    Returns:
        The entries for the samples that this rank keeps, in the order of the ranks; `counts`, summed over the ranks that count;
        and these ranks.
    """
    world, size = ranks(), len(counts)
    is_known = [column is not None for column in own]
    gathered = gather_vectors(np.concatenate([counts, is_known, identity.to_vector()]))
    found = select_ranks([Identity.from_vector(vector[size + len(is_known) :]) for vector in gathered])
    home, device = own.ids.device, exchange_device()
    ids = own.ids if rank() in found.ranks else own.ids[:0]
    stops = torch.tensor(
        [samples_of_rank(number, world, num_samples).stop for number in range(world)], dtype=torch.int32
    )
    ends = torch.searchsorted(ids, stops.to(home)).tolist()
    to_send = torch.tensor(np.diff([0, *ends]), device=device)
    to_receive = torch.empty_like(to_send)
    wait_for(distributed.all_to_all_single(to_receive, to_send, async_op=True))
    sends, receives = to_send.tolist(), to_receive.tolist()

    any_knows = [any(vector[size + place] for vector in gathered) for place in range(len(is_known))]
    packed = [
        torch.full_like(ids, unknown) if column is None else column[: len(ids)].to(dtype).view(torch.int32)
        for column, (unknown, dtype), knows in zip(own, EMPTY, any_knows, strict=True)
        if knows
    ]
    arrived = torch.empty((sum(receives), len(packed)), dtype=torch.int32, device=device)
    outgoing = torch.stack(packed, dim=1).to(device)
    wait_for(distributed.all_to_all_single(arrived, outgoing, receives, sends, async_op=True))
    unpacked = iter(arrived.to(home).unbind(dim=1))
    columns = [
        next(unpacked).contiguous().view(dtype) if knows else None
        for (_, dtype), knows in zip(EMPTY, any_knows, strict=True)
    ]
    totals = [int(sum(gathered[number][place] for number in found.ranks)) for place in range(size)]
    return Entries.of(columns), totals, found


def gather(own: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Joins the arrays [n] of all ranks, of one dtype, in the order of the ranks (a collective). The lengths may differ."""
    lengths = [int(length) for (length,) in gather_vectors(np.array([float(len(own))]))]
    if not any(lengths):
        return own
    padded = torch.zeros(max(lengths), dtype=torch.from_numpy(own[:0].copy()).dtype)
    padded[: len(own)] = torch.from_numpy(np.ascontiguousarray(own))
    padded = padded.to(exchange_device())
    parts = [torch.empty_like(padded) for _ in lengths]
    wait_for(distributed.all_gather(parts, padded, async_op=True))
    joined: npt.NDArray[Any] = np.concatenate(
        [part[:length].cpu().numpy() for part, length in zip(parts, lengths, strict=True)]
    )
    return joined
