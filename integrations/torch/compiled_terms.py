"""The terms of the score by a compiled library, once there is one: a single call instead of several small operations.

Off unless the environment variable `GWA_LOGGING_COMPILE` is 1. The first backward pass then starts the compilation in another
process. Until the library is there, and for every batch that does not fit it, the terms are computed in eager mode, with the
same values. If the compilation fails, eager mode stays. There is one library per head, for any number of rows: nothing is
compiled again.
"""

import logging
import os
import sys
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.head_layers import Linear
from gwa_logging.integrations.torch.scores import Terms

logger = logging.getLogger("gwa_logging")

SWITCH = "GWA_LOGGING_COMPILE"

FEW_ELEMENTS = 2**18
"""On a CPU the library uses one thread. With more elements than this, several threads in eager mode are faster."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DEVICES = ("cpu", "cuda")
_ALIGNMENT = 16  # bytes; the compiler assumes it


class HeadTerms(Protocol):
    """Computes the terms of a head's samples; see `Linear`."""

    @property
    def needs_embeddings(self) -> bool:
        """Returns True if `terms_by_logits` is called. Otherwise `terms_by_products` takes what the forward pass has kept."""

    def terms_by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        """The terms of each sample, with the numerator delta . (z - b)."""

    def terms_by_embeddings(
        self, delta_norms: Tensor, gradient: Tensor, embeddings: Tensor, weight_norm: Tensor
    ) -> Terms:
        """The terms of each sample, with the numerator (dL/dh) . h."""

    def close(self) -> None:
        """Ends the observation of the layer."""


def terms_of(layer: Linear, faults: Faults) -> HeadTerms:
    """The terms of a head: by a compiled library if the switch is on, otherwise the layer's own."""
    choice = os.environ.get(SWITCH, "")
    if choice not in ("", "0", "1"):
        faults.note(f"{SWITCH}: expected 0 or 1, found {choice!r}. Set it to 1 to compile the scoring")
    return CompiledTerms(layer, faults) if choice == "1" and type(layer) is Linear else layer


class CompiledTerms:
    """The terms of one linear head. Eager passes only: the compiler of a compiled model fuses the layer's own terms."""

    needs_embeddings = True

    def __init__(self, layer: Linear, faults: Faults) -> None:
        self._layer = layer
        self._by_logits = Library("logits", faults)
        self._by_embeddings = Library("embeddings", faults)

    def terms_by_logits(
        self, delta: Tensor, logits: Tensor, embeddings: Tensor, bias: Tensor | None, weight_norm: Tensor
    ) -> Terms:
        """The terms of each sample, with the numerator delta . (z - b)."""
        outputs = self._by_logits((delta, logits, embeddings), bias)
        if outputs is None:
            return self._layer.terms_by_logits(delta, logits, embeddings, bias, weight_norm)
        product, delta_norms, embedding_norms = outputs
        return Terms(product, delta_norms, embedding_norms, weight_norm)

    def terms_by_embeddings(
        self, delta_norms: Tensor, gradient: Tensor, embeddings: Tensor, weight_norm: Tensor
    ) -> Terms:
        """The terms of each sample, with the numerator (dL/dh) . h."""
        outputs = self._by_embeddings((gradient, embeddings), None)
        if outputs is None:
            return self._layer.terms_by_embeddings(delta_norms, gradient, embeddings, weight_norm)
        product, embedding_norms = outputs
        return Terms(product, delta_norms, embedding_norms, weight_norm)

    def join(self, timeout: float) -> bool:
        """Waits for the libraries that are being made, `timeout` seconds for each; returns True if one is ready."""
        libraries = (self._by_logits, self._by_embeddings)
        return True in [library.join(timeout) for library in libraries]

    def close(self) -> None:
        """Stops a compilation that is still running, and ends the observation of the layer."""
        for library in (self._by_logits, self._by_embeddings):
            library.cancelled.set()
        self._layer.close()


