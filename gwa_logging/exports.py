"""The suspects in the formats of other tools: CSV, pandas, Hugging Face datasets, cleanlab, Label Studio and Spotlight.

table = monitor.suspects_table()
table.write_csv("samples.csv")
dataset = exports.add_score_column(dataset, table)
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.ledger import UNKNOWN, check_number, lowest
from gwa_logging.records import SuspectsRecord

COLUMNS = SuspectsRecord.COLUMNS


@dataclass(frozen=True)
class SuspectsTable:
    """All samples of the ledger; row i is the sample with id i.

    Attributes:
        mean_score: float64 [num_samples], the lower, the more suspect; NaN for samples never seen.
        times_seen: float64 [num_samples].
        label, predicted: int64 [num_samples]; -1 where unknown.
        tokens: int64 [num_samples], of documents the number of rows with a score when last seen; 0 where unknown.
        negative_share, lowest_tenth: float64 [num_samples], see `gwa_logging.Suspect`; NaN where unknown.

    The last three are None if each sample is one row.
    """

    mean_score: npt.NDArray[np.float64]
    times_seen: npt.NDArray[np.float64]
    label: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64] | None = None
    negative_share: npt.NDArray[np.float64] | None = None
    lowest_tenth: npt.NDArray[np.float64] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, those of documents only if there are any."""
        return COLUMNS if self.tokens is None else (*COLUMNS, *SuspectsRecord.DOCUMENT_COLUMNS)

    def __len__(self) -> int:
        return len(self.mean_score)

    @property
    def id(self) -> npt.NDArray[np.int64]:
        """int64 [num_samples]: 0, 1, 2, ..."""
        return np.arange(len(self))

    def most_suspect(self, k: int) -> npt.NDArray[np.intp]:
        """Returns the ids of the k lowest mean scores, lowest first; samples never seen are left out.

        Raises:
            InvalidInputError: k is less than 1.
        """
        check_number(k)
        return lowest(self.mean_score, k)

    def write_csv(self, path: str | Path) -> None:
        """Writes all samples with a header line, in the order of their ids; unknown values are empty."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            columns = (getattr(self, name).tolist() for name in self.columns)
            for sample, score, seen, label, predicted, *details in zip(*columns, strict=True):
                classes = ("" if c == UNKNOWN else c for c in (label, predicted))
                if details and not details[0]:
                    details = [""] * len(details)
                writer.writerow([sample, score if seen else "", seen, *classes, *details])

    def to_pandas(self) -> Any:
        """Returns a pandas.DataFrame with the columns id, mean_score, times_seen, label and predicted, and those of documents.

        Raises:
            InvalidInputError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            if error.name != "pandas":
                raise
            raise InvalidInputError(
                "to_pandas(): pandas is not installed. Install it with: pip install pandas"
            ) from error
        return DataFrame({name: getattr(self, name) for name in self.columns})


def add_score_column(dataset: Any, table: SuspectsTable, name: str = "gwa_score") -> Any:
    """Returns a Hugging Face data set with the mean scores as a column; row i gets the score of the sample with id i.

    Raises:
        InvalidInputError: the data set does not have one row for each sample, or `table` is not a SuspectsTable.
    """
    _check_table(table)
    if len(dataset) != len(table):
        raise InvalidInputError(
            f"dataset: has {len(dataset)} rows, but the ledger has {len(table)} samples; pass the data set whose row numbers "
            "were the ids"
        )
    return dataset.add_column(name, table.mean_score)


def register_cleanlab_issue() -> type:
    """Registers the issue type "gwa" with cleanlab's Datalab, and returns its class.

    Then `lab.find_issues(issue_types={"gwa": {"label_quality": monitor.label_quality(), "threshold": 0.45}})`. Samples
    never seen are no issue, and have a score of 1.

    Raises:
        MissingDependencyError: cleanlab is not installed.
    """
    try:
        from cleanlab import IssueManager
        from cleanlab.datalab.internal.issue_manager_factory import register
        from pandas import DataFrame
    except ModuleNotFoundError as error:
        if error.name not in ("cleanlab", "pandas"):
            raise
        raise MissingDependencyError("cleanlab", "cleanlab") from error

    class GwaIssueManager(IssueManager):  # type: ignore[misc]
        """Samples whose gradient opposes the head."""

        description = (
            "Samples whose gradient at the classifier head keeps opposing the head's weights: probably mislabelled."
        )
        issue_name = "gwa"
        verbosity_levels: dict[int, list[str]] = {level: [] for level in range(5)}  # noqa: RUF012 - read by cleanlab

        def find_issues(self, label_quality: Any = None, threshold: float = 0.5, **_: Any) -> None:
            quality = np.asarray(label_quality, dtype=np.float64)
            samples = len(self.datalab.data)
            if quality.shape != (samples,):
                raise InvalidInputError(
                    f"label_quality: expected {samples} numbers, one for each sample, found shape {quality.shape}"
                )
            quality = np.where(np.isnan(quality), 1.0, quality)
            self.issues = DataFrame({f"is_{self.issue_name}_issue": quality < threshold, self.issue_score_key: quality})
            self.summary = self.make_summary(score=float(quality.mean()))

    return register(GwaIssueManager)  # type: ignore[no-any-return]


