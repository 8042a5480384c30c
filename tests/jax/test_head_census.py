"""A census of JAX heads: every way in which Flax, Equinox, Haiku and Keras make logits is scored exactly, or refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import Array

import gwa_logging
from gwa_logging import HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.jax import tap
from tests.jax.tiers import tiered

N, D, C = 6, 4, 3
X = jax.random.normal(jax.random.key(1), (N, D))
Y = jnp.arange(N) % C
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Net(NamedTuple):
    """A model to watch, and what the oracle knows of its head.

    Attributes:
        model: what is watched.
        params: the first argument of the loss.
        logits: of params and inputs.
        weight: the head's weight, of the parameters or of their gradient; or what was made of the parameters, if there are
            features.
        features: of params and inputs, where the parameter is not the weight, or is used elsewhere too.
        pure: the parameters as a pytree, and what makes of such a tree what the loss is given.
    """

    model: Any
    params: Any
    logits: Callable[[Any, Array], Array]
    weight: Callable[[Any], Array]
    features: Callable[[Any, Array], Array] | None = None
    pure: Callable[[Any], tuple[Any, Callable[[Any], Any]]] = lambda params: (params, lambda p: p)


Make = Callable[[], Net]


def moved(params: Any) -> Any:
    """Biases begin as zeros, which would hide what is done to them, and so do the second factors of LoRA."""
    return jax.tree.map(lambda p: p + jnp.linspace(-0.5, 0.7, p.size).reshape(p.shape), params)


def parts(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return linen.meta.unbox(tree)


def unit(rows: Array, axis: int = -1) -> Array:
    return rows / jnp.linalg.norm(rows, axis=axis, keepdims=True)


# --- Linen ------------------------------------------------------------------------------------------------------------


def of_linen(
    head: Callable[[Array], Array], path: str = "head.kernel", transform: Callable[[Any], Any] = lambda kind: kind
) -> Make:
    """A hidden Dense layer and a head, with the path of its weight, and what is made of the whole model's class."""

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return head(jnp.tanh(linen.Dense(D, name="hidden")(x)))

    def make() -> Net:
        model = transform(Linen)()
        params = moved(model.init(jax.random.key(0), X))
        return Net(model, params, model.apply, lambda p: parts(p["params"], path))

    return make


def parameter(name: str, *shape: int) -> Array:
    """A parameter of the Linen module that is running."""
    return linen.module._context.module_stack[-1].param(name, linen.initializers.normal(0.5), shape)


def tapped(h: Array) -> Array:
    weight, bias = parameter("w", C, D), parameter("b", C)
    return tap(h @ weight.T + bias, h, weight, bias)


def hidden_of(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["params"]["hidden"]["kernel"] + params["params"]["hidden"]["bias"])


class LinenSuper(linen.Dense):
    def __call__(self, inputs: Array) -> Array:
        return super().__call__(inputs)


class LinenScaling(linen.Dense):
    def __call__(self, inputs: Array) -> Array:
        return 0.5 * super().__call__(inputs)


class ScalingDot:
    """A `dot_general` that scales its result."""

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return 0.5 * jax.lax.dot_general(*args, **kwargs)


class LinenSubclass(linen.Dense):
    """Adds nothing."""


