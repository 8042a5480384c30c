"""Which class is taken for which: pairs of label and prediction among the suspects."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gwa_logging.records import Suspect

FEWEST = 20
"""With fewer suspects whose label differs from the prediction, a concentration on few pairs may be chance."""

MOST = 0.7
"""Share of these suspects that `concentration` calls most of them."""

MAX_PAIRS = 3
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


def concentration(suspects: Sequence[Suspect], classes: int) -> str | None:
    """Returns a sentence if few pairs of classes hold most of the suspects, otherwise None.

    Wrong labels that are spread at random give many pairs. Few pairs hint at classes that are hard to tell apart, or at one
    systematic error of the labelling.

    Args:
        suspects: the most suspect samples.
        classes: number of classes of the data set.
    """
    pairs = class_pairs(suspects)
    total = sum(pair.suspects for pair in pairs)
    allowed = min(MAX_PAIRS, int(MAX_PAIR_SHARE * classes * (classes - 1)))
    top = pairs[:allowed]
    held = sum(pair.suspects for pair in top)
    if total < FEWEST or held < MOST * total:
        return None
    while held - top[-1].suspects >= MOST * total:
        held -= top.pop().suspects
    named = ", ".join(f"{pair.label} predicted as {pair.predicted}" for pair in top)
    return (
        f"{held} of the {total} suspects whose label differs from the prediction belong to few class pairs ({named}): these "
        "classes may be hard to tell apart, or labelled wrongly in a systematic way"
    )
