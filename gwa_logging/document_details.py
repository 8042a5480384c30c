"""What the ledger keeps about a document's rows, apart from their mean score: 32 bits for each document.

A document is a sample for which the head sees several rows, such as the tokens of a text. The details describe the rows that
had a score when the document was last seen:

    bits     content                                       precision
    0-15     number of scored rows                         exact; 65,535 stands for as many or more
    16-22    share of them with a negative score           1/127
    23-30    |lowest tenth|, as a logarithm; 0 for zero    4 %, from 2**-25.4 (2e-8) to 1
    31       1 if the lowest tenth is negative

A word of 0 means that the sample was never seen with several rows. The lowest tenth of n scores is the one at place
ceil(n / 10) in ascending order: at least a tenth of the rows have this score or a lower one. It is stored as a logarithm,
because the scores of a head with 100,000 classes are small.

The adapters pack on the device, with the same constants.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_ROWS = 2**16 - 1
SHARE_SHIFT, SHARE_STEPS = 16, 127
SIZE_SHIFT, SIZE_STEPS, SIZES_PER_OCTAVE = 23, 255, 10
SIGN_SHIFT = 31


_MAGNITUDES = np.array(
    [0.0, *(float(f"{2 ** ((size - SIZE_STEPS) / SIZES_PER_OCTAVE):.3g}") for size in range(1, SIZE_STEPS + 1))]
)
_SHARES = np.round(np.arange(SHARE_STEPS + 1) / SHARE_STEPS, 3)
"""The values of the codes, rounded to no more digits than they are accurate to."""


class DocumentDetails(NamedTuple):
    """The unpacked details of each sample.

    Attributes:
        tokens: int64 [num_samples], number of scored rows when last seen, at most 65,535; 0 where unknown.
        negative_share: float64 [num_samples], in [0, 1], accurate to 0.005; NaN where unknown.
        lowest_tenth: float64 [num_samples], in [-1, 1], accurate to 4 % of its value; NaN where unknown.
    """

    tokens: npt.NDArray[np.int64]
    negative_share: npt.NDArray[np.float64]
    lowest_tenth: npt.NDArray[np.float64]


def unpack(details: npt.NDArray[np.int32]) -> DocumentDetails:
    """Unpacks int32 [...], as the ledger holds them.

    >>> unpack(np.array([3 | 127 << 16 | 255 << 23], np.int32))
    DocumentDetails(tokens=array([3]), negative_share=array([1.]), lowest_tenth=array([1.]))
    """
    words = details.astype(np.int64)
    tokens = words & MAX_ROWS
    magnitude = _MAGNITUDES[(words >> SIZE_SHIFT) & SIZE_STEPS]
    is_known = tokens > 0
    return DocumentDetails(
        tokens,
        np.where(is_known, _SHARES[(words >> SHARE_SHIFT) & SHARE_STEPS], np.nan),
        np.where(is_known, np.where(words < 0, -magnitude, magnitude), np.nan),
    )
