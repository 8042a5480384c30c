"""The process that compiles the terms of the score for one head: `background_compiler` starts it.

    python -m gwa_logging.integrations.torch.compile_worker SIGNATURE TARGET SECONDS

A process, not a thread: in the training process the compiler would hold the interpreter lock, and its own lock, for seconds.
The library appears at `TARGET` only after its results agreed with float64. The process ends itself, and the C++ compiler that
it has started, if the training process ends or after `SECONDS`.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from gwa_logging.integrations.torch.scores import Terms, alignment_scores, terms_by_embeddings, terms_by_logits

BY_LOGITS, BY_EMBEDDINGS = "logits", "embeddings"

FEWEST_ROWS = 2
"""The compiler treats a size of one as a constant, so a batch of one row stays in eager mode."""

_CHECKED_ROWS = (2, 37, 1024)
_TOLERANCE = 1e-5


class Signature(NamedTuple):
    """What a library is compiled for, except the number of rows.

    Attributes:
        form: `BY_LOGITS` or `BY_EMBEDDINGS`, see `scores`.
        device: such as "cpu" or "cuda:0". A library can be loaded on another device of the same model.
        dtypes: of the inputs, such as "float32".
        widths: C or D, the last dimension of each input. Inputs are delta, logits, embeddings and perhaps the bias, or dL/dh
            and embeddings.
    """

    form: str
    device: str
    dtypes: tuple[str, ...]
    widths: tuple[int, ...]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `json.dumps`."""
        form, device, dtypes, widths = json.loads(text)
        return cls(form, device, tuple(dtypes), tuple(widths))


class _ByLogits(nn.Module):
    """product, |delta|, |h|: float32 [rows] each, of delta, logits [rows, C], embeddings [rows, D] and bias [C]."""

    def forward(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return terms_by_logits(delta, logits, embeddings, bias, delta)[:3]


class _ByEmbeddings(nn.Module):
    """product and |h|: float32 [rows] each, of dL/dh and embeddings [rows, D]."""

    def forward(self, gradient: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        product, _, embedding_norms, _ = terms_by_embeddings(gradient, gradient, embeddings, gradient)
        return product, embedding_norms


def compile_library(signature: Signature, target: Path) -> None:
    """Compiles a library and checks its results.

    Raises:
        Exception: whatever the compiler raises.
        ArithmeticError: the results are wrong.
    """
    module = _ByLogits() if signature.form == BY_LOGITS else _ByEmbeddings()
    inputs = random_inputs(signature, 64)
    rows = torch.export.Dim("rows", min=FEWEST_ROWS)
    shapes = tuple({0: rows} if x.ndim == 2 else None for x in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=_by_name(module, shapes), strict=False)
    # One thread: the library is called for small batches only, see `compiled_terms`.
    options = {"cpp.threads": 1, "compile_threads": 1}
    made = target.with_suffix(".unchecked.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
    check_results(load_library(made, inputs[0].device), module, signature)
    made.replace(target)


def _by_name(module: nn.Module, shapes: tuple[object, ...]) -> dict[str, object]:
    names = ("delta", "logits", "embeddings", "bias") if isinstance(module, _ByLogits) else ("gradient", "embeddings")
    return dict(zip(names, shapes, strict=False))


def load_library(path: Path, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads a library. The function that it returns neither blocks on the device nor may run in two threads at once."""
    index = -1 if device.index is None else device.index
    # Not by torch._inductor, whose import would hold the training process for a second. The fourth argument is the number of
    # copies; the third switches off their locks, by which a call would wait until the device has finished the call before.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
    return loader.run


def random_inputs(signature: Signature, rows: int) -> tuple[Tensor, ...]:
    """Random inputs of a library. The first rows are zero, NaN and infinite if there are enough."""
    inputs = []
    for index, (dtype, width) in enumerate(zip(signature.dtypes, signature.widths, strict=True)):
        is_bias = signature.form == BY_LOGITS and index == 3
        x = torch.randn(width) if is_bias else torch.randn(rows, width)
        if rows > 8 and not is_bias:
            x[index], x[3 + index, 0], x[6, 0] = 0.0, torch.nan, torch.inf
        inputs.append(x.to(signature.device, getattr(torch, dtype)))
    return tuple(inputs)


def check_results(run: Callable[[list[Tensor]], list[Tensor]], module: nn.Module, signature: Signature) -> None:
    """Compares a library with the formula in float64.

    Raises:
        ArithmeticError: a score differs by more than 1e-5, or a marker differs.
    """
    for rows in _CHECKED_ROWS:
        inputs = random_inputs(signature, rows)
        scores = []
        for outputs in (run(list(inputs)), module(*(x.double() for x in inputs))):
            product, *norms = (x.double() for x in outputs)
            norms = norms if len(norms) == 2 else [torch.ones_like(product), *norms]
            scores.append(alignment_scores(Terms(product, norms[0], norms[1], torch.ones_like(product))))
        compiled, exact = scores
        if not torch.allclose(compiled, exact, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise ArithmeticError(f"the compiled scores of {rows} rows differ from those in float64")


def _end_with_parent(seconds: float) -> None:
    """Ends this process group when the other end of the standard input is closed, and after `seconds`."""

    def end() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def wait_for_parent() -> None:
        os.read(0, 1)  # not through a file object, whose lock would be held when the interpreter ends
        end()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main(signature: str, target: str, seconds: str) -> None:
    """Compiles the library for a signature in JSON. The reason of a failure is the last line of the standard error."""
    _end_with_parent(float(seconds))
    os.nice(19)
    torch.set_num_threads(1)
    wanted = Signature.from_json(signature)
    try:
        if torch.device(wanted.device).type == "cuda":
            torch.cuda.set_device(wanted.device)
        compile_library(wanted, Path(target))
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises
        traceback.print_exc()
        message = str(error).strip().partition("\n")[0]
        sys.exit(f"{type(error).__name__}: {message}")


if __name__ == "__main__":
    main(*sys.argv[1:])
