"""Trains an MLP in Equinox on scikit-learn's digits, with a share of the training labels flipped.

python examples/equinox_digits.py --noise 0.3
"""

import equinox as eqx
import jax
import numpy as np
import optax
from digits import arguments, batches, load, summary

import gwa_logging


def loss_fn(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    x, x_test = (images.reshape(len(images), -1) for images in (data.x, data.x_test))
    rng = np.random.default_rng(args.seed)
    model = eqx.nn.MLP(64, 10, 256, 1, key=jax.random.key(args.seed))
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
    monitor = gwa_logging.watch(model, backend=args.backend.split(","), log_every_n_steps=5, num_samples=len(data.y))
    value_and_grad = monitor.value_and_grad(loss_fn)  # replaces eqx.filter_value_and_grad(loss_fn)
    accuracies = []

    @eqx.filter_jit
    def train_step(model, opt_state, x, y):
        (_, scores), grads = value_and_grad(model, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, scores

    with monitor:
        for _ in monitor.epochs(args.epochs):
            for batch in batches(len(data.y), 64, rng):
                model, opt_state, scores = train_step(model, opt_state, x[batch], data.y[batch])
                monitor.update(scores, batch)
            accuracies.append(float((jax.vmap(model)(x_test).argmax(1) == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