def label_studio_tasks(
    table: SuspectsTable, images: Sequence[str], classes: Sequence[str], k: int = 100
) -> list[dict[str, Any]]:
    """Returns the k most suspect samples as tasks for Label Studio; write them with `json.dump` and import the file.

    Each task shows an image. Its prediction is the model's class, and its prediction score the sample's mean score, so that
    sorting by it puts the most suspect first. The labelling configuration needs `<Image name="image" value="$image"/>` and
    `<Choices name="label" toName="image">`.

    Args:
        table: from `monitor.suspects_table()`.
        images: the URL or path of each sample's image, by id.
        classes: the names of the classes, by index.
        k: number of tasks.

    Raises:
        InvalidInputError: the number of images is not the number of samples, a class has no name, or `table` is not a
            SuspectsTable.
    """
    _check_table(table)
    if len(images) != len(table):
        raise InvalidInputError(f"images: expected {len(table)}, one for each sample, found {len(images)}")
    largest = max(int(table.label.max(initial=0)), int(table.predicted.max(initial=0)))
    if largest >= len(classes):
        raise InvalidInputError(f"classes: expected at least {largest + 1} names, found {len(classes)}")
    return [_task(table, int(sample), images, classes) for sample in table.most_suspect(k)]


def _task(table: SuspectsTable, sample: int, images: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    label, predicted = int(table.label[sample]), int(table.predicted[sample])
    data: dict[str, Any] = {"image": images[sample], "id": sample}
    if label != UNKNOWN:
        data["label"] = classes[label]
    prediction: dict[str, Any] = {"model_version": "gwa", "score": float(table.mean_score[sample]), "result": []}
    if predicted != UNKNOWN:
        choice = {"from_name": "label", "to_name": "image", "type": "choices"}
        prediction["result"] = [{**choice, "value": {"choices": [classes[predicted]]}}]
    return {"data": data, "predictions": [prediction]}


def spotlight_issue(table: SuspectsTable, k: int = 100, columns: Sequence[str] = ()) -> Any:
    """Returns the k most suspect samples as an issue for Renumics Spotlight, which lists and selects them.

    Show it with `spotlight.show(frame, issues=[issue])`; row i of the frame must be the sample with id i, as in
    `table.to_pandas()`. Samples never seen are left out.

    Args:
        table: from `monitor.suspects_table()`.
        k: number of samples.
        columns: names of the frame's columns that the issue is about, such as that of the labels.

    Returns:
        A renumics.spotlight.analysis.DataIssue.

    Raises:
        InvalidInputError: Spotlight is not installed, k is less than 1, or `table` is not a SuspectsTable.
    """
    _check_table(table)
    try:
        from renumics.spotlight.analysis import DataIssue
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "renumics":
            raise
        raise InvalidInputError(
            "spotlight_issue(): Spotlight is not installed. Install it with: pip install renumics-spotlight "
            "(version 1.8 needs pandas 2)"
        ) from error
    rows = table.most_suspect(k)
    label, predicted = table.label[rows], table.predicted[rows]
    differ = int(((label != predicted) & (label != UNKNOWN) & (predicted != UNKNOWN)).sum())
    return DataIssue(
        title="Labels that are probably wrong (GWA)",
        rows=rows.tolist(),
        severity="medium",
        columns=list(columns) or None,
        description=(
            f"The {len(rows)} samples with the lowest mean alignment score: their gradient at the classifier head keeps "
            f"opposing the head's weights. For {differ} of them the predicted class differs from the label. "
            "A correctly labelled sample that is hard or rare has a low score too."
        ),
    )


def _check_table(table: Any) -> None:
    if not isinstance(table, SuspectsTable):
        raise InvalidInputError(f"table: expected monitor.suspects_table(), found {type(table).__name__}")
