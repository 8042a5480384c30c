"""Every model library, every loss and every way of training in JAX, against the gradient of each sample's own loss.

The score of a sample is the cosine between its negative gradient and the head's weight. So the oracle is `jax.vmap` of
`jax.grad` of the user's own loss, by the head's weight. Where samples interact before the head, as in batch normalisation, each
sample gets its own copy of the weight. Where numbers are rounded to 16 bits, it is `alignment_scores` on the tensors
as they were in the pass.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax import Array

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError, Monitor, alignment_scores
from gwa_logging.integrations.jax import AlignmentState, tap
from tests.jax.tiers import tiered

N, INPUTS, D, C = 24, 8, 12, 5
WIDTH = {"narrow": (D, C), "wide": (4, C)}
Loss = Callable[..., Array]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


# --- model libraries --------------------------------------------------------------------------------------------------


class Net(NamedTuple):
    """What is watched, what the loss is differentiated by, and how to read it."""

    model: Any
    params: Any
    logits: Callable[[Any, Array], Array]
    weight: Callable[[Any], Array]
    """The head's weight, of the parameters or of their gradient."""
    features: Callable[[Any, Array], Array] | None = None
    jit: Callable[..., Any] = jax.jit
    value_and_grad: Callable[..., Any] = jax.value_and_grad
    pure: Callable[[Any], tuple[Any, Callable[[Any], Any]]] = lambda params: (params, lambda p: p)
    """Returns the parameters as a pytree, and a function from such a tree to the loss's first argument."""


def with_biases(params: Any) -> Any:
    """Adds biases: Flax and Haiku start with zeros, which would hide an error in how a bias is treated."""
    return jax.tree.map(lambda p: p + jnp.linspace(-0.5, 0.7, p.size) if p.ndim == 1 else p, params)


class Compact(linen.Module):
    features: int = D
    classes: int = C

    @linen.compact
    def __call__(self, x: Array) -> Array:
        h = jnp.tanh(linen.Dense(self.features, name="body")(x))
        return linen.Dense(self.classes, name="head")(h)


class Setup(linen.Module):
    features: int = D
    classes: int = C

    def setup(self) -> None:
        self.body, self.head = linen.Dense(self.features), linen.Dense(self.classes)

    def __call__(self, x: Array) -> Array:
        return self.head(jnp.tanh(self.body(x)))


def of_linen(kind: type[linen.Module], features: int, classes: int) -> Net:
    model = kind(features, classes)

    def embed(p: Any, x: Array) -> Array:
        return jnp.tanh(x @ p["params"]["body"]["kernel"] + p["params"]["body"]["bias"])

    params = with_biases(model.init(jax.random.key(0), jnp.zeros((1, INPUTS))))
    return Net(model, params, model.apply, lambda p: p["params"]["head"]["kernel"], embed)


class Nnx(nnx.Module):
    def __init__(self, features: int, classes: int, rngs: nnx.Rngs) -> None:
        self.body, self.head = nnx.Linear(INPUTS, features, rngs=rngs), nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(jnp.tanh(self.body(x)))


def split(model: nnx.Module) -> tuple[Any, Callable[[Any], Any]]:
    graph, state = nnx.split(model)
    return state, lambda state: nnx.merge(graph, state)


def of_nnx(features: int, classes: int) -> Net:
    model = Nnx(features, classes, nnx.Rngs(0))
    nnx.update(model, with_biases(nnx.state(model)))
    return Net(
        model,
        model,
        lambda m, x: m(x),
        lambda p: p["head"]["kernel"][...],
        jit=nnx.jit,
        value_and_grad=nnx.value_and_grad,
        pure=split,
    )


class PerSample(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, features: int, classes: int, key: Array) -> None:
        a, b = jax.random.split(key)
        self.body, self.head = eqx.nn.Linear(INPUTS, features, key=a), eqx.nn.Linear(features, classes, key=b)

    def __call__(self, x: Array) -> Array:
        return self.head(jnp.tanh(self.body(x)))


class Batched(PerSample):
    def __call__(self, x: Array) -> Array:
        return jax.vmap(self.head)(jnp.tanh(jax.vmap(self.body)(x)))


def of_equinox(kind: type[PerSample], features: int, classes: int) -> Net:
    model = kind(features, classes, jax.random.key(0))
    return Net(
        model,
        model,
        lambda m, x: m(x) if kind is Batched else jax.vmap(m)(x),
        lambda m: m.head.weight,
        lambda m, x: jnp.tanh(x @ m.body.weight.T + m.body.bias),
        jit=eqx.filter_jit,
        value_and_grad=eqx.filter_value_and_grad,
    )


