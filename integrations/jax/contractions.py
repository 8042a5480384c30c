"""Linear layers whose input, weight and output have several axes each, reduced to [..., D] and [..., C]."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from gwa_logging.integrations.jax.sessions import Layer, Session


def run_contraction(
    session: Session,
    path: str,
    layer: Layer,
    inputs: Array,
    weight: Array,
    bias: Array | None,
    contracted: Sequence[int],
    order: Sequence[int] | None = None,
) -> Array:
    """Runs a layer that contracts some axes of its input with its weight.

    Args:
        session: receives the layer.
        path: of the layer.
        layer: from the input to the output.
        inputs: of the layer.
        weight: of the layer; each of its axes is contracted or an axis of the output.
        bias: added to the output, with one element for each feature; or None.
        contracted: axes of the input.
        order: the output's axes, first those that it shares with the input, then its features; None if they are in this order.
    """
    contracted = [axis % inputs.ndim for axis in contracted]
    kept = [axis for axis in range(inputs.ndim) if axis not in contracted]
    rows = tuple(inputs.shape[axis] for axis in kept)
    widths = tuple(inputs.shape[axis] for axis in contracted)
    shapes: list[tuple[int, ...]] = []

    def layer_of_rows(flat: Array) -> Array:
        output = layer(flat.reshape(*rows, *widths).transpose(_inverse([*kept, *contracted])))
        ordered = output if order is None else output.transpose(order)
        shapes.append(ordered.shape)
        return ordered.reshape(*rows, math.prod(ordered.shape[len(rows) :]))

    flat = inputs.transpose(*kept, *contracted).reshape(*rows, math.prod(widths))
    output = session.run_linear(path, layer_of_rows, flat, weight, None if bias is None else jnp.ravel(bias))
    output = output.reshape(shapes[0])
    return output if order is None else output.transpose(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def run_pointwise_convolution(
    session: Session, path: str, layer: Layer, inputs: Array, weight: Array, bias: Array | None, spatial: Sequence[int]
) -> Array:
    """Runs a convolution with a kernel of one.

    Args:
        session: receives the layer.
        path: of the layer.
        layer: from the input to the output.
        inputs: of the layer; the channels and all spatial axes come after the batch axes.
        weight: of the layer.
        bias: one for each channel of the output, or None.
        spatial: the spatial axes of the input.
    """
    positions = " x ".join(str(inputs.shape[axis]) for axis in spatial)
    if math.prod(inputs.shape[axis] for axis in spatial) != 1:
        return session.unsupported(
            path,
            layer(inputs),
            f"a convolution at {positions} positions, whose gradients are summed for each sample; pool before it, so that "
            "it runs at one position",
        )
    axes = range(inputs.ndim - len(spatial) - 1, inputs.ndim)
    return run_contraction(session, path, layer, inputs, weight, bias, axes)


def run_einsum(
    session: Session, path: str, layer: Layer, inputs: Array, weight: Array, bias: Array | None, equation: str
) -> Array:
    """Runs a layer that is an einsum of its input and its weight; the session receives it if it is a plain contraction."""
    axes = _contraction_axes(equation, inputs.ndim)
    return layer(inputs) if axes is None else run_contraction(session, path, layer, inputs, weight, bias, *axes)


def _contraction_axes(equation: str, dimensions: int) -> tuple[list[int], list[int]] | None:
    """The contracted axes of the input, and the order of the output's axes; None if an axis is shared or summed alone."""
    operands, arrow, output = equation.replace(" ", "").partition("->")
    inputs, comma, weight = operands.partition(",")
    missing = dimensions - len(inputs.replace("...", ""))
    dots = "".join(chr(0x3B1 + i) for i in range(missing))  # Greek letters, which no equation uses
    inputs, output = inputs.replace("...", dots), output.replace("...", dots)
    contracted = [letter for letter in inputs if letter in weight]
    rows = [letter for letter in inputs if letter not in weight]
    features = [letter for letter in output if letter in weight]
    is_contraction = (
        bool(arrow and comma and contracted)
        and sorted(weight) == sorted({*contracted, *features})
        and sorted(output) == sorted({*rows, *features})
        and sorted(inputs) == sorted({*contracted, *rows})
        and not {*contracted} & {*features}
    )
    if not is_contraction:
        return None
    return [inputs.index(letter) for letter in contracted], [output.index(letter) for letter in (*rows, *features)]
