"""What a score belongs to where the head sees several rows of one input (tokens, views, clips).

If the loss has a term for each row, as a language model's has, each row is a sample of its own: a position. If the loss pools
the rows after the head (a mean over tokens, an average over views), the sample is the input: its gradient is the sum over its
rows, and its norm the ghost norm, see `head_layers`.

The gradients tell which it is. Pooling z = sum_p a_p z_p gives each row the gradient a_p dL/dz, so the gradients of an input's
rows all point in one direction. Losses of single rows give them different directions, since their targets differ.
"""

from typing import Literal

import torch
from torch import Tensor

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.head_layers import by_input
from gwa_logging.integrations.torch.scores import row_norms

ATTEMPTS = 8
"""Backward passes that are looked at. In one that decides nothing, no input has several rows with a gradient."""

_SAME_DIRECTION = 1 - 1e-3
_SAME_LENGTH = 0.999


class Unit:
    """Decides once whether a sample is an input or a position.

    Attributes:
        pools: True if the rows of an input are one sample, False if each row is one, None while that is unknown.
    """

    def __init__(self, unit: Literal["sample", "position"] | None, faults: Faults) -> None:
        """Takes the user's choice; None lets the gradients decide."""
        self.pools = None if unit is None else unit == "sample"
        self._faults = faults
        self._attempts = 0

    def decide(self, delta: Tensor, inputs: int, weight_norm: Tensor) -> bool:
        """Returns True if the rows of an input are one sample. Blocks on the device while that is unknown.

        Args:
            delta: float [inputs, ..., C] or [rows, C], the gradient of the logits.
            inputs: number of inputs that the rows belong to, fewer than rows.
            weight_norm: float [], of the head's weight. While it is zero, the rows' gradients say little.
        """
        if self.pools is None and self._attempts < ATTEMPTS:
            self._attempts += 1
            found = is_pooled(by_input(delta, inputs)) if weight_norm > 0 else None
            if found is None and self._attempts == ATTEMPTS:
                found = False
            if found is not None:
                self.pools = found
                self._tell(delta.numel() // delta.shape[-1], inputs)
        return bool(self.pools)

    def note_compiled(self) -> None:
        """Notes that a compiled pass scores the rows of an input one by one, unless the user asked for that."""
        if self.pools is None:
            self._faults.note(
                "the head saw several rows for each input. Each row with a gradient (a token, a view, a clip) counts as a "
                "sample. If the loss pools them, pass unit='sample' to watch()"
            )

    def note_fused(self) -> None:
        """Notes that a loss without logits cannot score inputs."""
        self._faults.note(
            "unit='sample': a fused loss has a term for each row, so each row with a gradient counts as a sample"
        )

    def _tell(self, rows: int, inputs: int) -> None:
        if self.pools:
            self._faults.note(
                f"the head saw {rows} rows in one pass of {inputs} inputs, and the loss pools the rows of an input. Each input "
                "counts as a sample"
            )
        else:
            note_rows(self._faults, rows, inputs)


def note_rows(faults: Faults, rows: int, inputs: int) -> None:
    """Notes that each row of the head is a sample, although there are fewer inputs."""
    faults.note(
        f"the head saw {rows} rows in one pass of {inputs} inputs. Each row with a gradient (a token, a view, a clip) counts "
        "as a sample"
    )


def pooled_prediction(delta: Tensor, logits: Tensor) -> Tensor:
    """int64 [inputs]: the class of the largest pooled logit. The weight of a row is the length of its gradient.

    Args:
        delta: float32 [inputs, positions, C], the gradient of the logits.
        logits: of the same shape and dtype.
    """
    return torch.einsum("bp,bpc->bc", row_norms(delta), logits).argmax(-1)


def is_pooled(delta: Tensor) -> bool | None:
    """Returns True if the gradients of each input's rows point in one direction; None if there is nothing to compare.

    With two classes or fewer all gradients are parallel, so there they must have the same length too.

    Args:
        delta: float32 [inputs, positions, C]. Zero rows are left out.
    """
    norms = row_norms(delta)
    longest, index = norms.max(1)
    reference = delta[torch.arange(delta.shape[0], device=delta.device), index]
    lengths = norms * longest[:, None]
    products = torch.einsum("bpc,bc->bp", delta, reference)
    compared = (norms > 0) & ((norms > 0).sum(1, keepdim=True) > 1)
    same = products >= _SAME_DIRECTION * lengths
    if delta.shape[2] <= 2:
        same &= norms >= _SAME_LENGTH * longest[:, None]
    finite, some, all_same = torch.stack([lengths.isfinite().all(), compared.any(), (same | ~compared).all()]).tolist()
    return all_same if finite and some else None