def of_haiku(features: int, classes: int) -> Net:
    def forward(x: Array) -> Array:
        return hk.Linear(classes, name="head")(jnp.tanh(hk.Linear(features, name="body")(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = with_biases(model.init(jax.random.key(0), jnp.zeros((1, INPUTS))))
    return Net(model, params, model.apply, lambda p: p["head"]["w"])


def of_hand(features: int, classes: int) -> Net:
    """Its weight is [C, D], as in PyTorch."""

    def forward(params: Any, x: Array) -> Array:
        h = jnp.tanh(x @ params["body"])
        return tap(h @ params["head"].T + params["bias"], h, params["head"], params["bias"])

    a, b, c = jax.random.split(jax.random.key(0), 3)
    params = {
        "body": jax.random.normal(a, (INPUTS, features)) / 3,
        "head": jax.random.normal(b, (classes, features)) / 3,
        "bias": jax.random.normal(c, (classes,)),
    }
    return Net(forward, params, forward, lambda p: p["head"])


LIBRARIES: dict[str, Callable[[int, int], Net]] = {
    "Linen, compact": partial(of_linen, Compact),
    "Linen, setup": partial(of_linen, Setup),
    "NNX": of_nnx,
    "Equinox, jax.vmap(model)": partial(of_equinox, PerSample),
    "Equinox, vmap inside the model": partial(of_equinox, Batched),
    "Haiku": of_haiku,
    "a function with tap": of_hand,
}
LINEN, EQUINOX, TAP = "Linen, compact", "Equinox, jax.vmap(model)", "a function with tap"
library_of = pytest.mark.parametrize("library", LIBRARIES)

HEADS = [each for each in product(LIBRARIES, WIDTH) if each != (TAP, "wide")]
"""All libraries share the form for wide heads, which a function with tap never takes."""

ONE_OF_EACH_LIBRARY = {
    *((LINEN, "narrow"), ("Linen, setup", "narrow"), ("NNX", "wide"), ("Haiku", "narrow"), (TAP, "narrow")),
    *((EQUINOX, "wide"), ("Equinox, vmap inside the model", "wide")),
}
OTHER_WIDTHS = {each for each in HEADS if each not in ONE_OF_EACH_LIBRARY} | {(TAP, "narrow")}
"""Also one of each library, with the other width where there is one."""


def one_by_one(net: Net, loss: Loss, x: Array, y: Array, params: Any = None) -> np.ndarray:
    """The oracle: the score of each sample from the gradient of its own loss."""
    tree, whole = net.pure(net.params if params is None else params)
    weight = net.weight(tree)

    def score(x: Array, y: Array) -> Array:
        gradient = net.weight(jax.grad(lambda p: loss(whole(p), x[None], y[None]))(tree))
        return -jnp.sum(gradient * weight) / jnp.linalg.norm(gradient) / jnp.linalg.norm(weight)

    return np.asarray(jax.jit(jax.vmap(score))(x, y))


def by_copies(loss: Callable[[Array], Array], h: Array, kernel: Array, bias: Array) -> np.ndarray:
    """The oracle where samples interact before the head: the gradient by a copy of the kernel [D, C] for each of them."""
    copies = jnp.broadcast_to(kernel, (len(h), *kernel.shape))
    gradients = jax.jit(jax.grad(lambda copies: loss(jnp.einsum("bd,bdc->bc", h, copies) + bias)))(copies)
    sizes = jnp.linalg.norm(gradients.reshape(len(h), -1), axis=1) * jnp.linalg.norm(kernel)
    return np.asarray(-jnp.sum(gradients * kernel, axis=(1, 2)) / sizes)


def data(n: int = N, classes: int = C) -> tuple[Array, Array]:
    return jax.random.normal(jax.random.key(1), (n, INPUTS)), jax.random.randint(jax.random.key(2), (n,), 0, classes)


def assert_identical(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# --- losses -----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A loss of logits and targets, and the same in PyTorch."""

    loss: Loss
    torch: Callable[..., Any]
    y: np.ndarray
    classes: int = C


random = np.random.default_rng(0)
labels = random.integers(0, C, N).astype(np.int32)
others = random.integers(0, C, N)
shares = np.linspace(0, 1, N)[:, None]
soft = random.dirichlet(np.full(C, 0.5), N).astype(np.float32)
mixed = (shares * np.eye(C)[labels] + (1 - shares) * np.eye(C)[others]).astype(np.float32)
ignored = np.where(np.arange(N) % 5 == 0, -100, labels).astype(np.int32)
class_weights = np.array([0.2, 1.0, 3.0, 0.5, 2.0], np.float32)


def smoothed(z: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, C), 0.1)).mean()


def weighted(z: Array, y: Array) -> Array:
    w = jnp.asarray(class_weights)[y]
    return (cross_entropy(z, y) * w).sum() / w.sum()


def focal(z: Array, y: Array) -> Array:
    log_p = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)
    return (-((1 - jnp.exp(log_p)) ** 2) * log_p).mean()


def without_ignored(z: Array, y: Array) -> Array:
    w = (y >= 0).astype(jnp.float32)
    return (cross_entropy(z, jnp.maximum(y, 0)) * w).sum() / jnp.maximum(w.sum(), 1)


def torch_focal(z: Any, y: Any) -> Any:
    log_p = z.log_softmax(-1).gather(1, y[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def in_torch(name: str, **options: Any) -> Callable[..., Any]:
    def loss(z: Any, y: Any) -> Any:
        import torch

        given = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
        return getattr(torch.nn.functional, name)(z, y, **given)

    return loss


ce, bce = in_torch("cross_entropy"), in_torch("binary_cross_entropy_with_logits")
TASKS = {
    "cross-entropy, mean": Task(lambda z, y: cross_entropy(z, y).mean(), ce, labels),
    "cross-entropy, sum": Task(
        lambda z, y: cross_entropy(z, y).sum(), in_torch("cross_entropy", reduction="sum"), labels
    ),
    "label smoothing": Task(smoothed, in_torch("cross_entropy", label_smoothing=0.1), labels),
    "soft labels": Task(lambda z, y: optax.softmax_cross_entropy(z, y).mean(), ce, soft),
    "mixup": Task(lambda z, y: optax.softmax_cross_entropy(z, y).mean(), ce, mixed),
    "class weights": Task(weighted, in_torch("cross_entropy", weight=class_weights), labels),
    "BCE with logits, multi-label": Task(
        lambda z, y: optax.sigmoid_binary_cross_entropy(z, y).mean(), bce, (soft > 0.15).astype(np.float32)
    ),
    "focal": Task(focal, torch_focal, labels),
    "one logit, binary cross-entropy": Task(
        lambda z, y: optax.sigmoid_binary_cross_entropy(z[:, 0], y).mean(),
        lambda z, y: bce(z[:, 0], y),
        (labels % 2).astype(np.float32),
        classes=1,
    ),
    "ignored samples": Task(without_ignored, ce, ignored),
}


BASIC_TASKS = ("cross-entropy, mean", "ignored samples")
FAST_TASKS = {(LINEN, "narrow"): tuple(TASKS), (EQUINOX, "wide"): BASIC_TASKS}
"""The tasks of a head in the fast tier. They are compiled together, and so are its other ones."""


def task_loss(net: Net, task: str) -> Loss:
    return lambda params, x, y: TASKS[task].loss(net.logits(params, x), y)


@lru_cache(maxsize=2)
def steps_of(library: str, width: str, classes: int, tasks: tuple[str, ...]) -> tuple[Net, Any, Any]:
    """The steps with several losses of one head, watched and plain: two compilations for all of them."""
    net, (x, _) = LIBRARIES[library](WIDTH[width][0], classes), data()
    tree, whole = net.pure(net.params)
    ys = {name: jnp.asarray(TASKS[name].y) for name in tasks if TASKS[name].classes == classes}

    def every(value_and_grad: Callable[..., Any]) -> Any:
        steps = {name: value_and_grad(task_loss(net, name)) for name in ys}
        return jax.jit(lambda tree, ys: {name: steps[name](whole(tree), x, y) for name, y in ys.items()})(tree, ys)

    with gwa_logging.watch(net.model) as monitor:
        return net, every(monitor.value_and_grad), every(net.value_and_grad)


@pytest.mark.parametrize(
    ("library", "width", "task", "tasks"),
    [
        *((*head, task, tasks) for head, tasks in FAST_TASKS.items() for task in tasks),
        *(
            pytest.param(*head, task, tuple(TASKS), marks=pytest.mark.slow)
            for head in HEADS
            for task in TASKS
            if task not in FAST_TASKS.get(head, ())
        ),
    ],
)
def test_a_loss_is_scored_by_each_samples_gradient_and_nothing_else_changes(library, width, task, tasks):
    net, watched, plain = steps_of(library, width, TASKS[task].classes, tasks)
    (value, scores), grads = watched[task]
    want = one_by_one(net, task_loss(net, task), data()[0], jnp.asarray(TASKS[task].y))
    assert np.isnan(want).sum() == (5 if task == "ignored samples" else 0)
    np.testing.assert_allclose(scores, want, atol=1e-6)
    assert_identical((value, grads), plain[task])


@tiered("library, width", HEADS, fast=ONE_OF_EACH_LIBRARY)
@pytest.mark.usefixtures("fully_optimised")
def test_results_are_bit_identical_to_the_plain_step_when_xla_optimises_fully(library, width):
    net, (x, y) = LIBRARIES[library](*WIDTH[width]), data()
    with gwa_logging.watch(net.model) as monitor:
        (value, scores), grads = net.jit(monitor.value_and_grad(loss_of(net)))(net.params, x, y)
        plain = net.jit(net.value_and_grad(loss_of(net)))(net.params, x, y)
    np.testing.assert_allclose(scores, one_by_one(net, loss_of(net), x, y), atol=1e-6)
    assert_identical((value, grads), plain)


@tiered(
    "task, width",
    [*((task, "narrow") for task in TASKS), ("cross-entropy, mean", "wide"), ("ignored samples", "wide")],
    fast=[
        *((task, "narrow") for task in ("cross-entropy, mean", "label smoothing", "one logit, binary cross-entropy")),
        ("ignored samples", "wide"),
    ],
)
def test_pytorch_has_the_same_scores_for_the_same_weights_and_batch(width, task):
    import torch

    from tests.torch.test_probe import Recorder

    features, classes = WIDTH[width][0], TASKS[task].classes
    net, (x, _), y = of_linen(Compact, features, classes), data(), TASKS[task].y
    with gwa_logging.watch(net.model) as monitor:
        step = monitor.value_and_grad(lambda p, x, y: TASKS[task].loss(net.logits(p, x), y))
        (value, scores), _ = jax.jit(step)(net.params, x, y)
    twin = torch.nn.Sequential(torch.nn.Linear(INPUTS, features), torch.nn.Tanh(), torch.nn.Linear(features, classes))
    with torch.no_grad():
        for layer, name in ((twin[0], "body"), (twin[2], "head")):
            layer.weight.copy_(torch.from_numpy(np.array(net.params["params"][name]["kernel"].T)))
            layer.bias.copy_(torch.from_numpy(np.array(net.params["params"][name]["bias"])))
    recorder = Recorder(twin, N, head="2")
    targets = torch.from_numpy(y)
    out = TASKS[task].torch(
        twin(torch.from_numpy(np.array(x))), targets if targets.is_floating_point() else targets.long()
    )
    out.backward()
    assert out.item() == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(scores, recorder.scores(), atol=1e-6)


# --- ways of training -------------------------------------------------------------------------------------------------

PARTS, PART = 4, 6
Ways = dict[str, Callable[["Run"], tuple[Array, np.ndarray]]]


class Run(NamedTuple):
    """A watched model, a batch, and the loss."""

    net: Net
    monitor: Monitor
    x: Array
    y: Array

    def loss(self, params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(self.net.logits(params, x), y).mean()

    def step(self, loss: Loss | None = None, **options: Any) -> Callable[..., Any]:
        return self.monitor.value_and_grad(loss or self.loss, **options)

    def batch(self) -> tuple[Any, Array, Array]:
        return self.net.params, self.x, self.y

    def want(self, params: Any = None) -> np.ndarray:
        return one_by_one(self.net, self.loss, self.x, self.y, params)

    def parts(self) -> tuple[Array, Array]:
        return self.x.reshape(PARTS, PART, INPUTS), self.y.reshape(PARTS, PART)

    def of_training(self, steps: int) -> np.ndarray:
        """The oracle's scores of all parts while plain JAX trains with them."""
        params, gradient, scores = self.net.params, jax.jit(jax.grad(self.loss)), []
        for i in range(steps):
            part = slice(i * PART, (i + 1) * PART)
            scores.append(self.want(params)[part])
            params = moved(params, gradient(params, self.x[part], self.y[part]))
        return np.stack(scores)


def moved(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)


def scores_of(step: Callable[..., Any], run: Run) -> Array:
    (_, scores), _ = step(*run.batch())
    return scores


def without_jit(run: Run) -> tuple[Array, np.ndarray]:
    return scores_of(run.step(), run), run.want()


def under_jit(run: Run) -> tuple[Array, np.ndarray]:
    return scores_of(jax.jit(run.step()), run), run.want()


def donated(run: Run) -> tuple[Array, np.ndarray]:
    step, want = run.step(), run.of_training(PARTS)

    @partial(jax.jit, donate_argnums=0)
    def train(params: Any, x: Array, y: Array) -> tuple[Any, Array]:
        (_, scores), grads = step(params, x, y)
        return moved(params, grads), scores

    params, scores = jax.tree.map(jnp.copy, run.net.params), []
    for x, y in zip(*run.parts(), strict=True):
        given = jax.tree.leaves(params)
        params, found = train(params, x, y)
        assert all(leaf.is_deleted() for leaf in given)
        scores.append(found)
    return jnp.stack(scores), want


def scan_over_steps(run: Run) -> tuple[Array, np.ndarray]:
    step, bare = run.step(), jax.value_and_grad(run.loss)

    def train(params: Any, batch: Any) -> tuple[Any, Array]:
        (_, scores), grads = step(params, *batch)
        return moved(params, grads), scores

    def train_bare(params: Any, batch: Any) -> tuple[Any, None]:
        return moved(params, bare(params, *batch)[1]), None

    params, scores = jax.jit(partial(jax.lax.scan, train))(run.net.params, run.parts())
    assert_identical(params, jax.jit(partial(jax.lax.scan, train_bare))(run.net.params, run.parts())[0])
    return scores, run.of_training(PARTS)


def micro_batches(around: Callable[[Loss], Loss] = lambda loss: loss) -> Callable[[Run], tuple[Array, np.ndarray]]:
    def way(run: Run) -> tuple[Array, np.ndarray]:
        step = run.step(around(run.loss))

        @jax.jit
        def accumulated(params: Any, x: Array, y: Array) -> tuple[Any, Array]:
            def micro(total: Any, batch: Any) -> tuple[Any, Array]:
                (_, scores), grads = step(params, *batch)
                return jax.tree.map(lambda t, g: t + g / PARTS, total, grads), scores

            return jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, params), (x, y))

        grads, scores = accumulated(run.net.params, *run.parts())
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), grads, jax.grad(run.loss)(*run.batch()))
        return scores.ravel(), run.want()

    return way


