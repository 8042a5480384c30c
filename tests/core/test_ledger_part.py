"""The part of a ledger that a process keeps."""

import numpy as np

from gwa_logging.ledger import UNKNOWN, Ledger, LedgerPart

WHOLE = Ledger(
    np.arange(5, dtype=np.float32), np.ones(5, np.float32), np.arange(5, dtype=np.int32), 3, 4, np.full(5, 7, np.int32)
)


def columns(ledger):
    return [column.tolist() for column in (ledger.sums, ledger.seen, ledger.predicted, ledger.details)]


def test_a_part_of_a_ledger_has_its_own_samples_and_the_counts_of_all():
    part = LedgerPart.of(WHOLE, range(1, 3), np.asarray)
    assert columns(part.ledger) == [[1, 2], [1, 1], [1, 2], [7, 7]]
    assert (part.first, part.ledger.invalid_ids, part.ledger.untagged) == (1, 3, 4)
    assert part.own(np.arange(10, 15)).tolist() == [11, 12]


def test_a_part_that_fits_no_longer_gets_the_other_samples_as_unknown():
    part = LedgerPart.of(WHOLE, range(1, 3), np.asarray)
    assert part.fitted(range(1, 3)) is part
    fitted = part.fitted(range(5))
    assert fitted.first == 0
    unknown = UNKNOWN
    assert columns(fitted.ledger) == [
        [0, 1, 2, 0, 0],
        [0, 1, 1, 0, 0],
        [unknown, 1, 2, unknown, unknown],
        [0, 7, 7, 0, 0],
    ]


def test_the_parts_of_all_processes_are_the_whole():
    parts = [LedgerPart.of(WHOLE, samples, np.asarray).ledger for samples in (range(3), range(3, 5))]

    def gather(own):
        name = next(n for n in ("sums", "seen", "predicted", "details") if getattr(parts[0], n) is own)
        return np.concatenate([getattr(part, name) for part in parts])

    assert columns(LedgerPart(parts[0], 0, gather).whole()) == columns(WHOLE)
    assert LedgerPart(parts[0], 0, lambda own: np.concatenate([own, own])).total(4) == 8
