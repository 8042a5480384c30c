"""Keras 3 on its JAX backend: scores against each sample's own gradient, and nothing else changed."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import gwa_logging

X, Y = jax.random.normal(jax.random.key(1), (24, 8)), jax.random.randint(jax.random.key(2), (24,), 0, 5)


def make(activation: str | None, classes: int = 5) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(12, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(classes, activation=activation),
    ]
    return keras.Sequential(layers)


@pytest.mark.parametrize(
    ("activation", "classes"),
    [
        pytest.param(None, 5, id="logits, narrow"),
        pytest.param("softmax", 40, id="probabilities, wide", marks=pytest.mark.slow),
        pytest.param(None, 40, id="logits, wide", marks=pytest.mark.slow),
        pytest.param("softmax", 5, id="probabilities, narrow", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fully_optimised")
def test_scores_equal_each_samples_own_gradient_and_the_rest_is_bit_identical(activation, classes):
    model = make(activation, classes)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)

    def loss(trainable, others, x, y):
        predicted, others = model.stateless_call(trainable, others, x, training=True)
        return loss_of(y, predicted), (others, predicted)

    state = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    head = model.layers[-1]
    before = dict(vars(head))
    with gwa_logging.watch(model) as monitor:
        ((value, aux), scores), grads = jax.jit(monitor.value_and_grad(loss, has_aux=True))(*state, X, Y)
        monitor.update(scores)
        assert monitor.end_epoch().count == 24
        assert repr(head.path) in repr(monitor)
    bare = jax.jit(jax.value_and_grad(loss, has_aux=True))(*state, X, Y)
    got, want = jax.tree.leaves(((value, aux), grads)), jax.tree.leaves(bare)
    assert all(jnp.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert type(head) is keras.layers.Dense
    assert vars(head).keys() == before.keys()

    # The oracle: with z = W h + b, the gradient of one row of the loss by W is h times that by z, in NumPy.
    embeddings = keras.Model(model.inputs, head.input)
    h = embeddings.stateless_call(state[0][:-2], state[1], X, training=True)[0]
    z = h @ head.kernel.value + head.bias.value
    delta = jax.grad(lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), Y[:, None], 1).mean())(z)
    np.testing.assert_allclose(scores, gwa_logging.alignment_scores(delta, h, head.kernel.value.T), atol=2e-6)


def test_another_backend_is_refused_with_the_remedy(tmp_path):
    program = (
        "import sys, types, os\n"
        "os.environ['KERAS_BACKEND'] = 'numpy'\n"
        "import keras, gwa_logging\n"
        "gwa_logging.watch(keras.Sequential([keras.Input((8,)), keras.layers.Dense(5)]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Keras runs on the 'numpy' backend" in run.stderr
    assert "KERAS_BACKEND=jax" in run.stderr
