"""The ledger in a monitor's state: of all samples, or only the part of the process that saved it."""

from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, model_validator

from gwa_logging.agreement import PastScores
from gwa_logging.ledger import UNKNOWN, Ledger, LedgerPart
from gwa_logging.protocols import Adapter
from gwa_logging.state_values import Count, Floats, FloatsOrNone, Integers, StatePart

_ARRAYS = ("sums", "seen", "predicted", "details")


class LedgerState(NamedTuple):
    """What a state holds of the ledger.

    Attributes:
        ledger: its contents.
        frozen: those at the stop alert that stands; None without an alert.
        past: those at the end of the last epoch, for the agreement; None unless the stop rule watches it.
        part: id of the first sample, and size of the whole ledger; None if the other three are of all samples.
    """

    ledger: Ledger
    frozen: Ledger | None = None
    past: PastScores | None = None
    part: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, part: LedgerPart, frozen: LedgerPart | None, past: PastScores | None, num_samples: int, *, whole: bool
    ) -> Self:
        """Takes this process's parts, or collects those of all processes; then every process must call this."""
        if not whole:
            return cls(part.ledger, None if frozen is None else frozen.ledger, past, (part.first, num_samples))
        return cls(
            part.whole(),
            None if frozen is None else frozen.whole(),
            None if past is None else PastScores(part.gather(past.sums), part.gather(past.seen)),
        )

    def to_dict(self, adapter: Adapter) -> dict[str, Any]:
        """The arrays in the framework's form, and the numbers."""
        return {
            **_arrays(self.ledger, adapter),
            **(_arrays(self.frozen, adapter, "frozen_") if self.frozen else {}),
            **(_arrays(self.past, adapter, "past_") if self.past else {}),
            "invalid_ids": self.ledger.invalid_ids,
            "untagged": self.ledger.untagged,
            **({"part": list(self.part)} if self.part else {}),
        }

    def problem(self, adapter: Adapter, num_samples: int | None) -> str | None:
        """Returns why it does not fit a monitor, None if it does."""
        held = len(self.ledger.sums)
        first, size = self.part or (0, held)
        if size != num_samples:
            return f"its ledger has size {size}, but num_samples={num_samples}"
        own = adapter.own_samples(size)
        if self.part and own != range(first, first + held):
            return (
                f"its ledger has the {held} samples from {first} on, but this process keeps the {len(own)} from {own.start} "
                "on: each process must load the state that it saved with state_dict(whole_ledger=False)"
            )
        return None

    def parts(self, adapter: Adapter) -> tuple[LedgerPart, LedgerPart | None, PastScores | None]:
        """What the process of an adapter keeps of the ledger, of the frozen one, and of that of the last epoch."""
        past = None if self.past is None else Ledger(*self.past)
        own, frozen, past_part = (
            None if ledger is None else self._part(ledger, adapter) for ledger in (self.ledger, self.frozen, past)
        )
        assert own is not None
        return own, frozen, None if past_part is None else PastScores(past_part.ledger.sums, past_part.ledger.seen)

    def _part(self, ledger: Ledger, adapter: Adapter) -> LedgerPart:
        if self.part:
            return LedgerPart(ledger, self.part[0], adapter.gather)
        return LedgerPart.of(ledger, adapter.own_samples(len(ledger.sums)), adapter.gather)


def _arrays(held: Ledger | PastScores, adapter: Adapter, prefix: str = "") -> dict[str, Any]:
    """The arrays of a ledger in the framework's form; their names begin with the prefix."""
    arrays = {name: value for name, value in held._asdict().items() if name in _ARRAYS}
    return {prefix + name: None if a is None else adapter.to_checkpoint_array(a) for name, a in arrays.items()}


class SavedLedger(StatePart):
    """What `LedgerState.to_dict` returns, checked."""

    sums: Floats
    seen: Floats
    predicted: Integers
    details: Integers = None
    frozen_sums: FloatsOrNone = None
    frozen_seen: FloatsOrNone = None
    frozen_predicted: Integers = None
    frozen_details: Integers = None
    past_sums: FloatsOrNone = None
    past_seen: FloatsOrNone = None
    invalid_ids: Count
    untagged: Count
    part: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None

    def state(self) -> LedgerState:
        """The ledger that it describes."""
        return LedgerState(
            Ledger(**self._arrays(""), invalid_ids=self.invalid_ids, untagged=self.untagged),
            None if self.frozen_sums is None else Ledger(**self._arrays("frozen_")),
            None if self.past_sums is None else PastScores(**self._arrays("past_")),
            None if self.part is None else (self.part[0], self.part[1]),
        )

    def _arrays(self, prefix: str) -> dict[str, Any]:
        """The arrays whose names begin with the prefix, by name without it."""
        names = {name: prefix + name for name in _ARRAYS}
        return {name: getattr(self, full) for name, full in names.items() if full in type(self).model_fields}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        parts = [
            part for part in map(self._arrays, ("", "frozen_", "past_")) if any(a is not None for a in part.values())
        ]
        shapes = [array.shape for part in parts for array in part.values() if array is not None]
        if len({*shapes}) != 1:
            raise ValueError(f"expected arrays of one length, found the shapes {', '.join(map(str, shapes))}")
        for part in parts:
            if part["sums"] is None or part["seen"] is None:
                raise ValueError("sums or seen: one of the two is missing")
            predicted = part.get("predicted")
            if (part["seen"] < 0).any() or (predicted is not None and (predicted < UNKNOWN).any()):
                raise ValueError("seen or predicted: found negative numbers")
        return self
