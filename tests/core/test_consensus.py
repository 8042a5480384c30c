"""The consensus statistic against a loop over inputs in plain Python, and looks through a monitor."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwa_logging import EarlyStop, EpochReport, InvalidInputError
from gwa_logging.consensus import Consensus, LookRows, read_logits
from gwa_logging.early_stop import StopRule
from gwa_logging.settings import WatchSettings
from gwa_logging.statistic import Estimate
from gwa_logging.summary import AlignmentSummary


def softmax(row: list[float]) -> list[float]:
    whole = math.fsum(math.exp(z) for z in row)
    return [math.exp(z) / whole for z in row]


def expected(looks: list[dict[int, list[float]]]) -> float | None:
    """The statistic of the last look. Each look has the logits of its inputs by id."""
    *earlier, last = looks
    if not earlier:
        return None
    sums: dict[int, list[float]] = {}
    for look in earlier[: max(1, len(looks) // 2)]:
        for number, row in look.items():
            before = sums.get(number, [0.0] * len(row))
            sums[number] = [a + b for a, b in zip(before, softmax(row), strict=True)]
    right: dict[int, list[bool]] = defaultdict(list)
    for number, row in last.items():
        if number in sums:
            consensus = int(np.argmax(sums[number]))
            right[consensus].append(int(np.argmax(row)) == consensus)
    return math.fsum(sum(hits) / len(hits) for hits in right.values()) / len(right) if right else None


def expected_from_votes(votes: list[dict[int, int]], looked: dict[int, int]) -> float | None:
    """The statistic of the last of the epochs in which training has voted: predicted classes by id."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    epochs: dict[int, Counter[int]] = defaultdict(Counter)
    for epoch, vote in enumerate(votes[: max(1, len(votes) // 2)]):
        for number, predicted in vote.items():
            counts[number][predicted] += 1
            epochs[number][predicted] += epoch
    hits: dict[int, list[bool]] = defaultdict(list)
    for number, predicted in looked.items():
        if counts[number]:
            winner = max(counts[number], key=lambda c: (counts[number][c], epochs[number][c], -c))
            hits[winner].append(predicted == winner)
    return float(np.mean([np.mean(hit) for hit in hits.values()])) if hits else None


def rows_of(look: dict[int, list[float]]) -> LookRows:
    return read_logits(np.array(list(look.values())), np.array(list(look)))


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 16), looks=st.integers(1, 9))
def test_the_statistic_is_the_mean_share_of_each_consensus_class_that_is_predicted_as_that_class(seed, classes, looks):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(12, classes))
    run = []
    for _ in range(looks):
        seen = rng.choice(12, size=int(rng.integers(1, 13)), replace=False)
        run.append({int(i): list(2 * centre[i] + rng.normal(size=classes)) for i in seen})
    consensus = Consensus()
    for number, look in enumerate(run, 1):
        found, want = consensus.add(rows_of(look)), expected(run[:number])
        assert (found is None) == (want is None)
        if found is not None and want is not None:
            assert found.value == pytest.approx(want, abs=1e-12)


def test_with_more_than_sixteen_classes_the_consensus_is_that_of_the_whole_softmax():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 1000, size=40)
    run = []
    for _ in range(6):
        logits = rng.normal(size=(40, 1000))
        logits[np.arange(40), truth] += rng.normal(6, 2, size=40)
        run.append(dict(enumerate(logits.tolist())))
    consensus = Consensus()
    for number, look in enumerate(run, 1):
        found = consensus.add(rows_of(look))
        assert (found and found.value) == pytest.approx(expected(run[:number]), abs=1e-12)


