"""PyTorch: `attach` puts a probe at a model's classifier head."""

from gwa_logging.integrations.torch.adapter import TorchAdapter, attach
from gwa_logging.integrations.torch.find_head import Head, describe, find_head
from gwa_logging.integrations.torch.find_head import inside_adapters as subject

SEVERAL_HEADS = True
"""Whether head= takes a list."""

__all__ = ["Head", "TorchAdapter", "attach", "describe", "find_head", "subject"]
