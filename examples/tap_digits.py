"""Trains a hand-written JAX network on scikit-learn's digits; `tap` marks its classifier head.

python examples/tap_digits.py --noise 0.3
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import arguments, batches, load, summary

import gwa_logging
from gwa_logging.integrations.jax import tap

Params = dict[str, Any]


def predict(params: Params, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    return tap(h @ params["w2"] + params["b2"], h, params["w2"], params["b2"])


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    x, x_test = (images.reshape(len(images), -1) for images in (data.x, data.x_test))
    rng = np.random.default_rng(args.seed)
    first, second = jax.random.split(jax.random.key(args.seed))
    params = {
        "w1": jax.random.normal(first, (64, 256)) / 8,
        "b1": jnp.zeros(256),
        "w2": jax.random.normal(second, (256, 10)) / 16,
        "b2": jnp.zeros(10),
    }
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)
    monitor = gwa_logging.watch(predict, backend=args.backend.split(","), log_every_n_steps=5, num_samples=len(data.y))
    value_and_grad = monitor.value_and_grad(loss_fn)  # replaces jax.value_and_grad(loss_fn)
    accuracies = []

    @jax.jit
    def train_step(params, opt_state, x, y):
        (_, scores), grads = value_and_grad(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, scores

    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(data.y), 64, rng):
                params, opt_state, scores = train_step(params, opt_state, x[batch], data.y[batch])
                monitor.update(scores, batch)
            accuracies.append(float((predict(params, x_test).argmax(1) == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
