"""Entries of the ledger that wait for the other ranks, against a loop over them."""

from typing import Any

import numpy as np
import pytest
import torch

from gwa_logging.integrations.torch import ledger
from gwa_logging.integrations.torch.ledger import DeviceLedger, TaggedScores
from gwa_logging.integrations.torch.ledger_entries import Entries, joined
from gwa_logging.ledger import UNKNOWN, TaggedBatch

N = 50


def random_entries(seed: int, rows: int, *, predictions: bool = True, weights: bool = True) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, N, (rows,), generator=generator, dtype=torch.int32)
    seen = torch.rand(rows, generator=generator)
    seen[::7] = 0
    predicted = torch.randint(UNKNOWN, 5, (rows,), generator=generator, dtype=torch.int32)
    sums = torch.rand(rows, generator=generator) - 0.5
    return Entries(ids, sums, seen if weights else seen > 0, predicted if predictions else None)


def by_loop(parts: list[Entries]) -> dict[int, tuple[float, float, int]]:
    found: dict[int, tuple[float, float, int]] = {}
    for part in parts:
        predicted = [UNKNOWN] * len(part.ids) if part.predicted is None else part.predicted.tolist()
        rows = zip(part.ids.tolist(), part.sums.tolist(), part.seen.tolist(), predicted, strict=True)
        for sample, total, seen, label in rows:
            if seen > 0:
                known = found.get(sample, (0.0, 0.0, UNKNOWN))
                found[sample] = (known[0] + total, known[1] + seen, known[2] if label == UNKNOWN else label)
    return dict(sorted(found.items()))


def test_entries_are_joined_and_compacted_as_in_a_loop():
    parts = [
        random_entries(0, 200),
        random_entries(1, 30, predictions=False),
        random_entries(2, 0),
        random_entries(3, 90, weights=False),
    ]
    compact = joined(parts).compact()
    want = by_loop(parts)
    assert compact.ids.tolist() == list(want)
    for column, values in zip(compact[1:4], zip(*want.values(), strict=True), strict=True):
        assert column is not None
        assert column.tolist() == pytest.approx(list(values), abs=1e-5)
    assert compact.details is None


def test_no_entries_at_all_stay_empty():
    none = random_entries(0, 0)
    assert [0 if column is None else len(column) for column in joined([none, none]).compact()] == [0] * 5


def test_entries_that_wait_for_long_are_as_many_as_the_samples_and_lose_nothing(monkeypatch: pytest.MonkeyPatch):
    def batches() -> list[TaggedScores]:
        rng = np.random.default_rng(0)
        found: list[Any] = []
        for _ in range(3 * ledger.CHUNKS):
            scores = torch.from_numpy(rng.uniform(-1, 1, 4_000).astype(np.float32))
            ids, predicted = (torch.from_numpy(rng.integers(-2, N, 4_000)) for _ in range(2))
            found.append(TaggedScores(TaggedBatch(ids, None, predicted.clamp(min=0)), scores, None))
        return found

    direct, waiting = DeviceLedger(N), DeviceLedger(N)
    direct.add(batches())
    monkeypatch.setattr(ledger, "is_distributed", lambda: True)
    most = 0
    for batch in batches():
        waiting.add([batch])
        most = max(most, waiting.nbytes)
    assert most < 16 * (ledger.CHUNKS + 20) * 4_000
    waiting.keep_all()
    ours, want = waiting.to_host(), direct.to_host()
    np.testing.assert_allclose(ours.sums, want.sums, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(ours.seen, want.seen)
    np.testing.assert_array_equal(ours.predicted, want.predicted)
    assert ours.invalid_ids == want.invalid_ids > 0


def test_scores_after_the_process_group_has_ended_are_kept(monkeypatch: pytest.MonkeyPatch):
    batch = TaggedScores(TaggedBatch(torch.arange(N)), torch.linspace(-1, 1, N), None)
    monkeypatch.setattr(ledger, "is_distributed", lambda: True)
    monkeypatch.setattr(ledger, "own_samples", lambda size: range(size // 2))
    rank = DeviceLedger(N)
    rank.add([batch])
    monkeypatch.setattr(ledger, "is_distributed", lambda: False)
    rank.add([batch])
    rank.keep_all()
    found = rank.to_host()
    assert found.seen.tolist() == [2.0] * N
    np.testing.assert_allclose(found.sums, 2 * np.linspace(-1, 1, N), atol=1e-6)
