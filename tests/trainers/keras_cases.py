"""Tests of the callback for Keras, for both of its backends; test_keras.py runs them in one process per backend."""

import keras
import numpy as np
import pytest
import torch
from torch import nn

from gwa_logging import EarlyStop, HeadNotFoundError, InvalidInputError
from gwa_logging.integrations.keras import GWACallback
from tests.trainers.tasks import (
    BATCH,
    CLASSES,
    EPOCHS,
    FEATURES,
    RATE,
    assert_adds_only_its_session,
    assert_closed,
    assert_equal,
    plain,
    samples,
)

BACKEND = keras.backend.backend()
X, Y = samples()
PLAIN = {"batch_size": BATCH, "shuffle": False, "verbose": 0}


def slow_in_jax(test):
    """Marks a test that is slow with JAX, since XLA compiles the step of every fit."""
    return pytest.mark.slow(test) if BACKEND == "jax" else test


def make(activation=None, model=keras.Sequential, **compiling):
    keras.utils.set_random_seed(0)
    head = keras.layers.Dense(CLASSES, activation=activation, name="head")
    made = model([keras.Input((FEATURES,)), keras.layers.Dense(16, "tanh"), head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    made.compile(keras.optimizers.SGD(RATE), loss, metrics=["accuracy"], **compiling)
    return made


def fit(model, *callbacks, epochs=EPOCHS, **arguments):
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **PLAIN | arguments)


def copy_to_pytorch(model):
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        for layer, twin in zip(model.layers, (net[0], net[2]), strict=True):
            for values, parameter in zip(layer.get_weights(), (twin.weight, twin.bias), strict=True):
                parameter.copy_(torch.from_numpy(values.T))
    return net


@pytest.mark.parametrize(
    "activation",
    [pytest.param(None, marks=[pytest.mark.slow] if BACKEND == "jax" else []), "softmax"],
    ids=["logits", "fused softmax"],
)
def test_statistics_equal_those_of_the_plain_loop_and_nothing_else_changes(activation):
    callback, model, bare = GWACallback(log_every_n_steps=1), make(activation), make(activation)
    before = set(vars(model.layers[-1])) | set(vars(model))
    expected = plain(copy_to_pytorch(model))[0]
    history, bare_history = fit(model, callback).history, fit(bare).history
    assert_equal(callback.monitor.history, expected, abs=3e-6, rel=1e-4)  # float32 in another order
    assert [r.mean for r in callback.monitor.history] == pytest.approx([r.mean for r in expected], abs=1e-6)
    assert {key: history[key] for key in bare_history} == bare_history
    assert all(map(np.array_equal, model.get_weights(), bare.get_weights()))
    assert history["gwa/gwa"] == [report.gwa for report in callback.monitor.history]
    assert set(vars(model.layers[-1])) | set(vars(model)) <= before | set(vars(bare))
    assert model.layers[-1].call.__func__ is keras.layers.Dense.call
    assert callback.monitor.faults == {}
    fit(model)  # without the callback, as before
    fit(bare)
    assert all(map(np.array_equal, model.get_weights(), bare.get_weights()))


def test_the_consensus_equals_that_of_the_plain_loop_in_pytorch():
    if BACKEND == "jax":
        with pytest.raises(InvalidInputError, match="look: in JAX the monitor does not have the parameters"):
            fit(make(), GWACallback(look=X))
        return
    callback, model = GWACallback(look=X), make()
    expected = plain(copy_to_pytorch(model), look=X)[0]
    fit(model, callback)
    found = [report.consensus for report in callback.monitor.history]
    assert found == pytest.approx([report.consensus for report in expected], abs=0.02)  # float32 in another order
    assert found[0] is None
    assert callback.monitor.faults == {}


def test_the_callback_adds_nothing_but_its_session_and_monitor():
    assert_adds_only_its_session(GWACallback(), keras.callbacks.Callback)


@slow_in_jax
def test_the_progress_bar_shows_gwa(capsys):
    fit(make(), GWACallback(name="align"), verbose=2)
    assert "align/gwa: " in capsys.readouterr().out


RULE = {"warmup": 0, "patience": 1, "min_delta": 1e9, "drop": 0}  # fires in epoch 1


@slow_in_jax
def test_the_alert_stops_the_fit_only_with_action_stop():
    alerted, stopped = (
        GWACallback(early_stop=EarlyStop(**RULE)),
        GWACallback(early_stop=EarlyStop(action="stop", **RULE)),
    )
    fit(make(), alerted)
    fit(make(), stopped)
    assert alerted.monitor.alert is not None
    assert len(alerted.monitor.history) == EPOCHS
    assert len(stopped.monitor.history) == 2


class Interruption(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


def test_a_fit_resumed_from_a_backup_equals_an_uninterrupted_one(caplog):
    whole = GWACallback()
    fit(make(), whole)

    def backed_up(*callbacks):
        callback = GWACallback(backup_dir="backup")
        fit(make(), keras.callbacks.BackupAndRestore("backup"), *callbacks, callback)
        return callback

    with pytest.raises(InterruptedError):
        backed_up(Interruption())
    assert_equal(backed_up().monitor.history, whole.monitor.history)
    # The interrupted fit of this process has not closed its monitor.
    assert all("the journal of the state's run is not continued" in record.getMessage() for record in caplog.records)
    fit(make(), callback := GWACallback(backup_dir="nothing"), initial_epoch=1)
    assert "GWA starts again from zero" in caplog.text
    assert len(callback.monitor.history) == EPOCHS - 1


@slow_in_jax
def test_a_checkpoint_can_monitor_gwa_and_contains_plain_layers_only():
    callback, model = GWACallback(), make("softmax")
    following = {"monitor": "gwa/stable", "mode": "max", "save_best_only": True}
    best = keras.callbacks.ModelCheckpoint("best.keras", **following)
    fit(model, callback, best, keras.callbacks.ModelCheckpoint("{epoch}.keras"))
    assert best.best == max(report.stable_gwa for report in callback.monitor.history)
    loaded = keras.models.load_model(f"{EPOCHS}.keras")
    assert type(loaded.layers[-1]) is keras.layers.Dense
    assert np.array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


@slow_in_jax
def test_an_interrupted_fit_does_not_affect_the_next_one():
    model = make()
    with pytest.raises(InterruptedError):
        fit(model, GWACallback(), Interruption())
    model.set_weights(make().get_weights())
    callback = GWACallback()
    fit(model, callback)
    whole = GWACallback()
    fit(make(), whole)
    assert_equal(callback.monitor.history, whole.monitor.history)


class Subclass(keras.Model):
    def __init__(self, layers):
        super().__init__()
        self.parts = layers[1:]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@slow_in_jax
def test_a_subclassed_model_is_watched_if_its_head_is_named():
    model = make(model=Subclass)
    model.build((None, FEATURES))
    if BACKEND == "torch":
        with pytest.raises(HeadNotFoundError, match=r"no graph from its inputs[\s\S]*/head'"):
            fit(model, GWACallback())
    callback, expected = GWACallback(head=model.parts[-1].path), GWACallback()
    fit(model, callback)
    fit(make(), expected)
    assert_equal(callback.monitor.history, expected.monitor.history)


class OwnStep(keras.Sequential):
    """Overrides train_step, as Keras's guide to JAX shows."""

    def train_step(self, state, data):
        import jax

        trainable, others, optimizer, metrics = state
        gradient = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (loss, (_, _, others, metrics)), grads = gradient(
            trainable, others, metrics, *data, None, training=True, optimizer_variables=optimizer
        )
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
        return {"loss": loss}, (trainable, others, optimizer, metrics)


class NoGradient(OwnStep):
    def train_step(self, state, data):
        return {"loss": 0.0}, state


@pytest.mark.skipif(BACKEND != "jax", reason="a train step of JAX")
def test_an_overridden_train_step_is_watched_or_refused():
    callback, expected = GWACallback(), GWACallback()
    fit(make(model=OwnStep), callback)
    fit(make(), expected)
    assert_equal(callback.monitor.history, expected.monitor.history)
    with pytest.raises(InvalidInputError, match=r"calls jax\.value_and_grad 0 times"):
        fit(make(model=NoGradient), GWACallback())
    with pytest.raises(InvalidInputError, match="steps_per_execution=2"):
        fit(make(steps_per_execution=2), GWACallback())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_before_the_fit(monkeypatch):
    with pytest.raises(InvalidInputError, match="did you mean 'log_every_n_steps'"):
        GWACallback(log_every_n_step=3)
    with pytest.raises(InvalidInputError, match="num_samples=9: Keras's fit does not reveal"):
        GWACallback(num_samples=9)
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(InvalidInputError, match=r"'tensorflow'.*KERAS_BACKEND=torch"):
        GWACallback()


def test_two_callbacks_in_one_fit_are_refused():
    with pytest.raises(InvalidInputError, match="this trainer has two of them"):
        fit(make(), GWACallback(), GWACallback())


def test_a_fit_without_training_steps_closes_the_monitor():
    callback = GWACallback()
    fit(make(), callback, epochs=0)
    assert_closed(callback.monitor)


@slow_in_jax
def test_another_model_starts_from_zero():
    callback, expected = GWACallback(), GWACallback()
    fit(make(), callback)
    fit(make(), callback, epochs=2)
    fit(make(), expected, epochs=2)
    assert_equal(callback.monitor.history, expected.monitor.history)


def test_a_head_other_than_a_dense_layer_is_refused():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((FEATURES,)), keras.layers.Reshape((FEATURES, 1)), keras.layers.Conv1D(CLASSES, FEATURES)]
    model = keras.Sequential([*layers, keras.layers.Flatten()])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(HeadNotFoundError):
        fit(model, GWACallback())


@slow_in_jax
def test_the_best_weights_can_be_restored_after_the_fit():
    kept = {}

    class Copies(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept[epoch] = self.model.get_weights()

    model = make("softmax")
    callback = GWACallback(keep_best=True, early_stop=EarlyStop(warmup=0))
    fit(model, callback, Copies())
    assert all(map(np.array_equal, model.get_weights(), kept[EPOCHS - 1])), "an epoch's end sees its last step"
    best = [report.epoch for report in callback.monitor.history if report.is_best][-1]
    model.layers[-1].set_weights([np.zeros_like(weight) for weight in model.layers[-1].get_weights()])
    assert callback.monitor.restore_best() == best
    assert all(map(np.array_equal, model.get_weights(), kept[best]))
    assert not callback.monitor.faults
    assert np.isfinite(fit(model, epochs=1).history["loss"][0])  # it can be trained on


def test_an_average_is_left_to_keras():
    with pytest.raises(InvalidInputError, match=r"keep_best='averaged': .*use_ema=True"):
        GWACallback(keep_best="averaged")
