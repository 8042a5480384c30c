"""Finds the classifier head of a JAX model: by dataflow, in an abstract trace of the loss or of the model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from gwa_logging.errors import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.jax.library import Library
from gwa_logging.integrations.jax.probe import Call, Discovery, apart, makers, places
from gwa_logging.registry import import_room

_LIBRARIES = {"flax.linen": "Linen", "flax.nnx": "NNX", "equinox": "Equinox", "haiku": "Haiku", "keras": "Keras"}


def library_of(model: Any) -> Library:
    """The room of the library that a model is made with; hand-written if it is a function."""
    homes = [base.__module__ for base in type(model).__mro__]
    for home, name in _LIBRARIES.items():
        if any(module == home or module.startswith(home + ".") for module in homes):
            package, _, part = home.rpartition(".")
            room = import_room(f"gwa_logging.integrations.jax.{part}", package or part, "jax")
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
) -> Head:
    """Traces a loss once, abstractly, and finds the head's call in it.

    Raises:
        HeadNotFoundError: the loss does not run the head once.
    """
    jaxpr, calls = _trace(library, lambda *a, **k: fun(*a, **k)[0] if has_aux else fun(*a, **k), args, kwargs)
    return _choose(jaxpr, calls, wanted, "the loss", library.name)


def _trace(
    library: Library, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, list[Call]]:
    discovery = Discovery()
    with apart():
        jaxpr = jax.make_jaxpr(lambda: library.run_apart(discovery, fun, args, kwargs))()
    return jaxpr, discovery.calls


def _choose(jaxpr: Any, calls: list[Call], wanted: str | None, what: str, name: str) -> Head:
    if not calls:
        raise HeadNotFoundError(
            f"{what} does not run a linear layer of {name}. Check that the loss calls the watched "
            "model (the very one given to watch()), or, in a hand-written net, gwa_logging.integrations.jax.tap"
        )
    paths = {wanted} if wanted else makers(jaxpr)
    found = [call for call in calls if call.path in paths]
    runs = places(jaxpr.jaxpr, found[0].path) if found else []  # more than calls, if an inner jit runs twice
    if len(found) == 1 and len(runs) <= 1:
        around = frozenset[str]().union(*runs)
        if around & {"scan", "while"}:
            raise HeadNotFoundError(
                f"{found[0].path!r} runs in a loop (lax.scan, lax.map, fori_loop) inside of {what}, once for each part "
                "of the batch; a head must run once. Take value_and_grad of the loss of one part, and loop over that"
            )
        primitives = [equation.primitive.name for equation in jaxpr.eqns]
        return Head(found[0], bool(around), primitives in (["jit"], ["pjit"]))
    if not found:
        problem = (
            f"head={wanted!r}: {what} runs no such layer of {name}."
            if wanted
            else f"{what} does not come from a linear layer of {name}."
        )
    elif len({call.path for call in found}) == 1:
        problem = f"{found[0].path!r} runs {max(len(found), len(runs))} times in {what}; a head must run once."
    else:
        problem = f"{what} comes from several linear layers: {', '.join(sorted(repr(c.path) for c in found))}."
    raise HeadNotFoundError(problem, dict.fromkeys(map(str, calls)))


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
    jaxpr, calls = _trace(library, fun, args, {})
    try:
        head = _choose(jaxpr, calls, wanted, "the output", library.name).call
        chosen, verdict = head.path, f"head {head}: {'named by head=' if wanted else 'the output comes from it'}"
    except HeadNotFoundError as error:
        chosen, verdict = None, f"no head: {str(error).splitlines()[0]}"
    width = max((len(call.path) for call in calls), default=0)
    table = [
        f"{call.path.ljust(width)}  {call.features} -> {call.logits.shape[-1]}{'  HEAD' if call.path == chosen else ''}"
        for call in calls
    ]
    return "\n".join([f"{library.name}: {len(calls)} linear layers run", *table, verdict])
