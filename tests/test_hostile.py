"""Journals from untrusted sources: a command prints one line on errors and writes only into the run's folder."""

import json
import os
import random
import shutil
import struct
import tracemalloc
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwa_logging import EarlyStop
from gwa_logging.cli import main
from gwa_logging.journal import FILE_NAME, read_journal
from gwa_logging.records import Histogram
from gwa_logging.report.page import REPORT_NAME
from gwa_logging.thumbnail import thumbnail
from tests.records import interval_record

PICTURE = thumbnail(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
UNEXPECTED: tuple[Any, ...] = (
    *(1e30, -1, 1e999, 2**63, 2**53, 10**400, -(2**70), 0, 1.5, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        None,
        True,
        "",
        "../../x",
        "/etc",
        "a\0b",
        "\x1b[31m",
        "<script>",
        "\u202e",
        "x" * 100_000,
        [],
        {},
        [[]],
        {"a": 1},
    ),
)


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a valid run with every kind of record."""
    folder = tmp_path_factory.mktemp("valid")
    from tests.trackers import Training  # here, because it imports every tracker

    training = Training()
    with training.watch(folder, early_stop=EarlyStop(warmup=0, patience=1, min_delta=1e9, drop=0)) as monitor:
        for _ in range(3):
            training.epoch(monitor)
    records = [json.loads(line) for line in monitor.journal.read_text().splitlines()]
    suspects = [{"id": 3, "mean_score": -0.1, "times_seen": 2.5, "label": 1, "predicted": 0, "thumbnail": PICTURE}]
    records.insert(-1, {"kind": "suspects", "step": 5, "epoch": 0, "samples": 8, "suspects": suspects, "time": 1e9})
    records[0]["places"] = {"tensorboard": {"run": ".", "url": None}}
    assert {record["kind"] for record in records} == {"run", "interval", "epoch", "alert", "suspects", "close"}
    return records


def write(folder: Path, lines: list[Any]) -> Path:
    """Writes a journal into a run's folder, inside a folder in which nothing else may appear."""
    run = folder / "outer" / "run"
    run.mkdir(parents=True)
    (run / FILE_NAME).write_bytes(b"".join(line if isinstance(line, bytes) else _json(line) for line in lines))
    return run


def _json(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def check(run: Path, capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    """Runs a command in the run's folder. It must exit with 0, or with 2 and one line, and write into that folder only."""
    outside = files_in(run.parents[1]) - files_in(run)
    os.chdir(run)
    code = main([*command])
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert code == 0 or error.count("\n") == 1, error
    assert files_in(run.parents[1]) - files_in(run) == outside
    return code, error


# --- run ids and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", ["../../outside", "/{}/absolute", "sub/../../..", "gs://bucket/x", "http://host/x", "a\0b", "link", ""]
)
def test_replay_does_not_follow_a_journal_out_of_its_folder(lines, tmp_path, capsys, run):
    lines = [lines[0] | {"places": {"tensorboard": {"run": run.format(tmp_path)}}}, *lines[1:]]
    folder = write(tmp_path, lines)
    (folder / "link").symlink_to(tmp_path)
    if not run:  # the run's own folder, which contains a link that leaves it
        (folder / "gwa").symlink_to(tmp_path)
    code, error = check(folder, capsys, "replay", ".", "--backend", "tensorboard")
    assert code == 2
    assert "--run" in error


def test_replay_follows_a_journal_within_its_folder_and_the_working_directory(lines, tmp_path, capsys):
    run = write(
        tmp_path, [lines[0] | {"places": {"tensorboard": {"run": str(tmp_path / "outer" / "logs")}}}, *lines[1:]]
    )
    os.chdir(tmp_path / "outer")
    assert main(["replay", "run", "--backend", "tensorboard"]) == 0
    assert list((tmp_path / "outer" / "logs" / "gwa").iterdir())
    os.chdir(run)
    assert main(["replay", ".", "--backend", "tensorboard"]) == 2
    assert "outside" in capsys.readouterr().err
    assert main(["replay", ".", "--backend", "tensorboard", "--run", str(tmp_path / "outer" / "logs")]) == 0


@pytest.mark.parametrize(
    "name", ["../x", "gwa/..", "/x", "gwa/../../x", "a b", "..", "", "gwa/a/b", "x" * 65, "gwa\0", "gwa\n"]
)
def test_a_run_record_with_a_name_that_watch_refuses_is_skipped(lines, tmp_path, capsys, name):
    run = write(tmp_path, [lines[0] | {"name": name}, *lines[1:]])
    code, said = check(run, capsys, "replay", ".", "--backend", "tensorboard")
    assert code == 2
    assert "it contains no run (lines skipped: 1)" in said


@pytest.mark.parametrize(
    ("backend", "run"),
    [
        ("mlflow", "../../0123"),
        ("mlflow", "a" * 300),
        ("wandb", "me/../project"),
        ("wandb", "a/b/c/d"),
        ("wandb", "id?x=1"),
        ("trackio", "../x"),
        ("trackio", "project"),
        ("trackio", "pro\x1b[2Jject/run"),
    ],
)
def test_replay_refuses_an_invalid_run_id_before_it_contacts_the_tracker(lines, tmp_path, capsys, backend, run):
    folder = write(tmp_path, [lines[0] | {"places": {backend: {"run": run}}}, *lines[1:]])
    code, error = check(folder, capsys, "replay", ".", "--backend", backend)
    assert code == 2
    assert f"which is not a run of {backend}" in error
    assert error[:-1].isprintable()


def test_a_journal_that_is_not_a_file_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / FILE_NAME)
    assert main(["replay", str(tmp_path), "--backend", "tensorboard", "--run", "x"]) == 2
    assert main(["report", str(tmp_path)]) == 2


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("interval", {"step": 10**30}),
        ("interval", {"step": 1e30}),
        ("interval", {"step": -5}),
        ("interval", {"count": 10**30}),
        ("interval", {"epoch": 2**63}),
        ("interval", {"display_limit": float("inf")}),
        ("interval", {"display_limit": 1e308}),
        ("interval", {"display_limit": 1e-320}),
        ("interval", {"histogram": {"first": 0, "counts": [10**30]}}),
        ("interval", {"histogram": {"first": 0, "counts": [-1]}}),
        ("interval", {"histogram": {"first": -1, "counts": [1]}}),
        ("interval", {"histogram": {"first": 0, "counts": [1] * 513}}),
        ("interval", {"histogram": {"first": 0, "counts": []}}),
        ("interval", {"mean": 1e308}),
        ("interval", {"time": float("inf")}),
        ("epoch", {"gwa": 1e308}),
        ("epoch", {"gwa": float("inf")}),
        ("epoch", {"count": 1e30}),
        ("epoch", {"step": 1e30}),
        ("close", {"best_epoch": 10**400}),
        ("close", {"faults": {"x": 1e30}}),
        ("alert", {"epoch": -7}),
    ],
)
def test_a_line_with_a_number_out_of_bounds_is_skipped_and_counted(lines, tmp_path, capsys, kind, change):
    at = next(i for i, record in enumerate(lines) if record["kind"] == kind)
    run = write(tmp_path, [*lines[:at], lines[at] | change, *lines[at + 1 :]])
    assert read_journal(run / FILE_NAME)[1] == 1
    assert check(run, capsys, "report", ".") == (0, "")
    assert "Skipped lines of the journal (incomplete or unknown): 1." in (run / REPORT_NAME).read_text()


