"""Summarises the scores of many rows on their device: the moments and the histogram of `AlignmentSummary`, as one vector."""

import torch
from torch import Tensor

from gwa_logging.alignment import DEAD, SCORE_TOLERANCE
from gwa_logging.histogram import BINS
from gwa_logging.integrations.torch.scores import PADDING
from gwa_logging.summary import SUMMARY_NUMBERS, summary_vector


def fold_device(device: torch.device) -> torch.device:
    """Where to fold: on the device if it supports float64."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def fold(scores: Tensor, edges: Tensor) -> Tensor:
    """Summarises scores on their device, without waiting for it.

    Args:
        scores: float32 [rows], with markers.
        edges: float32 [513], the edges of the histogram.

    Returns:
        float64 [522], in the order of `AlignmentSummary.to_vector`.
    """
    scores = scores.to(edges.device)
    x = scores.double()
    valid = x.abs() <= 1 + SCORE_TOLERANCE  # False for NaN
    count = valid.sum().double()
    mean = torch.where(valid, x, 0.0).sum() / count.clamp(min=1)
    centred = torch.where(valid, x - mean, 0.0)
    correction = centred.sum() / count.clamp(min=1)
    centred = torch.where(valid, centred - correction, 0.0)
    square = centred * centred
    no_gradient, dead = torch.isnan(x), x == DEAD
    numbers = {
        "count": count,
        "mean": mean + correction,
        "m2": square.sum(),
        "m3": (square * centred).sum(),
        "m4": (square * square).sum(),
        "minimum": torch.where(valid, x, torch.inf).min(),
        "maximum": torch.where(valid, x, -torch.inf).max(),
        "no_gradient": no_gradient.sum().double(),
        "dead": dead.sum().double(),
        "not_finite": (~(valid | (x == PADDING) | no_gradient | dead)).sum().double(),
    }
    index = (torch.searchsorted(edges, scores, right=True) - 1).clamp(0, BINS - 1)
    bins = torch.zeros(BINS + 1, dtype=torch.float64, device=edges.device)
    bins.index_add_(0, torch.where(valid, index, BINS), torch.ones_like(x))
    return torch.cat([torch.stack([numbers[name] for name in SUMMARY_NUMBERS]), bins[:BINS]])


def fold_on_host(scores: Tensor) -> Tensor:
    """`fold` on the CPU: finds the bins in a table instead of searching. 6,400 scores take 40 us instead of 290 us.

    Args:
        scores: float32 [rows], with markers.

    Returns:
        float64 [522], in the order of `AlignmentSummary.to_vector`.
    """
    return torch.from_numpy(summary_vector(scores.cpu().numpy()))
