"""Several processes: every rank counts, rank 0 writes, and one small reduction per epoch makes all of them agree.

The reduction gathers the ranks' summaries, 4 KB each, and every rank merges them in the same order: so the report, and with
it the decision to stop, is the same to the bit everywhere, and nothing need be broadcast. It is called once per epoch, never
per step: ranks may have different numbers of steps.
"""

import torch
from torch import distributed

from gwa_logging.integrations.torch.accumulate import pack, unpack
from gwa_logging.summary import AlignmentSummary


def rank() -> int:
    """This process's rank; 0 if there is only one."""
    return distributed.get_rank() if is_distributed() else 0


def is_distributed() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def merged_over_ranks(summary: AlignmentSummary) -> AlignmentSummary:
    """The summary of all ranks, the same on each. Waits for all of them, as any collective does."""
    if not is_distributed():
        return summary
    vector = pack(summary)
    if "nccl" in distributed.get_backend():
        vector = vector.to(torch.device("cuda", torch.cuda.current_device()))
    gathered = [torch.empty_like(vector) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, vector)
    return AlignmentSummary.merge_all(unpack(part.cpu()) for part in gathered)
