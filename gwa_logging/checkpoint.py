"""The state of a monitor as plain data, for checkpoints.

Everything is JSON except the ledger's arrays, which have the form that the framework's own checkpoints accept: tensors in
PyTorch, because `torch.load` refuses NumPy, and NumPy arrays in JAX.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gwa_logging.alignment import SCORE_TOLERANCE
from gwa_logging.best_weights import BestWeightsFile
from gwa_logging.consensus import Consensus
from gwa_logging.early_stop import StopState
from gwa_logging.errors import InvalidInputError
from gwa_logging.histogram import BINS
from gwa_logging.ledger_state import LedgerState, SavedLedger
from gwa_logging.protocols import Adapter
from gwa_logging.records import EpochReport, StopAlert
from gwa_logging.saved_run import SavedRun
from gwa_logging.settings import shortened
from gwa_logging.state_values import (
    EXPECTED,
    LARGEST,
    Count,
    EpochOrNone,
    Finite,
    Flag,
    Positive,
    Real,
    StatePart,
    real,
    whole,
)
from gwa_logging.summary import SUMMARY_NUMBERS, AlignmentSummary

STATE_VERSION = 5
READABLE_VERSIONS = (3, 4, 5)
"""Version 3 has no details of documents in its ledger, and version 4 no looks."""


class HeadShape(NamedTuple):
    """Identifies the head that a state belongs to: its path, and its numbers of features and classes."""

    path: str
    features: int
    classes: int

    @classmethod
    def of(cls, adapter: Adapter) -> Self | None:
        """The head that an adapter watches; None until it is known."""
        return None if adapter.shape is None else cls(adapter.path, *adapter.shape)

    def matches(self, other: "HeadShape") -> bool:
        """Returns True if both describe the same head, perhaps in two instances of the model.

        Keras numbers unnamed layers and models across a process, so `sequential/head` becomes `sequential_8/head` later.
        """
        sizes_agree = (self.features, self.classes) == (other.features, other.classes)
        return sizes_agree and _without_numbers(self.path) == _without_numbers(other.path)

    def __str__(self) -> str:
        return f"{self.path!r} ({self.features} features, {self.classes} classes)"


def _without_numbers(path: str) -> str:
    """A Keras path without the numbers of unnamed layers and models. Other paths, which have no "/", stay as they are."""
    return re.sub(r"_\d+(?=/|$)", "", path) if "/" in path else path


class MonitorState(NamedTuple):
    """The state of one monitor.

    Attributes:
        head: the watched head; None if it was not known yet.
        processes: number of processes in the run.
        step: training steps so far.
        recorded_steps: the part of them that the journal has; the rest is in `interval`.
        display_limit: half-width of the range in which histograms are shown.
        planned: number of epochs planned, if known.
        stop: state of the stop rule.
        history, alert: as in the monitor.
        epoch: summary of the epoch in progress, over all processes.
        interval: summary of the interval in progress.
        ledger: the ledger over all processes, or the part of this one; None if there is none.
        look: `Consensus.state`, with arrays in the framework's form; None before the first look.
        heads: the states of the further heads by path, as `to_dict` returns them.
        best_weights: the file with the weights of the best epoch, if they are kept.
        run: the journal and the trackers' runs; None in a process that does not write, and in older states.
    """

    head: HeadShape | None
    processes: int
    step: int
    recorded_steps: int
    display_limit: float
    planned: int | None
    stop: StopState
    history: list[EpochReport]
    alert: StopAlert | None
    epoch: AlignmentSummary
    interval: AlignmentSummary
    ledger: LedgerState | None
    heads: dict[str, Any]
    look: dict[str, Any] | None = None
    best_weights: BestWeightsFile | None = None
    run: SavedRun | None = None

    def to_dict(self, adapter: Adapter) -> dict[str, Any]:
        """Converts the state to plain data."""
        return {
            "version": STATE_VERSION,
            **self._asdict(),
            "head": self.head and self.head._asdict(),
            "stop": {name: _to_json(value) for name, value in self.stop._asdict().items()},
            "history": [report.model_dump(mode="json") for report in self.history],
            "alert": self.alert and self.alert.model_dump(mode="json"),
            "best_weights": self.best_weights and self.best_weights.model_dump(),
            "run": self.run and self.run.model_dump(),
            "epoch": [_to_json(number) for number in self.epoch.to_vector().tolist()],
            "interval": [_to_json(number) for number in self.interval.to_vector().tolist()],
            "ledger": self.ledger and self.ledger.to_dict(adapter),
        }

    @classmethod
    def from_dict(cls, state: Any) -> Self:
        """Reads what `to_dict` returned.

        Raises:
            InvalidInputError: it is something else, damaged, or of another version.
        """
        if not isinstance(state, Mapping) or "version" not in state:
            found = f"the keys {sorted(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            raise InvalidInputError(f"state: not a state_dict() of a monitor: found {found[:200]}")
        if not any(_equals(state["version"], version) for version in READABLE_VERSIONS):
            raise InvalidInputError(
                f"state: expected version {STATE_VERSION}, found {shortened(state['version'])}; use the version of "
                "gwa_logging that saved it, or start without it"
            )
        try:
            read = _Saved.model_validate({name: state[name] for name in cls._fields if name in state})
        except ValidationError as error:
            raise InvalidInputError(
                f"state: not a state_dict() of a monitor, or a damaged one: {_explain(error)}. Nothing was loaded: use an "
                "earlier checkpoint, or start without the state"
            ) from None
        return cls(
            head=None if read.head is None else HeadShape(**dict(read.head)),
            processes=read.processes,
            step=read.step,
            recorded_steps=read.recorded_steps,
            display_limit=read.display_limit,
            planned=read.planned,
            stop=StopState(**dict(read.stop)),
            history=read.history,
            alert=read.alert,
            epoch=read.epoch,
            interval=read.interval,
            ledger=None if read.ledger is None else read.ledger.state(),
            heads=read.heads,
            look=read.look,
            best_weights=read.best_weights,
            run=read.run,
        )

    def check(self, adapter: Adapter, num_samples: int | None, heads: set[str]) -> None:
        """Checks that the state fits a monitor.

        Raises:
            InvalidInputError: its head, further heads, number of processes or size of the ledger differ.
        """
        head = HeadShape.of(adapter)
        if head and self.head and not head.matches(self.head):
            problem = f"it was saved with the head {self.head}, this model's is {head}"
        elif self.heads.keys() != heads:
            problem = (
                f"it was saved with the further heads {sorted(self.heads)}, but the watched ones are {sorted(heads)}"
            )
        elif self.processes != adapter.processes:
            problem = (
                f"it was saved by {self.processes} processes, this run has {adapter.processes}; resume with the same number, "
                "or start without it"
            )
        elif self.ledger is None and num_samples is not None:
            problem = f"it has no ledger, but num_samples={num_samples}"
        elif self.ledger is not None and (found := self.ledger.problem(adapter, num_samples)):
            problem = found
        else:
            return
        raise InvalidInputError(f"state: {problem}")


def _to_json(value: Any) -> Any:
    """JSON has no infinities and no NaN, so they become text, which `real` reads back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- reading: everything is checked before anything is used ----------------------------------------------------------