def fori_loop(run: Run) -> tuple[Array, np.ndarray]:
    step = run.step()

    @jax.jit
    def train(params: Any, x: Array, y: Array) -> Array:
        def one(i: Array, carry: Any) -> Any:
            params, table = carry
            (_, scores), grads = step(params, x[i], y[i])
            return moved(params, grads), table.at[i].set(scores)

        return jax.lax.fori_loop(0, PARTS, one, (params, jnp.zeros((PARTS, PART))))[1]

    return train(run.net.params, *run.parts()), run.of_training(PARTS)


def around_the_model(wrap: Callable[..., Any]) -> Callable[[Run], tuple[Array, np.ndarray]]:
    def way(run: Run) -> tuple[Array, np.ndarray]:
        logits = wrap(run.net.logits)
        loss = lambda params, x, y: cross_entropy(logits(params, x), y).mean()  # noqa: E731
        return scores_of(jax.jit(run.step(loss)), run), run.want()

    return way


def around_the_loss(wrap: Callable[..., Any]) -> Callable[[Run], tuple[Array, np.ndarray]]:
    return lambda run: (scores_of(jax.jit(run.step(wrap(run.loss))), run), run.want())


def scanned_body(run: Run) -> tuple[Array, np.ndarray]:
    def loss(params: Any, x: Array, y: Array) -> Array:
        def layer(x: Array, shift: Array) -> tuple[Array, None]:
            return jnp.tanh(2 * x + shift), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(3.0))
        return run.loss(params, x, y)

    return scores_of(jax.jit(run.step(loss)), run), one_by_one(run.net, loss, run.x, run.y)


