"""Trains an MLP in Flax Linen on scikit-learn's digits, with a share of the training labels flipped.

python examples/jax_digits.py --backend mlflow --noise 0.3
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import arguments, batches, load, summary
from flax import linen as nn

import gwa_logging


class MLP(nn.Module):
    """Two hidden layers and a classifier head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for width in (256, 128):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10, name="head")(x)


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    rng = np.random.default_rng(args.seed)
    model = MLP()
    params = model.init(jax.random.key(args.seed), data.x[:1])
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)
    accuracies = []

    monitor = gwa_logging.watch(
        model,
        backend=args.backend.split(","),
        early_stop=gwa_logging.EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
        num_samples=len(data.y),
    )

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    value_and_grad = monitor.value_and_grad(loss_fn)

    @jax.jit
    def train_step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, scores), grads = value_and_grad(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, scores

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        return (model.apply(params, data.x_test).argmax(1) == jnp.asarray(data.y_test)).mean()

    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(data.y), 64, rng):
                params, opt_state, scores = train_step(params, opt_state, data.x[batch], data.y[batch])
                monitor.update(scores, batch)
            accuracies.append(float(accuracy(params)))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
