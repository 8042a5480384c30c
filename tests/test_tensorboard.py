"""TensorBoard: real event files, read back with TensorBoard's own readers."""

import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gwa_logging
from gwa_logging import AlignmentSummary, BackendError, InvalidInputError
from gwa_logging.integrations.heatmap_picture import SIZE
from gwa_logging.integrations.tensorboard import TensorBoardBackend, open_backend
from gwa_logging.journal import read_journal
from gwa_logging.protocols import RunContext, TrackerContents
from gwa_logging.records import CloseRecord, IntervalRecord, StopReason
from tests.records import interval_record, stop_alert
from tests.trackers import BATCHES, EventAccumulator, Training, events_of, read_events, totals_in

ALERT = stop_alert(
    statistic="stable",
    value=0.25,
    best_value=0.5,
    reason=StopReason.NO_IMPROVEMENT,
    caveats=("the epochs are small", "the labels may be clean"),
)


def open_in(folder: Path, run: Any = None, name: str = "gwa") -> TensorBoardBackend:
    return open_backend(RunContext(name=name, run=run, directory=folder))


# --- which folder -----------------------------------------------------------------------------------------------------


def test_without_a_run_the_events_are_next_to_the_journal_in_a_folder_named_like_the_prefix(tmp_path: Path) -> None:
    monitor = Training().watch(tmp_path, backend="tensorboard")
    monitor.close()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    assert file.parent == monitor.journal.parent / "gwa"


def test_a_relative_folder_is_found_again_after_the_user_changes_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_in(tmp_path, "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (backend.run, backend.run_ref.run) == ("runs", str(tmp_path / "runs"))
    backend.write(ALERT)
    assert backend.contents() == open_in(tmp_path, backend.run_ref.run).contents() == TrackerContents(alerts={7})


@pytest.mark.parametrize("form", [str, Path, SummaryWriter, lambda folder: SimpleNamespace(logdir=str(folder))])
@pytest.mark.parametrize("give_back", [False, True])
def test_a_log_directory_can_be_a_path_or_a_writer(tmp_path: Path, form: Any, give_back: bool) -> None:
    backend = open_in(tmp_path, form(tmp_path / "runs" / "experiment"))
    if give_back:
        backend = open_in(tmp_path, backend.run)
    backend.write(ALERT)
    assert "gwa/alert" in read_events(tmp_path / "runs" / "experiment" / "gwa").Tags()["tensors"]


def test_the_event_file_of_a_writer_identifies_its_folder(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "runs")
    assert open_in(tmp_path, writer.file_writer).run == open_in(tmp_path, writer).run == str(tmp_path / "runs")


@pytest.mark.parametrize("wrong", [17, "", b"runs", object(), SummaryWriter, ["runs"]])
def test_anything_but_a_log_directory_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"run=.*expected a log directory such as 'runs/experiment'"):
        Training().watch(tmp_path, backend="tensorboard", run=wrong)


def test_a_log_directory_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(
        BackendError, match=r"'.*a file' cannot be written to \(NotADirectoryError.*run='runs/experiment'"
    ):
        Training().watch(tmp_path, backend="tensorboard", run=tmp_path / "a file")


def test_each_of_several_heads_has_its_own_folder(tmp_path: Path) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.other = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x: Any) -> Any:
            return self.main(x).sum() + self.other(x).sum()

    model = TwoHeads()
    heads = ["main", "other"]
    monitor = gwa_logging.watch(
        model, head=heads, backend="tensorboard", run=tmp_path / "runs", directory=tmp_path / "gwa_runs"
    )
    monitor.close()
    folders = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("events.out.tfevents.*")}
    assert folders == {"runs/gwa", "runs/gwa/other"}