class Tied(linen.Module):
    """A language model in small: its logits are the products with the embeddings of its tokens."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        embed = linen.Embed(C, D, name="embed")
        return embed.attend(jnp.tanh(linen.Dense(D, name="hidden")(x + embed(jnp.arange(len(x)) % C))))


class SetupNet(linen.Module):
    def setup(self) -> None:
        self.hidden, self.head = linen.Dense(D), linen.Dense(C)

    def __call__(self, x: Array) -> Array:
        return self.head(jnp.tanh(self.hidden(x)))


def tied() -> Net:
    params = moved(Tied().init(jax.random.key(0), X))

    def weight(params: Any) -> Array:
        return params["params"]["embed"]["embedding"]

    return Net(Tied(), params, Tied().apply, weight, lambda p, x: hidden_of(p, x + weight(p)[jnp.arange(N) % C]))


def bound() -> Net:
    model = SetupNet()
    params = moved(model.init(jax.random.key(0), X))

    def logits(params: Any, x: Array) -> Array:
        net = model.bind(params)
        return net.head(jnp.tanh(net.hidden(x)))

    return Net(model, params, logits, lambda p: p["params"]["head"]["kernel"])


def weight_normalised() -> Net:
    net = of_linen(lambda h: linen.WeightNorm(linen.Dense(C, name="head"), name="norm")(h))()

    def weight(params: Any) -> Array:
        scale = params["params"]["norm"]["head/kernel/scale"]
        return unit(params["params"]["head"]["kernel"], 0) * scale

    return net._replace(weight=weight, features=hidden_of)


def squeezed(h: Array) -> Array:
    """A squeeze-and-excite block, and a convolution."""
    gate = linen.sigmoid(linen.Dense(D, name="excite")(linen.relu(linen.Dense(2, name="squeeze")(h))))
    return linen.Conv(C, (1, 1), name="head")((h * gate)[:, None, None])[:, 0, 0]


def partitioned(h: Array) -> Array:
    init = linen.with_partitioning(linen.initializers.normal(0.5), (None, None))
    return linen.Dense(C, kernel_init=init, name="head")(h)


def frozen_head() -> Net:
    """Raw and closed over, so that only the model can tell that it is a parameter."""
    model = Tied()
    params = moved(model.init(jax.random.key(0), X))["params"]

    def logits(trained: Any, x: Array) -> Array:
        whole = {**trained, "embed": params["embed"]}
        h = model.apply({"params": whole}, x)
        return h @ params["embed"]["embedding"]

    return Net(model, {"hidden": params["hidden"]}, logits, lambda p: p["hidden"]["kernel"])


LINEN: dict[str, tuple[Make, str | None]] = {
    "Dense": (of_linen(lambda h: linen.Dense(C, name="head")(h)), None),
    "Dense, softmax and log": (of_linen(lambda h: jnp.log(linen.softmax(linen.Dense(C, name="head")(h)))), None),
    "Dense, learned temperature": (
        of_linen(lambda h: linen.Dense(C, name="head")(h) * jnp.exp(parameter("t"))),
        None,
    ),
    "Dense, bias added by hand": (
        of_linen(lambda h: linen.Dense(C, use_bias=False, name="head")(h) + parameter("b", C)),
        None,
    ),
    "Dense, relu after it": (of_linen(lambda h: linen.relu(linen.Dense(C, name="head")(h))), None),
    "Dense, subclass": (of_linen(lambda h: LinenSubclass(C, name="head")(h)), None),
    "Dense, subclass that calls super()": (of_linen(lambda h: LinenSuper(C, name="head")(h)), None),
    "Dense, scaling subclass that calls super()": (
        of_linen(lambda h: LinenScaling(C, name="head")(h)),
        "'head' is not a linear layer: it does not end with a product of its input and its weight, plus its bias",
    ),
    "Dense, the model in nn.remat": (of_linen(lambda h: linen.Dense(C, name="head")(h), transform=linen.remat), None),
    "Dense, the model in nn.jit": (of_linen(lambda h: linen.Dense(C, name="head")(h), transform=linen.jit), None),
    "Dense, partitioned": (of_linen(partitioned), None),
    "Dense, WeightNorm": (weight_normalised, None),
    "Dense of model.bind": (bound, None),
    "DenseGeneral": (of_linen(lambda h: linen.DenseGeneral(C, name="head")(h)), None),
    "DenseGeneral, two axes in": (
        of_linen(lambda h: linen.DenseGeneral(C, axis=(-2, -1), name="head")(h.reshape(-1, 2, D // 2))),
        None,
    ),
    "DenseGeneral, first axis in, two axes out": (
        of_linen(lambda h: linen.DenseGeneral((2, C), axis=0, name="head")(h.T).sum(1)),
        None,
    ),
    "Einsum": (of_linen(lambda h: linen.Einsum((D, C), "...d,dc->...c", name="head")(h)), None),
    "Einsum, features first": (of_linen(lambda h: linen.Einsum((C, D), "nd,cd->cn", name="head")(h).T), None),
    "Embed.attend": (tied, None),
    "Conv 1x1, pooled": (of_linen(lambda h: linen.Conv(C, (1, 1), name="head")(h[:, None, None])[:, 0, 0]), None),
    "Conv 1x1 after squeeze-and-excite": (of_linen(squeezed), None),
    "parameter, tap": (of_linen(tapped, "w"), None),
    "parameter": (
        of_linen(lambda h: h @ parameter("w", D, C)),
        "a matrix product with the parameter 'w' (4 x 3), outside any layer",
    ),
    "parameter, product by hand": (
        of_linen(lambda h: (h[:, :, None] * parameter("w", D, C)).sum(1)),
        "an operation with the parameter 'w' (4 x 3)",
    ),
    "parameter, vector by hand": (
        of_linen(lambda h: (h * parameter("w", D)).sum(-1, keepdims=True) * jnp.arange(C)),
        "a sum over a product with a vector of parameters",
    ),
    "parameter, in a loop": (
        of_linen(lambda h: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, parameter("w", 2, D, D))[0][:, :C]),
        "a matrix product with the parameter 'w' (2 x 4 x 4), outside any layer",
    ),
    "parameter, in a branch": (
        of_linen(lambda h: jax.lax.cond(True, lambda h, w: h @ w, lambda h, w: h[:, :C], h, parameter("w", D, C))),
        "a matrix product with the parameter 'w' (4 x 3), outside any layer",
    ),
    "parameter, distances to prototypes": (
        of_linen(lambda h: -((h[:, None] - parameter("w", C, D)) ** 2).sum(-1)),
        "an operation with the parameter 'w' (3 x 4)",
    ),
    "parameter, cosine": (
        of_linen(lambda h: unit(h) @ unit(parameter("w", D, C), 0)),
        "a normalised vector (a cosine head, or normalised logits)",
    ),
    "parameter, closed over": (
        frozen_head,
        "a matrix product with the parameter 'embed.embedding' (3 x 4), outside any layer",
    ),
    "Dense, normalised": (
        of_linen(lambda h: unit(linen.Dense(C, name="head")(h))),
        "a normalised vector (a cosine head, or normalised logits)",
    ),
    "Dense, scaling dot_general": (
        of_linen(lambda h: linen.Dense(C, dot_general_cls=ScalingDot, name="head")(h)),
        "'head' is not a linear layer: it computes more than the product",
    ),
    "Dense, two": (
        of_linen(lambda h: linen.Dense(C, name="a")(h) + linen.Dense(C, name="b")(-h)),
        "several linear layers: 'a', 'b'",
    ),
    "DenseGeneral, batch_dims": (
        of_linen(lambda h: linen.DenseGeneral(C, axis=-1, batch_dims=0, name="head")(h)),
        "a matrix product with the parameter 'head.kernel' (6 x 4 x 3), outside any layer",
    ),
    "Einsum, several heads averaged": (
        of_linen(lambda h: linen.Einsum((2, D, C), "ned,edc->nec", name="head")(jnp.stack([h, -h], 1)).mean(1)),
        "a matrix product with the parameter 'head.kernel' (2 x 4 x 3), outside any layer",
    ),
    "Conv 1x1, pooled after it": (
        of_linen(lambda h: linen.Conv(C, (1,), name="head")(jnp.stack([h, -h], 1)).mean(1)),
        "'head' (a convolution at 2 positions",
    ),
    "Conv, wider": (
        of_linen(lambda h: linen.Conv(C, (2,), padding="VALID", name="head")(jnp.stack([h, -h], 1))[:, 0]),
        "a convolution with the parameter 'head.kernel' (2 x 4 x 3), outside any layer",
    ),
    "parameter, tap without the bias": (
        of_linen(lambda h: (lambda w, b: tap(h @ w + b, h, w))(parameter("w", D, C), parameter("b", C))),
        "tap: something is added to the product of its input and its weight; if that is a bias, it was not given; pass it",
    ),
    "parameter, tap on scaled logits": (
        of_linen(lambda h: (lambda w: tap(0.1 * (h @ w), h, w))(parameter("w", D, C))),
        "tap: it does not end with a product of its input and its weight",
    ),
}


# --- NNX --------------------------------------------------------------------------------------------------------------


class NnxSubclass(nnx.Linear):
    def __call__(self, inputs: Array, scale: float = 1.0) -> Array:
        return super().__call__(inputs)


class NnxScaling(nnx.Linear):
    def __call__(self, inputs: Array) -> Array:
        return 0.5 * super().__call__(inputs)


class NnxRaw(nnx.Module):
    def __init__(self, is_tapped: bool, rngs: nnx.Rngs) -> None:
        self.kernel, self.is_tapped = nnx.Param(jax.random.normal(rngs.params(), (D, C))), is_tapped

    def __call__(self, h: Array) -> Array:
        logits = h @ self.kernel
        return tap(logits, h, self.kernel[...]) if self.is_tapped else logits


class Nnx(nnx.Module):
    def __init__(self, head: Any, call: Callable[[Any, Array], Array], rngs: nnx.Rngs) -> None:
        self.hidden, self.head, self.call = nnx.Linear(D, D, rngs=rngs), head, call

    def __call__(self, x: Array) -> Array:
        return self.call(self.head, jnp.tanh(self.hidden(x)))


def of_nnx(
    head: Callable[[nnx.Rngs], Any], call: Callable[[Any, Array], Array] = lambda head, h: head(h), path: str = "kernel"
) -> Make:
    def make() -> Net:
        rngs = nnx.Rngs(0)
        model = Nnx(head(rngs), call, rngs)
        nnx.update(model, moved(nnx.state(model, nnx.Param)))

        def split(model: Nnx) -> tuple[Any, Callable[[Any], Any]]:
            graph, state = nnx.split(model)
            return state, lambda state: nnx.merge(graph, state)

        return Net(model, model, lambda m, x: m(x), lambda state: parts(state, f"head.{path}")[...], pure=split)

    return make


NNX: dict[str, tuple[Make, str | None]] = {
    "Linear": (of_nnx(lambda rngs: nnx.Linear(D, C, rngs=rngs)), None),
    "Linear, subclass": (of_nnx(lambda rngs: NnxSubclass(D, C, rngs=rngs), lambda head, h: head(h, scale=2.0)), None),
    "LinearGeneral": (of_nnx(lambda rngs: nnx.LinearGeneral(D, C, rngs=rngs)), None),
    "LinearGeneral, two axes in": (
        of_nnx(
            lambda rngs: nnx.LinearGeneral((2, D // 2), C, axis=(-2, -1), rngs=rngs),
            lambda head, h: head(h.reshape(-1, 2, D // 2)),
        ),
        None,
    ),
    "Einsum": (of_nnx(lambda rngs: nnx.Einsum("nd,dc->nc", (D, C), (C,), rngs=rngs)), None),
    "Embed.attend": (
        of_nnx(lambda rngs: nnx.Embed(C, D, rngs=rngs), lambda head, h: head.attend(h), "embedding"),
        None,
    ),
    "Conv 1x1, pooled": (
        of_nnx(lambda rngs: nnx.Conv(D, C, (1, 1), rngs=rngs), lambda head, h: head(h[:, None, None])[:, 0, 0]),
        None,
    ),
    "Param, tap": (of_nnx(lambda rngs: NnxRaw(True, rngs)), None),
    "Param": (of_nnx(lambda rngs: NnxRaw(False, rngs)), "a matrix product with the parameter 'head.kernel' (4 x 3)"),
    "Linear, scaling subclass": (
        of_nnx(lambda rngs: NnxScaling(D, C, rngs=rngs)),
        "'head' is not a linear layer: it does not end with a product",
    ),
    "LoRALinear": (
        of_nnx(lambda rngs: nnx.LoRALinear(D, C, lora_rank=2, rngs=rngs)),
        "'head' is not a linear layer: it computes more",
    ),
    "Conv 1x1, pooled after it": (
        of_nnx(lambda rngs: nnx.Conv(D, C, (1,), rngs=rngs), lambda head, h: head(jnp.stack([h, -h], 1)).mean(1)),
        "'head' (a convolution at 2 positions",
    ),
}


# --- Equinox ----------------------------------------------------------------------------------------------------------


class EqxSubclass(eqx.nn.Linear):
    def __call__(self, x: Array, *, key: Any = None) -> Array:
        return self.weight @ x + self.bias


class EqxScaling(eqx.nn.Linear):
    def __call__(self, x: Array, *, key: Any = None) -> Array:
        return 0.5 * super().__call__(x)


class EqxRaw(eqx.Module):
    weight: Array
    is_tapped: bool

    def __call__(self, h: Array) -> Array:
        logits = self.weight @ h
        return tap(logits, h, self.weight) if self.is_tapped else logits


class Eqx(eqx.Module):
    hidden: eqx.nn.Linear
    head: Any
    call: Callable[[Any, Array], Array] = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.call(self.head, jnp.tanh(self.hidden(x)))


def of_eqx(
    head: Callable[[Array], Any],
    call: Callable[[Any, Array], Array] = lambda head, h: head(h),
    weight: Callable[[Any], Array] = lambda head: head.weight,
) -> Make:
    def make() -> Net:
        model = Eqx(eqx.nn.Linear(D, D, key=jax.random.key(0)), head(jax.random.key(1)), call)

        def split(model: Eqx) -> tuple[Any, Callable[[Any], Any]]:
            arrays, rest = eqx.partition(model, eqx.is_inexact_array)
            return arrays, lambda arrays: eqx.combine(arrays, rest)

        return Net(model, model, lambda m, x: jax.vmap(m)(x), lambda m: weight(m.head), pure=split)

    return make


def eqx_weight_normalised() -> Net:
    net = of_eqx(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(D, C, key=key)))()

    def weight(model: Eqx) -> Array:
        return unit(model.head.layer.weight) * model.head.g

    return net._replace(weight=weight, features=lambda m, x: jnp.tanh(jax.vmap(m.hidden)(x)))


EQUINOX: dict[str, tuple[Make, str | None]] = {
    "Linear": (of_eqx(lambda key: eqx.nn.Linear(D, C, key=key)), None),
    "Linear, subclass": (of_eqx(lambda key: EqxSubclass(D, C, key=key)), None),
    "Linear, WeightNorm": (eqx_weight_normalised, None),
    "MLP": (of_eqx(lambda key: eqx.nn.MLP(D, C, D, 1, key=key), weight=lambda head: head.layers[-1].weight), None),
    "Sequential": (
        of_eqx(
            lambda key: eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(D, C, key=key)]),
            weight=lambda head: head.layers[1].weight,
        ),
        None,
    ),
    "Conv1d 1, pooled": (
        of_eqx(lambda key: eqx.nn.Conv1d(D, C, 1, key=key), lambda head, h: head(h[:, None])[:, 0]),
        None,
    ),
    "array, tap": (of_eqx(lambda key: EqxRaw(jax.random.normal(key, (C, D)), True)), None),
    "array": (
        of_eqx(lambda key: EqxRaw(jax.random.normal(key, (C, D)), False)),
        "a matrix product with the parameter 'head.weight' (3 x 4)",
    ),
    "Embedding, transposed": (
        of_eqx(lambda key: eqx.nn.Embedding(C, D, key=key), lambda head, h: head.weight @ h),
        "a matrix product with the parameter 'head.weight' (3 x 4)",
    ),
    "Linear, scaling subclass": (
        of_eqx(lambda key: EqxScaling(D, C, key=key)),
        "'head' is not a linear layer: it does not end with a product",
    ),
    "Conv1d 1, pooled after it": (
        of_eqx(lambda key: eqx.nn.Conv1d(D, C, 1, key=key), lambda head, h: head(jnp.stack([h, -h], 1)).mean(1)),
        "'head' (a convolution at 2 positions",
    ),
}


# --- Haiku ------------------------------------------------------------------------------------------------------------


class HaikuSubclass(hk.Linear):
    """Adds nothing."""


def of_haiku(head: Callable[[Array], Array], path: str = "head.w") -> Make:
    def make() -> Net:
        def forward(x: Array) -> Array:
            return head(jnp.tanh(hk.Linear(D, name="hidden")(x)))

        model = hk.without_apply_rng(hk.transform(forward))
        params = moved(model.init(jax.random.key(0), X))
        return Net(model, params, model.apply, lambda p: parts(p, path))

    return make


def haiku_parameter(*shape: int) -> Array:
    return hk.get_parameter("w", shape, init=hk.initializers.RandomNormal())


def haiku_channels_first(h: Array) -> Array:
    return hk.Conv2D(C, 1, data_format="NCHW", name="head")(h[:, :, None, None])[:, :, 0, 0]


HAIKU: dict[str, tuple[Make, str | None]] = {
    "Linear": (of_haiku(lambda h: hk.Linear(C, name="head")(h)), None),
    "Linear, subclass": (of_haiku(lambda h: HaikuSubclass(C, name="head")(h)), None),
    "nets.MLP": (of_haiku(lambda h: hk.nets.MLP([D, C], name="mlp")(h), "mlp/~/linear_1.w"), None),
    "Conv2D 1x1, pooled": (of_haiku(lambda h: hk.Conv2D(C, 1, name="head")(h[:, None, None])[:, 0, 0]), None),
    "Conv2D 1x1, channels first": (of_haiku(haiku_channels_first), None),
    "get_parameter, tap": (of_haiku(lambda h: (lambda w: tap(h @ w, h, w))(haiku_parameter(D, C)), "~.w"), None),
    "get_parameter": (
        of_haiku(lambda h: h @ haiku_parameter(D, C)),
        "a matrix product with the parameter '~.w' (4 x 3)",
    ),
    "Embed, transposed": (
        of_haiku(lambda h: h @ hk.Embed(C, D, name="embed").embeddings.T),
        "a matrix product with the parameter 'embed.embeddings' (3 x 4)",
    ),
    "Conv2D 1x1, pooled after it": (
        of_haiku(lambda h: hk.Conv1D(C, 1, name="head")(jnp.stack([h, -h], 1)).mean(1)),
        "'head' (a convolution at 2 positions",
    ),
}


# --- Keras ------------------------------------------------------------------------------------------------------------


class KerasSubclass(keras.layers.Dense):
    """Adds nothing."""


class KerasRaw(keras.layers.Layer):
    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(D, C), name="w")

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, self.w)


def of_keras(*head: Callable[[], Any]) -> Make:
    """The first variable of the last layer that has any is the head's weight."""

    def make() -> Net:
        keras.utils.set_random_seed(0)
        layers = [keras.Input((D,)), keras.layers.Dense(D, activation="tanh", name="hidden"), *(one() for one in head)]
        model = keras.Sequential(layers)
        last = next(layer for layer in reversed(model.layers) if layer.trainable_variables)
        index = [v.path for v in model.trainable_variables].index(last.trainable_variables[0].path)
        params = moved([v.value for v in model.trainable_variables])
        others = [v.value for v in model.non_trainable_variables]

        def logits(params: Any, x: Array) -> Array:
            return model.stateless_call(params, others, x)[0]

        return Net(model, params, logits, lambda p: p[index])

    return make


