"""Several processes of JAX: what they exchange at the end of an epoch, and the store that `jax.distributed` has for them."""

from collections import Counter
from functools import reduce
from importlib import import_module
from time import monotonic
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gwa_logging.faults import Faults
from gwa_logging.ledger import UNKNOWN, Ledger
from gwa_logging.ranks import Attendance, Identity, select_ranks
from gwa_logging.summary import AlignmentSummary

LOST = "lost processes"
"""Fault: a process of jax.distributed has died."""


class JaxClientStore(NamedTuple):
    """The key-value store of jax.distributed. See `gwa_logging.ranks.SharedStore`."""

    client: Any

    def count_watch(self, name: str) -> int:
        """Counts the calls of watch() under this name."""
        _watches[name] += 1
        return _watches[name]

    def publish(self, key: str) -> None:
        """Stores the key for this process."""
        self.client.key_value_set(f"{key}/{jax.process_index()}", "watches")

    def find_missing(self, key: str, within: float) -> list[int]:
        """The processes that have not stored the key within this many seconds."""
        deadline = monotonic() + within
        return [number for number in range(jax.process_count()) if not self._has(f"{key}/{number}", deadline)]

    def _has(self, key: str, deadline: float) -> bool:
        try:
            self.client.blocking_key_value_get(key, max(1, round(1000 * (deadline - monotonic()))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        return True

    def store_once(self, key: str, value: str) -> str:
        """Stores a value unless another process has done so; returns the stored one."""
        try:
            self.client.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        return str(self.client.blocking_key_value_get(key, 1000))


_watches: Counter[str] = Counter()


def shared_store() -> JaxClientStore | None:
    """The store of jax.distributed; None if there is one process, or if this version of JAX has its client elsewhere."""
    if jax.process_count() == 1:
        return None
    try:
        client = import_module("jax._src.distributed").global_state.client  # it has no public name
    except (
        ImportError,
        AttributeError,
    ):  # without it a process that never watches blocks the others, as in any collective
        return None
    return None if client is None else JaxClientStore(client)


class Processes:
    """Merges what the processes have, by collectives: every process must call each method.

    A process that does not call watch(), or that dies, must not block the others. Then each one reports its own samples, and
    a fault says so.
    """

    def __init__(self, attendance: Attendance, faults: Faults) -> None:
        self._attendance = attendance
        self._faults = faults
        self._lost: dict[str, str] = {}  # the fault, once a process has died

    def merge_summaries(self, summary: AlignmentSummary, head: str) -> tuple[AlignmentSummary, dict[str, str]]:
        """The summary over the processes that count, and what is wrong with the others, by kind of fault.

        Args:
            summary: of this process.
            head: description of its head; empty while it is not known.
        """
        problems = self._attendance.problems()
        own = summary.to_vector()
        if not problems:
            identity = Identity(head, group=jax.process_index()).to_vector()
            # As bytes: JAX would turn float64 into float32.
            gathered = self._gather(np.concatenate([own, identity]).view(np.uint8))
            if gathered is not None:
                vectors = [np.frombuffer(part.tobytes()) for part in np.asarray(gathered)]
                summaries = [AlignmentSummary.from_vector(vector[: len(own)]) for vector in vectors]
                found = select_ranks([Identity.from_vector(vector[len(own) :]) for vector in vectors], summaries)
                summary, problems = AlignmentSummary.merge_all(summaries[rank] for rank in found.ranks), found.problems
            else:
                problems = self._lost
        self._faults.record_once(problems)
        return summary, problems

    def merge_ledgers(self, ledger: Ledger) -> Ledger:
        """The ledger over all processes, given that of this one."""
        problems = self._attendance.problems()
        # All processes must gather the same arrays, so they agree first on which of them any process has.
        own = np.array([ledger.predicted is not None, ledger.details is not None], np.int32)
        known = None if problems else self._gather(own)
        gathered = None if known is None else self._gather(_with_columns(ledger, known))
        if gathered is None:
            self._faults.record_once(problems or self._lost)
            return ledger
        ledgers = [
            Ledger(*(None if array is None else np.asarray(array)[rank] for array in gathered))  # type: ignore[arg-type]
            for rank in range(jax.process_count())
        ]
        merged = reduce(Ledger.merge, ledgers)
        return merged._replace(invalid_ids=int(merged.invalid_ids), untagged=int(merged.untagged))

    def _gather(self, value: Any) -> Any:
        """The values of all processes, stacked; None if a process has died: another attempt would fail, or never return."""
        if self._lost:
            return None
        try:
            return multihost_utils.process_allgather(value, tiled=False)
        except (ValueError, RuntimeError) as error:  # which one depends on when the process died
            reason = str(error).partition("\n")[0][:200]
            self._lost = {
                LOST: f"another process no longer answers ({reason}); from now on each process reports its own samples only"
            }
            return None


def _with_columns(ledger: Ledger, known: Any) -> Ledger:
    """The ledger with predictions and details, unknown if need be, if any process has them: int [processes, 2]."""
    has_predicted, has_details = (bool(column.any()) for column in np.asarray(known).T)
    if has_predicted and ledger.predicted is None:
        ledger = ledger._replace(predicted=np.full(ledger.sums.shape, UNKNOWN, np.int32))
    if has_details and ledger.details is None:
        ledger = ledger._replace(details=np.zeros(ledger.sums.shape, np.int32))
    return ledger
