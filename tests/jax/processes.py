"""One of two processes: trains with global arrays and with arrays of its own; prints results as JSON. See test_processes.py."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gwa_logging

COUNT = 2
number, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", COUNT, number, initialization_timeout=60)

model = nn.Dense(5)
x, y = np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32), np.arange(32) % 5
params = {
    "params": {"kernel": np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32), "bias": np.zeros(5, "f")}
}


def loss(params, x, y):
    return -(jax.nn.log_softmax(model.apply(params, x)) * jax.nn.one_hot(y, 5)).sum(-1).mean()


def trained(scores_of, epochs: int = 4) -> dict:
    rule = gwa_logging.EarlyStop(warmup=0, patience=2, min_delta=1e9, drop=0, action="stop")
    with gwa_logging.watch(model, early_stop=rule) as monitor:
        step = jax.jit(monitor.value_and_grad(loss))
        for _ in monitor.epochs(epochs):
            monitor.update(scores_of(step))
        report = monitor.history[0]
        return {
            "report": {k: getattr(report, k) for k in ("count", "mean", "std", "excess_kurtosis", "gwa", "stable_gwa")},
            "bins": report.histogram.dense().tolist(),
            "epochs": len(monitor.history),
            "journal": None if monitor.journal is None else str(monitor.journal),
            "faults": monitor.faults,
        }


def with_global_arrays(step):
    mesh = jax.make_mesh((COUNT,), ("d",), (AxisType.Auto,))
    half = slice(16 * number, 16 * (number + 1))
    over = NamedSharding(mesh, P("d"))
    parts = (jax.make_array_from_process_local_data(over, part[half]) for part in (x, y))
    (_, scores), _ = step(params, *parts)
    assert not scores.is_fully_addressable
    return scores


def with_arrays_of_its_own(step):
    half = slice(16 * number, 16 * (number + 1))
    (_, scores), _ = step(params, jnp.asarray(x[half]), jnp.asarray(y[half]))
    return scores


out = {"global": trained(with_global_arrays), "own": trained(with_arrays_of_its_own)}
Path(f"result{number}.json").write_text(json.dumps(out))
jax.distributed.shutdown()
