"""The suspects as a table, and in the formats of other tools."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from gwa_logging import InvalidInputError
from gwa_logging.exports import (
    SuspectsTable,
    add_score_column,
    label_studio_tasks,
    register_cleanlab_issue,
    spotlight_issue,
)
from tests.trackers import BATCH, BATCHES, Training

N = BATCH * BATCHES
TABLE = SuspectsTable(
    mean_score=np.array([0.2, -0.5, np.nan, 0.1]),
    times_seen=np.array([3.0, 3.0, 0.0, 2.5]),
    label=np.array([0, 2, 1, -1]),
    predicted=np.array([0, 1, -1, -1]),
)


def test_the_table_of_a_run_agrees_with_its_suspects(tmp_path: Path) -> None:
    training = Training()
    labels = torch.cat([y for _, y in training.batches])
    with training.watch(tmp_path, labels=labels) as monitor:
        for index in range(BATCHES - 1):  # the last batch is never seen
            monitor.tag(torch.arange(BATCH) + index * BATCH)
            training.step(index)
        table, suspects = monitor.suspects_table(), monitor.suspects(N)
    seen = N - BATCH
    assert len(table) == N
    assert len(suspects) == seen
    assert table.most_suspect(N).tolist() == [s.id for s in suspects]
    for s in suspects:
        row = (table.mean_score[s.id], table.times_seen[s.id], table.label[s.id], table.predicted[s.id])
        assert row == (s.mean_score, s.times_seen, s.label, s.predicted)
    assert np.isnan(table.mean_score[seen:]).all()
    assert (table.predicted[seen:] == -1).all()
    np.testing.assert_array_equal(table.label, labels.numpy())


def test_without_a_ledger_the_error_names_the_remedy(tmp_path):
    training = Training()
    with training.watch(tmp_path) as monitor:
        training.epoch(monitor)
        with pytest.raises(
            InvalidInputError, match=r"suspects_table\(\): there is no ledger: watch\(\.\.\., num_samples="
        ):
            monitor.suspects_table()


def test_the_csv_has_every_sample_and_leaves_unknown_values_empty(tmp_path):
    TABLE.write_csv(tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "mean_score", "times_seen", "label", "predicted"],
        ["0", "0.2", "3.0", "0", "0"],
        ["1", "-0.5", "3.0", "2", "1"],
        ["2", "", "0.0", "1", ""],
        ["3", "0.1", "2.5", "", ""],
    ]


def test_the_columns_of_documents_are_there_only_if_there_are_documents(tmp_path):
    table = replace(
        TABLE,
        tokens=np.array([3, 70, 0, 0]),
        negative_share=np.array([0.0, 0.5, np.nan, np.nan]),
        lowest_tenth=np.array([0.25, -0.5, np.nan, np.nan]),
    )
    table.write_csv(tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[5:] == ["tokens", "negative_share", "lowest_tenth"]
    assert [row[5:] for row in rows] == [["3", "0.0", "0.25"], ["70", "0.5", "-0.5"], [""] * 3, [""] * 3]
    pytest.importorskip("pandas")
    assert list(table.to_pandas().columns) == head


def test_the_table_of_a_run_with_documents_has_their_details(tmp_path):
    training = Training()
    with training.watch(tmp_path, num_samples=6) as monitor:
        monitor.update(torch.tensor([[-0.5, 0.25, -0.5], [0.25, -0.75, torch.nan]]), torch.tensor([4, 2]))
        table, suspects = monitor.suspects_table(), monitor.suspects(2)
    assert table.tokens.tolist() == [0, 0, 2, 0, 3, 0]
    assert (table.predicted == -1).all()
    for s in suspects:
        row = (table.tokens[s.id], table.negative_share[s.id], table.lowest_tenth[s.id])
        assert row == (s.tokens, s.negative_share, s.lowest_tenth)
    assert np.isnan(table.lowest_tenth[[0, 1, 3, 5]]).all()


def test_the_most_suspect_come_first_and_samples_never_seen_are_left_out():
    assert TABLE.most_suspect(2).tolist() == [1, 3]
    assert TABLE.most_suspect(100).tolist() == [1, 3, 0]
    with pytest.raises(InvalidInputError, match="k=0"):
        TABLE.most_suspect(0)


def test_pandas_gets_one_row_for_each_sample():
    pytest.importorskip("pandas")
    frame = TABLE.to_pandas()
    assert list(frame.columns) == ["id", "mean_score", "times_seen", "label", "predicted"]
    assert frame.sort_values("mean_score")["id"].tolist() == [1, 3, 0, 2]


def test_a_hugging_face_data_set_gets_the_scores_as_a_column():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": list("abcd")})
    np.testing.assert_array_equal(add_score_column(dataset, TABLE)["gwa_score"], TABLE.mean_score)
    with pytest.raises(InvalidInputError, match="has 3 rows, but the ledger has 4 samples"):
        add_score_column(dataset.select(range(3)), TABLE)


@pytest.mark.slow
def test_datalab_lists_the_samples_below_the_threshold():
    cleanlab = pytest.importorskip("cleanlab")
    register_cleanlab_issue()
    lab = cleanlab.Datalab({"label": [0, 1, 0, 1]}, label_name="label", verbosity=0)
    quality = (TABLE.mean_score + 1) / 2
    lab.find_issues(issue_types={"gwa": {"label_quality": quality, "threshold": 0.45}})
    issues = lab.get_issues("gwa")
    assert issues["is_gwa_issue"].tolist() == [False, True, False, False]
    assert issues["gwa_score"].tolist() == [0.6, 0.25, 1.0, 0.55]


def test_label_studio_tasks_have_the_documented_form():
    tasks = label_studio_tasks(TABLE, ["a.png", "b.png", "c.png", "d.png"], ["cat", "dog", "owl"], k=2)
    assert json.loads(json.dumps(tasks)) == [
        {
            "data": {"image": "b.png", "id": 1, "label": "owl"},
            "predictions": [
                {
                    "model_version": "gwa",
                    "score": -0.5,
                    "result": [
                        {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["dog"]}}
                    ],
                }
            ],
        },
        {"data": {"image": "d.png", "id": 3}, "predictions": [{"model_version": "gwa", "score": 0.1, "result": []}]},
    ]


def test_label_studio_needs_an_image_for_each_sample_and_a_name_for_each_class():
    with pytest.raises(InvalidInputError, match="images: expected 4"):
        label_studio_tasks(TABLE, ["a.png"], ["cat", "dog", "owl"])
    with pytest.raises(InvalidInputError, match="classes: expected at least 3 names, found 2"):
        label_studio_tasks(TABLE, ["a", "b", "c", "d"], ["cat", "dog"])


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class DataIssue:
    """The fields of the issues of Spotlight 1.8, which cannot be installed beside pandas 3."""

    title: str
    rows: list[int]
    severity: Literal["low", "medium", "high"] = "medium"
    columns: list[str] | None = None
    description: str = ""


@pytest.fixture
def spotlight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `renumics.spotlight.analysis` importable, with its documented DataIssue."""
    for name in ("renumics", "renumics.spotlight", "renumics.spotlight.analysis"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["renumics.spotlight.analysis"], "DataIssue", DataIssue, raising=False)


