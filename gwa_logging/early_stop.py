"""The stop rule: `step` is a pure function from (state, value) to (new state, decision); `StopRule` keeps the state.

Regime "scratch": after the warm-up, the rule follows the maximum of the statistic and fires after `patience` epochs in a row
that are clearly below it. Regime "finetune": while a new head adapts, the statistic first falls; only the maximum after that
first minimum counts.

Statistic "consensus": the sum of consensus and separation picks the epoch. The consensus evaluates the very checkpoint; late
in a long run, when the consensus has memorised labels in it too, the separation shows that. The sum would fire on a plateau,
so the rule fires only when the separation has clearly declined.

Source: arXiv 2510.25480, the section on early stopping, which takes the argmax of a complete run. This library adds patience,
because the argmax of an unfinished run is unknown, and drop, because a plateau is not a reason to stop.
"""

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from gwa_logging.records import AlertWithdrawal, EpochReport, StopAlert, StopReason
from gwa_logging.settings import DEFAULT_EARLY_STOP, EarlyStop
from gwa_logging.statistic import Estimate, estimate

WITHDRAWAL_MARGIN = 3.0
"""Number of standard errors by which a new best must exceed the best that an alert named to withdraw the alert."""

TIE_MARGIN = 2.0
"""An alert lists epochs within this number of standard errors of the best as equally good."""


TYPICAL_LOSS = {
    "consensus": (
        "in our study the epoch that this rule named was within 1.0 points of test accuracy of the best epoch in half of the "
        "runs, and within 4.4 points in nine of ten"
    ),
    "separation": (
        "in our study the epoch that this rule named was within 1.4 points of test accuracy of the best epoch in half of the "
        "runs, and within 8.2 points in nine of ten"
    ),
}
"""How sure an alert is, for the statistics that the study has examined with their default rule. Source: `docs/study.md`."""


class Decision(StrEnum):
    """How the rule interprets the value of an epoch."""

    WARMING_UP = "warming up"
    FALLING = "still falling towards the first minimum"
    UNDEFINED = "undefined value"
    IMPROVED = "new best"
    WAITING = "no new best"
    STOP = "patience is used up"