def several_seeds(run: Run) -> tuple[Any, list[Any]]:
    members = [jax.tree.map(lambda p, i=i: p + 0.1 * i, run.net.params) for i in range(3)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), members


def vmap_over_seeds(run: Run) -> tuple[Array, np.ndarray]:
    ensemble, members = several_seeds(run)
    (_, scores), _ = jax.jit(jax.vmap(run.step(), (0, None, None)))(ensemble, run.x, run.y)
    return scores, np.stack([run.want(member) for member in members])


def an_ensemble_in_the_loss(run: Run) -> tuple[Array, np.ndarray]:
    ensemble, members = several_seeds(run)

    def loss(ensemble: Any, x: Array, y: Array) -> Array:
        return jax.vmap(run.loss, (0, None, None))(ensemble, x, y).mean()

    (_, scores), _ = jax.jit(run.step(loss))(ensemble, run.x, run.y)
    return scores, np.stack([run.want(member) for member in members])


def vmap_over_parts_in_the_loss(run: Run) -> tuple[Array, np.ndarray]:
    def loss(params: Any, x: Array, y: Array) -> Array:
        return jax.vmap(run.loss, (None, 0, 0))(params, x, y).mean()

    (_, scores), _ = jax.jit(run.step(loss))(run.net.params, *run.parts())
    return scores.ravel(), run.want()


def inner_jit_that_stays(run: Run) -> tuple[Array, np.ndarray]:
    """Its trace is used by the evaluation before and after the step, and by the next step."""
    logits = jax.jit(run.net.logits)
    before = logits(run.net.params, run.x)
    step = run.step(lambda params, x, y: cross_entropy(logits(params, x), y).mean())
    twice = [scores_of(jax.jit(step), run), scores_of(jax.jit(lambda *batch: step(*batch)), run)]
    np.testing.assert_array_equal(logits(run.net.params, run.x), before)
    return jnp.stack(twice), np.stack([run.want()] * 2)


def optax_adam(run: Run) -> tuple[Array, np.ndarray]:
    optimizer, step, bare = optax.adam(0.1), run.step(), jax.jit(jax.grad(run.loss))

    @jax.jit
    def train(params: Any, state: Any, x: Array, y: Array) -> Any:
        (_, scores), grads = step(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, scores

    params = expected = run.net.params
    state = plain = optimizer.init(params)
    for _ in range(3):
        want = run.want(expected)
        params, state, scores = train(params, state, run.x, run.y)
        updates, plain = optimizer.update(bare(expected, run.x, run.y), plain, expected)
        expected = optax.apply_updates(expected, updates)
    return scores, want


def two_gradients_as_in_sam(run: Run) -> tuple[Array, np.ndarray]:
    step = run.step()

    @jax.jit
    def train(params: Any, x: Array, y: Array) -> tuple[Array, Array, Any]:
        (_, first), grads = step(params, x, y)
        above = jax.tree.map(lambda p, g: p + 0.5 * g, params, grads)
        (_, second), _ = step(above, x, y)
        return first, second, above

    first, second, above = train(*run.batch())
    return jnp.stack([first, second]), np.stack([run.want(), run.want(above)])


def frozen_backbone(run: Run) -> tuple[Array, np.ndarray]:
    """The gradient stops before the head and is taken by the head's parameters only."""
    head, rest = eqx.partition(run.net.params, head_only(run.net))

    def loss(head: Any, rest: Any, x: Array, y: Array) -> Array:
        return run.loss(eqx.combine(head, jax.lax.stop_gradient(rest)), x, y)

    (value, scores), grads = jax.jit(run.step(loss))(head, rest, run.x, run.y)
    assert_identical((value, grads), jax.jit(jax.value_and_grad(loss))(head, rest, run.x, run.y))
    return scores, run.want()


def frozen_head(run: Run) -> tuple[Array, np.ndarray]:
    rest, head = eqx.partition(run.net.params, jax.tree.map(lambda is_head: not is_head, head_only(run.net)))

    def loss(rest: Any, head: Any, x: Array, y: Array) -> Array:
        return run.loss(eqx.combine(rest, head), x, y)

    (_, scores), _ = jax.jit(run.step(loss))(rest, head, run.x, run.y)
    return scores, run.want()


def head_only(net: Net) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "head" in jax.tree_util.keystr(path), net.params)


def gradient_penalty(run: Run) -> tuple[Array, np.ndarray]:
    """The step itself is differentiated; some samples have no gradient, so that a score is 0 / 0."""
    y = jnp.where(jnp.arange(N) % 5 == 0, -100, run.y)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return without_ignored(run.net.logits(params, x), y)

    def penalised(value_and_grad: Callable[..., Any], params: Any) -> Array:
        grads = value_and_grad(params, run.x, y)[1]
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    watched, bare = run.step(loss), jax.value_and_grad(loss)
    got, want = (jax.jit(jax.grad(partial(penalised, one)))(run.net.params) for one in (watched, bare))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, want)
    (_, scores), _ = watched(run.net.params, run.x, y)
    return scores, one_by_one(run.net, loss, run.x, y)


def aux_and_keywords(run: Run) -> tuple[Array, np.ndarray]:
    def loss(params: Any, x: Array, *, y: Array, scale: float) -> tuple[Array, dict[str, Array]]:
        logits = run.net.logits(params, x)
        return scale * cross_entropy(logits, y).mean(), {"logits": logits}

    step = jax.jit(run.step(loss, has_aux=True))
    ((value, aux), scores), grads = step(run.net.params, run.x, y=run.y, scale=3.0)
    bare = jax.jit(jax.value_and_grad(loss, has_aux=True))
    assert_identical(((value, aux), grads), bare(run.net.params, run.x, y=run.y, scale=3.0))
    return scores, run.want()


NOTHING = jax.checkpoint_policies.nothing_saveable
WAYS: Ways = {
    "without jit": without_jit,
    "jit": under_jit,
    "jit, donate_argnums": donated,
    "scan over steps": scan_over_steps,
    "scan over micro-batches": micro_batches(),
    "scan over micro-batches, checkpoint in it": micro_batches(jax.checkpoint),
    "fori_loop over steps": fori_loop,
    "checkpoint around the model": around_the_model(jax.checkpoint),
    "checkpoint around the model, policy": around_the_model(partial(jax.checkpoint, policy=NOTHING)),
    "checkpoint around the loss": around_the_loss(jax.checkpoint),
    "jit around the model": around_the_model(jax.jit),
    "jit around the loss": around_the_loss(jax.jit),
    "jit around the model, also used by the evaluation": inner_jit_that_stays,
    "scan over layers with checkpoint": scanned_body,
    "vmap over seeds": vmap_over_seeds,
    "vmap over seeds in the loss": an_ensemble_in_the_loss,
    "vmap over parts in the loss": vmap_over_parts_in_the_loss,
    "optax.adam": optax_adam,
    "two gradients per step, as in SAM": two_gradients_as_in_sam,
    "frozen backbone": frozen_backbone,
    "frozen head": frozen_head,
    "gradient penalty": gradient_penalty,
    "has_aux and keywords": aux_and_keywords,
}


