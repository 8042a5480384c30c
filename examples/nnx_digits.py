"""Trains an MLP in Flax NNX on scikit-learn's digits, with a share of the training labels flipped.

python examples/nnx_digits.py --noise 0.3
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import arguments, batches, load, summary
from flax import nnx

import gwa_logging


class MLP(nnx.Module):
    """A hidden layer and a classifier head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body, self.head = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.body(x.reshape(len(x), -1))))


def loss_fn(model: MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    rng = np.random.default_rng(args.seed)
    model = MLP(nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    monitor = gwa_logging.watch(model, backend=args.backend.split(","), log_every_n_steps=5, num_samples=len(data.y))
    value_and_grad = monitor.value_and_grad(loss_fn)  # replaces nnx.value_and_grad(loss_fn)
    accuracies = []

    @nnx.jit
    def train_step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        (_, scores), grads = value_and_grad(model, x, y)
        optimizer.update(model, grads)
        return scores

    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(data.y), 64, rng):
                monitor.update(train_step(model, optimizer, data.x[batch], data.y[batch]), batch)
            accuracies.append(float((model(jnp.asarray(data.x_test)).argmax(1) == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
