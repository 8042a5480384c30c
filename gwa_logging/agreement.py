"""Agreement: the share of samples whose scores in an epoch have the sign of their earlier scores.

While a model learns the pattern that most samples share, each sample keeps its side: the scores of correctly labelled samples
stay positive and those of mislabelled ones negative. When the model memorises the mislabelled ones, their scores change sign.
Labels are not used, but each sample must be recognised in every epoch, so its id is needed.

The ledger has float32 sums over the whole run, and the scores of one epoch are the difference of two of them. Its sign is exact
for the rounded sums; a score below 1e-7 of the earlier sum may be lost in the rounding and then counts as zero.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.faults import Faults
from gwa_logging.ledger import LedgerPart
from gwa_logging.settings import EarlyStop
from gwa_logging.statistic import Estimate

FAULT = "agreement"


class PastScores(NamedTuple):
    """The ledger at the end of an epoch.

    Attributes:
        sums: float32 [N], sum of each sample's scores so far.
        seen: float32 [N], how often each sample was scored so far.
    """

    sums: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]


def agreement(past: PastScores, now: PastScores, total: Callable[[np.integer[Any]], int] = int) -> Estimate:
    """The share of samples whose scores since `past` have the sign of their scores until then.

    Samples that were not scored both before and since are left out. A sum of zero agrees with zero only.

    Args:
        past: at the end of the epoch before.
        now: at the end of this epoch.
        total: adds up a count over all processes, if each of them has some of the samples.

    Returns:
        The share in [0, 1] and its standard error, with the samples taken as independent. NaN if no sample can be compared.
    """
    compared = (past.seen > 0) & (now.seen > past.seen)
    before, after = past.sums[compared], now.sums[compared]
    agreeing = total(np.count_nonzero(np.sign(after - before) == np.sign(before)))
    count = total(np.count_nonzero(compared))
    if not count:
        return Estimate(math.nan, math.nan)
    share = agreeing / count
    return Estimate(share, math.sqrt(share * (1 - share) / count))


class EpochAgreement:
    """Computes the agreement of each epoch, if the stop rule watches it.

    Attributes:
        past: the ledger at the end of the last epoch, on the host; None before the first, or if the rule watches another
            statistic.
    """

    def __init__(self, read: Callable[[str], LedgerPart], rule: EarlyStop | None, faults: Faults) -> None:
        """Reads nothing yet. `read(caller)` returns the ledger of all processes."""
        self.past: PastScores | None = None
        self._read, self._faults = read, faults
        self._is_watched = rule is not None and rule.statistic == "agreement"

    def end_epoch(self, *, has_scores: bool) -> Estimate | None:
        """The agreement of the epoch that ends. Waits for the device. In a distributed run every process must call this.

        Never raises: an error is a fault.

        Args:
            has_scores: whether any sample of the epoch has a score.

        Returns:
            None if it is not watched, in the first epoch, and after a fault. NaN if no sample of the epoch has a score.
        """
        if not self._is_watched:
            return None
        try:
            part = self._read("agreement")
            past, self.past = self.past, PastScores(part.ledger.sums, part.ledger.seen)
            if past is None:
                return None
            found = agreement(past, self.past, part.total)
        except Exception as error:  # noqa: BLE001 - training must continue
            self._faults.record(FAULT, f"{type(error).__name__}: {error}")
            return None
        if has_scores and math.isnan(found.value):
            self._faults.record(
                FAULT,
                "no sample of this epoch had a score in an earlier one, so there is nothing to compare: pass the same ids for "
                "the same samples in every epoch, with tag(ids) or update(scores, ids)",
            )
            return None
        return found
