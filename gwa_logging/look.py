"""The look at the model after each epoch: evaluates it on some training inputs, or takes the logits that users pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.consensus import Consensus, LookRows, read_logits, read_predictions
from gwa_logging.errors import InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.ledger import UNKNOWN, LedgerPart
from gwa_logging.protocols import Adapter
from gwa_logging.sample_ids import sample_ids
from gwa_logging.settings import WatchSettings
from gwa_logging.statistic import Estimate

FAULT = "look"


Logits = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]
"""Logits of some inputs, and their ids, if known."""


class EpochLook:
    """Computes the consensus statistic of each epoch.

    Where the inputs have sample ids and the ledger knows what training predicted for them, its predictions form the consensus;
    otherwise the logits of the earlier looks do. The first look decides which, for the whole run.

    Attributes:
        consensus: what the earlier looks have seen.
    """

    def __init__(
        self, adapter: Adapter, settings: WatchSettings, faults: Faults, read_ledger: Callable[[str], LedgerPart]
    ) -> None:
        """Evaluates nothing yet. If the stop rule watches the statistic, an epoch without a look is a fault.

        Args:
            adapter, settings, faults: of the run.
            read_ledger: returns the ledger of all processes; its argument is the caller's name. Not called without one.
        """
        self.consensus = Consensus()
        self._read_ledger, self._ids = read_ledger, settings.look_ids
        self._seen: npt.NDArray[np.float32] | None = None  # of this process's part, at the end of the last epoch
        self._adapter, self._inputs, self._faults = adapter, settings.look, faults
        self._size = settings.num_samples
        self._is_needed = settings.early_stop is not None and settings.early_stop.statistic == "consensus"
        self._given: list[Logits] = []

    def give(self, logits: Any, ids: Any) -> None:
        """Takes logits for the epoch in progress. See `Monitor.look`."""
        if self._inputs is not None:
            raise InvalidInputError(
                "look(): this monitor evaluates the model itself, on watch(look=); leave that argument out to pass logits"
            )
        array = _logits(logits)
        numbers = None
        if ids is not None:
            try:
                numbers = sample_ids(ids, len(array), self._size)
            except ValueError as error:
                raise InvalidInputError(f"ids: {error}") from error
        if self._given and (self._given[-1][1] is None) != (numbers is None):
            raise InvalidInputError("look(): pass ids with all logits of an epoch, or with none")
        self._given.append((array, numbers))

    def end_epoch(self, pause: Callable[[], None], resume: Callable[[], None]) -> Estimate | None:
        """The statistic of the epoch that ends; None if there was no look, it failed, or there is no consensus yet.

        Never raises: a look that fails is a fault. In a distributed run every process must call this.

        Args:
            pause, resume: called before and after, so that the passes do not count.
        """
        evaluates = self._inputs is not None
        if evaluates:
            pause()
        try:
            rows = self._take_rows()
            return None if rows is None else self.consensus.add(rows, self._trained(rows))
        except Exception as error:  # noqa: BLE001 - training must continue
            self._faults.record(FAULT, f"{type(error).__name__}: {error}")
            return None
        finally:
            if evaluates:
                resume()
            self._given.clear()

    def _take_rows(self) -> LookRows | None:
        if self._inputs is not None:
            found = self._adapter.evaluate(self._inputs)
            if found is None:
                return None
            if self._ids is not None and len(self._ids) != len(found.logits):
                raise InvalidInputError(f"there are {len(found.logits)} inputs in look= and {len(self._ids)} look_ids")
            given: list[Logits] = [(found.logits, found.ids if self._ids is None else self._ids)]
        elif self._given:
            given = self._given
        elif self._is_needed:
            raise InvalidInputError(
                "no look in this epoch, and EarlyStop(statistic='consensus') needs one: call monitor.look(logits) before "
                "monitor.end_epoch()"
            )
        else:
            return None
        if len({array.shape[1:] for array, _ in given}) > 1:
            raise InvalidInputError(f"the logits have the shapes {', '.join(str(a.shape) for a, _ in given)}")
        logits = np.concatenate([array for array, _ in given])
        shape = self._adapter.shape
        classes = 1 if logits.ndim == 1 else logits.shape[1]
        if shape is not None and classes != shape[1]:
            raise InvalidInputError(f"expected logits [inputs, {shape[1]}], as the head has them, found {logits.shape}")
        numbers = [ids for _, ids in given if ids is not None]
        if self.consensus.looks and bool(numbers) != (self.consensus.inputs == 0):
            raise InvalidInputError(
                "ids: pass them in every epoch or in none, since without ids the position of an input is its id"
            )
        if numbers:
            ids = np.concatenate(numbers)
            if len(np.unique(ids)) != len(ids):
                raise InvalidInputError("ids: the same id occurs twice in this epoch")
        else:
            if self.consensus.inputs not in (0, len(logits)):
                raise InvalidInputError(
                    f"expected {self.consensus.inputs} inputs, as in the first look, found {len(logits)}: without ids, "
                    "every look must have the same inputs in the same order"
                )
            self.consensus.inputs, ids = len(logits), np.arange(len(logits))
        return read_logits(logits, ids)

    def _trained(self, rows: LookRows) -> LookRows | None:
        """What training predicted for the inputs in this epoch; None if earlier looks form the consensus."""
        if self._size is None or self.consensus.inputs or self.consensus.from_training is False:
            return None
        part = self._read_ledger("look")
        predicted, seen = part.ledger.predicted, part.ledger.seen
        own = rows.ids[(rows.ids >= part.first) & (rows.ids < part.first + len(seen))] - part.first
        known = own[:0] if predicted is None else own[predicted[own] != UNKNOWN]
        is_open = self.consensus.from_training is None
        if is_open and not (rows.ids.max() < self._size and part.total(known.size)):
            return None
        new = known[seen[known] > (0 if self._seen is None else self._seen[known])]
        if predicted is not None:
            self._seen = seen
        classes = np.empty(0, np.int32) if predicted is None else predicted[new]
        return read_predictions(part.gather(classes), part.gather(new + part.first), rows.num_classes)


def _logits(logits: Any) -> npt.NDArray[np.float32]:
    """float32 [rows, classes] or [rows] on the host.

    Raises:
        InvalidInputError: it is something else.
    """
    found = f"{getattr(logits, 'dtype', type(logits).__name__)} of shape {tuple(getattr(logits, 'shape', ()))}"
    try:
        if hasattr(logits, "detach") and hasattr(logits, "cpu"):
            logits = logits.detach().cpu().float()
        array = np.asarray(logits)
        array = array if array.dtype.kind in "OUSmMiubc" else array.astype(np.float32)
    except Exception as error:  # a tracer, a ragged list, an array of which other processes have parts
        raise InvalidInputError(
            f"logits: expected float [rows, classes], found {found}, which cannot be copied to the host: call it outside "
            f"jit, with logits that are replicated over all processes ({str(error).partition(chr(10))[0]})"
        ) from error
    if array.ndim not in (1, 2) or not array.size or array.dtype != np.float32:
        raise InvalidInputError(f"logits: expected float [rows, classes], found {found}")
    return array