@pytest.mark.parametrize("levels", [150, 300, 3_000, 200_000])
def test_deep_nesting_raises_no_traceback(lines, tmp_path, capsys, levels):
    nested = _json(lines[0]).replace(b'"settings": {', b'"settings": {"x": %s, ' % deep(levels).encode())
    for first in ([nested], [deep(levels).encode() + b"\n", lines[0]]):
        run = write(tmp_path, [*first, *lines[1:]])
        check(run, capsys, "report", ".")
        check(run, capsys, "replay", ".", "--backend", "tensorboard")
        shutil.rmtree(tmp_path / "outer")


def _bomb(width: int, height: int) -> str:
    data = bytearray(b64decode(PICTURE))
    data[16:24] = struct.pack(">II", width, height)
    return b64encode(data).decode()


@pytest.mark.parametrize(
    "picture", [_bomb(60_000, 60_000), _bomb(0, 1), '"><script>', "JVBERi0=", b64encode(b"%!PS" * 20).decode()]
)
def test_a_record_with_a_thumbnail_that_is_not_a_small_png_is_skipped(lines, tmp_path, capsys, picture):
    at = next(i for i, record in enumerate(lines) if record["kind"] == "suspects")
    (suspect,) = lines[at]["suspects"]
    hostile = lines[at] | {"suspects": [suspect | {"thumbnail": picture}]}
    run = write(tmp_path, [*lines[:at], hostile, *lines[at + 1 :]])
    assert check(run, capsys, "report", ".")[0] == 0
    page = (run / REPORT_NAME).read_text()
    assert "Skipped lines of the journal (incomplete or unknown): 1." in page
    assert picture not in page.partition("</main>")[0]


