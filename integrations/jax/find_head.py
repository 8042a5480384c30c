"""Finds the classifier head of a JAX model: by dataflow, in an abstract trace of the loss or of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.jax.jaxpr_walk import BIAS_NOT_GIVEN, check_is_linear, enclosing_primitives, producers
from gwa_logging.integrations.jax.model_library import ModelLibrary, named_arrays
from gwa_logging.integrations.jax.sessions import FUSED_PATH, TAP_PATH, Discovery, LayerCall, fresh_trace
from gwa_logging.registry import import_integration

_LIBRARIES = {
    "flax.linen": ("flax", "linen", "Linen"),
    "flax.nnx": ("flax", "nnx", "NNX"),
    "equinox": ("equinox", "equinox", "Equinox"),
    "haiku": ("haiku", "haiku", "Haiku"),
    "keras": ("keras", "keras_model", "Keras"),
}
"""By the package of a model's class: the third party, the module here, and its class."""


def library_of(model: Any) -> ModelLibrary:
    """The library that a model is made with; plain `ModelLibrary` for a function."""
    packages = [base.__module__ for base in type(model).__mro__]
    for package, (third_party, module, name) in _LIBRARIES.items():
        if any(each == package or each.startswith(package + ".") for each in packages):
            library = import_integration(f"gwa_logging.integrations.jax.{module}", third_party, "jax")
            return getattr(library, name)(model)  # type: ignore[no-any-return]
    return ModelLibrary(model)


class Head(NamedTuple):
    """The call of the head, and where it is.

    Attributes:
        call: the call.
        is_inner: True if it is inside an inner function that is jitted, checkpointed or the like.
        is_jitted: True if the whole loss is one jitted function.
    """

    call: LayerCall
    is_inner: bool
    is_jitted: bool


class _Trace(NamedTuple):
    """An abstract trace.

    Attributes:
        jaxpr: with markers.
        discovery: the session that made the markers.
        what: what was traced: "the loss" or "the output".
        library: name of the model, for messages.
    """

    jaxpr: Any
    discovery: Discovery
    what: str
    library: str

    def candidates(self, excluded: LayerCall | None = None) -> list[str]:
        """Descriptions of the layers that can be watched, without repetitions."""
        refused = dict(self.discovery.refused)
        calls = (call for call in self.discovery.calls if call.path not in refused)
        return [line for line in dict.fromkeys(map(str, calls)) if line != str(excluded)]


def find_head(
    library: ModelLibrary,
    wanted: str | None,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    has_aux: bool,
    argnums: Any,
) -> Head:
    """Traces a loss once, abstractly, and finds the call of the head in it.

    Raises:
        HeadNotFoundError: the loss does not call the head exactly once, or the head is not a linear layer.
    """
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    trained = [args[n] for n in numbers if isinstance(n, int) and -len(args) <= n < len(args)]

    def value(*args: Any, **kwargs: Any) -> Any:
        return fun(*args, **kwargs)[0] if has_aux else fun(*args, **kwargs)

    return _choose_head(_trace(library, value, args, kwargs, "the loss", trained), wanted)


def _trace(
    library: ModelLibrary,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    what: str,
    trained: Any = (),
) -> _Trace:
    discovery = Discovery()
    args, kwargs, trained = (_on_device(each) for each in (tuple(args), kwargs, trained))

    def run() -> Any:
        discovery.parameters(named_arrays(trained))
        return library.run_without_effects(discovery, fun, args, kwargs)

    with fresh_trace():
        jaxpr = jax.make_jaxpr(run)()
    return _Trace(jaxpr, discovery, what, library.name)