def test_the_standard_error_is_the_spread_over_draws_of_the_inputs():
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(400):
        consensus = Consensus()
        labels = np.repeat([0, 1, 2], [60, 30, 110])
        consensus.add(read_logits(5.0 * np.eye(3)[labels], np.arange(200)))
        agrees = rng.random(200) < np.array([0.9, 0.6, 0.75])[labels]
        found = consensus.add(read_logits(5.0 * np.eye(3)[np.where(agrees, labels, (labels + 1) % 3)], np.arange(200)))
        assert found is not None
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(values) == pytest.approx(0.75, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_inputs_without_a_defined_output_count_as_predicted_wrongly_and_do_not_enter_the_consensus():
    consensus, ids = Consensus(), np.arange(2)
    consensus.add(read_logits(np.array([[3.0, 0], [math.nan, 0]]), ids))
    assert consensus.add(read_logits(np.array([[3.0, 0], [0, 3]]), ids)) == Estimate(1.0, 0.0)
    assert consensus.classes() == {0: 0}
    found = consensus.add(read_logits(np.full((2, 2), math.nan), ids))
    assert found is not None
    assert found.value == 0
    masked = read_logits(np.array([[-math.inf, 1.0], [2.0, -math.inf]]), ids)
    assert masked.classes[:, 0].tolist() == [1, 0]


def test_a_single_logit_separates_two_classes_by_its_sign():
    for logits in (np.array([-1.0, 2.0]), np.array([[-1.0], [2.0]])):
        rows = read_logits(logits, np.arange(2))
        assert rows.num_classes == 2
        assert rows.classes[:, 0].tolist() == [0, 1]
        assert rows.shares[:, 0] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))])


@pytest.mark.parametrize("looks", [0, 1, 2, 7])
def test_a_restored_consensus_goes_on_bit_for_bit(looks):
    rng = np.random.default_rng(2)
    consensus = Consensus()
    for _ in range(looks):
        consensus.add(read_logits(rng.normal(size=(30, 7)), np.arange(30)))
    consensus.inputs = 30 if looks else 0
    restored = Consensus.from_state(consensus.state())
    assert (restored.looks, restored.inputs) == (consensus.looks, consensus.inputs)
    for _ in range(6):
        rows = read_logits(rng.normal(size=(30, 7)), np.arange(30))
        assert restored.add(rows) == consensus.add(rows)


def damaged_states() -> dict[str, object]:
    consensus = Consensus()
    for shift in range(3):
        consensus.add(read_logits(np.eye(4)[[0, 1, 2]] + shift, np.arange(3)))
    good = consensus.state()
    assert good is not None
    return {
        "a list": [1],
        "a key too few": {k: v for k, v in good.items() if k != "ids"},
        "lengths that are a number": {**good, "lengths": 3},
        "negative lengths": {**good, "lengths": [*good["lengths"][:-1], -1]},
        "lengths of another sum": {**good, "lengths": [*good["lengths"], 5]},
        "no looks": {**good, "looks": 0},
        "looks that are text": {**good, "looks": "3"},
        "a single class": {**good, "num_classes": 1},
        "classes out of range": {**good, "classes": good["classes"] + 9},
        "negative ids": {**good, "ids": good["ids"] - 9},
        "NaN": {**good, "shares": good["shares"] * np.float32(np.nan)},
        "a matrix": {**good, "shares": good["shares"][None]},
        "keys in the wrong order": {**good, "ids": good["ids"][::-1]},
    }


@pytest.mark.parametrize("damaged", damaged_states().values(), ids=damaged_states())
def test_a_damaged_state_is_refused(damaged):
    with pytest.raises(ValueError, match=r"expected|do not fit together|out of range"):
        Consensus.from_state(damaged)


def test_another_number_of_classes_is_refused_and_changes_nothing():
    consensus = Consensus()
    consensus.add(read_logits(np.eye(3), np.arange(3)))
    with pytest.raises(InvalidInputError, match="expected logits of 3 classes, as in the earlier looks, found 4"):
        consensus.add(read_logits(np.eye(4)[:3], np.arange(3)))
    assert consensus.looks == 1


# --- the rule -----------------------------------------------------------------------------------------------------------


TWO_GROUPS = AlignmentSummary.from_scores(np.repeat([-0.1, 0.3], 25))
ONE_GROUP = AlignmentSummary.from_scores(np.linspace(-0.1, 0.3, 50))


