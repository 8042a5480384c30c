"""Where the list of suspects goes: journal, CSV, trackers, replay and report."""

import csv
import io
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trackio
import wandb
from PIL import Image

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.class_pairs import class_pairs, concentration, count_pairs
from gwa_logging.journal import read_journal
from gwa_logging.records import RECORDS, SuspectsRecord
from gwa_logging.replay import replay
from gwa_logging.report.page import write_report
from gwa_logging.thumbnail import thumbnail
from tests.trackers import (
    BATCH,
    BATCHES,
    OnMlflow,
    OnTensorBoard,
    OnTrackio,
    OnWandb,
    Tracker,
    Training,
    folder_of,
    read_back,
    read_events,
    rows_of,
)

N = BATCH * BATCHES
COLUMNS = ["id", "mean_score", "times_seen", "label", "predicted"]
ALL_COLUMNS = [*COLUMNS, "tokens", "negative_share", "lowest_tenth"]
FROZEN_COLUMNS = [*ALL_COLUMNS, "until_epoch"]
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 12, 10, 3), dtype=np.uint8)


def watch(training: Training, folder: Path, **options: Any) -> Monitor:
    return training.watch(folder, labels=torch.cat([y for _, y in training.batches]), **options)


def epoch(training: Training, monitor: Monitor) -> None:
    for index in range(BATCHES):
        monitor.tag(torch.arange(BATCH) + index * BATCH)
        training.step(index)
    monitor.end_epoch()


def lists(monitor: Monitor) -> list[SuspectsRecord]:
    return [record for record in read_journal(monitor.journal)[0] if record.kind == "suspects"]


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()


def test_suspects_are_written_after_the_epochs_and_at_the_end_but_not_twice(tmp_path):
    training = Training()
    monitor = watch(training, tmp_path)
    for _ in monitor.epochs(2):
        epoch(training, monitor)
    assert [(r.epoch, r.step, r.until_epoch) for r in lists(monitor)] == [(2, 13, None)]
    monitor.close()
    assert len(lists(monitor)) == 1
    training.watch(tmp_path)

    monitor = watch(training, tmp_path)
    epoch(training, monitor)
    found = monitor.suspects()
    monitor.close()
    (record,) = lists(monitor)
    assert list(record.suspects) == found
    assert record.samples == len(found) == N
    assert [record.kind for record in read_journal(monitor.journal)[0]][-2:] == ["suspects", "close"]


def test_a_run_without_a_ledger_has_no_suspects(tmp_path):
    training = Training()
    monitor = training.watch(tmp_path)
    training.epoch(monitor)
    monitor.close()
    assert lists(monitor) == []
    assert not (monitor.journal.parent / "suspects.csv").exists()