def keras_lora() -> Net:
    net = of_keras(lambda: keras.layers.Dense(C, lora_rank=2))()
    head = net.model.layers[-1]

    def weight(params: Any) -> Array:
        by_path = dict(zip((v.path for v in net.model.trainable_variables), params, strict=True))
        return head._kernel.value + by_path[head.lora_kernel_a.path] @ by_path[head.lora_kernel_b.path]

    return net._replace(weight=weight, features=lambda p, x: jnp.tanh(x @ p[0] + p[1]))


KERAS: dict[str, tuple[Make, str | None]] = {
    "Dense": (of_keras(lambda: keras.layers.Dense(C)), None),
    "Dense, subclass": (of_keras(lambda: KerasSubclass(C)), None),
    "Dense, LoRA": (keras_lora, None),
    "EinsumDense": (of_keras(lambda: keras.layers.EinsumDense("...x,xy->...y", output_shape=C, bias_axes="y")), None),
    "Conv2D 1x1, pooled": (
        of_keras(
            lambda: keras.layers.Reshape((1, 1, D)), lambda: keras.layers.Conv2D(C, 1), lambda: keras.layers.Flatten()
        ),
        None,
    ),
    "add_weight": (of_keras(KerasRaw), "/w' (4 x 3), outside any layer that can be a head"),
    "Conv1D 1, pooled after it": (
        of_keras(
            lambda: keras.layers.RepeatVector(2), lambda: keras.layers.Conv1D(C, 1), keras.layers.GlobalAveragePooling1D
        ),
        "(a convolution at 2 positions",
    ),
}


