"""Trains an MLP in Haiku on scikit-learn's digits, with a share of the training labels flipped.

python examples/haiku_digits.py --noise 0.3
"""

import haiku as hk
import jax
import numpy as np
import optax
from digits import arguments, batches, load, summary

import gwa_logging

model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([256, 10])(hk.Flatten()(x))))


def loss_fn(params: hk.Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    rng = np.random.default_rng(args.seed)
    params = model.init(jax.random.key(args.seed), data.x[:1])
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)
    monitor = gwa_logging.watch(model, backend=args.backend.split(","), log_every_n_steps=5, num_samples=len(data.y))
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
                params, opt_state, scores = train_step(params, opt_state, data.x[batch], data.y[batch])
                monitor.update(scores, batch)
            accuracies.append(float((model.apply(params, data.x_test).argmax(1) == data.y_test).mean()))
    summary(monitor, accuracies, data.flipped)


if __name__ == "__main__":
    main()
