"""What a monitor remembers, as plain data: for checkpoints.

Everything is JSON, but for the ledger's arrays, which are in the form that the framework's own checkpoints take: tensors in
PyTorch, whose `torch.load` refuses NumPy, and NumPy arrays in JAX.
"""

import math
import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gwa_logging.alignment import SCORE_TOLERANCE
from gwa_logging.early_stop import StopState
from gwa_logging.errors import InvalidInputError
from gwa_logging.histogram import BINS
from gwa_logging.ledger import UNKNOWN, Ledger
from gwa_logging.protocols import Adapter
from gwa_logging.records import EpochReport, StopAlert
from gwa_logging.summary import AlignmentSummary

STATE_VERSION = 2


class HeadShape(NamedTuple):
    """Which head a state belongs to: its path, and how many features and classes it has."""

    path: str
    features: int
    classes: int

    @classmethod
    def of(cls, adapter: Adapter) -> Self | None:
        """The head that an adapter watches; None while it is not known."""
        return None if adapter.shape is None else cls(adapter.path, *adapter.shape)

    def is_that_of(self, other: "HeadShape") -> bool:
        """Whether it is the same head, in another instance of the model perhaps.

        Keras numbers layers and models without a name, and goes on counting: `sequential_8/head` was `sequential/head` before.
        """
        plain = (re.sub(r"_\d+(?=/|$)", "", path) if "/" in path else path for path in (self.path, other.path))
        return len({*plain}) == 1 and self[1:] == other[1:]

    def __str__(self) -> str:
        return f"{self.path!r} ({self.features} features, {self.classes} classes)"


class MonitorState(NamedTuple):
    """The state of one monitor.

    Attributes:
        head: of the model; None if it was not known yet.
        processes: how many processes trained together.
        step: training steps so far.
        taken: those of them that the journal has; the rest is in `interval`.
        display_limit: half-width of the range that histograms are shown in.
        planned: number of epochs planned, if known.
        stop: what the stop rule remembers.
        history, alert: of the monitor.
        epoch: summary of the epoch in progress, of all processes together.
        interval: summary of the interval in progress.
        ledger: of all processes together; None if there is none.
        heads: the states of the further heads, by path, as `plain` gives them.
    """

    head: HeadShape | None
    processes: int
    step: int
    taken: int
    display_limit: float
    planned: int | None
    stop: StopState
    history: list[EpochReport]
    alert: StopAlert | None
    epoch: AlignmentSummary
    interval: AlignmentSummary
    ledger: Ledger | None
    heads: dict[str, Any]

    def plain(self, adapter: Adapter) -> dict[str, Any]:
        """As plain data."""
        ledger = self.ledger
        return {
            "version": STATE_VERSION,
            **self._asdict(),
            "head": self.head and self.head._asdict(),
            "stop": {name: _number(value) for name, value in self.stop._asdict().items()},
            "history": [report.model_dump(mode="json") for report in self.history],
            "alert": self.alert and self.alert.model_dump(mode="json"),
            "epoch": _summary(self.epoch),
            "interval": _summary(self.interval),
            "ledger": ledger
            and {
                **{name: adapter.to_checkpoint_array(getattr(ledger, name)) for name in ("sums", "seen", "predicted")},
                "invalid_ids": ledger.invalid_ids,
                "untagged": ledger.untagged,
            },
        }

    @classmethod
    def from_plain(cls, state: Any) -> Self:
        """Reads what `plain` gave.

        Raises:
            InvalidInputError: it is something else, or of another version.
        """
        if not isinstance(state, Mapping) or "version" not in state:
            found = f"the keys {sorted(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            raise InvalidInputError(f"state: not a state_dict() of a monitor: found {found[:200]}")
        if not _equals(state["version"], STATE_VERSION):
            raise InvalidInputError(
                f"state: expected version {STATE_VERSION}, found {state['version']!r}; take the gwa_logging that it was "
                "saved with, or start without it"
            )
        try:
            read = _Saved.model_validate({name: state[name] for name in cls._fields if name in state})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "its fields"
            problem = first["msg"].removeprefix("Value error, ")
            found = "" if first["type"] in ("missing", "value_error") else f", found {_shortened(first['input'])}"
            raise InvalidInputError(
                f"state: not a state_dict() of a monitor, or a damaged one: {field}: {problem}{found}. Nothing was loaded: "
                "take an earlier checkpoint, or start without the state"
            ) from None
        return cls(
            head=None if read.head is None else HeadShape(**dict(read.head)),
            processes=read.processes,
            step=read.step,
            taken=read.taken,
            display_limit=read.display_limit,
            planned=read.planned,
            stop=StopState(**dict(read.stop)),
            history=read.history,
            alert=read.alert,
            epoch=AlignmentSummary(**dict(read.epoch)),
            interval=AlignmentSummary(**dict(read.interval)),
            ledger=None if read.ledger is None else Ledger(**dict(read.ledger)),
            heads=read.heads,
        )

    def check(self, adapter: Adapter, num_samples: int | None, heads: set[str]) -> None:
        """Whether it fits a monitor.

        Raises:
            InvalidInputError: it belongs to another head, other further heads, another number of processes, or its ledger is of
                another size.
        """
        head = HeadShape.of(adapter)
        size = None if self.ledger is None else len(self.ledger.sums)
        if head and self.head and not head.is_that_of(self.head):
            problem = f"it was saved with the head {self.head}, this model's is {head}"
        elif self.heads.keys() != heads:
            problem = f"it was saved with the further heads {sorted(self.heads)}, watched are {sorted(heads)}"
        elif self.processes != adapter.processes:
            problem = (
                f"it was saved by {self.processes} processes, this run has {adapter.processes}; go on with as many, or start "
                "without it"
            )
        elif size != num_samples:
            problem = f"its ledger is of size {size}, watch(num_samples={num_samples})"
        else:
            return
        raise InvalidInputError(f"state: {problem}")