def test_the_csv_in_the_runs_folder_holds_the_table(tmp_path):
    training = Training()
    monitor = watch(training, tmp_path)
    epoch(training, monitor)
    found = monitor.log_suspects(5)
    with (monitor.journal.parent / "suspects.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == COLUMNS
    assert [[int(i), float(m), float(n), int(y), int(p)] for i, m, n, y, p in rows] == [
        [s.id, s.mean_score, s.times_seen, s.label, s.predicted] for s in found
    ]
    assert found == monitor.suspects(5)


def test_if_the_csv_cannot_be_written_the_suspects_are_still_returned(tmp_path):
    training = Training()
    monitor = watch(training, tmp_path)
    epoch(training, monitor)
    (monitor.journal.parent / "suspects.csv").mkdir()
    assert len(monitor.log_suspects(3)) == 3
    assert monitor.faults == {"suspects.csv": 1}


def test_a_program_that_changes_its_working_directory_gets_everything_in_the_same_folder(tmp_path, monkeypatch):
    training = Training()
    monitor = gwa_logging.watch(training.model, num_samples=N, backend="tensorboard", early_stop=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    epoch(training, monitor)
    monitor.close()
    assert monitor.faults == {}
    (folder,) = (tmp_path / "gwa_runs").iterdir()
    assert {"journal.jsonl", "suspects.csv", "gwa"} <= {path.name for path in folder.iterdir()}
    assert read_events(folder / "gwa").Tags()["scalars"]


def test_a_closed_monitor_writes_no_suspects(tmp_path):
    training = Training()
    monitor = watch(training, tmp_path)
    monitor.close()
    with pytest.raises(InvalidInputError, match="closed"):
        monitor.log_suspects()


# --- trackers ---------------------------------------------------------------------------------------------------------


def in_mlflow(tracker: OnMlflow, run: str) -> list[list[str]]:
    path = tracker.client.download_artifacts(run, "gwa/suspects.csv")
    head, *rows = csv.reader(io.StringIO(Path(path).read_text()))
    assert head == FROZEN_COLUMNS
    return rows


def in_wandb(tracker: OnWandb, run: str) -> list[list[str]]:
    folders = (tracker.folder / "wandb").glob(f"offline-run-*-{run.rpartition('/')[2]}")
    for folder in sorted(folders, reverse=True):
        for found in read_back(str(folder)).column("gwa/suspects.path"):
            table = json.loads((folder / "files" / found).read_text())
            assert table["columns"][:9] == FROZEN_COLUMNS
            return [["" if cell is None else str(cell) for cell in row[:9]] for row in table["data"]]
    raise AssertionError("no table")


def in_tensorboard(tracker: OnTensorBoard, run: str) -> list[list[str]]:
    (event,) = read_events(Path(run) / "gwa").Tensors("gwa/suspects")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head == FROZEN_COLUMNS
    return rows


def in_trackio(tracker: OnTrackio, run: str) -> list[list[str]]:
    project, _, name = run.partition("/")
    (found,) = (other for other in trackio.Api().runs(project) if other.name == name)
    (table,) = (row["gwa/suspects"] for row in rows_of(found) if "gwa/suspects" in row)
    return [["" if row[name] is None else str(row[name]) for name in FROZEN_COLUMNS] for row in table["_value"]]


TRACKERS = {
    "MLflow": (OnMlflow, in_mlflow),
    "W&B": (OnWandb, in_wandb),
    "TensorBoard": (OnTensorBoard, in_tensorboard),
    "Trackio": (OnTrackio, in_trackio),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "W&B" else ()) for name in TRACKERS]
)
def test_the_table_is_in_the_tracker_and_a_replay_sends_it_once(name: str, tmp_path, monkeypatch) -> None:
    make, read = TRACKERS[name]
    tracker: Tracker = make()
    tracker.set_up(tmp_path, monkeypatch)
    training = Training()
    at_once = EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)
    monitor = watch(training, tmp_path, backend=tracker.backend, early_stop=at_once)
    run = monitor._deliveries[0].backend.run_ref.run
    epoch(training, monitor)
    monitor.update(torch.tensor([[-0.5, 0.25, -0.5], [0.25, -0.75, -0.25]]), torch.arange(2))  # two documents
    monitor.end_epoch()
    assert monitor.alert is not None
    monitor.close()
    assert monitor.faults == {}
    expected = [["" if cell is None else str(cell) for cell in row] for row in lists(monitor)[0].rows()]
    assert [row[5] for row in expected].count("3") == 2
    assert {row[8] for row in expected} == {"1"}
    assert len(expected) == N
    assert read(tracker, run) == expected

    again = replay(monitor.journal, tracker.backend, run)
    assert again.sent == 0

    other = replay(monitor.journal, tracker.backend, str(tmp_path / "runs") if name == "TensorBoard" else "new")
    assert other.had == 0
    assert read(tracker, other.run_ref.run) == expected


def test_in_the_users_wandb_run_the_table_moves_no_step(tmp_path, monkeypatch):
    tracker = OnWandb()
    tracker.set_up(tmp_path, monkeypatch)
    run, training = tracker.start(), Training()
    monitor = watch(training, tmp_path, backend="wandb", run=run)
    run.log({"user/loss": 1.0})
    epoch(training, monitor)
    before = run.step
    monitor.log_suspects(4, images=IMAGES)
    assert monitor.flush(30)
    assert run.step == before
    run.log({"user/loss": 0.5})
    monitor.close()
    folder = folder_of(run)
    tracker.end(run)
    disk = read_back(folder)
    assert disk.column("user/loss", "_step") == [(1.0, 0), (0.5, 1)]
    (path,) = disk.column("gwa/suspects.path")
    table = json.loads((Path(folder) / "files" / path).read_text())
    assert table["columns"] == [*COLUMNS, "picture"]


def test_wandbs_table_shows_the_pictures(tmp_path):
    """W&B stores the pictures in an artifact, which it does not write offline."""
    from gwa_logging.integrations.wandb import _table

    training = Training()
    monitor = watch(training, tmp_path)
    epoch(training, monitor)
    monitor.log_suspects(4, images=IMAGES)
    for row in _table(lists(monitor)[0]).data:
        assert isinstance(row[5], wandb.Image)
        np.testing.assert_array_equal(np.asarray(row[5].image), IMAGES[row[0]])


