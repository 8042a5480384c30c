"""The selection of the processes whose samples count."""

import numpy as np
import pytest

from gwa_logging import EarlyStop, InvalidInputError
from gwa_logging.ranks import Attendance, Identity, check_windows, first_scores, select_ranks
from gwa_logging.settings import WatchSettings
from gwa_logging.summary import AlignmentSummary


def summary(seed: int) -> AlignmentSummary:
    return AlignmentSummary.from_scores(np.random.default_rng(seed).uniform(-0.9, 0.9, 24))


def of(seed: int, group: int, head: str = "head") -> tuple[Identity, AlignmentSummary]:
    """A process with random scores of this seed."""
    return Identity(head, first_scores([summary(seed)]), group), summary(seed)


def unknown(group: int) -> tuple[Identity, AlignmentSummary]:
    """A process that has seen no sample yet."""
    return Identity(group=group), AlignmentSummary()


@pytest.mark.parametrize(
    ("processes", "ranks", "kinds"),
    [
        ([of(1, 0), of(2, 1), of(3, 2)], [0, 1, 2], []),  # data-parallel
        ([of(1, 0), of(1, 0), of(2, 2), of(2, 2)], [0, 2], []),  # two tensor-parallel pairs
        ([of(1, 0), of(2, 0)], [0, 1], []),  # tensor-parallel, each with a part of the sequence
        ([of(1, 0), of(1, 1)], [0, 1], ["ranks with the same samples"]),
        ([of(1, 0, "a"), of(2, 1, "b"), of(3, 2, "a")], [0, 2], ["ranks with different heads"]),
        ([unknown(0), of(2, 1, "a"), of(3, 2, "b")], [0, 1], ["ranks with different heads"]),
        ([unknown(0), unknown(0)], [0, 1], []),  # nothing is known yet
    ],
)
def test_each_sample_counts_once_and_for_one_head_only(processes, ranks, kinds):
    identities, summaries = zip(*processes, strict=True)
    found = select_ranks(identities, summaries)
    assert (found.ranks, list(found.problems)) == (ranks, kinds)


def test_equal_scores_up_to_rounding_mean_the_same_samples():
    scores = np.random.default_rng(0).uniform(-0.9, 0.9, 24)
    near, far = (first_scores([AlignmentSummary.from_scores(scores * (1 + by))]) for by in (1e-7, 1e-3))
    first = first_scores([AlignmentSummary.from_scores(scores)])
    assert select_ranks([Identity("", first), Identity("", near)]).ranks == [0]
    assert select_ranks([Identity("", first), Identity("", far)]).ranks == [0, 1]


def test_constant_scores_do_not_identify_samples():
    equal = AlignmentSummary.from_scores(np.full(24, 0.5))
    assert first_scores([]) == first_scores([equal]) == Identity().first
    assert first_scores([equal, summary(1)])[0] == 48


@pytest.mark.parametrize("head", ["", "'head' (12 features, 5 classes)", "é" * 300 + "'z' (1 features, 2 classes)"])
def test_an_identity_is_decoded_as_it_was_encoded(head):
    sent = Identity(head, (24.0, 1 / 3, 0.5, -0.1, 0.9), 3)
    found = Identity.from_vector(np.frombuffer(sent.to_vector().tobytes()))
    assert found[1:] == sent[1:]
    assert found.head[-80:] == head[-80:]


def test_windows_of_samples_are_refused_in_a_distributed_run():
    check_windows(None, 2)
    check_windows(100, 1)
    with pytest.raises(InvalidInputError, match=r"samples_per_epoch=100: the 2 processes .* monitor\.end_epoch\(\)"):
        check_windows(100, 2)


class Store(dict[str, str]):
    """A store in this process. See `gwa_logging.ranks.SharedStore`."""

    __hash__ = object.__hash__

    def count_watch(self, name: str) -> int:
        return 1

    def publish(self, key: str) -> None:
        self[key] = ""

    def find_missing(self, key: str, within: float) -> list[int]:
        return []

    def store_once(self, key: str, value: str) -> str:
        return self.setdefault(key, value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"num_samples": 10}, {"num_samples": 11}, "num_samples: this process passes 11 to watch(), another one 10"),
        ({}, {"labels": [0, 1]}, "num_samples: this process passes 2 to watch(), another one None"),
        ({"early_stop": None}, {}, "early_stop: this process passes "),
        (
            {"early_stop": EarlyStop(patience=3)},
            {"early_stop": EarlyStop(patience=4)},
            "another one EarlyStop(patience=3)",
        ),
        ({"unit": "sample"}, {"unit": "position"}, "unit: this process passes 'position'"),
        ({"look": np.zeros((2, 3))}, {}, "early_stop: "),
        ({"look": np.zeros((2, 3)), "early_stop": None}, {"early_stop": None}, "look: this process passes None"),
        ({"keep_best": True}, {"keep_best": "averaged"}, "keep_best: this process passes 'averaged'"),
        ({"num_samples": 2, "labels": [0, 1]}, {"num_samples": 2}, "labels: this process passes None to watch()"),
    ],
)
def test_processes_that_disagree_on_a_setting_are_refused(first, second, message):
    store = Store()
    Attendance.for_settings(WatchSettings(**first), lambda: store).enter()
    with pytest.raises(InvalidInputError) as error:
        Attendance.for_settings(WatchSettings(**second), lambda: store).enter()
    assert message in str(error.value)
    assert "Pass the same value in every process" in str(error.value)


def test_what_only_the_writing_process_uses_may_differ():
    store = Store()
    for values in ({"backend": "mlflow", "directory": "a", "log_every_n_steps": 1}, {"on_alert": print}):
        attendance = Attendance.for_settings(WatchSettings(**values), lambda: store)
        attendance.enter()
        assert attendance.problems() == {}
    assert [key for key, value in store.items() if not value] == ["gwa_logging/watch/gwa/1"]


def test_a_store_that_fails_refuses_nothing():
    class Broken(Store):
        def store_once(self, key: str, value: str) -> str:
            raise RuntimeError("connection reset")

    store = Broken()
    attendance = Attendance.for_settings(WatchSettings(), lambda: store)
    attendance.enter()
    assert attendance.problems() == {}