# --- the census -------------------------------------------------------------------------------------------------------

CENSUS = {"Linen": LINEN, "NNX": NNX, "Equinox": EQUINOX, "Haiku": HAIKU, "Keras": KERAS}
EXACT = [(library, name) for library, rows in CENSUS.items() for name, row in rows.items() if row[1] is None]
REFUSED = [(library, name) for library, rows in CENSUS.items() for name, row in rows.items() if row[1] is not None]


def scores_of(net: Net, monitor: gwa_logging.Monitor) -> np.ndarray:
    tree, whole = net.pure(net.params)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(net.logits(params, x), y).mean()

    @jax.jit
    def step(tree: Any, x: Array, y: Array) -> Array:
        (_, scores), _ = monitor.value_and_grad(loss)(whole(tree), x, y)
        return scores

    return np.asarray(step(tree, X, Y))


def oracle(net: Net) -> np.ndarray:
    """From the gradient of each sample's own loss by the weight; by hand, delta h^T, where that is not a parameter."""
    tree, whole = net.pure(net.params)
    weight = net.weight(tree)
    if net.features is not None:
        h, logits = net.features(net.params, X), net.logits(net.params, X)
        delta = jax.vmap(jax.grad(cross_entropy))(logits, Y)
        weight = weight if weight.shape == (C, D) else weight.T
        return np.asarray(gwa_logging.alignment_scores(delta, h, weight))

    def gradient(n: Array) -> Array:
        return net.weight(jax.grad(lambda tree: cross_entropy(net.logits(whole(tree), X), Y)[n])(tree)).ravel()

    gradients = jax.jit(jax.vmap(gradient))(jnp.arange(N))
    return np.asarray(-gradients @ weight.ravel() / jnp.linalg.norm(gradients, axis=1) / jnp.linalg.norm(weight))


