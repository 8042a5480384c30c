"""Selects the processes of a distributed run whose samples count.

The summaries of all processes cannot simply be merged. Pipeline stages have different heads, whose scores must not be mixed.
Tensor-parallel ranks that replicate the head all see the same samples, and each sample must count once. Every process
decides from the same reports of all processes, so all reach the same result.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple, Protocol, Self

import numpy as np

from gwa_logging.alignment import FloatArray
from gwa_logging.errors import InvalidInputError
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary

logger = logging.getLogger("gwa_logging")

DIFFERENT_HEADS = "ranks with different heads"
SAME_SAMPLES = "ranks with the same samples"
NOT_WATCHED = "ranks without watch()"

WATCHED_WITHIN = 60.0
"""Seconds that the first reduction waits for processes that have not called watch()."""

NONE_MISSING = "none"
_TEXT_BYTES = 256  # of the head's description
_TOLERANCE = 1e-5  # relative: larger than the rounding between two ranks, smaller than the difference between samples


def check_windows(samples_per_epoch: int | None, processes: int) -> None:
    """Refuses windows of samples in a distributed run, whose processes would close them at different steps and then hang.

    Args:
        samples_per_epoch: as in `gwa_logging.watch`; None if epochs are closed by the caller.
        processes: number of processes in the run.

    Raises:
        InvalidInputError: `samples_per_epoch` is set and there are several processes.
    """
    if samples_per_epoch is not None and processes > 1:
        raise InvalidInputError(
            f"samples_per_epoch={samples_per_epoch}: the {processes} processes of this run would close their windows at "
            "different steps; leave it out and call monitor.end_epoch() in every process instead"
        )


class Identity(NamedTuple):
    """What a process reports about itself to the others.

    Attributes:
        head: description of its head; empty while the head is unknown.
        first: count, mean, sum of squared deviations, minimum and maximum of its first scores; zeros before the first.
        group: lowest rank of the processes that receive the same samples according to the model's layout. Their first scores
            are equal, unless something else, such as sequence parallelism, divides the samples among them.
    """

    head: str = ""
    first: tuple[float, ...] = (0.0,) * 5
    group: int = 0

    def to_vector(self) -> FloatArray:
        """Encodes the identity as float64 [262]."""
        text = np.zeros(_TEXT_BYTES)
        encoded = np.frombuffer(self.head.encode()[-_TEXT_BYTES:], np.uint8)  # long paths differ at their end
        text[: encoded.size] = encoded
        return np.concatenate([[self.group], self.first, text])

    @classmethod
    def from_vector(cls, vector: FloatArray) -> Self:
        """Decodes the result of `to_vector`."""
        text = bytes(vector[6:].astype(np.uint8)).rstrip(b"\0").decode(errors="replace")
        return cls(text, tuple(vector[1:6].tolist()), int(vector[0]))


def first_scores(summaries: Iterable[AlignmentSummary]) -> tuple[float, ...]:
    """Returns `Identity.first` for summaries in the order of training; zeros if all scores so far are equal."""
    first = AlignmentSummary()
    for summary in summaries:
        first = first.merge(summary)
        if not first.constant:
            return (float(first.count), first.mean, first.m2, first.minimum, first.maximum)
    return Identity().first


def _are_same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Returns True if two results of `first_scores` are of the same samples."""
    tolerance = _TOLERANCE * max(abs(one[3]), abs(one[4]))
    count, mean, squares, minimum, maximum = zip(one, other, strict=True)
    return (
        0 < count[0] == count[1]
        and all(abs(a - b) <= tolerance for a, b in (mean, minimum, maximum))
        and math.isclose(*squares, rel_tol=100 * _TOLERANCE)
    )


class RankSelection(NamedTuple):
    """The ranks whose samples count, and a message for each kind of fault."""

    ranks: list[int]
    problems: dict[str, str]


def select_ranks(identities: Sequence[Identity], summaries: Sequence[AlignmentSummary] = ()) -> RankSelection:
    """Selects the processes whose samples count.

    They have the head of the lowest rank, and of those of a group that have the same samples only one counts. Processes in
    different groups with equal summaries all count, and are reported as a fault.
    """
    problems: dict[str, str] = {}
    heads = {rank: identity.head for rank, identity in enumerate(identities) if identity.head}
    own = next(iter(heads.values()), "")
    foreign = {rank: head for rank, head in heads.items() if head != own}
    if foreign:
        first, other = next(iter(heads)), next(iter(foreign))
        problems[DIFFERENT_HEADS] = (
            f"rank {first} watches {own}, rank {other} watches {heads[other]}; only the scores of rank {first}'s head are "
            "reported. Watch the same head on every rank. In a pipeline, pass the PipelineStage to watch(), or "
            "head=HeadOnRanks(<the ranks with the head>)"
        )
    ranks: list[int] = []
    groups: dict[int, list[Identity]] = {}
    for rank, identity in enumerate(identities):
        others = groups.setdefault(identity.group, [])
        if rank not in foreign and not any(_are_same(identity.first, other.first) for other in others):
            others.append(identity)
            ranks.append(rank)
    scores = {rank: first_scores([summaries[rank]]) for rank in ranks} if summaries else {}
    for pair in pairwise(sorted(scores, key=lambda rank: scores[rank])):  # after sorting, equal scores are neighbours
        if _are_same(scores[pair[0]], scores[pair[1]]):
            problems[SAME_SAMPLES] = (
                f"ranks {min(pair)} and {max(pair)} have trained on the same samples, so these count twice. Give each rank its "
                "own share of the data, for example with a DistributedSampler"
            )
    return RankSelection(ranks, problems)


