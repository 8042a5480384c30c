"""Trains an MLP with Keras's `fit` on scikit-learn's digits, with a share of the training labels flipped.

KERAS_BACKEND=torch python examples/keras_fit_digits.py --noise 0.3
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from digits import arguments, load, summary

from gwa_logging import EarlyStop
from gwa_logging.integrations.keras import GWACallback


def main() -> None:
    args = arguments(__doc__)
    data = load(args.noise, args.seed)
    keras.utils.set_random_seed(args.seed)
    layers = [keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(256, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    callback = GWACallback(
        backend=args.backend.split(","),
        early_stop=EarlyStop(action="stop" if args.stop else "alert"),
        log_every_n_steps=5,
    )
    held_out = data.x_test, data.y_test
    fitted = model.fit(
        data.x, data.y, batch_size=64, epochs=args.epochs, validation_data=held_out, callbacks=[callback], verbose=2
    )
    # `fit` does not pass the ids of a batch's samples; keras_digits.py has a custom loop and also finds the wrong labels.
    summary(callback.monitor, fitted.history["val_accuracy"], data.flipped[:0])


if __name__ == "__main__":
    main()