FAST_EXACT = {
    "Linen": (
        *("Dense", "Dense, learned temperature", "Dense, subclass that calls super()", "Dense of model.bind"),
        *("Dense, the model in nn.remat", "DenseGeneral, two axes in", "Einsum, features first", "Embed.attend"),
        *("Conv 1x1, pooled", "parameter, tap"),
    ),
    "NNX": ("Linear", "LinearGeneral, two axes in", "Embed.attend", "Param, tap"),
    "Equinox": ("Linear", "Linear, WeightNorm", "Sequential", "Conv1d 1, pooled"),
    "Haiku": ("Linear", "Conv2D 1x1, channels first", "get_parameter, tap"),
    "Keras": ("Dense", "Dense, LoRA", "EinsumDense"),
}
"""Of each library: its linear layer, a part of a model, a general product, a convolution, and a parameter."""


@tiered("library, construction", EXACT, fast=[(library, name) for library in CENSUS for name in FAST_EXACT[library]])
def test_a_linear_head_is_found_and_scored_by_each_samples_gradient(library, construction):
    net = CENSUS[library][construction][0]()
    with gwa_logging.watch(net.model) as monitor:
        np.testing.assert_allclose(scores_of(net, monitor), oracle(net), atol=2e-6)


@pytest.mark.parametrize(("library", "construction"), REFUSED)
def test_other_logits_are_refused_with_the_operation_that_made_them_and_no_hidden_layer_is_scored(
    library, construction
):
    make, reason = CENSUS[library][construction]
    net = make()
    with gwa_logging.watch(net.model) as monitor, pytest.raises(HeadNotFoundError) as error:
        scores_of(net, monitor)
    assert reason in str(error.value)


