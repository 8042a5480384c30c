"""Follows a loss back to the layer that made its logits, in the jaxpr of an abstract trace.

While a loss is traced, `Discovery` leaves notes in the jaxpr: identities whose names start with `PREFIX`. They mark the output
of every linear layer that could be the head, its input, weight and bias, and the parameters of the model. Two questions are
answered from them:

- `makers`: which layers do the logits come from? Only the nearest layer counts on every path. A product with a parameter
  that belongs to no such layer (an einsum, a convolution, a tied embedding) ends the path as a layer would: whatever precedes
  it is hidden.
- `flaw`: does a layer compute input x weight + bias, and nothing else? The scores are wrong for any other function.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

PREFIX = "gwa_logging:"
"""Starts the name of every note: `PREFIX` kind `:` number."""

COSINE = (
    "a normalised vector (a cosine head, or logits that are normalised): the output does not change with the length of the "
    "weight, so the scores would be zero whatever is learnt"
)

Maker = int | str
"""The number of a layer's call, or a phrase for something that made the logits but is no layer."""

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "scaled_matmul"}
_LOOPS = {"scan", "while", "cond"}
_MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "mesh_cast",
    "name",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
"""Operations that give every number another place, shape or type, and change no value."""

_SUMS = {"add", "add_any", "sub", "mul", "div", "max", "reduce_sum", "reduce_max", "select_n"}


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


class Operation(NamedTuple):
    """An equation of a jaxpr."""

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]

    def note(self) -> tuple[str, int] | None:
        """Kind and number, if this is a note of `Discovery`."""
        name = str(self.params.get("name", ""))
        if self.name != "name" or not name.startswith(PREFIX):
            return None
        kind, _, number = name.removeprefix(PREFIX).partition(":")
        return kind, int(number)


class Graph:
    """A jaxpr in which the functions that are only called (jit, checkpoint, custom_jvp, ...) are replaced by their bodies."""

    def __init__(self, jaxpr: Any) -> None:
        self.operations: list[Operation] = []
        self._constants: dict[int, Value] = {}
        open_jaxpr = _open(jaxpr)
        self.inputs = [Value(v.aval) for v in open_jaxpr.invars]
        self.outputs = self._inline(jaxpr, self.inputs)

    def _inline(self, jaxpr: Any, inputs: list[Value]) -> list[Value]:
        open_jaxpr, constants = _open(jaxpr), getattr(jaxpr, "consts", ())
        values: dict[Any, Value] = dict(zip(open_jaxpr.invars, inputs, strict=True))
        values |= {v: Value(v.aval) for v in open_jaxpr.constvars}
        for variable, constant in zip(open_jaxpr.constvars, constants, strict=False):
            values[variable] = self._constants.setdefault(id(constant), values[variable])

        def read(variable: Any) -> Value:
            if not hasattr(variable, "val"):
                return values[variable]
            return Value(variable.aval, None if variable.aval.shape else (str(variable.val), str(variable.aval)))

        for equation in open_jaxpr.eqns:
            sources = [read(v) for v in equation.invars]
            body = _called(equation)
            if body is None:
                made = [Value(v.aval) for v in equation.outvars]
                self.operations.append(Operation(equation.primitive.name, equation.params, sources, made))
            else:
                inside = [self._seen_as(v.aval, value) for v, value in zip(_open(body).invars, sources, strict=True)]
                outside = self._inline(body, inside)
                made = [self._seen_as(v.aval, value) for v, value in zip(equation.outvars, outside, strict=True)]
            values.update(zip(equation.outvars, made, strict=True))
        return [read(v) for v in open_jaxpr.outvars]

    def _seen_as(self, aval: Any, value: Value) -> Value:
        """The value itself, or its part where a function is called on parts, as in shard_map."""
        if getattr(value.aval, "shape", None) == getattr(aval, "shape", None):
            return value
        part = Value(aval)
        self.operations.append(Operation("part", {}, [value], [part]))
        return part