OF_A_BATCH, OF_A_ROW = (LINEN, "wide"), (EQUINOX, "narrow")
"""A wide head whose layer gets the batch, and a narrow one whose layer gets a row."""

WAYS_OF_HEADS = [(way, *head) for way in WAYS for head in (OF_A_BATCH, OF_A_ROW)]
WAYS_OF_HEADS += [(way, *head) for way in WAYS if "vmap" in way for head in ((LINEN, "narrow"), (EQUINOX, "wide"))]

FAST_WAYS = [
    ("jit", *OF_A_ROW),
    ("jit, donate_argnums", *OF_A_BATCH),
    ("scan over micro-batches, checkpoint in it", *OF_A_ROW),
    ("fori_loop over steps", *OF_A_BATCH),
    ("checkpoint around the model, policy", *OF_A_BATCH),
    ("jit around the model, also used by the evaluation", *OF_A_BATCH),
    ("scan over layers with checkpoint", *OF_A_ROW),
    ("vmap over seeds", LINEN, "narrow"),
    ("vmap over seeds in the loss", EQUINOX, "wide"),
    ("vmap over parts in the loss", *OF_A_BATCH),
    ("two gradients per step, as in SAM", *OF_A_BATCH),
    ("frozen backbone", *OF_A_ROW),
    ("frozen head", *OF_A_BATCH),
    ("gradient penalty", *OF_A_ROW),
    ("has_aux and keywords", *OF_A_BATCH),
]
"""Each kind of loop, of inner transformation, of mapped axis and of gradient, with one of the heads."""


@tiered("way, library, width", WAYS_OF_HEADS, fast=FAST_WAYS)
def test_a_way_of_training_has_the_scores_of_each_samples_gradient(way, width, library):
    net = LIBRARIES[library](*WIDTH[width])
    with gwa_logging.watch(net.model) as monitor:
        scores, want = WAYS[way](Run(net, monitor, *data()))
    assert scores.shape == want.shape
    np.testing.assert_allclose(scores, want, atol=1e-6)


def test_a_scan_over_steps_may_carry_a_summary_instead_of_the_scores():
    net = of_linen(Compact, D, C)
    with gwa_logging.watch(net.model) as monitor:
        run = Run(net, monitor, *data())
        step = run.step()

        @jax.jit
        def epoch(params: Any, x: Array, y: Array) -> AlignmentState:
            def train(carry: Any, batch: Any) -> tuple[Any, None]:
                params, state = carry
                (_, scores), grads = step(params, *batch)
                return (moved(params, grads), state.update(scores)), None

            return jax.lax.scan(train, (params, AlignmentState.empty()), (x, y))[0][1]

        monitor.update(epoch(net.params, *run.parts()))
        report = monitor.end_epoch()
    want = run.of_training(PARTS)
    assert report.count == N
    assert (report.mean, report.std) == pytest.approx((want.mean(), want.std()), abs=1e-6)


def test_a_flax_train_state_trains_to_the_same_bits():
    net = of_linen(Compact, D, C)
    x, y = data()

    def loss(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(net.logits(params, x), y).mean()

    def trained(value_and_grad: Callable[..., Any]) -> tuple[TrainState, Any]:
        @jax.jit
        def step(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Any]:
            value, grads = value_and_grad(state.params, x, y)
            return state.apply_gradients(grads=grads), value

        state = TrainState.create(apply_fn=net.model.apply, params=net.params, tx=optax.adamw(0.1))
        for _ in range(3):
            state, value = step(state, x, y)
        return state, value

    with gwa_logging.watch(net.model) as monitor:
        state, (value, scores) = trained(monitor.value_and_grad(loss))
    plain, plain_value = trained(jax.value_and_grad(loss))
    assert_identical(
        ((state.params, state.opt_state, state.step), value), ((plain.params, plain.opt_state, 3), plain_value)
    )
    assert scores.shape == (N,)


class Regularised(linen.Module):
    """Returns its embeddings too."""

    @linen.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        h = linen.BatchNorm(use_running_average=False)(linen.Dense(D)(x))
        h = linen.Dropout(0.4, deterministic=False)(jnp.tanh(h))
        return linen.Dense(C, name="head")(h), h


def test_dropout_and_batch_normalisation_are_scored_on_the_features_of_the_pass():
    model, (x, y) = Regularised(), data()
    key = jax.random.key(3)
    variables = model.init({"params": jax.random.key(0), "dropout": key}, x)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params: Any, stats: Any, x: Array, y: Array, key: Array) -> Any:
        (z, h), new = model.apply(
            {"params": params, "batch_stats": stats}, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(z, y).mean(), (h, new["batch_stats"])

    with gwa_logging.watch(model) as monitor:
        step = jax.jit(monitor.value_and_grad(loss, has_aux=True))
        ((value, aux), scores), grads = step(params, stats, x, y, key)
    assert_identical(((value, aux), grads), jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, x, y, key))
    h = aux[0]
    assert (h == 0).any()
    want = by_copies(lambda z: cross_entropy(z, y).mean(), h, params["head"]["kernel"], params["head"]["bias"])
    np.testing.assert_allclose(scores, want, atol=1e-6)


@pytest.mark.parametrize(
    ("library", "width"), [(LINEN, "wide"), ("NNX", "narrow"), ("Haiku", "narrow"), (TAP, "narrow")]
)
def test_every_token_is_a_sample_and_padding_has_no_score(library, width):
    net = LIBRARIES[library](*WIDTH[width])
    x, y = data()
    y = jnp.where(jnp.arange(N) % 5 == 0, -100, y)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return without_ignored(net.logits(params, x), y)

    with gwa_logging.watch(net.model) as monitor:
        step = net.jit(monitor.value_and_grad(loss))
        (_, scores), _ = step(net.params, x.reshape(4, 6, INPUTS), y.reshape(4, 6))
        monitor.update(scores)
        report = monitor.end_epoch()
    want = one_by_one(net, loss, x, y)
    assert (report.count, report.excluded, scores.shape) == (N - 5, 5, (4, 6))
    np.testing.assert_allclose(scores.ravel(), want, atol=1e-6)