def test_a_running_tensorboard_still_shows_what_the_user_logs(tmp_path: Path) -> None:
    """TensorBoard's reader would leave the user's event file for a newer one in the same folder."""
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 0)
    writer.flush()
    backend, looking = open_in(tmp_path, writer), EventAccumulator(str(tmp_path))
    backend.write(interval_record(0, [0.1]))
    looking.Reload()
    for step in (1, 2):
        writer.add_scalar("loss", 0.5, step)
    writer.flush()
    looking.Reload()
    assert [event.step for event in looking.Scalars("loss")] == [0, 1, 2]


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_bins_are_those_of_the_display_without_empty_bins_at_the_ends(tmp_path: Path) -> None:
    record = interval_record(0, [-0.21, -0.2, 0.1, 0.11, 0.3])
    open_in(tmp_path).write(record)
    (event,) = read_events(tmp_path / "gwa").Histograms("gwa/scores")
    shown = event.histogram_value
    counts, edges = record.histogram.to_display(64, 0.5)
    first, last = np.flatnonzero(counts)[[0, -1]]
    assert shown.bucket == counts[first : last + 1].tolist()
    assert shown.bucket_limit == edges[first + 1 : last + 2].tolist()
    assert (shown.min, shown.max) == (edges[first], edges[last + 1])
    assert (shown.num, shown.sum) == (5, pytest.approx(0.1))


def test_a_record_keeps_its_time(tmp_path: Path) -> None:
    class Timed(IntervalRecord):
        time: float = 0.0

    backend = open_in(tmp_path)
    values = interval_record(0, [0.1, 0.2]).model_dump()
    backend.write(Timed(**values | {"time": 1_700_000_000.0}))
    backend.write(Timed(**values | {"step": 1, "time": 0.0}))
    first, second = read_events(tmp_path / "gwa").Scalars("gwa/steps/q50")
    assert first.wall_time == 1_700_000_000.0
    assert second.wall_time == pytest.approx(time.time(), abs=60)


def test_an_interval_without_a_score_leaves_no_event(tmp_path: Path) -> None:
    backend = open_in(tmp_path)
    for step, scores in enumerate(([math.nan], [0.1, -0.2], [math.nan])):
        backend.write(interval_record(step, scores))
    events = read_events(tmp_path / "gwa")
    for key in ("steps/mean", "steps/q50"):
        assert [event.step for event in events.Scalars(f"gwa/{key}")] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_values_beyond_float32_are_stored_as_the_nearest_value(tmp_path: Path, value: float) -> None:
    report = AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report().model_copy(update={"gwa": value})
    open_in(tmp_path).write(report)
    (event,) = read_events(tmp_path / "gwa").Scalars("gwa/gwa")
    assert event.value == pytest.approx(math.inf if value == 1e300 else value, nan_ok=True)


def test_the_alert_and_the_best_epoch_are_texts_and_no_charts(tmp_path: Path) -> None:
    backend = open_in(tmp_path)
    backend.write(ALERT)
    backend.write(CloseRecord(epochs=9, steps=90, best_epoch=2, best_value=0.5, faults={}))
    events = read_events(tmp_path / "gwa")
    assert events.summary_metadata["gwa/alert"].plugin_data.plugin_name == "text"
    (event,) = events.Tensors("gwa/alert")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 7
    assert text == "stop now\n\n- But: the epochs are small.\n- But: the labels may be clean."
    (best,) = events.Tensors("gwa/best")
    assert (best.step, best.tensor_proto.string_val[0].decode()) == (
        8,
        "Best epoch: 2 (statistic of the stop alert: 0.5)",
    )
    assert events.Tags()["scalars"] == []


def test_a_run_has_pictures_of_its_scores(tmp_path: Path) -> None:
    training = Training()
    monitor = training.watch(tmp_path, backend="tensorboard")
    for _ in range(3):
        training.epoch(monitor)
    monitor.close()
    assert monitor.faults == {}
    pictures = read_events(monitor.journal.parent / "gwa").Images("gwa/distribution")
    assert len(pictures) == 4  # the reader keeps a sample of four
    assert max(event.step for event in pictures) == 3 * BATCHES - 1
    assert {(event.width, event.height) for event in pictures} == {SIZE}
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in pictures)


