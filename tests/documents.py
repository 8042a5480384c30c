"""The oracle for documents: a loop over the documents of a batch, in float64."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from gwa_logging import Monitor


class Expected(NamedTuple):
    """What a pass adds for one document, and the details that it leaves."""

    mean: float
    tokens: int
    negative_share: float
    lowest_tenth: float


def documents(scores: np.ndarray, ids: np.ndarray, lengths: np.ndarray | None = None) -> dict[int, Expected]:
    """The documents of one pass.

    Args:
        scores: float [...], not finite where there is no score.
        ids: int, of the same shape; negative where there is no document.
        lengths: float, of the same shape, the norms of the tokens' gradients; None if they are not known.
    """
    lengths = np.ones(scores.shape) if lengths is None else lengths
    found = {}
    for document in np.unique(ids[ids >= 0]):
        is_own = (ids == document) & np.isfinite(scores)
        own = np.sort(scores[is_own].astype(np.float64))
        if own.size:
            found[int(document)] = Expected(
                np.average(scores[is_own].astype(np.float64), weights=lengths[is_own]),
                own.size,
                float((own < 0).mean()),
                own[int(np.ceil(own.size / 10)) - 1],
            )
    return found


def check_documents(monitor: Monitor, passes: list[dict[int, Expected]], tolerance: float = 1e-6) -> None:
    """Compares all suspects with the documents of all passes."""
    found = {suspect.id: suspect for suspect in monitor.suspects(10_000)}
    assert found.keys() == {document for each in passes for document in each}
    has_details = any(each.tokens > 1 for one in passes for each in one.values())
    for document, suspect in found.items():
        own = [each[document] for each in passes if document in each]
        assert suspect.times_seen == len(own)
        assert suspect.mean_score == pytest.approx(np.mean([each.mean for each in own]), abs=tolerance)
        if has_details:
            check_details(suspect, own[-1], tolerance)
        else:
            assert (suspect.tokens, suspect.negative_share, suspect.lowest_tenth) == (None, None, None)


def check_details(suspect: Any, last: Expected, tolerance: float = 1e-6) -> None:
    """Compares the details of a document, to their documented precision."""
    assert suspect.tokens == last.tokens
    assert suspect.negative_share == pytest.approx(last.negative_share, abs=0.005)
    assert suspect.lowest_tenth == pytest.approx(last.lowest_tenth, rel=0.04, abs=max(tolerance, 2.2e-8))