def in_sixteen_bits(run: Run, dtype: Any, scale: float) -> tuple[Array, np.ndarray]:
    """The parameters are float32 and are cast to 16 bits for the pass; the loss may be scaled."""
    net = run.net

    def rounded(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(dtype), params)

    def loss(params: Any, x: Array, y: Array) -> Array:
        z = net.logits(rounded(params), x.astype(dtype)).astype(jnp.float32)
        return scale * cross_entropy(z, y).mean()

    (_, scores), grads = jax.jit(run.step(loss))(*run.batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    half = rounded(net.params)
    h, z = net.features(half, run.x.astype(dtype)), net.logits(half, run.x.astype(dtype))
    delta = jax.grad(lambda z: scale * cross_entropy(z.astype(jnp.float32), run.y).mean())(z)
    weight = net.weight(half)
    weight = weight if weight.shape == (delta.shape[-1], h.shape[-1]) else weight.T
    return scores, alignment_scores(*(np.asarray(a, np.float64) for a in (delta, h, weight)))


SIXTEEN_BITS = {"bf16": (jnp.bfloat16, 1), "fp16": (jnp.float16, 1), "fp16 with a loss scale": (jnp.float16, 2.0**12)}


@tiered(
    "kind, library, width",
    [(kind, *head) for kind in SIXTEEN_BITS for head in (OF_A_BATCH, OF_A_ROW)],
    fast=[("bf16", *OF_A_ROW), ("fp16 with a loss scale", *OF_A_BATCH)],
)
def test_sixteen_bit_training_is_scored_on_the_rounded_tensors(kind, library, width):
    dtype, scale = SIXTEEN_BITS[kind]
    features, classes = WIDTH[width]
    net = LIBRARIES[library](8 * features, 8 * classes)
    with gwa_logging.watch(net.model) as monitor:
        scores, want = in_sixteen_bits(Run(net, monitor, *data(classes=8 * classes)), dtype, scale)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, want, atol=5e-3)


def test_a_step_that_overflows_under_a_dynamic_loss_scale_is_excluded():
    net = of_linen(Compact, D, C)
    x, y = data()

    def loss(params: Any, scale: jmp.DynamicLossScale, x: Array, y: Array) -> Array:
        z = net.logits(jax.tree.map(lambda p: p.astype(jnp.float16), params), x.astype(jnp.float16))
        return scale.scale(cross_entropy(z, y).mean())

    with gwa_logging.watch(net.model) as monitor:
        value_and_grad = monitor.value_and_grad(loss)

        @jax.jit
        def step(params: Any, scale: jmp.DynamicLossScale, x: Array, y: Array) -> Any:
            (_, scores), grads = value_and_grad(params, scale, x, y)
            grads = scale.unscale(grads)
            finite = jmp.all_finite(grads)
            return jmp.select_tree(finite, moved(params, grads), params), scale.adjust(finite), finite, scores

        params, scale, scores, finite = net.params, jmp.DynamicLossScale(jnp.float32(2**24)), [], False
        while not finite:
            before = params
            params, scale, finite, found = step(params, scale, x, y)
            monitor.update(found)
            scores.append(found)
        report = monitor.end_epoch()
    lost = sum(int((~np.isfinite(found)).sum()) for found in scores)
    assert not np.isfinite(scores[0]).any()
    assert (report.count, report.excluded) == (len(scores) * N - lost, lost)
    assert monitor.faults == {"samples that are not finite": lost}
    np.testing.assert_allclose(scores[-1], one_by_one(net, loss_of(net), x, y, before), atol=5e-3)


# --- arguments --------------------------------------------------------------------------------------------------------


@tiered(
    "library, argnums",
    product([LINEN, "NNX"], [0, 1, -1, -2, (1, 0), (-1, -2), (0,)]),
    fast=[*((LINEN, argnums) for argnums in (-1, (1, 0))), *(("NNX", argnums) for argnums in (0, -2, (-1, -2)))],
)
def test_argnums_are_those_of_jax(library, argnums):
    net = LIBRARIES[library](D, C)
    x, y = data()

    def loss(params: Any, x: Array) -> Array:
        return cross_entropy(net.logits(params, x), y).mean()

    with gwa_logging.watch(net.model) as monitor:
        (value, scores), grads = net.jit(monitor.value_and_grad(loss, argnums=argnums))(net.params, x)
    assert_identical((value, grads), net.jit(net.value_and_grad(loss, argnums=argnums))(net.params, x))
    np.testing.assert_allclose(scores, one_by_one(net, loss_of(net), x, y), atol=1e-6)


@library_of
def test_arguments_after_the_parameters_may_be_keywords(library):
    net = LIBRARIES[library](D, C)
    x, y = data()

    def loss(params: Any, x: Array, y: Array, scale: float = 2.0) -> Array:
        return scale * cross_entropy(net.logits(params, x), y).mean()

    with gwa_logging.watch(net.model) as monitor:
        step = monitor.value_and_grad(loss)
        (value, scores), _ = net.jit(lambda params, x, y: step(params, y=y, x=x))(net.params, x, y)
    assert value == pytest.approx(float(loss(net.params, x, y)), rel=1e-6)
    np.testing.assert_allclose(scores, one_by_one(net, loss_of(net), x, y), atol=1e-6)


def test_allow_int_is_passed_on():
    net = of_linen(Compact, D, C)
    x, y = data()

    def loss(both: Any, x: Array, y: Array) -> Array:
        params, steps = both
        return cross_entropy(net.logits(params, x), y).mean() + steps

    given = (net.params, jnp.array(3))
    with gwa_logging.watch(net.model) as monitor:
        with pytest.raises(TypeError, match="int32"):
            monitor.value_and_grad(loss)(given, x, y)
        (_, scores), grads = monitor.value_and_grad(loss, allow_int=True)(given, x, y)
    assert grads[1].dtype == jax.dtypes.float0
    np.testing.assert_allclose(scores, one_by_one(net, loss_of(net), x, y), atol=1e-6)


def loss_of(net: Net) -> Loss:
    return lambda params, x, y: cross_entropy(net.logits(params, x), y).mean()


# --- NNX --------------------------------------------------------------------------------------------------------------


def nnx_split_and_merged(run: Run) -> tuple[Array, np.ndarray]:
    """The usual form for jax.jit and jax.lax.scan: pure states outside, a model inside."""
    graph, state = nnx.split(run.net.params)
    step = run.step()

    def train(state: Any, batch: Any) -> tuple[Any, Array]:
        (_, scores), grads = step(nnx.merge(graph, state), *batch)
        return moved(state, grads), scores

    _, scores = jax.jit(partial(jax.lax.scan, train))(state, run.parts())
    bare = nnx.jit(nnx.grad(run.loss))
    want = []
    for i in range(PARTS):
        part, model = slice(i * PART, (i + 1) * PART), nnx.merge(graph, state)
        want.append(run.want(model)[part])
        state = moved(state, bare(model, run.x[part], run.y[part]))
    return scores, np.stack(want)


def nnx_around_the_model(wrap: Callable[..., Any]) -> Callable[[Run], tuple[Array, np.ndarray]]:
    def way(run: Run) -> tuple[Array, np.ndarray]:
        logits = wrap(lambda model, x: model(x))
        step = run.step(lambda model, x, y: cross_entropy(logits(model, x), y).mean())
        return scores_of(nnx.jit(step), run).ravel(), run.want()

    return way


def nnx_head_only(run: Run) -> tuple[Array, np.ndarray]:
    head = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("head")))
    (value, scores), grads = nnx.jit(run.step(argnums=head))(*run.batch())
    assert_identical((value, grads), nnx.jit(nnx.value_and_grad(run.loss, argnums=head))(*run.batch()))
    assert set(grads) == {"head"}
    return scores, run.want()


