"""What a loaded state continues, and what it leaves alone. No framework and no tracker's package."""

import json
from pathlib import Path

import pytest

from gwa_logging import InvalidInputError, Monitor
from gwa_logging._continued_journal import SUPERSEDED
from gwa_logging.journal import read_journal
from gwa_logging.records import EpochReport, IntervalRecord
from tests.resumed_trainer import STEPS, Model, step, watch


def trained(folder: Path, steps: int, *, save_at: int) -> tuple[Monitor, dict]:
    monitor, state = watch(Model(), folder, "local"), {}
    for number in range(steps):
        if number == save_at:
            state = json.loads(json.dumps(monitor.state_dict()))
        step(monitor, number)
    return monitor, state


def positions(journal: Path) -> tuple[list[int], list[int]]:
    """The steps of the intervals and the numbers of the epochs."""
    records = read_journal(journal)[0]
    return (
        [r.step for r in records if isinstance(r, IntervalRecord)],
        [r.epoch for r in records if isinstance(r, EpochReport)],
    )


def resumed(folder: Path, state: dict, steps: range) -> Monitor:
    monitor = watch(Model(), folder, "local")
    monitor.load_state_dict(state)
    for number in steps:
        step(monitor, number)
    monitor.close()
    return monitor


def test_the_journal_is_continued_and_what_came_after_the_state_is_kept_beside_it(tmp_path):
    first, state = trained(tmp_path, 3 * STEPS + 4, save_at=STEPS + 5)
    first.close()
    with first.journal.open("ab") as file:
        file.write(b'{"kind": "interv')  # torn
    second = resumed(tmp_path, state, range(STEPS + 5, 4 * STEPS))
    assert second.journal == first.journal
    assert positions(second.journal) == (list(range(4 * STEPS)), [0, 1, 2, 3])
    assert read_journal(second.journal)[1] == 0
    assert [path.name for path in tmp_path.iterdir()] == [first.journal.parent.name]
    moved, torn = read_journal(first.journal.parent / SUPERSEDED)
    assert [r.step for r in moved if isinstance(r, IntervalRecord)] == list(range(STEPS + 5, 3 * STEPS + 4))
    assert torn == 1


def test_closing_a_resumable_run_leaves_the_epoch_and_the_interval_in_progress_to_the_next_process(tmp_path):
    first = watch(Model(), tmp_path, "local")
    for number in range(STEPS + 5):
        step(first, number)
    state = first.state_dict()
    first.close(resumable=True)
    assert positions(first.journal) == (list(range(STEPS + 5)), [0])
    assert not (first.journal.parent / SUPERSEDED).exists()
    second = resumed(tmp_path, state, range(STEPS + 5, 2 * STEPS))
    assert positions(second.journal) == (list(range(2 * STEPS)), [0, 1])
    assert not (first.journal.parent / SUPERSEDED).exists()


def test_an_earlier_state_that_is_loaded_after_a_later_one_is_a_fault(tmp_path):
    first, earlier = trained(tmp_path, STEPS + 5, save_at=STEPS + 2)
    later = first.state_dict()
    first.close(resumable=True)
    second = watch(Model(), tmp_path, "local")
    second.load_state_dict(later)
    assert second.faults == {}
    second.load_state_dict(earlier)
    assert second.faults == {"restart": 1}
    second.close()


@pytest.mark.parametrize("error", [ValueError, None])
def test_an_exception_in_a_with_statement_closes_a_run_with_a_state_as_resumable(tmp_path, error):
    monitor = watch(Model(), tmp_path, "local")
    try:
        with monitor:
            step(monitor, 0)
            monitor.state_dict()
            if error:
                raise error
    except ValueError:
        pass
    assert positions(monitor.journal)[1] == ([] if error else [0])


@pytest.mark.parametrize("why", ["gone", "in use", "another directory", "not a journal"])
def test_a_journal_that_cannot_be_continued_is_left_alone_and_a_new_one_begins_where_the_state_ends(
    tmp_path, caplog, why
):
    first, state = trained(tmp_path / "a", STEPS + 9, save_at=STEPS + 5)
    first.flush() if why == "in use" else first.close()
    if why == "not a journal":
        first.journal.write_text("text\n")
    if why == "gone":
        first.journal.unlink()
    before = first.journal.read_bytes() if why != "gone" else None
    folder = tmp_path / ("b" if why == "another directory" else "a")
    second = resumed(folder, state, range(STEPS + 5, 2 * STEPS))
    assert second.journal != first.journal
    assert positions(second.journal) == (list(range(STEPS + 5, 2 * STEPS)), [1])
    assert "the new one begins where the state ends" in caplog.text
    assert why == "gone" or first.journal.read_bytes() == before
    assert second.faults == {}
    first.close()


def test_a_state_that_is_loaded_after_the_first_step_continues_no_journal(tmp_path):
    first, state = trained(tmp_path, 9, save_at=5)
    first.close()
    second = watch(Model(), tmp_path, "local")
    step(second, 0)
    second.load_state_dict(state)
    second.close()
    assert second.journal != first.journal


@pytest.mark.parametrize("folder", ["..", "../other", "a/b", "", "a\0", 3, None], ids=repr)
def test_a_state_cannot_name_a_folder_elsewhere(tmp_path, folder):
    first, state = trained(tmp_path / "runs", 9, save_at=5)
    first.close()
    state["run"]["folder"] = folder
    second = watch(Model(), tmp_path / "runs", "local")
    if folder == "..":
        (tmp_path / "journal.jsonl").write_bytes(before := first.journal.read_bytes())
    with pytest.raises(InvalidInputError, match=r"state: .*run\.folder"):
        second.load_state_dict(state)
    assert second.journal.parent.parent == tmp_path / "runs"
    second.close()
    if folder == "..":
        assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_state_without_a_run_is_read_and_begins_a_new_journal(tmp_path, version):
    first, state = trained(tmp_path, STEPS + 9, save_at=STEPS + 5)
    first.close()
    del state["run"]
    second = resumed(tmp_path, state | {"version": version}, range(STEPS + 5, 2 * STEPS))
    assert second.journal != first.journal
    assert positions(second.journal) == (list(range(STEPS + 5, 2 * STEPS)), [1])
