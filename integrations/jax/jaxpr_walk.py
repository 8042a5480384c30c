"""Follows a loss back to the layer that made its logits, in the jaxpr of an abstract trace.

Three questions are answered from the markers in the jaxpr (see `jaxpr_graph`):

- `producers`: which layers do the logits come from? Only the nearest layer counts on every path. A product with a parameter
  that belongs to no layer (an einsum, a convolution, a tied embedding) ends the path as a layer would: everything before it
  is hidden.
- `check_is_linear`: does a layer compute input x weight + bias, and nothing else? The scores would be wrong otherwise.
- `enclosing_primitives`: is a layer called inside jit, a checkpoint or a loop?
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gwa_logging.integrations.jax.jaxpr_graph import LOOPS, Graph, Operation, Value, jaxprs_in, marker_name, open_jaxpr

COSINE = (
    "a normalised vector (a cosine head, or normalised logits): the output does not change with the length of the weight, so "
    "all scores would be zero"
)

BIAS_NOT_GIVEN = "something is added to the product of its input and its weight; if that is a bias, it was not given"

Producer = int | str
"""The number of a layer's call, or a phrase for an operation that made the logits but is no layer."""

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "scaled_matmul"}
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
"""Operations that change the place, shape or type of numbers, but not their values."""

_SUMS = {"add", "add_any", "sub", "mul", "div", "max", "reduce_sum", "reduce_max", "select_n"}

_NAMES = {"dot_general": "a matrix product", "conv_general_dilated": "a convolution"}


# --- which layers the logits come from --------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        producers: the nearest layers, and phrases for other operations that made it.
        parameters: the parameters that it comes from without a layer between; empty if there are producers.
        rank: largest number of dimensions, before broadcasting, of what was computed from these parameters.
        traits: "square": a sum of squares; "norm": the root of one; "unit": divided by its own norm; "scaled": a layer's
            output times a vector of parameters.
    """

    producers: frozenset[Producer] = frozenset()
    parameters: frozenset[str] = frozenset()
    rank: int = 0
    traits: frozenset[str] = frozenset()

    def join(self, other: "Origin") -> "Origin":
        """The origin of a value that comes from both."""
        return Origin(
            self.producers | other.producers,
            self.parameters | other.parameters,
            max(self.rank, other.rank),
            self.traits | other.traits,
        )


_NOTHING = Origin()


def producers(jaxpr: Any, parameters: Sequence[str], unsupported: Sequence[str]) -> frozenset[Producer]:
    """The nearest producers of the first output of a jaxpr.

    Args:
        jaxpr: of a loss, or of a model.
        parameters: names of the marked parameters, by number.
        unsupported: phrases for the layers that are marked as unsupported, by number.
    """
    graph = Graph(jaxpr)
    return _OriginTracker(parameters, unsupported).run(graph, [_NOTHING] * len(graph.inputs))[0].producers


class _OriginTracker:
    """Propagates origins from the inputs of a graph to its outputs."""

    def __init__(self, parameters: Sequence[str], unsupported: Sequence[str]) -> None:
        self._parameters = parameters
        self._unsupported = unsupported

    def run(self, graph: Graph, inputs: Sequence[Origin]) -> list[Origin]:
        """The origins of a graph's outputs, given those of its inputs."""
        declared = {
            operation.inputs[0]: Origin(
                parameters=frozenset({self._parameters[marker[1]]}), rank=operation.inputs[0].rank
            )
            for operation in graph.operations
            if (marker := operation.marker()) is not None and marker[0] == "parameter"
        }
        known = dict(zip(graph.inputs, inputs, strict=True)) | declared
        for operation in graph.operations:
            sources = [known.get(value, _NOTHING) for value in operation.inputs]
            for value, origin in zip(operation.outputs, self._output_origins(operation, sources), strict=True):
                known[value] = declared.get(value, origin if value.has_gradient else _NOTHING)
        return [known.get(value, _NOTHING) for value in graph.outputs]

    def _output_origins(self, operation: Operation, sources: list[Origin]) -> list[Origin]:
        params = operation.params
        if operation.name == "scan":
            return self._run_loop(Graph(params["jaxpr"]), sources, params["num_consts"], params["num_carry"])
        if operation.name == "while":
            skipped, constants = params["cond_nconsts"], params["body_nconsts"]
            return self._run_loop(Graph(params["body_jaxpr"]), sources[skipped:], constants, None)
        if operation.name == "cond":
            branches = [self.run(Graph(branch), sources[1:]) for branch in params["branches"]]
            return [_join_all(column) for column in zip(*branches, strict=True)]
        return [self._operation_origin(operation, sources)] * len(operation.outputs)

    def _run_loop(self, body: Graph, sources: list[Origin], constants: int, carried: int | None) -> list[Origin]:
        """The outputs of a loop: the body is repeated until the origins of its carry no longer change."""
        end = len(sources) if carried is None else constants + carried
        fixed, carry, scanned = sources[:constants], sources[constants:end], sources[end:]
        while True:
            outputs = self.run(body, [*fixed, *carry, *scanned])
            joined = [a.join(b) for a, b in zip(carry, outputs, strict=False)]
            if joined == carry:
                return outputs
            carry = joined

    def _operation_origin(self, operation: Operation, sources: list[Origin]) -> Origin:
        kind, number = operation.marker() or ("", 0)
        if kind == "layer":
            return Origin(frozenset({number}))
        if kind == "unsupported":
            return Origin(frozenset({self._unsupported[number]}))
        joined = _join_all(sources)
        if operation.name == "stop_gradient":  # a frozen parameter is one
            return joined._replace(producers=frozenset())
        bare = [source for source in sources if source.parameters]
        output_rank = max((value.rank for value in operation.outputs), default=0)
        if operation.name in _PRODUCTS and bare:
            if joined.producers or len(bare) < len(sources):
                return Origin(frozenset({_describe_operation(bare, operation)}))
            return joined._replace(rank=output_rank, traits=_traits(operation, sources))
        comes_from_layers = joined.producers and all(isinstance(producer, int) for producer in joined.producers)
        if comes_from_layers and any(source.rank > 1 for source in bare):
            return Origin(frozenset({_describe_operation(bare, operation)}))
        if operation.name == "reduce_sum" and "scaled" in joined.traits:
            return Origin(frozenset({"a sum over a product with a vector of parameters"}))
        traits = _traits(operation, sources)
        if joined.producers:
            return Origin(frozenset({COSINE}) if "unit" in traits else joined.producers, traits=traits)
        return joined._replace(rank=min(joined.rank, output_rank), traits=traits)


