"""The parts of a weight that is sharded over the vocabulary (tensor parallelism), for losses that use it directly."""

from typing import Any

import torch
from torch import Tensor, distributed

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.torch.chunked_cross_entropy import Shard
from gwa_logging.integrations.torch.distributed import full_tensor, is_split
from gwa_logging.integrations.torch.scores import frobenius_norm

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor]


def local_parts(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Parts, Shard | None]:
    """The arguments of the loss as plain tensors on this rank, differentiable; and which part of the vocabulary they are.

    Raises:
        InvalidInputError: only some of them are DTensors, or they are sharded in a way that is not supported.
    """
    if not (is_split(hidden) or is_split(weight) or is_split(bias)):
        return (hidden, weight, bias, full_tensor(target)), None
    _check_meshes(hidden, weight, bias)
    from torch.distributed.tensor import Partial, Replicate

    of_weight: Any = weight
    mesh, placements = of_weight.device_mesh, of_weight.placements
    everywhere = [Replicate()] * mesh.ndim
    whole: Any = hidden
    whole = whole.redistribute(mesh, everywhere)
    if all(placement.is_replicate() for placement in placements):
        local_bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
        return (whole.to_local(), of_weight.to_local(), local_bias, full_tensor(target)), None
    if mesh.ndim > 1 or not placements[0].is_shard(0) or not type(placements[0]).__name__ == "Shard":
        raise InvalidInputError(
            f"weight: is placed as {placements} on a mesh of shape {tuple(mesh.shape)}. Supported are Shard(0) on a mesh of "
            "one dimension, such as mesh['tp'], and a replicated weight"
        )
    local_bias = None
    if bias is not None:
        of_bias: Any = bias
        local_bias = of_bias.redistribute(mesh, placements).to_local()
    # Each rank computes its classes' part of the hidden states' gradient.
    local = whole.to_local(grad_placements=[Partial()])
    size = -(-weight.shape[0] // mesh.size())  # all ranks have as many rows, except the last ones
    shard = Shard(mesh.get_group(), min(mesh.get_local_rank() * size, weight.shape[0]), weight.shape[0])
    return (local, of_weight.to_local(), local_bias, full_tensor(target)), shard


def _check_meshes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not is_split(weight):
        raise InvalidInputError(
            "hidden or bias: is a DTensor, but weight is not. Pass all of them as DTensors on one mesh"
        )
    if not is_split(hidden):
        raise InvalidInputError(
            "weight: is a DTensor, but hidden is not. With fully_shard, compute the loss inside the model's forward, where the "
            "weight is whole, and do not shard the head on its own. With a sharded vocabulary, pass hidden as a DTensor: "
            "DTensor.from_local(hidden, mesh, [Replicate()])"
        )
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor is not None and (not is_split(tensor) or tensor.device_mesh != weight.device_mesh):  # type: ignore[attr-defined]
            raise InvalidInputError(f"{name}: expected a DTensor on the weight's mesh, {weight.device_mesh}")  # type: ignore[attr-defined]


def whole_norm(weight: Tensor, shard: Shard | None) -> Tensor:
    """float32 []: the Frobenius norm of the whole weight, of which this is a part (a collective if it is sharded)."""
    norm = frobenius_norm(weight)
    if shard is None:
        return norm
    square = norm.square()
    distributed.all_reduce(square, group=shard.group)
    return torch.sqrt(square)