# --- pictures and the report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (IMAGES[0], IMAGES[0]),
        (np.moveaxis(IMAGES[0], -1, 0), IMAGES[0]),
        (IMAGES[0][:, :, 0], IMAGES[0][:, :, 0]),
        (IMAGES[0][None, :, :, 0], IMAGES[0][:, :, 0]),
        (torch.from_numpy(IMAGES[0]), IMAGES[0]),
        (Image.fromarray(IMAGES[0]), IMAGES[0]),
        ((IMAGES[0], 3), IMAGES[0]),
        ({"image": IMAGES[0], "label": 3}, IMAGES[0]),
        (np.array([[-1.0, 0.0], [1.0, np.nan]]), np.array([[0, 128], [255, 128]])),
        (np.zeros((2, 2)), np.zeros((2, 2))),
        (np.arange(200 * 100).reshape(200, 100) % 251 / 250, None),
    ],
)
def test_a_thumbnail_is_a_png_of_the_picture_and_small(item, expected):
    with Image.open(io.BytesIO(b64decode(thumbnail(item)))) as picture:
        pixels = np.asarray(picture)
    if expected is None:
        assert pixels.shape == (64, 32)
    else:
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("item", [np.zeros(5), np.zeros((2, 3, 4, 5)), "text", np.zeros((0, 4)), np.zeros((5, 6, 7))])
def test_an_array_that_is_not_a_picture_is_refused(item):
    with pytest.raises((InvalidInputError, ValueError)):
        thumbnail(item)