class SharedStore(Protocol):
    """A key-value store that all processes of a run share. Two objects for the same store compare equal."""

    def count_watch(self, name: str) -> int:
        """Counts this call of watch() in this process, and returns the number of its calls under this name."""
        ...

    def publish(self, key: str) -> None:
        """Stores the key for this process."""
        ...

    def find_missing(self, key: str, within: float) -> list[int]:
        """Waits up to `within` seconds for all ranks to store the key. Returns the ranks that have not."""
        ...

    def store_once(self, key: str, value: str) -> str:
        """Stores a value unless another process has stored one before. Returns the stored value."""
        ...


class Attendance:
    """Finds the processes that have not called watch(), so that no reduction waits for them forever.

    On watch() each process stores a key. The first reduction waits for the keys of all processes and stores the result, so
    that all processes act on the same result.
    """

    def __init__(
        self, name: str, find_store: Callable[[], SharedStore | None], agreed: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Does nothing yet.

        Args:
            name: as in `gwa_logging.watch`.
            find_store: returns the current store; None if there are no other processes, or they have not connected yet.
            agreed: the settings that must be equal in all processes, as text by name.
        """
        self._name = name
        self._agreed = agreed
        self._find_store = find_store
        self._store: SharedStore | None = None
        self._key = ""
        self._missing: tuple[int, ...] | None = None

    @classmethod
    def for_settings(cls, settings: WatchSettings, find_store: Callable[[], SharedStore | None]) -> Self:
        """The attendance for these arguments of `watch`. Those that decide what the processes exchange must agree."""
        agreed = {
            "num_samples": str(settings.num_samples),
            "early_stop": repr(settings.early_stop),
            "unit": repr(settings.unit),
            "look": "None" if settings.look is None else "given",
            "keep_best": repr(settings.keep_best),
            "labels": "None" if settings.labels is None else "given",
        }
        return cls(settings.name, find_store, agreed)

    def enter(self) -> None:
        """Stores the key of this process: it has called watch(). Does not wait for other processes.

        Raises:
            InvalidInputError: another process has called watch() with settings that this one must share.
        """
        self._store = self._find_store()
        if self._store is not None:
            self._key = f"gwa_logging/watch/{self._name}/{self._store.count_watch(self._name)}"
            self._check_agreement(self._store)
            self._store.publish(self._key)

    def _check_agreement(self, store: SharedStore) -> None:
        """Compares the settings with those of the first process that has called watch()."""
        try:
            first = json.loads(store.store_once(f"{self._key}/settings", json.dumps(dict(self._agreed))))
        except RuntimeError as error:  # the first reduction will fail as well, with an error that says more
            logger.debug("gwa_logging: the shared store of the processes failed: %s", error)
            return
        differences = [
            f"{name}: this process passes {value} to watch(), another one {first[name]}"
            for name, value in self._agreed.items()
            if first.get(name, value) != value
        ]
        if differences:
            raise InvalidInputError(
                f"{'; '.join(differences)}. Pass the same value in every process of a distributed run"
            )

    def missing(self) -> tuple[int, ...]:
        """Returns the ranks that have not called watch(), the same on every rank. The first call blocks up to 60 s."""
        if self._missing is None:
            store = self._store
            self._missing = self._settle(store) if store is not None and store == self._find_store() else ()
        return self._missing

    def _settle(self, store: SharedStore) -> tuple[int, ...]:
        try:
            absent = ",".join(map(str, store.find_missing(self._key, WATCHED_WITHIN)))
            settled = store.store_once(f"{self._key}/missing", absent or NONE_MISSING)
        except RuntimeError as error:  # the reduction will fail as well, with an error that tells more
            logger.debug("gwa_logging: the shared store of the processes failed: %s", error)
            return ()
        return () if settled == NONE_MISSING else tuple(map(int, settled.split(",")))

    def problems(self) -> dict[str, str]:
        """Returns a message by kind of fault; empty if all processes watch."""
        missing = self.missing()
        if not missing:
            return {}
        return {
            NOT_WATCHED: f"ranks {list(missing)} have not called watch(), so each rank reports its own samples only; call "
            "watch() on every rank, before the first epoch ends"
        }