def judged(
    values: list[float | None], *, separated: int = 1, resumed: bool = False, **options: object
) -> tuple[list[EpochReport], list[int]]:
    """Reports, and the epochs of alerts. After `separated` epochs the scores are one group, so the separation declines."""
    rule, reports, alerts = StopRule(EarlyStop(statistic="consensus", **options)), [], []  # type: ignore[arg-type]
    for epoch, value in enumerate(values):
        estimate = None if value is None else Estimate(value, 0.001)
        scores = TWO_GROUPS if epoch <= separated else ONE_GROUP
        if resumed:
            state, rule = rule.state, StopRule(rule.settings)
            rule.restore(state, None, reports)
        report, alert, _ = rule.judge(scores.report(epoch=epoch, step=epoch), reports, estimate)
        reports.append(report)
        if alert:
            alerts.append(alert.epoch)
            sums = [r.consensus + r.separation for r in reports[2:] if r.consensus is not None]
            assert (alert.statistic, alert.best_value) == ("consensus", max(sums))
            assert "the consensus + separation statistic has had no new best" in alert.message
            assert "the separation alone is clearly below its best" in alert.message
    return reports, alerts


def test_the_rule_skips_two_epochs_and_fires_after_five_without_a_new_best():
    reports, alerts = judged([None, 0.99, 0.8, 0.9, 0.899, 0.899, 0.899, 0.899, 0.899, 0.899])
    assert [r.epoch for r in reports if r.is_best] == [2, 3]
    assert alerts == [8]
    assert [r.consensus for r in reports[:3]] == [None, 0.99, 0.8]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_rule_fires_only_once_the_separation_has_declined_too(resumed):
    values = [None, 0.99, 0.3, 0.4, *[0.35] * 16]
    assert judged(values, separated=99, resumed=resumed)[1] == []  # a plateau
    reports, alerts = judged(values, separated=10, resumed=resumed)
    assert alerts == [15]  # five epochs clearly below
    assert [r.epoch for r in reports if r.is_best] == [2, 3]
    later = [*values[:14], 0.8, *values[14:]]  # a new best in epoch 14
    assert judged(later, separated=10, resumed=resumed)[1] == [19]


def test_the_sum_of_consensus_and_separation_picks_the_epoch():
    values = [None, 0.5, 0.5, 0.6, 0.7, 0.8, 0.8]
    reports, _ = judged(values, separated=4)  # later the consensus grows by 0.1, and the separation falls by 0.25
    assert [r.epoch for r in reports if r.is_best] == [2, 3, 4]
    assert reports[4].separation - reports[5].separation > 0.2


def test_epochs_whose_look_failed_are_ignored():
    assert judged([None, 0.9, 0.9, *[None] * 9])[1] == []
    assert judged([None, 0.9, 0.9, *[None] * 9, *[0.8] * 5])[1] == [16]


def test_warmup_and_drop_can_still_be_set():
    assert EarlyStop(statistic="consensus") == EarlyStop(statistic="consensus", warmup=2, drop=0)
    rule = EarlyStop(statistic="consensus", warmup=4, drop=0.1)
    assert (rule.warmup, rule.drop) == (4, 0.1)
    assert (EarlyStop().warmup, EarlyStop().drop) == (0.1, 0.05)


# --- records and settings -------------------------------------------------------------------------------------------------


def test_reports_of_earlier_versions_can_be_read_and_have_no_consensus():
    report = AlignmentSummary.from_scores(np.linspace(-0.1, 0.3, 50)).report(epoch=0, step=0)
    old = report.model_dump_json(exclude={"consensus"})
    assert EpochReport.model_validate_json(old).consensus is None
    assert "consensus" not in report.metrics
    new = report.model_copy(update={"consensus": 0.25})
    assert EpochReport.model_validate_json(new.model_dump_json()).consensus == 0.25
    assert new.metrics["consensus"] == 0.25


@pytest.mark.parametrize(
    "look", [3, "x", [], [3], np.float32(1.0), iter([np.zeros((2, 2))])], ids=lambda look: type(look).__name__
)
def test_a_look_that_is_no_batch_is_refused(look, tmp_path: Path):
    with pytest.raises(InvalidInputError, match="look: expected inputs as the model is called with them"):
        WatchSettings(look=look, directory=tmp_path)


def test_a_look_needs_epochs_that_end_between_steps():
    with pytest.raises(InvalidInputError, match="look: the model can only be evaluated between two steps"):
        WatchSettings(look=np.zeros((2, 2)), samples_per_epoch=100)