def _equals(value: Any, number: int) -> bool:
    try:
        return bool(whole(value) == number)
    except ValueError:
        return False


def _explain(error: ValidationError) -> str:
    """The first wrong field, what it should be, and what was found."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}" if field else str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{field}: it is missing"
    if first["type"] == "extra_forbidden":
        return f"{field}: it is unknown"
    expected = EXPECTED.get(first["type"], "another value").format(**first.get("ctx", {}))
    return f"{field}: expected {expected}, found {shortened(first['input'])}"


class _Head(StatePart):
    path: str
    features: Positive
    classes: Positive


class _Stop(StatePart):
    epochs: Count
    lowest: Real
    rising: Flag
    best: Real
    best_error: Annotated[Finite, Field(ge=0)]
    best_epoch: EpochOrNone
    waited: Count
    undefined: Count
    fired: Flag

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if math.isnan(self.lowest) or self.lowest == -math.inf:
            raise ValueError(f"lowest={self.lowest}: expected a number, or inf before there is one")
        if not self.best_epoch < max(self.epochs, 1) or max(self.waited, self.undefined) > self.epochs:
            raise ValueError(
                f"best_epoch={self.best_epoch}, waited={self.waited}, undefined={self.undefined}: not within "
                f"epochs={self.epochs}"
            )
        if self.best != -math.inf if self.best_epoch < 0 else not math.isfinite(self.best):
            raise ValueError(f"best={self.best} does not go with best_epoch={self.best_epoch}")
        return self


def _summary(value: Any) -> AlignmentSummary:
    """Reads the list that `AlignmentSummary.to_vector` gave, and checks that scores can have such a summary."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != len(SUMMARY_NUMBERS) + BINS:
        raise ValueError(f"expected {len(SUMMARY_NUMBERS) + BINS} numbers, found {shortened(value)}")
    vector = np.array([real(number) for number in value])
    numbers = dict(zip(SUMMARY_NUMBERS, vector.tolist(), strict=False))
    count, bins = numbers["count"], vector[-BINS:]
    counts = np.array([count, numbers["no_gradient"], numbers["dead"], numbers["not_finite"], *bins])
    if not ((counts >= 0) & (counts <= LARGEST) & (counts == np.floor(counts))).all():
        raise ValueError("expected counts from 0 to 2**53, found others")
    limit = 1 + 2 * SCORE_TOLERANCE  # the tolerance itself, rounded to float32
    minimum, maximum = numbers["minimum"], numbers["maximum"]
    in_order = -limit <= minimum <= maximum <= limit
    if not in_order if count else (minimum, maximum) != (math.inf, -math.inf):
        raise ValueError(f"minimum={minimum} and maximum={maximum} do not fit {count:.0f} scores")
    if not abs(numbers["mean"]) <= limit:
        raise ValueError(f"mean={numbers['mean']}: expected a mean of scores, in [-1, 1]")
    for name in ("m2", "m3", "m4"):
        if not math.isfinite(numbers[name]) or (numbers[name] < 0 and name != "m3"):
            raise ValueError(f"{name}={numbers[name]}: expected a moment of scores")
    if bins.sum() != count:
        raise ValueError(f"bins: they hold {bins.sum():.0f} scores, count={count:.0f}")
    return AlignmentSummary.from_vector(vector)


