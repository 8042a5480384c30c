"""The weights of the best epoch, for `watch(keep_best=)`: when they are kept, and the file that holds them.

At the end of each epoch that the stop rule marks as the best so far, the adapter copies the weights to the host, and a thread
writes them to `best_weights_epoch_<n>.<suffix>` in the run's folder. The file is complete or absent: it gets its name once it
is on the disk. The file of the earlier best epoch is deleted only then.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.state_values import Count, Flag

WRITE_WITHIN = 60.0
"""Seconds that a new best epoch waits for the file of the last one, which bounds the copies on the host to one."""

FAULT = "best weights"


class ModelWeights(Protocol):
    """What an adapter provides for `BestWeights`."""

    @property
    def suffix(self) -> str:
        """The suffix of the file, with its dot."""
        ...

    def check(self, params: Any) -> None:
        """Checks the parameters that the user passes to the monitor.

        Raises:
            InvalidInputError: they cannot be kept.
        """
        ...

    def observe(self, params: Any) -> None:
        """Takes the parameters after a step (JAX).

        Raises:
            InvalidInputError: they cannot be kept.
        """
        ...

    def end_epoch(self, params: Any, *, is_best: bool) -> Any:
        """Ends an epoch. If it is the best, copies the weights, or their average, to the host, and waits for the device.

        If the weights are sharded, every process must call this.

        Args:
            params: what the user passed to `Monitor.end_epoch`, or None.
            is_best: False if nothing is to be copied.

        Returns:
            The copy in the process that writes; None in the others, and if the epoch is not the best.

        Raises:
            InvalidInputError: there is nothing to copy.
        """
        ...

    def write(self, snapshot: Any, file: BinaryIO) -> None:
        """Writes a snapshot. Called in a thread."""
        ...

    def read(self, path: Path) -> Any:
        """Reads what `write` wrote."""
        ...

    def share(self, value: Any) -> Any:
        """The value of the process that writes, on all processes. Every process must call this."""
        ...

    def restore(self, weights: Any) -> None:
        """Loads what `read` returned into the model. Every process must call this; only the one that writes has `weights`.

        Raises:
            InvalidInputError: the model no longer exists, or does not hold its weights (JAX).
        """
        ...


class BestWeightsFile(BaseModel):
    """Where the weights of the best epoch are.

    Attributes:
        epoch: the epoch, from 0.
        path: absolute path of the file.
        averaged: True if it holds the running average of the weights.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    epoch: Count
    path: str
    averaged: Flag


class _Found(NamedTuple):
    """What the process that writes tells the others: the epoch, or the reason why there are no weights."""

    epoch: int
    problem: str


