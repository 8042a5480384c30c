"""Run by test_sharding.py: trains one step of a net of C classes on N host devices, sharded in each way; prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gwa_logging

DEVICES, CLASSES = map(int, sys.argv[1:])


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(12)(x)))


MODEL = MLP()
X, Y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.randint(jax.random.key(2), (32,), 0, CLASSES)
PARAMS = MODEL.init(jax.random.key(0), X)


def loss(params, x, y):
    return -(jax.nn.log_softmax(MODEL.apply(params, x)) * jax.nn.one_hot(y, CLASSES)).sum(-1).mean()


def result(monitor: gwa_logging.Monitor, scores: jax.Array) -> dict:
    monitor.update(scores, np.arange(32))
    monitor.flush()
    for _ in range(3):
        monitor.update(scores)
    report = monitor.end_epoch()
    spec = [str(part) for part in getattr(scores.sharding, "spec", ())]
    return {
        "scores": np.asarray(scores).ravel().tolist(),
        "spec": spec,
        "report": {k: getattr(report, k) for k in ("count", "mean", "std", "excess_kurtosis", "gwa", "stable_gwa")},
        "bins": report.histogram.dense().tolist(),
        "seen": sum(suspect.times_seen for suspect in monitor.suspects(32)),
        "faults": monitor.faults,
    }


def one_device(monitor):
    (_, scores), _ = jax.jit(monitor.value_and_grad(loss))(PARAMS, X, Y)
    return result(monitor, scores)


def placed(mesh):
    over = NamedSharding(mesh, P("d"))
    return jax.device_put(PARAMS, NamedSharding(mesh, P())), jax.device_put(X, over), jax.device_put(Y, over)


def auto(monitor):
    (_, scores), _ = jax.jit(monitor.value_and_grad(loss))(*placed(jax.make_mesh((DEVICES,), ("d",), (AxisType.Auto,))))
    return result(monitor, scores)


def explicit(monitor):
    mesh = jax.make_mesh((DEVICES,), ("d",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        (_, scores), _ = jax.jit(monitor.value_and_grad(loss))(*placed(mesh))
        return result(monitor, scores)


def shard_map(monitor):
    value_and_grad = monitor.value_and_grad(loss)

    def local(params, x, y):
        (value, scores), grads = value_and_grad(params, x, y)
        return jax.lax.pmean(value, "d"), scores, jax.lax.pmean(grads, "d")

    mesh = jax.make_mesh((DEVICES,), ("d",), (AxisType.Auto,))
    step = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=(P(), P("d"), P()))
    return result(monitor, jax.jit(step)(PARAMS, X, Y)[1])


def pmap(monitor):
    step = jax.pmap(monitor.value_and_grad(loss), in_axes=(None, 0, 0))
    (_, scores), _ = step(PARAMS, X.reshape(DEVICES, -1, 8), Y.reshape(DEVICES, -1))
    return result(monitor, scores)


def tensor_parallel_head(monitor):
    mesh = jax.make_mesh((2, DEVICES // 2), ("d", "m"), (AxisType.Auto,) * 2)
    params, x, y = placed(mesh)
    parts = {"kernel": NamedSharding(mesh, P(None, "m")), "bias": NamedSharding(mesh, P("m"))}
    params = {"params": {**params["params"], "head": jax.device_put(PARAMS["params"]["head"], parts)}}
    (_, scores), _ = jax.jit(monitor.value_and_grad(loss))(params, x, y)
    return result(monitor, scores)


if __name__ == "__main__":
    assert jnp.asarray(jax.device_count()) == DEVICES
    out = {}
    for way in (one_device, auto, explicit, shard_map, pmap, tensor_parallel_head):
        with gwa_logging.watch(MODEL, num_samples=32) as watching:
            out[way.__name__] = way(watching)
    sys.stdout.write(json.dumps(out))
