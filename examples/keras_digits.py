"""Trains an MLP in Keras 3 on its JAX backend, on scikit-learn's digits, with a share of the training labels flipped.

python examples/keras_digits.py --noise 0.3
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from digits import arguments, batches, load, summary

import gwa_logging


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    rng = np.random.default_rng(args.seed)
    keras.utils.set_random_seed(args.seed)
    layers = [keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(256, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    trainable = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]

    def loss_fn(trainable: list, x: jax.Array, y: jax.Array) -> jax.Array:
        predicted, _ = model.stateless_call(trainable, [], x, training=True)
        return loss_of(y, predicted)

    monitor = gwa_logging.watch(model, backend=args.backend.split(","), log_every_n_steps=5, num_samples=len(data.y))
    value_and_grad = monitor.value_and_grad(loss_fn)  # replaces jax.value_and_grad(loss_fn)
    accuracies = []

    @jax.jit
    def train_step(trainable: list, state: list, x: jax.Array, y: jax.Array) -> tuple[list, list, jax.Array]:
        (_, scores), grads = value_and_grad(trainable, x, y)
        return *optimizer.stateless_apply(state, grads, trainable), scores

    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(data.y), 64, rng):
                trainable, state, scores = train_step(trainable, state, data.x[batch], data.y[batch])
                monitor.update(scores, batch)
            predicted, _ = model.stateless_call(trainable, [], data.x_test)
            accuracies.append(float((predicted.argmax(1) == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
