"""Finds the classifier head of a JAX model: by dataflow, in an abstract trace of the loss or of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.jax.jaxpr_walk import ADDED, flaw, makers
from gwa_logging.integrations.jax.model_library import Library, named
from gwa_logging.integrations.jax.probe import HAND_WRITTEN, Call, Discovery, apart, places
from gwa_logging.registry import import_integration

_LIBRARIES = {"flax.linen": "Linen", "flax.nnx": "NNX", "equinox": "Equinox", "haiku": "Haiku", "keras": "Keras"}


def library_of(model: Any) -> Library:
    """The room of the library that a model is made with; hand-written if it is a function."""
    homes = [base.__module__ for base in type(model).__mro__]
    for home, name in _LIBRARIES.items():
        if any(module == home or module.startswith(home + ".") for module in homes):
            package, _, part = home.rpartition(".")
            room = import_integration(f"gwa_logging.integrations.jax.{part}", package or part, "jax")
            return getattr(room, name)(model)  # type: ignore[no-any-return]
    return Library(model)


class Head(NamedTuple):
    """The head's call, and where it is made.

    Attributes:
        call: what runs.
        is_inner: an inner function makes it, which is jitted, checkpointed or the like.
        is_jitted: everything that was traced is one jitted function.
    """

    call: Call
    is_inner: bool
    is_jitted: bool


def find_head(
    library: Library,
    wanted: str | None,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    has_aux: bool,
    argnums: Any,
) -> Head:
    """Traces a loss once, abstractly, and finds the head's call in it.

    Raises:
        HeadNotFoundError: the loss does not run the head once, or the head is no linear layer.
    """
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    trained = [args[n] for n in numbers if isinstance(n, int) and -len(args) <= n < len(args)]
    value = lambda *a, **k: fun(*a, **k)[0] if has_aux else fun(*a, **k)  # noqa: E731
    return _choose(*_trace(library, value, args, kwargs, trained), wanted, "the loss", library.name)


def _trace(
    library: Library, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], trained: Any = ()
) -> tuple[Any, Discovery]:
    discovery = Discovery()
    args, kwargs, trained = (_on_device(each) for each in (tuple(args), kwargs, trained))

    def run() -> Any:
        discovery.parameters(named(trained))
        return library.run_apart(discovery, fun, args, kwargs)

    with apart():
        jaxpr = jax.make_jaxpr(run)()
    return jaxpr, discovery


def _on_device(tree: Any) -> Any:
    """Nested containers with arrays of JAX instead of NumPy: in a trace each use of a NumPy array is another constant."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" else leaf,
        tree,
        is_leaf=lambda node: not isinstance(node, Mapping | list | tuple),
    )


def _choose(jaxpr: Any, discovery: Discovery, wanted: str | None, what: str, name: str) -> Head:
    calls, refused = discovery.calls, dict(discovery.refused)
    if not calls and not refused:
        raise HeadNotFoundError(
            f"{what} does not run a linear layer of {name}. Check that the loss calls the watched "
            "model (the very one given to watch()), or, in a hand-written net, gwa_logging.integrations.jax.tap"
        )
    lines = [str(call) for call in dict.fromkeys(calls) if call.path not in refused]
    if wanted in refused:
        raise HeadNotFoundError(f"head={wanted!r}: {refused[wanted]}.", lines)
    paths = {wanted} if wanted else _nearest(jaxpr, discovery, what, lines)
    found = [number for number, call in enumerate(calls) if call.path in paths]
    runs = places(jaxpr.jaxpr, found)  # more than calls, if an inner jit runs twice
    if len(found) == 1 and len(runs) <= 1:
        return _head(jaxpr, calls[found[0]], found[0], runs, what, lines)
    if not found:
        problem = (
            f"head={wanted!r}: {what} runs no such layer of {name}."
            if wanted
            else f"{what} does not come from a linear layer of {name}."
        )
    elif len({calls[n].path for n in found}) == 1:
        problem = f"{calls[found[0]].path!r} runs {max(len(found), len(runs))} times in {what}; a head must run once."
    else:
        problem = f"{what} comes from several linear layers: {', '.join(sorted(map(repr, paths)))}."
    raise HeadNotFoundError(problem, lines)


def _nearest(jaxpr: Any, discovery: Discovery, what: str, lines: Sequence[str]) -> set[str]:
    """The paths of the linear layers that the first output of a jaxpr comes from, if it comes from nothing else."""
    unfit = [f"{path!r} ({reason})" for path, reason in discovery.refused]
    nearest = makers(jaxpr, discovery.names, unfit)
    paths = {discovery.calls[maker].path for maker in nearest if isinstance(maker, int)}
    others = sorted(maker for maker in nearest if isinstance(maker, str))
    if not others:
        return paths
    raise HeadNotFoundError(
        f"{what} does not come from one linear layer, but from {'; '.join([*map(repr, sorted(paths)), *others])}. "
        "A product of your own is marked as the head with gwa_logging.integrations.jax.tap",
        lines,
    )


def _head(jaxpr: Any, call: Call, number: int, runs: list[frozenset[str]], what: str, lines: Sequence[str]) -> Head:
    around = frozenset[str]().union(*runs)
    if around & {"scan", "while"}:
        raise HeadNotFoundError(
            f"{call.path!r} runs in a loop (lax.scan, lax.map, fori_loop) inside of {what}, once for each part "
            "of the batch; a head must run once. Take value_and_grad of the loss of one part, and loop over that"
        )
    problem = flaw(jaxpr, number, call.has_bias)
    if problem is not None:
        raise HeadNotFoundError(_flawed(call, problem), [line for line in lines if line != str(call)])
    primitives = [e.primitive.name for e in jaxpr.eqns if e.primitive.name != "name"]
    return Head(call, bool(around), primitives in (["jit"], ["pjit"]))


def _flawed(call: Call, problem: str) -> str:
    if call.path != HAND_WRITTEN:
        return f"{call.path!r} is no linear layer: {problem}"
    remedy = (
        "pass it: tap(logits, embeddings, weight, bias)"
        if problem == ADDED
        else (
            "give tap the very logits, embeddings and weight of logits = embeddings @ weight + bias, before anything else is "
            "done to the logits"
        )
    )
    return f"tap: {problem}; {remedy}"


def describe(model: Any, wanted: Any = None, inputs: Iterable[Any] = ()) -> str:
    """The finder's view of a model that runs on example inputs, as a plain-text table.

    Args:
        model: the model.
        wanted: the dotted path of a head, or None.
        inputs: what the model is called with, arrays; for Equinox, one sample.

    Returns:
        A line for each linear layer that runs, and a last line that says which one is the head, or why there is none. The loss
        decides in the end: it may follow another output.

    Raises:
        InvalidInputError: there are no inputs.
    """
    library, inputs = library_of(model), tuple(inputs)
    if not inputs:
        raise InvalidInputError(
            f"{library.name}: a JAX model's head is found by following its data, so an example input is needed: name a "
            "function that returns both, (model, input)"
        )
    fun, args = library.forward(inputs)
    jaxpr, discovery = _trace(library, fun, args, {})
    calls, refused = discovery.calls, dict(discovery.refused)
    try:
        head = _choose(jaxpr, discovery, wanted, "the output", library.name).call
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
