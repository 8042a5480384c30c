"""Which class is taken for which: pairs of label and prediction among the suspects."""

from collections import Counter
from collections.abc import Sequence
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


def concentration(
    labels: npt.NDArray[np.integer[Any]], predicted: npt.NDArray[np.integer[Any]], classes: int
) -> str | None:
    """Returns a sentence if few pairs of classes hold most of the suspects, otherwise None.

    Wrong labels that are spread at random give many pairs. Few pairs hint at classes that are hard to tell apart, or at one
    systematic error of the labelling, which a model learns as easily as the correct labels.

    Args:
        labels, predicted: int [suspects], the classes of the samples with a negative mean score; negative where unknown.
        classes: number of classes of the data set.
    """
    differs = (labels >= 0) & (predicted >= 0) & (labels != predicted)
    total = int(np.count_nonzero(differs))
    if total < FEWEST:
        return None
    base = int(predicted.max()) + 1
    codes, counts = np.unique(labels[differs].astype(np.int64) * base + predicted[differs], return_counts=True)
    allowed = min(MAX_PAIRS, int(MAX_PAIR_SHARE * classes * (classes - 1)))
    order = np.argsort(-counts, kind="stable")[:allowed]
    held = np.cumsum(counts[order])
    if not held.size or held[-1] < MOST * total:
        return None
    needed = int(np.argmax(held >= MOST * total)) + 1
    named = ", ".join(f"{code // base} predicted as {code % base}" for code in codes[order[:needed]].tolist())
    return (
        f"of the {total} samples with a negative mean score whose label differs from the prediction, {held[needed - 1]} belong "
        f"to few class pairs ({named}): these classes may be hard to tell apart, or labelled wrongly in a systematic way; the "
        "alert is weakest for such labels, since a model learns them as easily as correct ones"
    )
