"""Which class is taken for which: pairs of label and prediction among the suspects."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gwa_logging.records import Suspect

FEWEST = 20
"""With fewer suspects whose label differs from the prediction, a concentration on few pairs may be chance."""

MOST = 0.5
"""Share of these suspects that `concentration` calls most of them."""

MAX_PAIRS = 5
MAX_PAIR_SHARE = 0.1
"""`concentration` reports at most this many pairs, and at most this share of the possible ones."""


class ClassPair(NamedTuple):
    """How many suspects have this label and this predicted class."""

    label: int
    predicted: int
    suspects: int


def class_pairs(suspects: Sequence[Suspect]) -> list[ClassPair]:
    """Returns the pairs of label and different prediction, the most frequent first; unknown classes are left out."""
    pairs = Counter(
        (suspect.label, suspect.predicted)
        for suspect in suspects
        if suspect.label is not None and suspect.predicted is not None and suspect.label != suspect.predicted
    )
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [ClassPair(label, predicted, count) for (label, predicted), count in ordered]


def count_pairs(
    labels: npt.NDArray[np.integer[Any]],
    predicted: npt.NDArray[np.integer[Any]],
    gather: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
) -> list[ClassPair]:
    """Counts the pairs of label and different prediction over all processes, ordered by label and prediction.

    Args:
        labels, predicted: int [N], the classes of samples of this process; negative where unknown.
        gather: joins the arrays of all processes.
    """
    differs = (labels >= 0) & (predicted >= 0) & (labels != predicted)
    codes = (labels[differs].astype(np.int64) << 32) + predicted[differs]
    codes, counts = (gather(array) for array in np.unique(codes, return_counts=True))
    codes, group = np.unique(codes, return_inverse=True)
    totals = np.zeros(len(codes), np.int64)
    np.add.at(totals, group, counts)
    return [
        ClassPair(code >> 32, code & 0xFFFFFFFF, count)
        for code, count in zip(codes.tolist(), totals.tolist(), strict=True)
    ]


def concentration(pairs: Sequence[ClassPair], classes: int) -> str | None:
    """Returns a sentence if few pairs of classes hold most of the suspects, otherwise None.

    Wrong labels that are spread at random give many pairs. Few pairs hint at classes that are hard to tell apart, or at one
    systematic error of the labelling, which a model learns as easily as the correct labels.

    Args:
        pairs: of the samples with a negative mean score, ordered by label and prediction.
        classes: number of classes of the data set.
    """
    total = sum(pair.suspects for pair in pairs)
    if total < FEWEST:
        return None
    allowed = min(MAX_PAIRS, int(MAX_PAIR_SHARE * classes * (classes - 1)))
    largest = sorted(pairs, key=lambda pair: -pair.suspects)[:allowed]
    held = np.cumsum([pair.suspects for pair in largest])
    if not held.size or held[-1] < MOST * total:
        return None
    needed = int(np.argmax(held >= MOST * total)) + 1
    named = ", ".join(f"{pair.label} predicted as {pair.predicted}" for pair in largest[:needed])
    return (
        f"of the {total} samples with a negative mean score whose label differs from the prediction, {held[needed - 1]} belong "
        f"to few class pairs ({named}): these classes may be hard to tell apart, or labelled wrongly in a systematic way; the "
        "alert is weakest for such labels, since a model learns them as easily as correct ones"
    )