def _on_device(tree: Any) -> Any:
    """Nested containers with JAX arrays instead of NumPy arrays, of which every use in a trace is another constant."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" else leaf,
        tree,
        is_leaf=lambda node: not isinstance(node, Mapping | list | tuple),
    )


def _choose_head(trace: _Trace, wanted: str | None) -> Head:
    calls, refused = trace.discovery.calls, dict(trace.discovery.refused)
    if not calls and not refused:
        raise HeadNotFoundError(
            f"{trace.what} does not run a linear layer of {trace.library}. Check that the loss calls the watched model, the "
            "one given to watch(), or, in a hand-written net, tap or linear_cross_entropy of gwa_logging.integrations.jax"
        )
    if wanted in refused:
        raise HeadNotFoundError(f"head={wanted!r}: {refused[wanted]}.", trace.candidates())
    paths = {wanted} if wanted else _nearest_paths(trace)
    numbers = [number for number, call in enumerate(calls) if call.path in paths]
    runs = enclosing_primitives(trace.jaxpr, numbers)  # more than calls, if an inner jit runs twice
    if len(numbers) == 1 and len(runs) <= 1:
        return _checked_head(trace, numbers[0], frozenset[str]().union(*runs))
    if not numbers and wanted:
        problem = f"head={wanted!r}: {trace.what} does not run a linear layer with this path."
    elif not numbers:
        problem = f"{trace.what} does not come from a linear layer of {trace.library}."
    elif len({calls[n].path for n in numbers}) == 1:
        times = max(len(numbers), len(runs))
        problem = f"{calls[numbers[0]].path!r} runs {times} times in {trace.what}; a head must run once."
    else:
        problem = f"{trace.what} comes from several linear layers: {', '.join(sorted(map(repr, paths)))}."
    raise HeadNotFoundError(problem, trace.candidates())


def _nearest_paths(trace: _Trace) -> set[str]:
    """The paths of the linear layers that the first output comes from.

    Raises:
        HeadNotFoundError: it also comes from something else.
    """
    discovery = trace.discovery
    unsupported = [f"{path!r} ({reason})" for path, reason in discovery.refused]
    nearest = producers(trace.jaxpr, discovery.names, unsupported)
    paths = {discovery.calls[producer].path for producer in nearest if isinstance(producer, int)}
    others = sorted(producer for producer in nearest if isinstance(producer, str))
    if not others:
        return paths
    raise HeadNotFoundError(
        f"{trace.what} does not come from one linear layer, but from {'; '.join([*map(repr, sorted(paths)), *others])}. "
        "Mark a product that is not a layer as the head with gwa_logging.integrations.jax.tap",
        trace.candidates(),
    )


def _checked_head(trace: _Trace, number: int, around: frozenset[str]) -> Head:
    """The head, after checking where it is called and what it computes."""
    call = trace.discovery.calls[number]
    if around & {"scan", "while"}:
        raise HeadNotFoundError(
            f"{call.path!r} runs in a loop (lax.scan, lax.map, fori_loop) inside {trace.what}, once for each part of the "
            "batch; a head must run once. Take value_and_grad of the loss of one part, and loop over that. If the loop saves "
            "the memory of the logits, use gwa_logging.integrations.jax.linear_cross_entropy instead"
        )
    problem = None if call.path == FUSED_PATH else check_is_linear(trace.jaxpr, number, call.has_bias)
    if problem is not None:
        raise HeadNotFoundError(_not_linear(call, problem), trace.candidates(excluded=call))
    primitives = [e.primitive.name for e in trace.jaxpr.eqns if e.primitive.name != "name"]
    return Head(call, is_inner=bool(around), is_jitted=primitives in (["jit"], ["pjit"]))


def _not_linear(call: LayerCall, problem: str) -> str:
    if call.path != TAP_PATH:
        return f"{call.path!r} is not a linear layer: {problem}"
    if problem == BIAS_NOT_GIVEN:
        return f"tap: {problem}; pass it: tap(logits, embeddings, weight, bias)"
    return (
        f"tap: {problem}; pass tap the logits, embeddings and weight of logits = embeddings @ weight + bias, before anything "
        "else is done to the logits"
    )


def describe(model: Any, wanted: Any = None, inputs: Iterable[Any] = ()) -> str:
    """What the head finder sees in a model that runs on example inputs, as a plain-text table.

    Args:
        model: the model.
        wanted: the dotted path of a head, or None.
        inputs: arrays that the model is called with; for Equinox, one sample.

    Returns:
        A line for each linear layer that runs, and a last line: which one is the head, or why there is none. In training the
        loss decides, which may use another output of the model.

    Raises:
        InvalidInputError: there are no inputs.
    """
    library, inputs = library_of(model), tuple(inputs)
    if not inputs:
        raise InvalidInputError(
            f"{library.name}: a JAX model's head is found by following its data, so an example input is needed: name a "
            "function that returns both, (model, input)"
        )
    fun, args = library.evaluation(inputs)
    trace = _trace(library, fun, args, {}, "the output")
    calls, refused = trace.discovery.calls, dict(trace.discovery.refused)
    try:
        head = _choose_head(trace, wanted).call
        chosen, verdict = head.path, f"head {head}: {'named by head=' if wanted else 'the output comes from it'}"
    except HeadNotFoundError as error:
        chosen, verdict = None, f"no head: {str(error).splitlines()[0]}"
    width = max((len(path) for path in (*refused, *(call.path for call in calls))), default=0)
    table = [
        f"{call.path.ljust(width)}  {call.features} -> {call.logits.shape[-1]}{'  HEAD' if call.path == chosen else ''}"
        for call in calls
        if call.path not in refused
    ] + [f"{path.ljust(width)}  refused: {reason}" for path, reason in refused.items()]
    return "\n".join([f"{library.name}: {len(table)} linear layers run", *table, verdict])
