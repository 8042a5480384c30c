"""The stop rule: `step`, a pure function from (state, value) to (new state, decision), and `StopRule`, which keeps its state.

Regime "scratch": skip the warm-up, then follow the maximum of the statistic; `patience` epochs without a new best end
it. Regime "finetune": the statistic first falls while the new head finds its place; the maximum after that first
minimum counts. Source: arXiv 2510.25480, the section on early stopping; patience is ours, because a run that is still
going on has no argmax.
"""

import math
from enum import StrEnum
from typing import NamedTuple

from gwa_logging.settings import EarlyStop
from gwa_logging.types import EpochReport, StopAlert, StopReason


class Decision(StrEnum):
    """What one epoch's value meant."""

    WARMING_UP = "warming up"
    FALLING = "still falling towards the first minimum"
    UNDEFINED = "undefined value"
    IMPROVED = "new best"
    WAITING = "no new best"
    STOP = "patience is used up"


class StopState(NamedTuple):
    """All that the rule remembers.

    Attributes:
        epochs: values seen so far.
        lowest: finetune only: the lowest value so far, until the first minimum is passed.
        rising: whether the first minimum is passed; True from the start in regime "scratch".
        best, best_epoch: -inf and -1 until there is one.
        waited: epochs since the best.
        fired: whether the alert has been given; it is given once.
    """

    epochs: int = 0
    lowest: float = math.inf
    rising: bool = False
    best: float = -math.inf
    best_epoch: int = -1
    waited: int = 0
    fired: bool = False


def warmup_epochs(settings: EarlyStop, planned: int | None) -> int:
    """How many epochs are skipped: a share below 1 is of the planned epochs, rounded up; one if no plan is known."""
    if settings.warmup >= 1 or settings.warmup == 0:
        return math.ceil(settings.warmup)
    return 1 if planned is None else math.ceil(settings.warmup * planned)


def step(settings: EarlyStop, state: StopState, value: float, planned: int | None = None) -> tuple[StopState, Decision]:
    """Takes in the value of the next epoch.

    Args:
        settings: the rule.
        state: what it remembers.
        value: the statistic of the epoch `state.epochs`; an infinite or NaN value is passed over: it is no best, and
            costs no patience.
        planned: number of epochs planned, if known.

    Returns:
        The new state, and what the value meant. STOP is returned once.
    """
    epoch = state.epochs
    state = state._replace(epochs=epoch + 1, rising=state.rising or settings.regime == "scratch")
    if epoch < warmup_epochs(settings, planned):
        return state, Decision.WARMING_UP
    if not math.isfinite(value):
        return state, Decision.UNDEFINED
    if not state.rising:
        if value <= state.lowest + settings.min_delta:
            return state._replace(lowest=min(value, state.lowest)), Decision.FALLING
        state = state._replace(rising=True)
    if value > state.best + settings.min_delta or state.best_epoch < 0:
        return state._replace(best=value, best_epoch=epoch, waited=0), Decision.IMPROVED
    state = state._replace(waited=state.waited + 1)
    if state.waited < settings.patience or state.fired:
        return state, Decision.WAITING
    return state._replace(fired=True), Decision.STOP


class StopRule:
    """The rule with its state, asked once per epoch.

    Attributes:
        settings: the rule.
        state: what it remembers.
        planned: number of epochs planned, if known.
    """

    def __init__(self, settings: EarlyStop) -> None:
        self.settings = settings
        self.state = StopState()
        self.planned: int | None = None

    def judge(self, report: EpochReport) -> tuple[EpochReport, StopAlert | None]:
        """Takes in the next epoch: its report, marked if it is the best so far, and an alert if it is time to stop."""
        value = {"stable": report.stable_gwa, "gwa": report.gwa, "mean": report.mean}[self.settings.statistic]
        self.state, decision = step(self.settings, self.state, value, self.planned)
        report = report.model_copy(update={"is_best": decision is Decision.IMPROVED})
        return report, self._alert(report, value) if decision is Decision.STOP else None

    def _alert(self, report: EpochReport, value: float) -> StopAlert:
        statistic, state = self.settings.statistic, self.state
        return StopAlert(
            epoch=report.epoch,
            best_epoch=state.best_epoch,
            statistic=statistic,
            value=value,
            best_value=state.best,
            reason=StopReason.NO_IMPROVEMENT,
            message=(
                f"GWA says stop: no new best of its {statistic} statistic for {state.waited} epoch{'s'[: state.waited - 1]}. "
                f"Best epoch: {state.best_epoch} ({state.best:.4g}); now epoch {report.epoch}: {value:.4g}."
            ),
            caveats=report.notes,
        )