def _join_all(origins: Iterable[Origin]) -> Origin:
    result = _NOTHING
    for origin in origins:
        result = result.join(origin)
    return result


def _describe_operation(bare: Sequence[Origin], operation: Operation) -> str:
    if any("unit" in origin.traits for origin in bare):
        return COSINE
    names = sorted(frozenset[str]().union(*(origin.parameters for origin in bare)))
    listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"{_NAMES.get(operation.name, 'an operation')} with {listed}, outside any layer that can be a head"


def _traits(operation: Operation, sources: list[Origin]) -> frozenset[str]:
    """The traits of an operation's output."""
    name = operation.name
    joined = frozenset[str]().union(*(source.traits for source in sources))
    is_square = (
        name == "square"
        or (name == "integer_pow" and operation.params.get("y") == 2)
        or (name in ("mul", "dot_general") and operation.inputs[0] is operation.inputs[1])
    )
    if is_square:
        return frozenset({"square"})
    if name in ("sqrt", "rsqrt"):
        return frozenset({"norm"} if "square" in joined else ())
    if name in _MOVES:
        return joined
    if name in ("mul", "div"):
        a, b = sources
        is_same = bool(a.producers & b.producers or a.parameters & b.parameters)
        if is_same and ("norm" in b.traits) != ("norm" in a.traits):
            return frozenset({"unit"})
        is_scaled = any(one.rank == 1 and one.parameters and other.producers for one, other in ((a, b), (b, a)))
        return (joined - {"unit", "scaled"}) | ({"scaled"} if is_scaled else frozenset())
    return joined & {"square", "norm"} if name in _SUMS else frozenset()


# --- what a layer computes --------------------------------------------------------------------------------------------


def check_is_linear(jaxpr: Any, number: int, has_bias: bool) -> str | None:
    """Checks that a marked layer computes input x weight + bias, and nothing else.

    Args:
        jaxpr: in which the layer is called once.
        number: of the layer's call.
        has_bias: True if a bias was marked too.

    Returns:
        What is wrong with the layer; None if it is linear.
    """
    for graph in _graphs(jaxpr):
        if any(operation.marker() == ("layer", number) for operation in graph.operations):
            return _LayerBody(graph, number).problem(has_bias)
    return "it was not found in the trace"