def nnx_seeds(run: Run) -> tuple[Array, np.ndarray]:
    graph, state = nnx.split(run.net.params)
    members = [jax.tree.map(lambda p, i=i: p + 0.1 * i, state) for i in range(3)]
    ensemble = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    step = run.step()

    @nnx.jit
    @nnx.vmap(in_axes=(0, None, None))
    def train(model: Nnx, x: Array, y: Array) -> Array:
        (_, scores), _ = step(model, x, y)
        return scores

    return train(ensemble, run.x, run.y), np.stack([run.want(nnx.merge(graph, member)) for member in members])


NNX_WAYS: Ways = {
    "split and merged, in jax.jit and scan": nnx_split_and_merged,
    "nnx.remat around the model": nnx_around_the_model(nnx.remat),
    "nnx.jit around the model": nnx_around_the_model(nnx.jit),
    "nnx.vmap around the model": nnx_around_the_model(partial(nnx.vmap, in_axes=(None, 0))),
    "nnx.remat around the loss": lambda run: (scores_of(nnx.jit(run.step(nnx.remat(run.loss))), run), run.want()),
    "nnx.jit around the loss": lambda run: (scores_of(run.step(nnx.jit(run.loss)), run), run.want()),
    "DiffState of the head": nnx_head_only,
    "nnx.vmap over seeds": nnx_seeds,
}


@tiered(
    "way, width",
    [(way, width) for way in NNX_WAYS for width in WIDTH if width == "narrow" or "vmap" in way],
    fast=[
        ("split and merged, in jax.jit and scan", "narrow"),
        ("nnx.remat around the model", "narrow"),
        ("nnx.vmap around the model", "wide"),
        ("nnx.jit around the loss", "narrow"),
        ("DiffState of the head", "narrow"),
        ("nnx.vmap over seeds", "narrow"),
    ],
)
def test_a_way_of_nnx_has_the_scores_of_each_samples_gradient(way, width):
    net = of_nnx(*WIDTH[width])
    graph = nnx.graphdef(net.model)
    with gwa_logging.watch(net.model) as monitor:
        scores, want = NNX_WAYS[way](Run(net, monitor, *data()))
    assert nnx.graphdef(net.model) == graph
    np.testing.assert_allclose(scores, want, atol=1e-6)


# --- Equinox ----------------------------------------------------------------------------------------------------------


def eqx_around_the_model(wrap: Callable[..., Any]) -> Callable[[Run], tuple[Array, np.ndarray]]:
    def way(run: Run) -> tuple[Array, np.ndarray]:
        step = run.step(lambda model, x, y: cross_entropy(wrap(model)(x), y).mean())
        return scores_of(eqx.filter_jit(step), run), run.want()

    return way


EQUINOX_WAYS: Ways = {
    "filter_vmap": eqx_around_the_model(eqx.filter_vmap),
    "filter_checkpoint under vmap": eqx_around_the_model(lambda model: jax.vmap(eqx.filter_checkpoint(model))),
    "filter_checkpoint over vmap": eqx_around_the_model(lambda model: eqx.filter_checkpoint(eqx.filter_vmap(model))),
    "filter_jit around the model": eqx_around_the_model(lambda model: eqx.filter_jit(eqx.filter_vmap(model))),
    "filter_jit around the loss": lambda run: (scores_of(run.step(eqx.filter_jit(run.loss)), run), run.want()),
}


@pytest.mark.parametrize("width", ["narrow"])
@pytest.mark.parametrize("way", EQUINOX_WAYS)
def test_a_way_of_equinox_has_the_scores_of_each_samples_gradient(way, width):
    net = of_equinox(PerSample, *WIDTH[width])
    with gwa_logging.watch(net.model) as monitor:
        scores, want = EQUINOX_WAYS[way](Run(net, monitor, *data()))
    np.testing.assert_allclose(scores, want, atol=1e-6)


class Stateful(eqx.Module):
    """Returns its embeddings too."""

    body: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        a, b = jax.random.split(key)
        self.body, self.head = eqx.nn.Linear(INPUTS, D, key=a), eqx.nn.Linear(D, C, key=b)
        self.norm, self.drop = eqx.nn.BatchNorm(D, axis_name="batch", mode="batch"), eqx.nn.Dropout(0.4)

    def __call__(self, x: Array, state: eqx.nn.State, key: Array) -> Any:
        h, state = self.norm(self.body(x), state)
        h = self.drop(jnp.tanh(h), key=key)
        return self.head(h), h, state


def test_equinox_with_dropout_and_batch_normalisation_is_scored_on_the_features_of_the_pass():
    model, state = eqx.nn.make_with_state(Stateful)(jax.random.key(0))
    (x, y), keys = data(), jax.random.split(jax.random.key(3), N)

    def loss(model: Stateful, state: eqx.nn.State, x: Array, y: Array) -> Any:
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, 0, None))
        z, h, state = batched(x, state, keys)
        return cross_entropy(z, y).mean(), (h, state)

    with gwa_logging.watch(model) as monitor:
        step = eqx.filter_jit(monitor.value_and_grad(loss, has_aux=True))
        ((value, (h, after)), scores), grads = step(model, state, x, y)
    (plain, (_, plain_after)), plain_grads = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(
        model, state, x, y
    )
    assert_identical((value, after, grads), (plain, plain_after, plain_grads))
    assert (h == 0).any()
    want = by_copies(lambda z: cross_entropy(z, y).mean(), h, model.head.weight.T, model.head.bias)
    np.testing.assert_allclose(scores, want, atol=1e-6)


# --- the compiled step ------------------------------------------------------------------------------------------------


def count(text: str, *operations: str) -> dict[str, int]:
    return {name: len(re.findall(rf"\b{name}\b", text)) for name in operations}


@tiered("library, width", HEADS, fast=OTHER_WIDTHS)
@pytest.mark.usefixtures("fully_optimised")
def test_the_compiled_step_has_no_further_matrix_product_and_never_leaves_the_device(library, width):
    net, (x, y) = LIBRARIES[library](*WIDTH[width]), data()
    tree, whole = net.pure(net.params)

    def compiled(value_and_grad: Callable[..., Any]) -> tuple[str, str]:
        def step(tree: Any, x: Array, y: Array) -> Any:
            return value_and_grad(whole(tree), x, y)

        traced = jax.jit(step).trace(tree, x, y)
        return str(traced.jaxpr), traced.lower().compile().as_text()

    with gwa_logging.watch(net.model) as monitor:
        jaxpr, hlo = compiled(monitor.value_and_grad(loss_of(net)))
    plain_jaxpr, plain_hlo = compiled(net.value_and_grad(loss_of(net)))
    assert count(plain_hlo, "dot")["dot"] >= 4  # two forward, the body's and the head's gradient
    assert "gradient" not in plain_hlo
    for text, plain, operations in (
        (hlo, plain_hlo, ("dot", "convolution", "custom-call", "infeed", "outfeed", "send", "recv", "while")),
        (jaxpr, plain_jaxpr, ("dot_general", "device_put", "transfer")),
    ):
        assert count(text, *operations) == count(plain, *operations)
    assert "callback" not in jaxpr + hlo


