"""What the loss of a language model's head costs in JAX: time and peak memory of all logits, and of the watched fused loss.

    python -m benchmarks.language_models_jax [--vocabulary 32000 128000] [--rows 4096] [--width 256] [--seconds 60]

Peak memory is what the compiled step needs beside its arguments and results, as XLA plans it. For the times the ways take
turns in one process; "again" is the bare fused loss a second time, so its difference is the noise of the machine.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gwa_logging
from benchmarks.measuring import Step, measure, overheads
from gwa_logging.integrations.jax import linear_cross_entropy, tap

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def all_logits(hidden: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of a head that is a layer."""
    logits = tap(hidden @ weight, hidden, weight)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target).mean()


def by_row(hidden: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The fused loss whose backward pass computes the logits again."""
    return linear_cross_entropy(hidden, weight, target, reduction="none").mean()


WAYS: dict[str, tuple[Loss, bool]] = {
    "all logits": (all_logits, False),
    "all logits, watched by tap": (all_logits, True),
    "bare": (linear_cross_entropy, False),
    "again": (linear_cross_entropy, False),
    "watched": (linear_cross_entropy, True),
    "losses by row": (by_row, False),
    "losses by row, watched": (by_row, True),
}
"""The loss, and whether it is watched. "bare" is the fused loss without `watch`."""


def compiled_step(way: str, args: argparse.Namespace, classes: int, resources: ExitStack) -> tuple[Step, float]:
    """A training step of a body, a head and a loss, and its peak memory in MiB. `resources` closes its monitor."""
    loss, is_watched = WAYS[way]
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.dtype(args.dtype)
    params = {
        "body": jax.random.normal(keys[0], (32, args.width), dtype) / 6,
        "head": jax.random.normal(keys[1], (args.width, classes), dtype) / args.width**0.5,
    }
    x = jax.random.normal(keys[2], (args.rows, 32), dtype)
    target = jax.random.randint(keys[3], (args.rows,), 0, classes)

    def loss_of(params: dict[str, jax.Array], x: jax.Array, target: jax.Array) -> jax.Array:
        return loss(jnp.tanh(x @ params["body"]), params["head"], target)

    monitor = None
    if is_watched:
        directory = resources.enter_context(tempfile.TemporaryDirectory())
        monitor = resources.enter_context(gwa_logging.watch(loss_of, directory=directory, early_stop=None))
    differentiated = monitor.value_and_grad(loss_of) if monitor else jax.value_and_grad(loss_of)

    def train(params: dict[str, jax.Array], x: jax.Array, target: jax.Array) -> Any:
        result, grads = differentiated(params, x, target)
        return jax.tree.map(lambda p, g: p - (1e-3 * g).astype(p.dtype), params, grads), result

    run = jax.jit(train, donate_argnums=0).lower(params, x, target).compile()

    def step() -> None:
        nonlocal params
        params, result = run(params, x, target)
        if monitor is not None:
            monitor.update(result[1])
        jax.block_until_ready(params)

    return step, run.memory_analysis().temp_size_in_bytes / 2**20


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prints the figures of every way, and returns them by vocabulary and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times of one vocabulary; 0: memory alone")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for classes in args.vocabulary:
        with ExitStack() as resources:
            make = partial(compiled_step, args=args, classes=classes, resources=resources)
            steps, peaks = zip(*(make(way) for way in WAYS), strict=True)
            found: dict[str, dict[str, float]] = {way: {"peak_mb": peak} for way, peak in zip(WAYS, peaks, strict=True)}
            if args.seconds:
                times = measure(dict(zip(WAYS, steps, strict=True)), args.seconds, warm_up=1, least=3)
                for way, overhead in overheads(times).items():
                    found[way] |= overhead
                found["bare"]["ms"] = float(1e3 * np.median(times["bare"]))
        results[str(classes)] = found
        for way, figures in found.items():
            print(classes, way, json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
        jax.clear_caches()
    return results


if __name__ == "__main__":
    main()