class StopState(NamedTuple):
    """What the rule remembers between epochs.

    Attributes:
        epochs: number of values seen.
        lowest: regime "finetune": the lowest value until the first minimum is passed.
        rising: True once the first minimum is passed; in regime "scratch" from the first epoch.
        best, best_error, best_epoch: the best value, its standard error and its epoch; at first -inf, 0 and -1.
        waited: number of the latest epochs in a row that are clearly below the best.
        undefined: number of the latest epochs in a row whose value is undefined.
        fired: True while an alert stands: from when it fires until a clearly better epoch withdraws it.
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
    """Returns the number of warm-up epochs. A share of the planned epochs is rounded up, and is 1 if no plan is known."""
    if settings.warmup >= 1 or settings.warmup == 0:
        return math.ceil(settings.warmup)
    return 1 if planned is None else math.ceil(settings.warmup * planned)


def step(
    settings: EarlyStop,
    state: StopState,
    value: float,
    error: float = 0.0,
    planned: int | None = None,
    *,
    may_fire: bool = True,
) -> tuple[StopState, Decision]:
    """Applies the rule to the value of the next epoch.

    Args:
        settings: the rule.
        state: its state before this epoch.
        value: the statistic of epoch `state.epochs`. Infinity and NaN are undefined values: they are never the best, and the
            rule fires after `patience` of them in a row.
        error: standard error of the value, at least 0.
        planned: number of epochs planned, if known.
        may_fire: False keeps the rule silent when the patience is used up; it fires in the first epoch that may fire.

    Returns:
        The new state and the decision. STOP is returned once, and again only after a clearly better epoch.
    """
    epoch = state.epochs
    state = state._replace(epochs=epoch + 1, rising=state.rising or settings.regime == "scratch")
    if epoch < warmup_epochs(settings, planned):
        return state, Decision.WARMING_UP
    if not math.isfinite(value):
        state = state._replace(undefined=state.undefined + 1)
        is_over = may_fire and state.undefined >= settings.patience
        return _fire(state, Decision.UNDEFINED) if is_over else (state, Decision.UNDEFINED)
    state = state._replace(undefined=0)
    if not state.rising:
        if value <= state.lowest + settings.min_delta * error:
            return state._replace(lowest=min(value, state.lowest)), Decision.FALLING
        state = state._replace(rising=True)
    excess, noise = value - state.best, math.hypot(error, state.best_error)
    if state.best_epoch < 0 or excess > settings.min_delta * noise:
        still_fired = state.fired and excess <= WITHDRAWAL_MARGIN * noise
        state = state._replace(best=value, best_error=error, best_epoch=epoch, waited=0, fired=still_fired)
        return state, Decision.IMPROVED
    if settings.drop and value >= state.best - settings.drop * abs(state.best):
        return state._replace(waited=0), Decision.WAITING
    state = state._replace(waited=state.waited + 1)
    is_over = may_fire and state.waited >= settings.patience
    return _fire(state, Decision.WAITING) if is_over else (state, Decision.WAITING)


def _fire(state: StopState, otherwise: Decision) -> tuple[StopState, Decision]:
    """Returns STOP, or `otherwise` if an alert stands already."""
    return (state, otherwise) if state.fired else (state._replace(fired=True), Decision.STOP)


class StopRule:
    """The rule with its state. Call `judge` once per epoch.

    Attributes:
        settings: the rule.
        state: its state.
        planned: number of epochs planned, if known.
    """

    def __init__(self, settings: EarlyStop) -> None:
        self.settings = settings
        self.state = StopState()
        self.planned: int | None = None
        self._decline = StopState()  # of the separation, which statistic "consensus" waits for

    def restore(self, state: StopState, planned: int | None, history: Sequence[EpochReport]) -> None:
        """Goes on from a state; `history` are the reports of all epochs until then."""
        self.state, self.planned, self._decline = state, planned, StopState()
        for report in history:
            self._has_declined(report)

    def _has_declined(self, report: EpochReport) -> bool:
        """Adds an epoch. Returns True if the separation lets the rule fire."""
        if self.settings.statistic != "consensus":
            return True
        rule = DEFAULT_EARLY_STOP.model_copy(update={"regime": self.settings.regime})
        error = _finite_error("separation", report)
        self._decline, _ = step(rule, self._decline, report.separation, error, self.planned)
        return self._decline.fired

    def judge(
        self,
        report: EpochReport,
        history: Sequence[EpochReport] = (),
        consensus: Estimate | None = None,
        agreement: Estimate | None = None,
    ) -> tuple[EpochReport, StopAlert | None, bool]:
        """Applies the rule to the next epoch.

        Args:
            report: the report of this epoch.
            history: the reports of the epochs before, which the text of an alert refers to.
            consensus: the consensus of this epoch; None if there is none. An epoch without it says nothing about the model, so
                a rule that watches it ignores the epoch.
            agreement: the agreement of this epoch, in the same way. NaN if no sample of the epoch has a score.

        Returns:
            The report with `consensus`, `agreement` and `is_best` set; an alert if the rule fires, else None; True if this
            epoch withdraws an alert.
        """
        fired = self.state.fired
        if consensus is not None:
            report = report.model_copy(update={"consensus": consensus.value})
        if agreement is not None and math.isfinite(agreement.value):
            report = report.model_copy(update={"agreement": agreement.value})
        may_fire = self._has_declined(report)
        value = self._watched(report, history[-1] if history else None, consensus, agreement)
        if value is None:
            self.state = self.state._replace(epochs=self.state.epochs + 1)
            return report, None, False
        self.state, decision = step(
            self.settings, self.state, value.value, value.standard_error, self.planned, may_fire=may_fire
        )
        report = report.model_copy(update={"is_best": decision is Decision.IMPROVED})
        alert = self._alert(report, value, history) if decision is Decision.STOP else None
        return report, alert, fired and not self.state.fired

    def _watched(
        self,
        report: EpochReport,
        previous: EpochReport | None,
        consensus: Estimate | None,
        agreement: Estimate | None,
    ) -> Estimate | None:
        """Returns the watched statistic with its standard error; None if this epoch is to be ignored."""
        statistic = self.settings.statistic
        value = self._value(report, previous)
        if statistic == "consensus":
            if consensus is None:
                return None
            error = math.hypot(consensus.standard_error, _finite_error("separation", report))
            return Estimate(value, error) if math.isfinite(value) else Estimate(math.nan, 0.0)
        if statistic != "agreement":
            return Estimate(value, _finite_error(statistic, report))
        if agreement is None:
            return None
        error = math.hypot(agreement.standard_error, estimate("separation", report.histogram).standard_error)
        if not math.isfinite(agreement.value + report.separation):  # no scores, or all of them equal
            return Estimate(math.nan, 0.0)
        # Both epochs are taken to have the same error, and to be independent.
        return Estimate(value, error / math.sqrt(2)) if math.isfinite(value) else None

    def _value(self, report: EpochReport, previous: EpochReport | None) -> float:
        """Returns the watched statistic of an epoch; NaN if it has none."""
        statistic = self.settings.statistic
        if statistic == "agreement":
            return _agreement_and_separation(report, previous)
        if statistic == "consensus":
            return math.nan if report.consensus is None else report.consensus + report.separation
        names = {"separation": "separation", "stable": "stable_gwa", "gwa": "gwa", "mean": "mean"}
        return float(getattr(report, names[statistic]))

    def _alert(self, report: EpochReport, value: Estimate, history: Sequence[EpochReport]) -> StopAlert:
        statistic, state = self.settings.statistic, self.state
        epochs = "1 epoch" if self.settings.patience == 1 else f"{self.settings.patience} epochs"
        name = f"{statistic} + separation" if statistic in ("consensus", "agreement") else statistic
        best = f"Best epoch: {state.best_epoch} ({state.best:.4g})" if state.best_epoch >= 0 else "No epoch was best"
        if state.undefined:
            reason, cause = StopReason.UNDEFINED, f"the {name} statistic has been undefined for {epochs}"
        elif self.settings.drop:
            reason = StopReason.DECLINE
            cause = f"the {name} statistic has been clearly below its best for {epochs}"
        else:
            reason, cause = StopReason.NO_IMPROVEMENT, f"the {name} statistic has had no new best for {epochs}"
        if statistic == "consensus" and not state.undefined:
            cause += ", and the separation alone is clearly below its best"
        message = f"GWA recommends stopping: {cause}. {best}; epoch {report.epoch}: {value.value:.4g}"
        noise = math.hypot(value.standard_error, state.best_error)
        if noise and math.isfinite(value.value):
            message += f", lower by {(state.best - value.value) / noise:.3g} standard errors"
        pairs = zip(history, (None, *history), strict=False)
        ties = [r.epoch for r, previous in pairs if r.epoch != state.best_epoch and self._ties_with_best(r, previous)]
        if ties:
            message += f". Equally good within the error: epochs {_format_ranges([*ties, state.best_epoch])}"
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

    def _ties_with_best(self, report: EpochReport, previous: EpochReport | None) -> bool:
        """Returns True if the epoch is after the warm-up, and not clearly worse than the best one."""
        if report.epoch < warmup_epochs(self.settings, self.planned):
            return False
        return self._value(report, previous) >= self.state.best - TIE_MARGIN * self.state.best_error

    def _caveats(self, report: EpochReport, history: Sequence[EpochReport]) -> Iterable[str]:
        """Yields reasons to doubt the alert."""
        statistic, action = self.settings.statistic, self.settings.action
        if self.state.best_epoch >= 0 and self.settings == EarlyStop(statistic=statistic, action=action):
            yield from filter(None, [TYPICAL_LOSS.get(statistic)])
        yield from report.notes
        best = next((r for r in history if r.epoch == self.state.best_epoch), None)
        for note in best.notes if best else ():
            if note not in report.notes:
                yield f"epoch {self.state.best_epoch}: {note}"
        if 0 <= self.state.best_epoch == warmup_epochs(self.settings, self.planned):
            yield (
                f"the best epoch, {self.state.best_epoch}, is the first after the warm-up, so a better one may be inside the "
                "warm-up; shorten it with EarlyStop(warmup=...)"
            )


def _finite_error(statistic: str, report: EpochReport) -> float:
    """Returns the standard error of a statistic of the scores; 0 if it is undefined."""
    error = estimate(statistic, report.histogram).standard_error
    return error if math.isfinite(error) else 0.0


def _agreement_and_separation(report: EpochReport, previous: EpochReport | None) -> float:
    """Returns the mean of agreement + separation over two epochs, in [0, 2]; NaN if either epoch lacks one of them."""
    if previous is None or previous.agreement is None or report.agreement is None:
        return math.nan
    return (report.agreement + report.separation + previous.agreement + previous.separation) / 2


def withdrawal_of(alert: StopAlert, report: EpochReport) -> AlertWithdrawal:
    """The record of an alert that a clearly better epoch has withdrawn."""
    message = (
        f"epoch {report.epoch} is clearly better than epoch {alert.best_epoch}: the stop alert of epoch {alert.epoch} is "
        "withdrawn"
    )
    return AlertWithdrawal(epoch=report.epoch, alert_epoch=alert.epoch, message=f"GWA: {message}.")


def _format_ranges(epochs: list[int]) -> str:
    """Lists epochs as ranges.

    >>> _format_ranges([9, 3, 4, 5])
    '3 to 5, 9'
    """
    ranges: list[list[int]] = []
    for epoch in sorted(epochs):
        if ranges and epoch == ranges[-1][-1] + 1:
            ranges[-1].append(epoch)
        else:
            ranges.append([epoch])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)
