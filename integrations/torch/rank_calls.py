"""What the adapters of all ranks share: the calls that the ranks make together, for the summary of an epoch and the ledger."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gwa_logging.faults import Faults
from gwa_logging.integrations.torch.accumulate import Accumulator
from gwa_logging.integrations.torch.distributed import is_distributed, merged_over_ranks, rank, ranks
from gwa_logging.integrations.torch.ledger_ranks import gather, own_samples
from gwa_logging.ledger import LedgerPart
from gwa_logging.ranks import Attendance, Identity, RankSelection
from gwa_logging.summary import AlignmentSummary


class RankCalls:
    """Mixed into the adapters. Each rank keeps the samples of a range of ids, see `ledger_ranks`.

    Attributes:
        notes: what is wrong with the ranks, for the report of an epoch.
    """

    notes: tuple[str, ...]

    _accumulator: Accumulator
    _attendance: Attendance
    _faults: Faults
    _model: Callable[[], nn.Module | None]
    _num_samples: int | None

    def _identity(self) -> Identity:
        raise NotImplementedError

    @property
    def is_detached(self) -> bool:
        """Returns True if the model, or this rank's stage of it, no longer exists."""
        return self._model() is None

    @property
    def processes(self) -> int:
        """The number of ranks."""
        return ranks()

    def reduce(self, summary: AlignmentSummary) -> AlignmentSummary:
        """The summary of all ranks that count (a collective: every rank must call it)."""
        if not is_distributed():
            return summary
        problems = self._attendance.problems()
        if not problems:
            summary, (_, problems) = merged_over_ranks(summary, self._identity())
            if self._accumulator.keeps_samples:
                self._meet()
        self._faults.record_once(problems)
        self.notes = tuple(problems.values())
        return summary

    def ledger(self) -> LedgerPart:
        """The part that this rank keeps of the ledger of all ranks that count (a collective: every rank must call it)."""
        if is_distributed():
            problems = self._attendance.problems()
            if not problems:
                (invalid_ids, untagged), (_, problems) = self._meet()
                self._faults.record_once(problems)
                ledger = self._accumulator.own_ledger()._replace(invalid_ids=invalid_ids, untagged=untagged)
                return LedgerPart(ledger, self.own_samples(self._num_samples or 0).start, self.gather).checked()
            self._faults.record_once(problems)
        return LedgerPart(self._accumulator.ledger()).checked()

    def own_samples(self, num_samples: int) -> range:
        """The ids that this rank keeps; all of them if the other ranks cannot be reached."""
        return own_samples(num_samples) if is_distributed() and not self._attendance.missing() else range(num_samples)

    def gather(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Joins the arrays of all ranks (a collective: every rank must call it)."""
        return gather(own) if is_distributed() and not self._attendance.missing() else own

    def load_ledger(self, part: LedgerPart) -> None:
        """Restores what `ledger` returned."""
        if not is_distributed() and rank() != 0:  # before the ranks have connected, rank 0 keeps all
            part = part._replace(ledger=part.ledger.map(np.zeros_like)._replace(predicted=None, details=None))
        self._accumulator.load_ledger(part, self._device())

    def _meet(self) -> tuple[list[int], RankSelection]:
        """Sends each rank the entries of the samples that it keeps (a collective)."""
        return self._accumulator.meet(self._identity(), self._device())

    def _device(self) -> torch.device:
        """Where the model is."""
        model = self._model()
        parameter = None if model is None else next(iter(model.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device
