"""A jaxpr as a flat graph: inner functions inlined, values with identity, and this library's markers readable.

Markers are identities that `sessions.Discovery` leaves in the jaxpr while a loss is traced. Their names start with
`MARKER_PREFIX`. They mark the output of every linear layer that could be the head, its input, weight and bias, and the
parameters of the model.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

MARKER_PREFIX = "gwa_logging:"
"""A marker's name is `MARKER_PREFIX` kind `:` number."""

LOOPS = {"scan", "while", "cond"}
"""Primitives whose bodies run another number of times than once."""


def mark(kind: str, number: int, value: Array) -> Array:
    """Returns the value, marked in the jaxpr that is being traced."""
    return checkpoint_name(value, marker_name(kind, number))  # type: ignore[no-any-return,no-untyped-call]


def marker_name(kind: str, number: int) -> str:
    """The name of a marker."""
    return f"{MARKER_PREFIX}{kind}:{number}"


class Value:
    """A value in a graph. Two values are the same if they are one object."""

    __slots__ = ("aval", "literal")

    def __init__(self, aval: Any, literal: Hashable = None) -> None:
        self.aval = aval
        self.literal = literal

    @property
    def rank(self) -> int:
        """The number of dimensions with more than one element."""
        return sum(size != 1 for size in getattr(self.aval, "shape", ()))

    @property
    def has_gradient(self) -> bool:
        """Returns False for integers and booleans, such as a predicted class."""
        dtype = getattr(self.aval, "dtype", None)
        return dtype is None or bool(jnp.issubdtype(dtype, jnp.inexact))


class Operation(NamedTuple):
    """An equation of a jaxpr."""

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]

    def marker(self) -> tuple[str, int] | None:
        """Kind and number if this is a marker, else None."""
        name = str(self.params.get("name", ""))
        if self.name != "name" or not name.startswith(MARKER_PREFIX):
            return None
        kind, _, number = name.removeprefix(MARKER_PREFIX).partition(":")
        return kind, int(number)


class Graph:
    """A jaxpr in which functions that are only called (jit, checkpoint, custom_jvp, ...) are replaced by their bodies."""

    def __init__(self, jaxpr: Any) -> None:
        self.operations: list[Operation] = []
        self._constants: dict[int, Value] = {}
        self.inputs = [Value(v.aval) for v in open_jaxpr(jaxpr).invars]
        self.outputs = self._inline(jaxpr, self.inputs)

    def _inline(self, jaxpr: Any, inputs: list[Value]) -> list[Value]:
        opened, constants = open_jaxpr(jaxpr), getattr(jaxpr, "consts", ())
        values: dict[Any, Value] = dict(zip(opened.invars, inputs, strict=True))
        values |= {v: Value(v.aval) for v in opened.constvars}
        for variable, constant in zip(opened.constvars, constants, strict=False):
            values[variable] = self._constants.setdefault(id(constant), values[variable])

        def read(variable: Any) -> Value:
            if not hasattr(variable, "val"):
                return values[variable]
            return Value(variable.aval, None if variable.aval.shape else (str(variable.val), str(variable.aval)))

        for equation in opened.eqns:
            sources = [read(v) for v in equation.invars]
            body = _called_body(equation)
            if body is None:
                results = [Value(v.aval) for v in equation.outvars]
                self.operations.append(Operation(equation.primitive.name, equation.params, sources, results))
            else:
                arguments = [
                    self._converted(v, value) for v, value in zip(open_jaxpr(body).invars, sources, strict=True)
                ]
                returned = self._inline(body, arguments)
                results = [self._converted(v, value) for v, value in zip(equation.outvars, returned, strict=True)]
            values.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in opened.outvars]

    def _converted(self, variable: Any, value: Value) -> Value:
        """The value itself, or a part of it where a function is called on parts, as in shard_map."""
        if getattr(value.aval, "shape", None) == getattr(variable.aval, "shape", None):
            return value
        part = Value(variable.aval)
        self.operations.append(Operation("part", {}, [value], [part]))
        return part


def open_jaxpr(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def _called_body(equation: Any) -> Any:
    """The body of an equation that calls one function once on its own inputs; None for all others."""
    bodies = list(jaxprs_in(equation.params))
    if len(bodies) != 1 or equation.primitive.name in LOOPS:
        return None
    body = open_jaxpr(bodies[0])
    fits = len(body.invars) == len(equation.invars) and len(body.outvars) == len(equation.outvars)
    return bodies[0] if fits else None
