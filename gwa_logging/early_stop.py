"""The stop rule: `step`, a pure function from (state, value) to (new state, decision), and `StopRule`, which keeps its state.

Regime "scratch": skip the warm-up, then follow the maximum of the statistic; `patience` epochs in a row that are clearly
below it end it. Regime "finetune": the statistic first falls while the new head finds its place; the maximum after that
first minimum counts. Source: arXiv 2510.25480, the section on early stopping; patience and drop are ours, because a run
that is still going on has no argmax, and because a statistic that merely stands still is no reason to stop.
"""

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from gwa_logging.records import EpochReport, StopAlert, StopReason
from gwa_logging.settings import EarlyStop
from gwa_logging.statistic import Estimate, estimate

CLEARLY = 3.0
"""Standard errors by which a new best must exceed the one that an alert has named, to take the alert back."""

AS_GOOD = 2.0
"""Standard errors of the best within which other epochs are called as good as it."""


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
        best, best_error, best_epoch: the best value, its standard error and its epoch; -inf, 0 and -1 until there is one.
        waited: epochs in a row that were clearly below the best.
        undefined: epochs in a row whose value was undefined.
        fired: whether the alert stands. It is given once, and taken back when a clearly better best appears.
    """

    epochs: int = 0
    lowest: float = math.inf
    rising: bool = False
    best: float = -math.inf
    best_error: float = 0.0
    best_epoch: int = -1
    waited: int = 0
    undefined: int = 0
    fired: bool = False


def warmup_epochs(settings: EarlyStop, planned: int | None) -> int:
    """How many epochs are skipped: a share below 1 is of the planned epochs, rounded up; one if no plan is known."""
    if settings.warmup >= 1 or settings.warmup == 0:
        return math.ceil(settings.warmup)
    return 1 if planned is None else math.ceil(settings.warmup * planned)


def step(
    settings: EarlyStop, state: StopState, value: float, error: float = 0.0, planned: int | None = None
) -> tuple[StopState, Decision]:
    """Takes in the value of the next epoch.

    Args:
        settings: the rule.
        state: what it remembers.
        value: the statistic of the epoch `state.epochs`; an infinite or NaN value is no best, and `patience` of them in a
            row are a reason to stop of their own.
        error: the value's standard error, at least 0.
        planned: number of epochs planned, if known.

    Returns:
        The new state, and what the value meant. STOP is returned once, and again only after a clearly better best.
    """
    epoch = state.epochs
    state = state._replace(epochs=epoch + 1, rising=state.rising or settings.regime == "scratch")
    if epoch < warmup_epochs(settings, planned):
        return state, Decision.WARMING_UP
    if not math.isfinite(value):
        state = state._replace(undefined=state.undefined + 1)
        return _stop(state, Decision.UNDEFINED) if state.undefined >= settings.patience else (state, Decision.UNDEFINED)
    state = state._replace(undefined=0)
    if not state.rising:
        if value <= state.lowest + settings.min_delta * error:
            return state._replace(lowest=min(value, state.lowest)), Decision.FALLING
        state = state._replace(rising=True)
    excess, noise = value - state.best, math.hypot(error, state.best_error)
    if state.best_epoch < 0 or excess > settings.min_delta * noise:
        stands = state.fired and excess <= CLEARLY * noise
        best = state._replace(best=value, best_error=error, best_epoch=epoch)
        return best._replace(waited=0, fired=stands), Decision.IMPROVED
    if settings.drop and value >= state.best - settings.drop * abs(state.best):
        return state._replace(waited=0), Decision.WAITING
    state = state._replace(waited=state.waited + 1)
    return _stop(state, Decision.WAITING) if state.waited >= settings.patience else (state, Decision.WAITING)


def _stop(state: StopState, otherwise: Decision) -> tuple[StopState, Decision]:
    return (state, otherwise) if state.fired else (state._replace(fired=True), Decision.STOP)


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

    def judge(
        self, report: EpochReport, history: Sequence[EpochReport] = ()
    ) -> tuple[EpochReport, StopAlert | None, bool]:
        """Takes in the next epoch.

        Args:
            report: its report.
            history: those of the epochs before, for the words of an alert.

        Returns:
            The report, marked if it is the best so far; an alert if it is time to stop; whether the alert that was given
            before is taken back.
        """
        fired = self.state.fired
        value = self._of(report)
        self.state, decision = step(self.settings, self.state, value.value, value.standard_error, self.planned)
        report = report.model_copy(update={"is_best": decision is Decision.IMPROVED})
        alert = self._alert(report, value, history) if decision is Decision.STOP else None
        return report, alert, fired and not self.state.fired

    def _of(self, report: EpochReport) -> Estimate:
        """What is watched: the value as reported, its error from the histogram."""
        names = {"separation": "separation", "stable": "stable_gwa", "gwa": "gwa", "mean": "mean"}
        error = estimate(self.settings.statistic, report.histogram).standard_error
        return Estimate(getattr(report, names[self.settings.statistic]), error if math.isfinite(error) else 0.0)

    def _alert(self, report: EpochReport, value: Estimate, history: Sequence[EpochReport]) -> StopAlert:
        statistic, state = self.settings.statistic, self.state
        epochs = f"{self.settings.patience} epoch{'s'[: self.settings.patience - 1]}"
        best = (
            f"Best epoch: {state.best_epoch} ({state.best:.4g})" if state.best_epoch >= 0 else "There was no best epoch"
        )
        if state.undefined:
            reason, what = StopReason.UNDEFINED, f"its {statistic} statistic has been undefined for {epochs}"
        elif self.settings.drop:
            reason = StopReason.DECLINE
            what = f"its {statistic} statistic has been clearly below its best for {epochs}"
        else:
            reason, what = StopReason.NO_IMPROVEMENT, f"no new best of its {statistic} statistic for {epochs}"
        message = f"GWA says stop: {what}. {best}; now epoch {report.epoch}: {value.value:.4g}"
        noise = math.hypot(value.standard_error, state.best_error)
        if noise and math.isfinite(value.value):
            message += f", lower by {(state.best - value.value) / noise:.3g} standard errors"
        close = [r.epoch for r in history if r.epoch != state.best_epoch and self._is_as_good(r)]
        if close:
            message += f". As good within its error: epochs {_listed([*close, state.best_epoch])}"
        return StopAlert(
            epoch=report.epoch,
            best_epoch=state.best_epoch,
            statistic=statistic,
            value=value.value,
            best_value=state.best if state.best_epoch >= 0 else math.nan,
            reason=reason,
            message=message + ".",
            caveats=tuple(self._caveats(report, history)),
        )

    def _is_as_good(self, report: EpochReport) -> bool:
        if report.epoch < warmup_epochs(self.settings, self.planned):
            return False
        return self._of(report).value >= self.state.best - AS_GOOD * self.state.best_error

    def _caveats(self, report: EpochReport, history: Sequence[EpochReport]) -> Iterable[str]:
        yield from report.notes
        best = next((r for r in history if r.epoch == self.state.best_epoch), None)
        for note in best.notes if best else ():
            if note not in report.notes:
                yield f"epoch {self.state.best_epoch}: {note}"
        if 0 <= self.state.best_epoch == warmup_epochs(self.settings, self.planned):
            yield (
                f"the best epoch, {self.state.best_epoch}, is the first after the warm-up: a better one may lie in it; "
                "EarlyStop(warmup=...) shortens it"
            )


def _listed(epochs: list[int]) -> str:
    """Epochs as ranges: 3 to 5, 9.

    >>> _listed([9, 3, 4, 5])
    '3 to 5, 9'
    """
    ranges: list[list[int]] = []
    for epoch in sorted(epochs):
        if ranges and epoch == ranges[-1][-1] + 1:
            ranges[-1].append(epoch)
        else:
            ranges.append([epoch])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)
