"""What a monitor remembers, as plain data: for checkpoints.

Everything is JSON, but for the ledger's arrays, which are in the form that the framework's own checkpoints take: tensors in
PyTorch, whose `torch.load` refuses NumPy, and NumPy arrays in JAX.
"""

import math
import re
from typing import Any, NamedTuple, Self

import numpy as np

from gwa_logging.early_stop import StopState
from gwa_logging.errors import InvalidInputError
from gwa_logging.samples import Ledger
from gwa_logging.summary import AlignmentSummary
from gwa_logging.types import Adapter, EpochReport, StopAlert

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
                **{name: adapter.portable(getattr(ledger, name)) for name in ("sums", "seen", "predicted")},
                "strays": ledger.strays,
                "untagged": ledger.untagged,
            },
        }

    @classmethod
    def from_plain(cls, state: Any) -> Self:
        """Reads what `plain` gave.

        Raises:
            InvalidInputError: it is something else, or of another version.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise InvalidInputError(
                    f"state: expected version {STATE_VERSION}, found {state['version']!r}; take the gwa_logging that it was "
                    "saved with, or start without it"
                )
            values = {name: state[name] for name in cls._fields}
            return cls(
                **values
                | {
                    "head": HeadShape(**state["head"]) if state["head"] else None,
                    "step": int(state["step"]),
                    "taken": int(state["taken"]),
                    "display_limit": float(state["display_limit"]),
                    "stop": StopState(**{name: _back(value) for name, value in state["stop"].items()}),
                    "history": [EpochReport.model_validate(report) for report in state["history"]],
                    "alert": StopAlert.model_validate(state["alert"]) if state["alert"] else None,
                    "epoch": _summary_back(state["epoch"]),
                    "interval": _summary_back(state["interval"]),
                    "ledger": _ledger_back(state["ledger"]) if state["ledger"] else None,
                    "heads": dict(state["heads"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"state: not a state_dict() of a monitor ({error!r})") from error

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


def _back(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _summary(summary: AlignmentSummary) -> dict[str, Any]:
    numbers = {name: _number(getattr(summary, name)) for name in AlignmentSummary.__slots__ if name != "bins"}
    return {**numbers, "bins": summary.bins.tolist()}


def _summary_back(values: dict[str, Any]) -> AlignmentSummary:
    numbers = {name: _back(value) for name, value in values.items()}
    bins = np.asarray(numbers.pop("bins"), dtype=np.int64)
    if bins.shape != AlignmentSummary().bins.shape:
        raise ValueError(f"{bins.size} bins")
    return AlignmentSummary(**numbers, bins=bins)


def _ledger_back(values: dict[str, Any]) -> Ledger:
    sums, seen = (np.asarray(values[name], dtype=np.float32) for name in ("sums", "seen"))
    predicted = np.asarray(values["predicted"], dtype=np.int32)
    if not sums.ndim == seen.ndim == predicted.ndim == 1 or not len(sums) == len(seen) == len(predicted):
        raise ValueError(f"a ledger of shapes {sums.shape}, {seen.shape}, {predicted.shape}")
    return Ledger(sums, seen, predicted, int(values["strays"]), int(values["untagged"]))