def _graphs(jaxpr: Any) -> Iterator[Graph]:
    """The graph of a jaxpr and those of the loops in it."""
    graph = Graph(jaxpr)
    yield graph
    for operation in graph.operations:
        for body in jaxprs_in(operation.params) if operation.name in LOOPS else ():
            yield from _graphs(body)


class _LayerBody:
    """The operations between the input of a layer and its output."""

    def __init__(self, graph: Graph, number: int) -> None:
        self._made_by = {value: operation for operation in graph.operations for value in operation.outputs}
        marked = {
            marker[0]: operation.inputs[0]
            for operation in graph.operations
            if (marker := operation.marker()) is not None and marker[1] == number and marker[0] != "parameter"
        }
        self._output, self._input, self._weight = marked["layer"], marked["input"], marked["weight"]
        self._bias = marked.get("bias")

    def problem(self, has_bias: bool) -> str | None:
        output = self._uncopied(self._output)
        operation = self._made_by.get(output)
        if self._is_product(output):
            return "its bias is not added to the product" if has_bias else None
        if operation is None or operation.name not in ("add", "add_any"):
            return f"it does not end with a product of its input and its weight{', plus its bias' if has_bias else ''}"
        for a, b in (operation.inputs, operation.inputs[::-1]):
            if self._is_product(self._uncopied(a)):
                if self._bias is not None and self._is_same(b, self._bias, is_broadcast=True):
                    return None
                return "something else than its bias is added to the product" if has_bias else BIAS_NOT_GIVEN
        return "it computes more than the product of its input and its weight, plus its bias"

    def _is_product(self, value: Value) -> bool:
        operation = self._made_by.get(value)
        if operation is None or operation.name not in ("dot_general", "conv_general_dilated"):
            return False
        if operation.name == "conv_general_dilated" and not _is_pointwise(operation):
            return False
        a, b = operation.inputs
        return any(self._is_same(x, self._input) and self._is_same(y, self._weight) for x, y in ((a, b), (b, a)))

    def _uncopied(self, value: Value, is_broadcast: bool = False) -> Value:
        """The value that this one is a copy of, apart from shape and type."""
        while (operation := self._made_by.get(value)) is not None and operation.name in {*_MOVES, "stop_gradient"}:
            source = operation.inputs[0]
            is_repeated = source.aval.size != value.aval.size and not is_broadcast
            if is_repeated or not source.has_gradient:
                break
            value = source
        return value

    def _is_same(self, a: Value, b: Value, is_broadcast: bool = False, depth: int = 8) -> bool:
        """Returns True if two values are equal apart from shape and type: one value, or computed twice in the same way."""
        a, b = self._uncopied(a, is_broadcast), self._uncopied(b, is_broadcast)
        if a is b or (a.literal is not None and a.literal == b.literal):
            return True
        one, other = self._made_by.get(a), self._made_by.get(b)
        if one is None or other is None or not depth or (one.name, len(one.inputs)) != (other.name, len(other.inputs)):
            return False
        is_alike = str(one.params) == str(other.params) and one.outputs.index(a) == other.outputs.index(b)
        return is_alike and all(
            x.aval.shape == y.aval.shape and self._is_same(x, y, is_broadcast, depth - 1)
            for x, y in zip(one.inputs, other.inputs, strict=True)
        )


def _is_pointwise(convolution: Operation) -> bool:
    """Returns True if a convolution maps every position separately, and all in the same way."""
    params, kernel = convolution.params, convolution.inputs[1].aval.shape
    spatial = params["dimension_numbers"].rhs_spec[2:]
    return (
        all(kernel[axis] == 1 for axis in spatial)
        and set(params["window_strides"]) <= {1}
        and all(low == high == 0 for low, high in params["padding"])
        and params["feature_group_count"] == params["batch_group_count"] == 1
    )


# --- where a layer is called ------------------------------------------------------------------------------------------


def enclosing_primitives(jaxpr: Any, numbers: Collection[int]) -> list[frozenset[str]]:
    """For each call of the layers with these numbers: the primitives that it is nested in, such as jit or scan."""
    names = {marker_name("layer", number) for number in numbers}
    calls = []
    for equation in open_jaxpr(jaxpr).eqns:
        if equation.primitive.name == "name" and equation.params["name"] in names:
            calls.append(frozenset[str]())
        outer = {equation.primitive.name} - {"custom_vmap_call"}  # this one is around every marker of a layer
        for body in jaxprs_in(equation.params):
            calls.extend(inner | outer for inner in enclosing_primitives(body, numbers))
    return calls