@pytest.mark.parametrize("library", [LINEN, "NNX", EQUINOX, "Haiku"])
def test_a_step_is_traced_again_only_for_another_shape(library):
    net, traces = LIBRARIES[library](D, C), []

    def loss(params: Any, x: Array, y: Array) -> Array:
        traces.append(x.shape)
        return cross_entropy(net.logits(params, x), y).mean()

    with gwa_logging.watch(net.model) as monitor:
        step = net.jit(monitor.value_and_grad(loss))
        for n in (N, 7):
            before = len(traces)
            step(net.params, *data(n))
            first = len(traces)
            for _ in range(2):
                (_, scores), _ = step(net.params, *data(n))
                monitor.update(scores)
            assert len(traces) == first > before
        step(net.params, *data(N))
        assert len(traces) == first


# --- bad input --------------------------------------------------------------------------------------------------------


@library_of
def test_a_head_that_the_loss_does_not_run_is_refused_with_the_candidates(library):
    net = LIBRARIES[library](D, C)
    with gwa_logging.watch(net.model, head="no.such.head") as monitor:
        step = monitor.value_and_grad(loss_of(net))
        with pytest.raises(
            HeadNotFoundError, match=r"head='no\.such\.head': the loss does not run a linear layer with this path"
        ) as error:
            net.jit(step)(net.params, *data())
    assert any(f"{D} -> {C}" in line for line in error.value.candidates)
    assert "watch(model, head=" in str(error.value)


@library_of
def test_a_head_that_runs_twice_in_one_loss_is_refused(library):
    net = LIBRARIES[library](D, C)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(net.logits(params, x) + net.logits(params, -x), y).mean()

    with gwa_logging.watch(net.model) as monitor, pytest.raises(HeadNotFoundError, match="runs 2 times in"):
        monitor.value_and_grad(loss)(net.params, *data())


@pytest.mark.parametrize("jit", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("library", [LINEN, EQUINOX, "Haiku", TAP])
def test_a_head_that_runs_twice_in_an_inner_function_is_refused(library, jit):
    net = LIBRARIES[library](D, C)
    logits = jit(net.logits)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(logits(params, x) + logits(params, -x), y).mean()

    with gwa_logging.watch(net.model) as monitor, pytest.raises(HeadNotFoundError, match="runs 2 times in"):
        monitor.value_and_grad(loss)(net.params, *data())


LOOPS = {
    "lax.scan": lambda one, xs, ys: jax.lax.scan(lambda total, b: (total + one(*b), None), 0.0, (xs, ys))[0],
    "lax.map": lambda one, xs, ys: jax.lax.map(lambda b: one(*b), (xs, ys)).mean(),
    "fori_loop": lambda one, xs, ys: jax.lax.fori_loop(0, PARTS, lambda i, total: total + one(xs[i], ys[i]), 0.0),
}


@pytest.mark.parametrize("loop", LOOPS)
@library_of
def test_a_head_in_a_loop_of_the_loss_is_refused(library, loop):
    net = LIBRARIES[library](D, C)
    x, y = data()

    def loss(params: Any, x: Array, y: Array) -> Array:
        parts = x.reshape(PARTS, PART, INPUTS), y.reshape(PARTS, PART)
        return LOOPS[loop](lambda x, y: loss_of(net)(params, x, y), *parts)

    with (
        gwa_logging.watch(net.model) as monitor,
        pytest.raises(HeadNotFoundError, match=r"runs in a loop .* loop over"),
    ):
        monitor.value_and_grad(loss)(net.params, x, y)


@library_of
def test_a_loss_that_never_runs_a_layer_of_the_model_is_refused_with_what_to_check(library):
    net = LIBRARIES[library](D, C)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return jnp.sum(x**2) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(net.pure(params)[0]))

    with gwa_logging.watch(net.model) as monitor:
        said = "does not run a linear layer of .*the one given to watch"
        with pytest.raises(HeadNotFoundError, match=said):
            monitor.value_and_grad(loss)(net.params, *data())


class Other(Compact):
    """Another model."""


class OtherNnx(Nnx):
    """Another model."""


class OtherEquinox(PerSample):
    """Another model."""


OTHERS = {
    "Linen": (Compact(D, C), lambda: of_linen(Other, D, C)),
    "Linen, other classes": (Compact(D, C), lambda: of_linen(Compact, D, 7)),
    "NNX": (
        Nnx(D, C, nnx.Rngs(0)),
        lambda: of_nnx(D, C)._replace(params=OtherNnx(D, C, nnx.Rngs(0))),
    ),
    "Equinox": (PerSample(D, C, jax.random.key(0)), lambda: of_equinox(OtherEquinox, D, C)),
}


@pytest.mark.parametrize("library", OTHERS)
def test_a_loss_of_another_model_is_refused(library):
    watched, other = OTHERS[library]
    net = other()
    with (
        gwa_logging.watch(watched) as monitor,
        pytest.raises(HeadNotFoundError, match="does not run a linear layer of"),
    ):
        monitor.value_and_grad(loss_of(net))(net.params, *data())


def test_an_argnum_beyond_the_arguments_is_named():
    net = of_linen(Compact, D, C)
    with gwa_logging.watch(net.model) as monitor, pytest.raises(InvalidInputError, match=r"argnums=3: .* 3 positional"):
        monitor.value_and_grad(loss_of(net), argnums=3)(net.params, *data())


IDS = {
    "too few": (jnp.arange(5), r"sample_ids: expected \[24\], one for each score, .* found \[5\]"),
    "too many": (np.arange(30), r"sample_ids: expected \[24\], one for each score, .* found \[30\]"),
    "floats": (jnp.arange(24.0), "sample_ids: expected an integer array .* found float32"),
    "booleans": (jnp.ones(24, bool), "sample_ids: expected an integer array .* found bool"),
    "a list": (list(range(24)), "sample_ids: expected an integer array .* found list"),
    "two axes": (jnp.zeros((5, 6), jnp.int32), r"sample_ids: expected \[24\], .* found \[5, 6\]"),
}


@pytest.mark.parametrize("ids", IDS)
def test_sample_ids_that_do_not_match_the_scores_are_refused_and_not_recorded(ids):
    given, said = IDS[ids]
    with gwa_logging.watch(Compact(), num_samples=N) as monitor:
        with pytest.raises(InvalidInputError, match=said):
            monitor.update(jnp.zeros(N), given)
        assert monitor.suspects() == []
        monitor.update(jnp.full(N, 0.1), jnp.arange(N))
        assert monitor.end_epoch().count == N


def test_sample_ids_without_a_ledger_are_refused_with_the_remedy():
    with gwa_logging.watch(Compact()) as monitor, pytest.raises(InvalidInputError, match="num_samples="):
        monitor.update(jnp.zeros(N), jnp.arange(N))


SCORES = {
    "complex": jnp.zeros(3, jnp.complex64),
    "booleans": np.ones(3, bool),
    "a float": 0.1,
    "None": None,
    "a pair": (jnp.zeros(3), jnp.zeros(3)),
}


@pytest.mark.parametrize("scores", SCORES)
def test_anything_but_an_array_of_scores_is_refused_with_its_type(scores):
    with (
        gwa_logging.watch(Compact()) as monitor,
        pytest.raises(InvalidInputError, match=r"scores: expected a floating-point array \[batch\], found"),
    ):
        monitor.update(SCORES[scores])
