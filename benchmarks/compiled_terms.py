"""What `GWA_LOGGING_COMPILE=1` gains on a CPU, and what a training step pays while the library is being compiled.

    python -m benchmarks.compiled_terms [--models MLP] [--seconds 20]

First trains one watched model while another process compiles, into an empty cache, and lists the longest steps beside those of
a bare and a watched model without a compilation. Then bare and watched steps, with and without the library, take turns.
"""

import argparse
import os
import tempfile
import time
from unittest import mock

import numpy as np
import torch

from benchmarks.measuring import Step, measure, overheads
from benchmarks.torch_steps import WORKS, Alternatives
from gwa_logging.integrations.torch.compiled_terms import SWITCH, CompiledTerms


def compiled_step(alternatives: Alternatives) -> tuple[Step, CompiledTerms]:
    """A watched step whose first run starts a compilation, and the object that waits for the library."""
    made: list[CompiledTerms] = []
    initialise = CompiledTerms.__init__

    def note(self: CompiledTerms, *args: object) -> None:
        made.append(self)
        initialise(self, *args)  # type: ignore[arg-type]

    with mock.patch.dict(os.environ, {SWITCH: "1"}), mock.patch.object(CompiledTerms, "__init__", note):
        step = alternatives._watched()
    return step, made[0]


def longest(step: Step, seconds: float, terms: CompiledTerms | None = None) -> str:
    """Percentiles of the step's milliseconds in this time, or until the library is ready."""
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not (terms is not None and terms.join(0)):
        begin = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - begin))
    p50, p99, p999 = np.percentile(taken, [50, 99, 99.9])
    return f"{len(taken):6} steps, median {p50:.2f}, 99 % {p99:.2f}, 99.9 % {p999:.2f}, longest {max(taken):.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKS, default=["MLP"])
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure each part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, XDG_CACHE_HOME=directory):
            alternatives = Alternatives(WORKS[name], compiled=False, directory=directory, backends=False)
            steps = {"bare": alternatives._step(), "again": alternatives._step(), "watched": alternatives._watched()}
            steps["compiled"], terms = compiled_step(alternatives)
            print(name)
            for which in ("bare", "watched"):
                print(f"  {which:16}{longest(steps[which], args.seconds / 2)}")
            print(f"  {'while compiling':16}{longest(steps['compiled'], 120, terms)}")
            assert terms.join(120), "the library was not compiled"
            for which, row in overheads(measure(steps, args.seconds)).items():
                print(
                    f"  {which:9}{row['median']:+6.2f} % [{row['low']:+.2f}, {row['high']:+.2f}], mean {row['mean']:+.2f} %"
                )
            for monitor in alternatives.monitors:
                monitor.close()


if __name__ == "__main__":
    main()
