"""Run by test_linear_cross_entropy.py: one step of a head inside `linear_cross_entropy` on 4 devices, sharded in each way."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gwa_logging
from gwa_logging.integrations.jax import linear_cross_entropy

B, T, D, V = 8, 6, 16, 44
a, b, c, d = jax.random.split(jax.random.key(0), 4)
HIDDEN, TARGET = jax.random.normal(a, (B, T, D)), jax.random.randint(b, (B, T), 0, V)
WEIGHT, BIAS = jax.random.normal(c, (D, V)) / 4, jax.random.normal(d, (V,))
TARGET = TARGET.at[:, 0].set(-100)
WHOLE = HIDDEN, WEIGHT, BIAS, TARGET


def loss(hidden, weight, bias, target):
    return linear_cross_entropy(hidden, weight, target, bias, chunk=12)


def loss_by_row(hidden, weight, bias, target):
    losses = linear_cross_entropy(hidden, weight, target, bias, chunk=12, reduction="none")
    return losses.sum() / (target >= 0).sum()


def result(step, arrays):
    with gwa_logging.watch(step) as monitor:
        (value, scores), grads = jax.jit(monitor.value_and_grad(step, argnums=(0, 1, 2)))(*arrays)
        monitor.update(scores)
        count = monitor.end_epoch().count
    return as_dict(value, scores, grads, count)


def as_dict(value, scores, grads, count):
    spec = [str(part) for part in getattr(scores.sharding, "spec", ())]
    numbers = [np.asarray(array).ravel().tolist() for array in (value, jnp.nan_to_num(scores, nan=7.0), *grads)]
    return {"numbers": numbers, "count": count, "spec": spec}


def placed(mesh, *specs):
    return tuple(jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(WHOLE, specs, strict=True))


ROWS = P("d")


def batch(step, kind):
    mesh = jax.make_mesh((4,), ("d",), (kind,))
    with jax.set_mesh(mesh):
        return result(step, placed(mesh, ROWS, P(), P(), ROWS))


def vocabulary(step, kind):
    mesh = jax.make_mesh((2, 2), ("d", "m"), (kind,) * 2)
    with jax.set_mesh(mesh):
        return result(step, placed(mesh, ROWS, P(None, "m"), P("m"), ROWS))


def features(step, kind):
    """As in fully sharded data parallelism: the weight is sharded over the axis of the batch."""
    mesh = jax.make_mesh((4,), ("d",), (kind,))
    with jax.set_mesh(mesh):
        return result(step, placed(mesh, ROWS, P("d"), P(), ROWS))


def sequence(step, kind):
    mesh = jax.make_mesh((2, 2), ("d", "s"), (kind,) * 2)
    with jax.set_mesh(mesh):
        return result(step, placed(mesh, P("d", "s"), P(), P(), P("d", "s")))


def shard_map(step):
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    with gwa_logging.watch(step) as monitor:
        value_and_grad = monitor.value_and_grad(step, argnums=(0, 1, 2))

        def local(hidden, weight, bias, target):
            (value, scores), (by_hidden, by_weight, by_bias) = value_and_grad(hidden, weight, bias, target)
            # JAX sums the gradients of what is the same on all devices
            return jax.lax.pmean(value, "d"), scores, (by_hidden / 4, by_weight / 4, by_bias / 4)

        out = (P(), ROWS, (ROWS, P(), P()))
        run = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, P(), P(), ROWS), out_specs=out)
        value, scores, grads = jax.jit(run)(*WHOLE)
        monitor.update(scores)
        count = monitor.end_epoch().count
    return as_dict(value, scores, grads, count)


def partly_manual(step):
    """The batch is mapped by shard_map, and XLA shards the vocabulary inside."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), (AxisType.Auto,) * 2)
    with gwa_logging.watch(step) as monitor:
        value_and_grad = monitor.value_and_grad(step, argnums=(0, 1, 2))

        def local(hidden, weight, bias, target):
            (value, scores), (by_hidden, by_weight, by_bias) = value_and_grad(hidden, weight, bias, target)
            return jax.lax.pmean(value, "d"), scores, (by_hidden / 2, by_weight / 2, by_bias / 2)

        out = (P(), ROWS, (ROWS, P(), P()))
        run = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, P(), P(), ROWS), out_specs=out, axis_names={"d"})
        value, scores, grads = jax.jit(run)(*placed(mesh, ROWS, P(None, "m"), P("m"), ROWS))
        monitor.update(scores)
        count = monitor.end_epoch().count
    return as_dict(value, scores, grads, count)


def part_of_the_vocabulary():
    """The loss inside shard_map where each device holds a part of the vocabulary."""
    mesh = jax.make_mesh((4,), ("m",), (AxisType.Auto,))
    run = jax.shard_map(
        lambda *arrays: jax.lax.pmean(loss(*arrays), "m"),
        mesh=mesh,
        in_specs=(P(), P(None, "m"), P("m"), P()),
        out_specs=P(),
    )
    return jax.jit(run)(*WHOLE)


if __name__ == "__main__":
    assert jax.device_count() == 4
    assert jnp.isnan(part_of_the_vocabulary())
    results = {}
    for step in (loss, loss_by_row):
        results[f"one device, {step.__name__}"] = result(step, WHOLE)
        results[f"shard_map, {step.__name__}"] = shard_map(step)
        results[f"shard_map of the batch alone, {step.__name__}"] = partly_manual(step)
        for way in (batch, vocabulary, features, sequence):
            for kind in (AxisType.Auto, AxisType.Explicit):
                results[f"{way.__name__}, {kind.name.lower()}, {step.__name__}"] = way(step, kind)
    sys.stdout.write(json.dumps(results))