class Library:
    """The compiled library of one form of the terms, or the attempt to get one.

    The first batch decides the dtypes and sizes that it is compiled for. States: not started; started, `_thread` is set; ready,
    `_run` is set; given up, neither changes any more.

    Attributes:
        cancelled: set when the library is no longer needed.
    """

    def __init__(self, form: str, faults: Faults) -> None:
        self.cancelled = Event()
        self._form = form
        self._faults = faults
        self._thread: Thread | None = None
        self._run: Callable[[list[Tensor]], list[Tensor]] | None = None
        self._device = torch.device("meta")
        self._expected: list[
            tuple[torch.dtype, int, int]
        ] = []  # dtype, last dimension and number of dimensions of each input
        self._fewest_rows = self._most_rows = 0
        self._lock = Lock()  # DataParallel's replicas run their backward passes in threads

    def __call__(self, inputs: tuple[Tensor, ...], bias: Tensor | None) -> list[Tensor] | None:
        """The outputs of the library; None if it is not ready or these inputs do not fit it.

        Args:
            inputs: [rows, K] each, see `compile_worker.Signature`.
            bias: [C].
        """
        run = self._run
        if run is None:
            if self._thread is None:
                self._start(inputs, bias)
            return None
        arguments = list(inputs) if bias is None else [*inputs, bias]
        if not self._fits(arguments, inputs[0].shape[0]) or not self._lock.acquire(blocking=False):
            return None
        try:
            return run(arguments)
        except Exception as error:  # noqa: BLE001 - the eager form takes over
            self._run = None
            self._give_up(f"{type(error).__name__}: {error}")
            return None
        finally:
            self._lock.release()

    def _fits(self, arguments: list[Tensor], rows: int) -> bool:
        """Returns True if the inputs differ from the first ones only in their number of rows, and are contiguous."""
        if not self._fewest_rows <= rows <= self._most_rows and (
            rows < self._fewest_rows or torch.get_num_threads() > 1
        ):
            return False
        if len(arguments) != len(self._expected):
            return False
        for x, (dtype, width, dimensions) in zip(arguments, self._expected, strict=True):
            if (
                x.dtype is not dtype
                or x.shape[-1] != width
                or x.ndim != dimensions
                or not x.is_contiguous()
                or x.data_ptr() % _ALIGNMENT
                or (dimensions == 2 and x.shape[0] != rows)
                or not (type(x) is Tensor or type(x) is Parameter)
            ):
                return False
        return arguments[0].device == self._device

    def _start(self, inputs: tuple[Tensor, ...], bias: Tensor | None) -> None:
        """Starts to compile for inputs like these."""
        if inputs[0].ndim != 2 or not self._lock.acquire(blocking=False):
            return
        try:
            arguments = inputs if bias is None else (*inputs, bias)
            if self._thread is not None or any(type(x) not in (Tensor, Parameter) for x in arguments):
                return
            self._thread = Thread(target=self._get, name="gwa-logging compiled scoring", daemon=True)
            self._device = inputs[0].device
            self._expected = [(x.dtype, x.shape[-1], x.ndim) for x in arguments]
            width = sum(x.shape[1] for x in inputs)
            self._most_rows = FEW_ELEMENTS // width if self._device.type == "cpu" else sys.maxsize
            self._thread.start()
        except Exception as error:  # noqa: BLE001 - such as a limit on threads
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            self._lock.release()

    def _get(self) -> None:
        """Gets the library from the cache or the compiler, in a thread that waits for another process."""
        try:
            if reason := self._unsupported():
                return self._give_up(reason)
            # These need a POSIX system.
            from gwa_logging.integrations.torch.background_compiler import Cancelled, CompilationError, library_for
            from gwa_logging.integrations.torch.compile_worker import FEWEST_ROWS, Signature, load_library

            dtypes, widths, _ = zip(*self._expected, strict=True)
            signature = Signature(self._form, str(self._device), tuple(_DTYPES[dtype] for dtype in dtypes), widths)
            try:
                path = library_for(signature, self.cancelled)
            except Cancelled:
                return None
            except CompilationError as error:
                return self._give_up(str(error))
            self._fewest_rows = FEWEST_ROWS
            self._run = load_library(path, self._device)
            logger.info("gwa_logging: the scores are computed by a compiled library from now on: %s", path)
        except Exception as error:  # noqa: BLE001 - training continues without the library
            self._give_up(f"{type(error).__name__}: {error}")

    def _unsupported(self) -> str:
        """Why there is no library for these inputs; empty if there may be one."""
        if self._device.type not in _DEVICES:
            return f"the device {self._device.type} is not supported, only cpu and cuda"
        unsupported = [str(dtype) for dtype, *_ in self._expected if dtype not in _DTYPES]
        return f"{unsupported[0]} is not supported, only float32, bfloat16 and float16" if unsupported else ""

    def _give_up(self, reason: str) -> None:
        self._faults.note(f"{SWITCH}: the scoring is not compiled, and continues in eager mode: {reason}")

    def join(self, timeout: float) -> bool:
        """Waits until it is decided whether there is a library; returns True if it is ready."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._run is not None