def test_a_picture_that_fails_is_counted_and_the_others_are_shown(tmp_path):
    training = Training()
    monitor = watch(training, tmp_path)
    epoch(training, monitor)
    pictures = {i: IMAGES[i] for i in range(0, N, 2)}
    found = monitor.log_suspects(N, images=pictures)
    assert {s.id % 2 for s in found if s.thumbnail} == {0}
    assert monitor.faults == {"thumbnails": N // 2}


def test_the_report_shows_the_suspects_with_their_pictures(tmp_path):
    training = Training()
    with watch(training, tmp_path) as monitor:
        epoch(training, monitor)
        found = monitor.log_suspects(6, images=IMAGES)
    page = write_report(monitor.journal.parent).read_text(encoding="utf-8")
    section = page[page.index("Samples that are probably mislabelled") :]
    section = section[: section.index("</section>")]
    listed = section.partition("The list</h3>")[2]
    assert [int(i) for i in re.findall(r'<th scope="row">(\d+)', listed)] == [s.id for s in found]
    assert [f"<td>{s.label}<td>{s.predicted}<" in section for s in found] == [True] * 6
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", section)
    assert pictures == [s.thumbnail for s in found]
    captions = re.findall("<figcaption>(.*?)</figcaption>", section)
    assert [re.sub("<.*?>", " ", caption).split() for caption in captions] == [
        f"label {s.label} predicted {s.predicted} sample {s.id}".split() for s in found
    ]
    assert ['class="differs"' in caption for caption in captions] == [s.label != s.predicted for s in found]
    assert f"Recorded after epoch 0 (step {BATCHES - 1}), when {N} samples had been scored" in section


def test_the_report_leaves_out_unknown_labels_and_says_in_which_epoch_the_list_was_made(tmp_path):
    training = Training()
    with training.watch(tmp_path, num_samples=N) as monitor:
        epoch(training, monitor)
        monitor.tag(torch.arange(BATCH))
        training.step(0)
        monitor.log_suspects(20)
        page = write_report(monitor.journal.parent).read_text(encoding="utf-8")
    section = page[page.index("Samples that are probably mislabelled") :].partition("</section>")[0]
    assert '<th scope="col">predicted' in section
    assert '<th scope="col">label' not in section
    assert "Which class is taken for which" not in section
    assert f"in epoch 1 (step {BATCHES})" in section
    assert "20 rows; scroll the table to see all." in section


def test_the_report_and_the_csv_describe_documents(tmp_path):
    training = Training()
    with training.watch(tmp_path, num_samples=N) as monitor:
        monitor.update(torch.tensor([[-0.5, 0.25, -0.5], [0.25, -0.75, torch.nan]]), torch.tensor([4, 2]))
        monitor.log_suspects(5)
        page = write_report(monitor.journal.parent).read_text(encoding="utf-8")
        rows = (monitor.journal.parent / "suspects.csv").read_text().splitlines()
    section = page[page.index("Samples that are probably mislabelled") :].partition("</section>")[0]
    section = section.replace("\N{MINUS SIGN}", "-")
    assert '<th scope="col">tokens<th scope="col">negative<th scope="col">lowest tenth' in section
    assert '<th scope="row">2<td>-0.2500<td>1<td>2<td>50%<td>-0.76<' in section
    assert '<th scope="row">4<td>-0.2500<td>1<td>3<td>67%<td>-0.5<' in section
    assert rows[0] == ",".join(ALL_COLUMNS)
    assert [row.split(",")[:6] for row in rows[1:]] == [
        ["2", "-0.25", "1", "", "", "2"],
        ["4", "-0.25", "1", "", "", "3"],
    ]


def test_a_journal_that_was_written_before_documents_had_details_is_read():
    line = (
        '{"kind":"suspects","step":3,"epoch":0,"samples":7,"suspects":[{"id":4,"mean_score":-0.5,"times_seen":2.0,'
        '"label":1,"predicted":null,"thumbnail":null}],"time":1.0}'
    )
    record = RECORDS.validate_json(line)
    assert record.columns == tuple(COLUMNS)
    assert record.rows() == [[4, -0.5, 2, 1, None]]
    assert record.suspects[0].tokens is None


def suspects_of(*pairs: tuple[int | None, int | None]) -> list[gwa_logging.Suspect]:
    return [
        gwa_logging.Suspect(id=i, mean_score=-0.5, times_seen=3, label=label, predicted=predicted)
        for i, (label, predicted) in enumerate(pairs)
    ]


def test_class_pairs_count_the_suspects_whose_label_differs_from_the_prediction():
    assert class_pairs(suspects_of((3, 5), (5, 3), (3, 5), (1, 1), (None, 2), (2, None))) == [(3, 5, 2), (5, 3, 1)]


def concentration_of(*pairs: tuple[int, int], classes: int = 10) -> str | None:
    labels, predicted = np.array(pairs, np.int32).reshape(-1, 2).T
    return concentration(count_pairs(labels, predicted, np.asarray), classes)


def test_few_class_pairs_that_hold_most_suspects_are_reported():
    systematic = [*[(3, 5)] * 14, *[(5, 3)] * 4, (0, 1), (1, 2), (-1, 4), (4, -1), (2, 2)]
    said = concentration_of(*systematic)
    assert said is not None
    assert said.startswith(
        "of the 20 samples with a negative mean score whose label differs from the prediction, 14 belong"
    )
    assert "(3 predicted as 5)" in said
    assert "the alert is weakest for such labels" in said
    assert concentration_of(*systematic[1:]) is None  # too few to judge
    assert concentration_of(*systematic, classes=3) is None  # three classes have only six pairs
    assert concentration_of() is None
    assert concentration_of(*[(1, 1)] * 30) is None


def test_as_few_pairs_are_named_as_hold_half_of_the_suspects_and_five_at_most():
    spread = [(i % 10, (i + 1 + i // 10) % 10) for i in range(80)]
    assert concentration_of(*spread) is None
    shifted = [(i % 10, (i + 1) % 10) for i in range(40)]  # ten pairs: five of them hold half
    assert concentration_of(*shifted).count("predicted as") == 5
    assert concentration_of(*shifted, (0, 5)) is None
    assert concentration_of(*[(3, 5)] * 12, *[(5, 3)] * 13, (1, 2)).count("predicted as") == 1
    assert concentration_of(*[(3, 5)] * 12, *[(5, 3)] * 9, *[(1, 2)] * 8, (2, 1)).count("predicted as") == 2


def test_a_report_without_a_ledger_has_no_section_on_suspects(tmp_path):
    training = Training()
    with training.watch(tmp_path) as monitor:
        training.epoch(monitor)
    assert "probably mislabelled" not in write_report(monitor.journal.parent).read_text(encoding="utf-8")


def test_a_suspect_survives_json(tmp_path):
    training = Training()
    with watch(training, tmp_path) as monitor:
        epoch(training, monitor)
        (worst,) = monitor.suspects(1)
    assert gwa_logging.Suspect.model_validate_json(worst.model_dump_json()) == worst