class BestWeights:
    """Keeps the weights of the best epoch of one model.

    Attributes:
        file: the last complete file; None before the first, and in a process that does not write.
    """

    def __init__(self, weights: ModelWeights, folder: Path | None, faults: Faults, *, averaged: bool) -> None:
        """Writes nothing yet.

        Args:
            weights: copies the weights of the model.
            folder: the run's folder; None in a process that does not write.
            faults: records failures.
            averaged: True if `weights` copies the running average.
        """
        self.file: BestWeightsFile | None = None
        self._weights, self._folder, self._faults, self._averaged = weights, folder, faults, averaged
        self._writer: Thread | None = None

    def check(self, params: Any) -> None:
        """See `ModelWeights.check`. None passes."""
        if params is not None:
            self._weights.check(params)

    def observe(self, params: Any) -> None:
        """See `ModelWeights.observe`."""
        self._weights.observe(params)

    def end_epoch(self, epoch: int, params: Any, *, is_best: bool) -> None:
        """Keeps the weights if the epoch is the best one so far. Never raises. All processes must agree on `is_best`."""
        try:
            is_ready = self.wait(WRITE_WITHIN) if is_best else False
            # By every process, even if this one cannot write.
            snapshot = self._weights.end_epoch(params, is_best=is_best)
            if is_best and self._folder is not None:
                if not is_ready:
                    raise TimeoutError(f"the file of the last best epoch is not written after {WRITE_WITHIN:.0f} s")
                self._start_writing(epoch, snapshot, self._folder)
        except Exception as error:  # noqa: BLE001 - training must continue
            self._faults.record(FAULT, f"those of epoch {epoch} were not kept: {type(error).__name__}: {error}")

    def _start_writing(self, epoch: int, snapshot: Any, folder: Path) -> None:
        # Not a daemon: when the program ends, it waits until the file is complete.
        self._writer = Thread(
            target=self._write, args=(epoch, snapshot, folder), name="gwa_logging weights", daemon=False
        )
        self._writer.start()

    def _write(self, epoch: int, snapshot: Any, folder: Path) -> None:
        path = folder / f"best_weights_epoch_{epoch}{self._weights.suffix}"
        try:
            write_atomically(path, lambda file: self._weights.write(snapshot, file))
        except Exception as error:  # noqa: BLE001 - it is a thread; the earlier file stays valid
            self._faults.record(FAULT, f"{path} was not written: {type(error).__name__}: {error}")
            return
        earlier, self.file = self.file, BestWeightsFile(epoch=epoch, path=str(path), averaged=self._averaged)
        # A resumed run leaves the file of the run before it, which another run may still resume from.
        if earlier is not None and Path(earlier.path).parent == folder and earlier.path != self.file.path:
            with suppress(OSError):
                Path(earlier.path).unlink()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the file of the last best epoch is written. Returns False if it is not after `timeout` seconds."""
        writer = self._writer  # another thread may wait too
        if writer is not None:
            writer.join(timeout)
        return writer is None or not writer.is_alive()

    def last_file(self) -> BestWeightsFile | None:
        """The file of the last best epoch, for a checkpoint; waits until it is written."""
        self.wait(WRITE_WITHIN)
        return self.file

    def resume(self, file: BestWeightsFile | None) -> None:
        """Continues with the file of an earlier run, or with none."""
        self.wait()
        self.file = file

    def move_to(self, folder: Path) -> None:
        """Writes later files to another folder."""
        self.wait()
        self._folder = folder

    def sentence(self, epoch: int) -> str:
        """Where the weights of the epoch are, for the alert's message; empty if they are not there."""
        self.wait(WRITE_WITHIN)
        if self.file is None or self.file.epoch != epoch:
            return ""
        what = "averaged weights" if self.file.averaged else "weights"
        return f" Its {what}: {self.file.path}."

    def load(self) -> Any:
        """The weights of the best epoch, on the host. Waits until they are written. Every process must call this.

        Raises:
            InvalidInputError: there are none, or the file cannot be read.
        """
        _, weights = self._found()
        return self._weights.share(weights)

    def restore(self) -> int:
        """Loads the weights of the best epoch into the model, and returns that epoch. Every process must call this.

        Raises:
            InvalidInputError: there are none, the file cannot be read, or the model cannot take them.
        """
        epoch, weights = self._found()
        self._weights.restore(weights)
        return epoch

    def _found(self) -> tuple[int, Any]:
        self.wait()
        found, weights = _Found(-1, ""), None
        if self._folder is None:
            found = _Found(
                -1, "the weights are in the process that writes the journal, which this process cannot reach"
            )
        elif self.file is None:
            reason = f" ({FAULT!r} is among monitor.faults)" if FAULT in self._faults.counts else ""
            found = _Found(-1, f"there are no weights yet: no epoch was the best so far, or none could be kept{reason}")
        else:
            try:
                weights = self._weights.read(Path(self.file.path))
                found = _Found(self.file.epoch, "")
            except Exception as error:  # noqa: BLE001 - all processes raise it below
                found = _Found(-1, f"{self.file.path} cannot be read: {type(error).__name__}: {error}")
        found = _Found(*self._weights.share(tuple(found)))
        if found.problem:
            raise InvalidInputError(f"keep_best: {found.problem}")
        return found.epoch, weights


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file that is complete or absent. It replaces one of the same name.

    Raises:
        OSError: it cannot be written. No part of it is left.
    """
    unfinished = path.with_name(f"{path.name}.new")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