def _open(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def _called(equation: Any) -> Any:
    """The body of an equation that runs one function on its own inputs, once; None for all others."""
    bodies = list(jaxprs_in(equation.params))
    if len(bodies) != 1 or equation.primitive.name in _LOOPS:
        return None
    body = _open(bodies[0])
    fits = len(body.invars) == len(equation.invars) and len(body.outvars) == len(equation.outvars)
    return bodies[0] if fits else None


# --- what the logits come from ----------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        makers: the nearest layers, and phrases for what made it besides.
        parameters: the parameters that it comes from without any layer between; none if there are makers.
        rank: of what has been made of these parameters, the number of dimensions before broadcasting.
        traits: "square": a sum of squares; "norm": the root of one; "unit": divided by its own norm; "scaled": a layer's
            output times a vector of parameters.
    """

    makers: frozenset[Maker] = frozenset()
    parameters: frozenset[str] = frozenset()
    rank: int = 0
    traits: frozenset[str] = frozenset()

    def join(self, other: "Origin") -> "Origin":
        """The origin of a value that comes from both."""
        return Origin(
            self.makers | other.makers,
            self.parameters | other.parameters,
            max(self.rank, other.rank),
            self.traits | other.traits,
        )


_NOTHING = Origin()


def makers(jaxpr: Any, parameters: Sequence[str], unfit: Sequence[str]) -> frozenset[Maker]:
    """The nearest makers of the first output of a jaxpr.

    Args:
        jaxpr: of a loss, or of a model.
        parameters: what to call the parameters that are noted in it.
        unfit: phrases for the layers that are noted as being no head.
    """
    graph = Graph(jaxpr)
    return _Flow(parameters, unfit).run(graph, [_NOTHING] * len(graph.inputs))[0].makers


class _Flow:
    """Follows origins from the inputs of a graph to its outputs."""

    def __init__(self, parameters: Sequence[str], unfit: Sequence[str]) -> None:
        self._names = parameters
        self._unfit = unfit

    def run(self, graph: Graph, inputs: Sequence[Origin]) -> list[Origin]:
        """The origins of a graph's outputs, given those of its inputs."""
        declared = {
            operation.inputs[0]: Origin(parameters=frozenset({self._names[note[1]]}), rank=operation.inputs[0].rank)
            for operation in graph.operations
            if (note := operation.note()) is not None and note[0] == "parameter"
        }
        known = dict(zip(graph.inputs, inputs, strict=True)) | declared
        for operation in graph.operations:
            sources = [known.get(value, _NOTHING) for value in operation.inputs]
            for value, origin in zip(operation.outputs, self._after(operation, sources), strict=True):
                known[value] = declared.get(value, origin if _has_gradient(value) else _NOTHING)
        return [known.get(value, _NOTHING) for value in graph.outputs]

    def _after(self, operation: Operation, sources: list[Origin]) -> list[Origin]:
        if operation.name == "scan":
            return self._scan(operation.params, sources)
        if operation.name == "while":
            skipped, constants = operation.params["cond_nconsts"], operation.params["body_nconsts"]
            return self._repeat(Graph(operation.params["body_jaxpr"]), sources[skipped:], constants, None)
        if operation.name == "cond":
            branches = [self.run(Graph(branch), sources[1:]) for branch in operation.params["branches"]]
            return [_joined(column) for column in zip(*branches, strict=True)]
        return [self._made(operation, sources)] * len(operation.outputs)

    def _scan(self, params: Mapping[str, Any], sources: list[Origin]) -> list[Origin]:
        return self._repeat(Graph(params["jaxpr"]), sources, params["num_consts"], params["num_carry"])

    def _repeat(self, body: Graph, sources: list[Origin], constants: int, carried: int | None) -> list[Origin]:
        """A loop's outputs: what it carries is followed until nothing is added to it."""
        end = len(sources) if carried is None else constants + carried
        fixed, carry, each = sources[:constants], sources[constants:end], sources[end:]
        while True:
            outputs = self.run(body, [*fixed, *carry, *each])
            after = [a.join(b) for a, b in zip(carry, outputs, strict=False)]
            if after == carry:
                return outputs
            carry = after

    def _made(self, operation: Operation, sources: list[Origin]) -> Origin:
        note = operation.note()
        if note is not None and note[0] == "layer":
            return Origin(frozenset({note[1]}))
        if note is not None and note[0] == "unfit":
            return Origin(frozenset({self._unfit[note[1]]}))
        together = _joined(sources)
        if operation.name == "stop_gradient":  # a frozen parameter is one
            return together._replace(makers=frozenset())
        bare = [source for source in sources if source.parameters]
        rank = min(together.rank, max((value.rank for value in operation.outputs), default=0))
        if operation.name in _PRODUCTS and bare:
            if together.makers or len(bare) < len(sources):
                return Origin(frozenset({_phrase(bare, operation)}))
            return together._replace(
                rank=max(value.rank for value in operation.outputs), traits=_traits(operation, sources)
            )
        is_open = together.makers and not any(isinstance(maker, str) for maker in together.makers)
        if is_open and any(source.rank > 1 for source in bare):
            return Origin(frozenset({_phrase(bare, operation)}))
        if operation.name == "reduce_sum" and "scaled" in together.traits:
            return Origin(frozenset({"a sum over a product with a vector of parameters"}))
        traits = _traits(operation, sources)
        if together.makers:
            return Origin(frozenset({COSINE}) if "unit" in traits else together.makers, traits=traits)
        return together._replace(rank=rank, traits=traits)


def _joined(origins: Iterable[Origin]) -> Origin:
    whole = _NOTHING
    for origin in origins:
        whole = whole.join(origin)
    return whole


def _has_gradient(value: Value) -> bool:
    """False for integers and booleans, such as a predicted class: no gradient passes them."""
    dtype = getattr(value.aval, "dtype", None)
    return dtype is None or bool(jnp.issubdtype(dtype, jnp.inexact))


def _phrase(bare: Sequence[Origin], operation: Operation) -> str:
    if any("unit" in origin.traits for origin in bare):
        return COSINE
    names = sorted(frozenset[str]().union(*(origin.parameters for origin in bare)))
    listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    how = {"dot_general": "a matrix product", "conv_general_dilated": "a convolution"}.get(
        operation.name, "an operation"
    )
    return f"{how} with {listed}, outside any layer that can be a head"


def _traits(operation: Operation, sources: list[Origin]) -> frozenset[str]:
    """What an operation makes of the traits of its inputs."""
    name, of = operation.name, [source.traits for source in sources]
    together = frozenset[str]().union(*of)
    squares = (
        name == "square"
        or (name == "integer_pow" and operation.params.get("y") == 2)
        or (name in ("mul", "dot_general") and operation.inputs[0] is operation.inputs[1])
    )
    if squares:
        return frozenset({"square"})
    if name in ("sqrt", "rsqrt"):
        return frozenset({"norm"} if "square" in together else ())
    if name in _MOVES:
        return together
    if name in ("mul", "div"):
        a, b = sources
        share = bool(a.makers & b.makers or a.parameters & b.parameters)
        if share and ("norm" in b.traits) != ("norm" in a.traits):
            return frozenset({"unit"})
        vector = any(one.rank == 1 and one.parameters and other.makers for one, other in ((a, b), (b, a)))
        return (together - {"unit", "scaled"}) | ({"scaled"} if vector else frozenset())
    return together & {"square", "norm"} if name in _SUMS else frozenset()


# --- what a layer computes --------------------------------------------------------------------------------------------


def flaw(jaxpr: Any, number: int, has_bias: bool) -> str | None:
    """Why a layer that was noted does not compute its input times its weight, plus its bias; None if it does.

    Args:
        jaxpr: in which the layer runs once.
        number: of the layer's call.
        has_bias: whether a bias was noted too.
    """
    found = next(_runs(jaxpr, number), None)
    return "it was not found in the trace" if found is None else _Layer(found, number).flaw(has_bias)


def _runs(jaxpr: Any, number: int) -> Iterator[Graph]:
    """The graphs, also inside loops, in which a layer runs."""
    graph = Graph(jaxpr)
    for operation in graph.operations:
        if operation.note() == ("layer", number):
            yield graph
        for body in jaxprs_in(operation.params) if operation.name in _LOOPS else ():
            yield from _runs(body, number)


class _Layer:
    """The operations that a layer's output comes from."""

    def __init__(self, graph: Graph, number: int) -> None:
        self._by = {value: operation for operation in graph.operations for value in operation.outputs}
        notes = {
            note[0]: operation.inputs[0]
            for operation in graph.operations
            if (note := operation.note()) is not None and note[1] == number and note[0] != "parameter"
        }
        self._output = notes["layer"]
        self._input, self._weight, self._bias = (notes.get(kind) for kind in ("input", "weight", "bias"))

    def flaw(self, has_bias: bool) -> str | None:
        output = self._source(self._output)
        operation = self._by.get(output)
        if self._is_product(output):
            return "its bias is not added to the product" if has_bias else None
        if operation is None or operation.name not in ("add", "add_any"):
            return (
                f"it does not end with a product of its input and its weight{'' if not has_bias else ', plus its bias'}"
            )
        for a, b in (operation.inputs, operation.inputs[::-1]):
            if self._is_product(self._source(a)):
                if self._bias is not None and self._same(b, self._bias, is_broadcast=True):
                    return None
                return "something else than its bias is added to the product" if has_bias else ADDED
        return "it computes more than the product of its input and its weight, plus its bias"

    def _is_product(self, value: Value) -> bool:
        operation = self._by.get(value)
        if operation is None or operation.name not in ("dot_general", "conv_general_dilated"):
            return False
        if operation.name == "conv_general_dilated" and not _is_pointwise(operation):
            return False
        a, b = operation.inputs
        assert self._input is not None
        assert self._weight is not None
        return any(self._same(x, self._input) and self._same(y, self._weight) for x, y in ((a, b), (b, a)))

    def _source(self, value: Value, is_broadcast: bool = False) -> Value:
        """What a value is a copy of, apart from shape and type."""
        while (operation := self._by.get(value)) is not None and operation.name in {*_MOVES, "stop_gradient"}:
            before = operation.inputs[0]
            grows = before.aval.size != value.aval.size and not is_broadcast
            if grows or not _has_gradient(before):
                break
            value = before
        return value

    def _same(self, a: Value, b: Value, is_broadcast: bool = False, depth: int = 8) -> bool:
        """Returns True if two values are equal apart from shape and type: one value, or computed twice in the same way."""
        a, b = self._source(a, is_broadcast), self._source(b, is_broadcast)
        if a is b or (a.literal is not None and a.literal == b.literal):
            return True
        one, other = self._by.get(a), self._by.get(b)
        if one is None or other is None or not depth or (one.name, len(one.inputs)) != (other.name, len(other.inputs)):
            return False
        is_alike = str(one.params) == str(other.params) and one.outputs.index(a) == other.outputs.index(b)
        return is_alike and all(
            x.aval.shape == y.aval.shape and self._same(x, y, is_broadcast, depth - 1)
            for x, y in zip(one.inputs, other.inputs, strict=True)
        )


ADDED = "something is added to the product of its input and its weight; if that is a bias, it was not given"


def _is_pointwise(convolution: Operation) -> bool:
    """Whether a convolution maps every position by itself, all in the same way."""
    params, kernel = convolution.params, convolution.inputs[1].aval.shape
    spatial = params["dimension_numbers"].rhs_spec[2:]
    return (
        all(kernel[axis] == 1 for axis in spatial)
        and set(params["window_strides"]) <= {1}
        and all(low == high == 0 for low, high in params["padding"])
        and params["feature_group_count"] == params["batch_group_count"] == 1
    )