def test_numpy_arrays_in_a_step_without_jit_are_scored_like_those_of_jax():
    model, x, y = linen.Dense(C), np.asarray(X), np.asarray(Y)
    params = jax.tree.map(np.asarray, moved(model.init(jax.random.key(0), x)))
    net = Net(model, jax.tree.map(jnp.asarray, params), model.apply, lambda p: p["params"]["kernel"])
    with gwa_logging.watch(model) as monitor:

        def loss(params: Any) -> Array:
            return cross_entropy(model.apply(params, x), y).sum()

        (_, closed_over), _ = monitor.value_and_grad(loss)(params)
        (_, given), _ = monitor.value_and_grad(lambda p, x: cross_entropy(model.apply(p, x), y).sum())(params, x)
    for scores in (closed_over, given):
        np.testing.assert_allclose(np.asarray(scores), oracle(net), atol=2e-6)


@pytest.mark.parametrize("head", [["a", "b"], ("a", "b")], ids=["list", "tuple"])
def test_a_list_of_heads_is_refused_with_the_remedy(head):
    with pytest.raises(InvalidInputError, match=r"head=\['a', 'b'\]: in JAX a single head is watched.*head='a'"):
        gwa_logging.watch(Tied(), head=head)


def test_a_layer_that_is_not_linear_is_refused_even_if_named():
    net = LINEN["Dense, scaling dot_general"][0]()
    with (
        gwa_logging.watch(net.model, head="head") as monitor,
        pytest.raises(HeadNotFoundError, match="'head' is not a linear layer") as error,
    ):
        scores_of(net, monitor)
    assert error.value.candidates == ("'hidden': 4 -> 4",)


def test_the_published_census_is_this_one():
    rows = [
        f"| {library} | {name} | {'exact' if reason is None else f'refused: {reason}'} |"
        for library, constructions in CENSUS.items()
        for name, (_, reason) in constructions.items()
    ]
    page = (Path(__file__).parents[2] / "docs" / "census.md").read_text()
    assert "\n".join(rows) in page