@pytest.mark.usefixtures("spotlight")
def test_spotlight_lists_the_most_suspect_samples_by_row():
    issue = spotlight_issue(TABLE, k=2, columns=["label"])
    assert (issue.rows, issue.columns, issue.severity) == ([1, 3], ["label"], "medium")
    assert "For 1 of them the predicted class differs from the label" in issue.description
    assert spotlight_issue(TABLE).rows == [1, 3, 0]
    assert spotlight_issue(TABLE).columns is None
    with pytest.raises(InvalidInputError, match="k=0"):
        spotlight_issue(TABLE, k=0)


def test_without_spotlight_the_error_has_the_pip_line():
    with pytest.raises(InvalidInputError, match="pip install renumics-spotlight"):
        spotlight_issue(TABLE)


EXPORTS: dict[str, Any] = {
    "datasets": lambda table: add_score_column([], table),
    "Label Studio": lambda table: label_studio_tasks(table, [], []),
    "Spotlight": spotlight_issue,
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())
@pytest.mark.parametrize("wrong", [None, [], {"mean_score": [0.1]}], ids=["None", "a list of suspects", "a dict"])
def test_what_is_no_table_is_an_error_that_names_the_call(export, wrong):
    with pytest.raises(InvalidInputError, match=r"table: expected monitor\.suspects_table\(\), found "):
        export(wrong)
