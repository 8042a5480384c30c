"""Which processes count: decided from what each of them reports of itself, so every process reaches the same result.

Processes may not simply be added up. Pipeline stages have different heads, and their scores do not belong together.
Tensor-parallel ranks that replicate the head all see the same samples, and each sample must count once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from gwa_logging.alignment import FloatArray
from gwa_logging.summary import AlignmentSummary

DIFFERENT_HEADS = "ranks with different heads"
SAME_SAMPLES = "ranks with the same samples"
NOT_WATCHED = "ranks without watch()"

_TEXT = 256  # bytes of the head's description
_CLOSE = 1e-5  # two ranks compute the same scores up to rounding; the scores of different samples are never this close


class Identity(NamedTuple):
    """What a process reports of itself.

    Attributes:
        head: description of its head; empty while it is not known.
        first: count, mean, sum of squares, minimum and maximum of its first scores; zeros while there are none. Processes
            with the same first scores see the same samples.
        group: lowest rank of the processes that see the same samples according to the model's layout.
    """

    head: str = ""
    first: tuple[float, ...] = (0.0,) * 5
    group: int = 0

    def to_vector(self) -> FloatArray:
        """float64 [262], for other processes."""
        text = np.zeros(_TEXT)
        encoded = np.frombuffer(self.head.encode()[-_TEXT:], np.uint8)  # the end of a long path is what differs
        text[: encoded.size] = encoded
        return np.concatenate([[self.group], self.first, text])

    @classmethod
    def from_vector(cls, vector: FloatArray) -> Self:
        """The identity that `to_vector` was called on."""
        text = bytes(vector[6:].astype(np.uint8)).rstrip(b"\0").decode(errors="replace")
        return cls(text, tuple(vector[1:6].tolist()), int(vector[0]))

    def sees_what(self, other: Self) -> bool:
        """Returns True if both have the same first scores."""
        count, mean, squares, minimum, maximum = self.first
        its_count, its_mean, its_squares, its_minimum, its_maximum = other.first
        near = _CLOSE * max(abs(minimum), abs(maximum))
        return (
            0 < count == its_count
            and abs(mean - its_mean) <= near
            and abs(minimum - its_minimum) <= near
            and abs(maximum - its_maximum) <= near
            and math.isclose(squares, its_squares, rel_tol=100 * _CLOSE)
        )


def first_scores(summaries: Sequence[AlignmentSummary]) -> tuple[float, ...]:
    """The `Identity.first` of summaries in the order of training; zeros if all scores so far are equal."""
    first = AlignmentSummary()
    for summary in summaries:
        first = first.merge(summary)
        if not first.constant:
            return (float(first.count), first.mean, first.m2, first.minimum, first.maximum)
    return Identity().first


class Counted(NamedTuple):
    """The processes whose samples count, and a kind of fault and a sentence for each reason why others do not."""

    ranks: list[int]
    problems: dict[str, str]


def counted(identities: Sequence[Identity]) -> Counted:
    """Decides which processes count: those with the head of the lowest rank, and of those with the same samples the lowest."""
    problems: dict[str, str] = {}
    heads = {rank: identity.head for rank, identity in enumerate(identities) if identity.head}
    own = next(iter(heads.values()), "")
    foreign = [rank for rank, head in heads.items() if head != own]
    if foreign:
        first, other = next(iter(heads)), foreign[0]
        problems[DIFFERENT_HEADS] = (
            f"rank {first} watches {own}, rank {other} watches {heads[other]}; only the scores of rank {first}'s head are "
            "reported. Watch the same head on every rank; the stages of a pipeline cannot be watched yet"
        )
    ranks: list[int] = []
    for rank, identity in enumerate(identities):
        if rank in foreign:
            continue
        twin = next((other for other in ranks if identities[other].sees_what(identity)), None)
        if twin is None:
            ranks.append(rank)
        elif identities[twin].group != identity.group:
            problems[SAME_SAMPLES] = (
                f"ranks {twin} and {rank} train on the same samples, which are counted once. In data-parallel training give "
                "each rank its own share of the data, with a DistributedSampler"
            )
    return Counted(ranks, problems)