def test_the_picture_is_the_first_card(tmp_path: Path) -> None:
    training = Training()
    monitor = training.watch(tmp_path, backend="tensorboard")
    training.epoch(monitor)
    monitor.close()
    tags = read_events(monitor.journal.parent / "gwa").Tags()
    cards = sorted([*tags["images"], *tags["scalars"], *tags["histograms"]])  # TensorBoard's order, for lower case
    assert cards[:2] == ["gwa/distribution", "gwa/gwa"]


def test_the_head_is_logged_as_a_text(tmp_path: Path) -> None:
    monitor = Training().watch(tmp_path, backend="tensorboard")
    monitor.close()
    (event,) = read_events(monitor.journal.parent / "gwa").Tensors("gwa/head")
    assert "Linear 8 -> 3" in event.tensor_proto.string_val[0].decode()


def test_a_run_without_a_best_epoch_has_no_best_epoch(tmp_path: Path) -> None:
    backend = open_in(tmp_path)
    backend.write(CloseRecord(epochs=0, steps=0, best_epoch=None, best_value=math.nan, faults={}))
    assert read_events(tmp_path / "gwa").Tags()["scalars"] == []


def test_a_later_backend_reads_the_contents_of_the_folder(tmp_path: Path) -> None:
    first = open_in(tmp_path)
    assert first.contents() == TrackerContents()
    for step in (0, 20, 40):
        first.write(interval_record(step, [0.1, 0.2]))
    first.write(AlignmentSummary.from_scores([0.1, 0.2, 0.4]).report(epoch=3))
    first.write(ALERT)
    first.close()
    second = open_in(tmp_path / "elsewhere", first.run_ref.run)
    held = TrackerContents(intervals={0, 20, 40}, epochs={3: 3}, alerts={7})
    assert second.contents() == held
    second.write(CloseRecord(epochs=8, steps=41, best_epoch=2, best_value=0.5, faults={}))
    assert second.contents() == held._replace(closes={8})
    assert open_in(tmp_path, name="other").contents() == TrackerContents()


# --- outages ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread dies
def test_no_record_is_lost_if_the_disk_fails_temporarily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    monitor = training.watch(tmp_path, backend="tensorboard", run=tmp_path / "runs")
    training.epoch(monitor)
    assert monitor.flush(30)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", _refuse)
        training.epoch(monitor)
        assert not monitor.flush(0.2)
    training.epoch(monitor)
    monitor.close()
    assert list(monitor.faults) == ["backend tensorboard"]
    records, _ = read_journal(monitor.journal)
    files = sorted((tmp_path / "runs" / "gwa").iterdir(), key=lambda file: int(file.name.rpartition(".")[2]))
    held = [event for file in files for event in events_of(read_events(file).Histograms, "gwa/scores")]
    assert [(e.step, sum(e.histogram_value.bucket)) for e in held] == totals_in(records)


def _refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


# --- what it needs ----------------------------------------------------------------------------------------------------


def test_neither_torch_nor_tensorflow_is_needed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, gwa_logging.integrations.tensorboard as t\n"
        "from gwa_logging.protocols import RunContext\nfrom gwa_logging.records import CloseRecord\n"
        "backend = t.open_backend(RunContext('gwa', None, pathlib.Path(sys.argv[1])))\n"
        "backend.write(CloseRecord(epochs=1, steps=1, best_epoch=0, best_value=1.0, faults={}))\n"
        "backend.close()\n"
        "print([name for name in ('torch', 'tensorflow') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert read_events(tmp_path / "gwa").Tensors("gwa/best")[0].step == 0


def test_event_files_of_the_same_second_are_read_in_the_order_of_writing(tmp_path: Path) -> None:
    for step in range(4):  # each in a separate file, as in replays
        backend = open_backend(RunContext("gwa", str(tmp_path), tmp_path))
        backend.write(interval_record(step, [0.1, 0.2]))
        backend.close()
    seconds = sorted(path.name.split(".")[3] for path in (tmp_path / "gwa").iterdir())
    assert len(set(seconds)) == len(seconds) == 4
    assert [event.step for event in read_events(tmp_path / "gwa").Scalars("gwa/steps/mean")] == [0, 1, 2, 3]
