"""The PyTorch integration: `attach` puts a probe at a model's classifier head. See `gwa_logging.protocols.AdapterModule`."""

from gwa_logging.integrations.torch.adapter import TorchAdapter
from gwa_logging.integrations.torch.find_head import Head, describe, find_head
from gwa_logging.integrations.torch.fused_losses import FusedLossPatch, patch_fused_loss
from gwa_logging.integrations.torch.linear_cross_entropy import linear_cross_entropy
from gwa_logging.integrations.torch.packing import document_ids
from gwa_logging.integrations.torch.pipeline import HeadOnRanks, attach, subject

SEVERAL_HEADS = True
"""True: `head=` accepts a list."""

__all__ = [
    "FusedLossPatch",
    "Head",
    "HeadOnRanks",
    "TorchAdapter",
    "attach",
    "describe",
    "document_ids",
    "find_head",
    "linear_cross_entropy",
    "patch_fused_loss",
    "subject",
]