def test_merged_counts_do_not_exceed_the_largest_count():
    most = Histogram(first=256, counts=(2**53 - 1,))
    assert most.merge(most).merge(most) == most


def test_a_line_without_an_end_takes_bounded_memory(lines, tmp_path):
    run = write(tmp_path, [*lines[:3]])
    with (run / FILE_NAME).open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b'{"kind": "')
        file.seek(150 << 20, os.SEEK_CUR)  # a hole of zeros, which takes no space on the disk
        file.write(b'"}\n')
        file.write(_json(lines[3]))
    tracemalloc.start()
    try:
        records, skipped = read_journal(run / FILE_NAME)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert (len(records), skipped) == (4, 1)


def test_a_valid_journal_is_read_completely(lines, tmp_path):
    run = write(tmp_path, lines)
    records, skipped = read_journal(run / FILE_NAME)
    assert (len(records), skipped) == (len(lines), 0)
    empty = interval_record(0, [], excluded=3, display_limit=0.001)
    (run / FILE_NAME).write_text(empty.model_dump_json() + "\n")
    assert read_journal(run / FILE_NAME)[1] == 0


# --- random damage ----------------------------------------------------------------------------------------------------


def _mutate(value: Any, dice: random.Random) -> Any:
    """Returns the value with one part replaced by an unexpected one or deleted."""
    if dice.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return dice.choice(UNEXPECTED)
    keys = range(len(value)) if isinstance(value, list) else list(value)
    changed: Any = list(value) if isinstance(value, list) else dict(value)
    key = dice.choice(keys)
    if dice.random() < 0.1:
        del changed[key]
    else:
        changed[key] = _mutate(changed[key], dice)
    return changed


def _damage(data: bytes, dice: random.Random) -> bytes:
    """Returns the data with some bytes changed, removed or doubled."""
    for _ in range(dice.randrange(3)):
        at, length = dice.randrange(len(data)), dice.randrange(1, 40)
        piece = dice.choice(
            [b"", dice.randbytes(length), b"\0" * length, data[at : at + length] * 2, b"\n", b"9" * 40, b"[" * 999]
        )
        data = data[:at] + piece + data[at + length :]
    return data


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_a_command_survives_any_journal(lines, tmp_path_factory, seed):
    dice = random.Random(seed)
    hostile = [_mutate(record, dice) if dice.random() < 0.3 else record for record in lines]
    dice.shuffle(hostile) if dice.random() < 0.2 else None
    run = write(tmp_path_factory.mktemp("fuzz"), [_damage(b"".join(map(_json, hostile)), dice)])
    outside = files_in(run.parents[1]) - files_in(run)
    os.chdir(run)
    for command in (["report", "."], ["replay", ".", "--backend", "tensorboard"]):
        assert main(command) in (0, 2)
    assert files_in(run.parents[1]) - files_in(run) == outside
