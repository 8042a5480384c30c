"""Run by test_processes.py as one of two processes: trains with global arrays and with its own; writes the results as JSON."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gwa_logging
from gwa_logging import ranks

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.agreement import N as SAMPLES
from tests.agreement import random_epochs

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


def with_own_arrays(step):
    half = slice(16 * number, 16 * (number + 1))
    (_, scores), _ = step(params, jnp.asarray(x[half]), jnp.asarray(y[half]))
    return scores


def with_a_flush_in_one_process() -> dict:
    """Only the first process flushes, between steps whose scores are global arrays."""
    with gwa_logging.watch(model) as monitor:
        step = jax.jit(monitor.value_and_grad(loss))
        for i in range(9):
            monitor.update(with_global_arrays(step))
            if i == 4 and number == 0:
                monitor.flush()
        return {"count": monitor.end_epoch().count, "faults": monitor.faults}


def with_different_heads() -> dict:
    """The first process trains five classes on 16 samples, the second one seven on 12."""
    classes, size = (7, 12) if number else (5, 16)
    own = nn.Dense(classes)
    start = own.init(jax.random.key(0), x)

    def its_loss(params, x, y):
        return -(jax.nn.log_softmax(own.apply(params, x)) * jax.nn.one_hot(y, classes)).sum(-1).mean()

    with gwa_logging.watch(own) as monitor:
        (_, scores), _ = monitor.value_and_grad(its_loss)(start, x[:size], y[:size])
        monitor.update(scores)
        report = monitor.end_epoch()
    return {"count": report.count, "notes": report.notes, "faults": monitor.faults}


def with_windows_of_samples() -> str | None:
    """Returns the error. The processes would close their windows, and gather their summaries, at different steps."""
    try:
        gwa_logging.watch(model, samples_per_epoch=8).close()
    except gwa_logging.InvalidInputError as error:
        return str(error)
    return None


def with_documents() -> dict:
    """The first process has documents, the second one predictions; a sample of each is also in the other."""
    with gwa_logging.watch(model, num_samples=8) as monitor:
        if number:
            monitor.update(jnp.array([0.25, -0.5]), np.array([3, 7]), predicted=np.array([1, 2]))
        else:
            monitor.update(jnp.array([[0.5, -0.25, 0.5], [0.25, 0.75, -0.5]]), np.array([[3, 3, 2], [3, 2, -1]]))
        suspects = monitor.suspects(8)
    return {"faults": monitor.faults, "suspects": [suspect.model_dump() for suspect in suspects]}


def until_the_alert() -> dict:
    """Each process has half of every epoch's scores. The alert fires in epoch 3."""
    rule = gwa_logging.EarlyStop(statistic="agreement", patience=1, min_delta=1e9, drop=0)
    with gwa_logging.watch(model, num_samples=SAMPLES, early_stop=rule) as monitor:
        for batches in random_epochs(0):
            for scores, ids in batches:
                monitor.update(jnp.asarray(scores[number::COUNT]), ids[number::COUNT])
            monitor.end_epoch()
        lists = [monitor.suspects(SAMPLES), monitor.suspects(SAMPLES, whole_run=True)]
    return {
        "agreement": [report.agreement for report in monitor.history],
        "alert": monitor.alert and monitor.alert.epoch,
        "times_seen": [sum(suspect.times_seen for suspect in suspects) for suspects in lists],
        "faults": monitor.faults,
    }


def watched_by_the_first() -> dict | None:
    """The second process never calls watch()."""
    ranks.WATCHED_WITHIN = 0.5
    if number:
        return None
    with gwa_logging.watch(model, num_samples=32) as monitor:
        (_, scores), _ = monitor.value_and_grad(loss)(params, x, y)
        monitor.update(scores, np.arange(32))
        report, suspects = monitor.end_epoch(), monitor.suspects(32)
    return {"count": report.count, "notes": report.notes, "faults": monitor.faults, "suspects": len(suspects)}


def beside_a_process_that_dies() -> dict:
    """The second process dies after its first epoch."""
    own = slice(16 * number, 16 * (number + 1))
    with gwa_logging.watch(model, num_samples=32) as monitor:
        (_, scores), _ = monitor.value_and_grad(loss)(params, x[own], y[own])
        monitor.update(scores, np.arange(32)[own])
        both = monitor.end_epoch()
        if number:
            os._exit(0)
        monitor.update(scores, np.arange(32)[own])
        alone, suspects = monitor.end_epoch(), monitor.suspects(32)
        monitor.state_dict()
        monitor.update(scores, np.arange(32)[own])
        last = monitor.end_epoch()
    reports = [both, alone, last]
    return {
        "counts": [r.count for r in reports],
        "notes": [r.notes for r in reports],
        "faults": monitor.faults,
        "suspects": len(suspects),
    }


if sys.argv[3:] == ["dies"]:
    Path(f"result{number}.json").write_text(json.dumps(beside_a_process_that_dies()))
    sys.stdout.flush()
    os._exit(0)  # jax.distributed's own exit would wait for the other process

out = {
    "global": trained(with_global_arrays),
    "own": trained(with_own_arrays),
    "flush": with_a_flush_in_one_process(),
    "heads": with_different_heads(),
    "documents": with_documents(),
    "alert": until_the_alert(),
    "first": watched_by_the_first(),
    "windows": with_windows_of_samples(),
}
Path(f"result{number}.json").write_text(json.dumps(out))
jax.distributed.shutdown()