class _Saved(StatePart):
    """A whole state, as `MonitorState.to_dict` returns it."""

    head: _Head | None
    processes: Positive
    step: Count
    recorded_steps: Count
    display_limit: Annotated[Finite, Field(gt=0)]
    planned: Positive | None
    stop: _Stop
    history: list[EpochReport]
    alert: StopAlert | None
    epoch: Annotated[Any, BeforeValidator(_summary)]
    interval: Annotated[Any, BeforeValidator(_summary)]
    ledger: SavedLedger | None
    heads: dict[str, Any]
    look: Annotated[Any, BeforeValidator(lambda value: Consensus.from_state(value).state())] = None
    best_weights: BestWeightsFile | None = None
    run: SavedRun | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.alert is None and self.ledger is not None and self.ledger.frozen_sums is not None:
            raise ValueError("ledger.frozen_sums: there is no alert at which it was frozen")
        if self.recorded_steps > self.step:
            raise ValueError(f"recorded_steps={self.recorded_steps}: expected at most step={self.step}")
        for index, report in enumerate(self.history):
            if report.epoch != index or not 0 <= report.count <= LARGEST or not 0 <= report.excluded <= LARGEST:
                raise ValueError(
                    f"history.{index}: epoch={report.epoch}, count={report.count}, excluded={report.excluded}"
                )
            if report.histogram.total != report.count:
                raise ValueError(f"history.{index}: count={report.count}, its histogram has {report.histogram.total}")
        if self.stop.epochs > len(self.history):
            raise ValueError(f"stop.epochs={self.stop.epochs}: there are {len(self.history)} reports in history")
        return self