def _number(value: Any) -> Any:
    """JSON has no infinities and no NaN; as text they are read back by `float`."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _summary(summary: AlignmentSummary) -> dict[str, Any]:
    numbers = {name: _number(getattr(summary, name)) for name in AlignmentSummary.__slots__ if name != "bins"}
    return {**numbers, "bins": summary.bins.tolist()}


# --- reading: everything is checked before anything is used ----------------------------------------------------------


def _equals(value: Any, number: int) -> bool:
    try:
        return bool(_whole(value) == number)
    except ValueError:
        return False


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(value: Any) -> int:
    """An integer of Python, of NumPy, or the only element of an array: some checkpoints turn numbers into arrays."""
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"expected an integer, found {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected an integer, found {_shortened(value)}") from None


def _real(value: Any) -> float:
    """A number, or what `_number` made of one."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, bool | np.bool_ | str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"expected a number, found {_shortened(value)}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number, found {_shortened(value)}") from None


def _flag(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.dtype(bool):
        return bool(value)
    raise ValueError(f"expected True or False, found {_shortened(value)}")


def _array(value: Any, kinds: str) -> npt.NDArray[Any]:
    """A one-dimensional array of finite numbers of some kinds, from what any framework has made of it."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected an array of numbers ({error})") from None
    if array.ndim != 1 or (array.dtype.kind not in kinds and array.size):
        raise ValueError(f"expected a one-dimensional array of numbers, found {array.dtype} of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers, found {int((~np.isfinite(array)).sum())} that are not")
    return array


def _bins(value: Any) -> npt.NDArray[np.int64]:
    array = _array(value, "iu")
    if len(array) != BINS:
        raise ValueError(f"expected {BINS} counts, found {len(array)} bins")
    if array.min() < 0 or array.max() > LARGEST:
        raise ValueError(f"expected counts from 0 to 2**53, found {array.min()} to {array.max()}")
    return array.astype(np.int64)


LARGEST = 2**53
"""Up to here float64, in which processes exchange counts, holds every integer."""

_Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=LARGEST)]
_Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=LARGEST)]
_Epoch = Annotated[int, BeforeValidator(_whole), Field(ge=-1, le=LARGEST)]
_Real = Annotated[float, BeforeValidator(_real)]
_Finite = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
_Flag = Annotated[bool, BeforeValidator(_flag)]
_Floats = Annotated[Any, BeforeValidator(lambda value: _array(value, "f").astype(np.float32))]


class _Part(BaseModel):
    """Base of what is read from a state; nothing in it is converted silently."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Head(_Part):
    path: str
    features: _Positive
    classes: _Positive


class _Stop(_Part):
    epochs: _Count
    lowest: _Real
    rising: _Flag
    best: _Real
    best_error: Annotated[_Finite, Field(ge=0)]
    best_epoch: _Epoch
    waited: _Count
    undefined: _Count
    fired: _Flag

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


class _Summary(_Part):
    count: _Count
    mean: _Finite
    m2: Annotated[_Finite, Field(ge=0)]
    m3: _Finite
    m4: _Finite
    minimum: _Real
    maximum: _Real
    bins: Annotated[Any, BeforeValidator(_bins)]
    no_gradient: _Count
    dead: _Count
    not_finite: _Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limit = 1 + 2 * SCORE_TOLERANCE  # the tolerance itself, rounded to float32
        in_order = -limit <= self.minimum <= self.maximum <= limit
        if not in_order if self.count else (self.minimum, self.maximum) != (math.inf, -math.inf):
            raise ValueError(f"minimum={self.minimum} and maximum={self.maximum} are not those of {self.count} scores")
        if abs(self.mean) > limit:
            raise ValueError(f"mean={self.mean}: expected a mean of scores, in [-1, 1]")
        if int(self.bins.sum()) != self.count:
            raise ValueError(f"bins: they hold {self.bins.sum()} scores, count={self.count}")
        return self


class _Ledger(_Part):
    sums: _Floats
    seen: _Floats
    predicted: Annotated[Any, BeforeValidator(lambda value: _array(value, "iuf").astype(np.int32))]
    invalid_ids: _Count
    untagged: _Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        shapes = self.sums.shape, self.seen.shape, self.predicted.shape
        if len({*shapes}) != 1:
            raise ValueError(f"a ledger of shapes {', '.join(map(str, shapes))}")
        if (self.seen < 0).any() or (self.predicted < UNKNOWN).any():
            raise ValueError("seen or predicted: found negative numbers")
        return self


class _Saved(_Part):
    """A whole state, as `MonitorState.plain` gives it."""

    head: _Head | None
    processes: _Positive
    step: _Count
    taken: _Count
    display_limit: Annotated[_Finite, Field(gt=0)]
    planned: _Positive | None
    stop: _Stop
    history: list[EpochReport]
    alert: StopAlert | None
    epoch: _Summary
    interval: _Summary
    ledger: _Ledger | None
    heads: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.taken > self.step:
            raise ValueError(f"taken={self.taken}: expected at most step={self.step}")
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
