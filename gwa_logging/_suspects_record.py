"""The part of `records` that describes suspects."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from gwa_logging._record_base import Count, Index, Number, Record, TimedRecord
from gwa_logging.histogram import MAX_COUNT
from gwa_logging.thumbnail import is_thumbnail


class Suspect(Record):
    """A training sample that is probably mislabelled.

    Attributes:
        id: the sample's id.
        mean_score: the sample's mean score, until the stop alert if one stands, dimensionless; the lower, the more suspect.
            In PyTorch the tokens of a document are weighted by the norms of their gradients.
        times_seen: how often the sample was scored; the sum of its shares if samples are mixed (mixup).
        label, predicted: class index from `watch(labels=)`, and class with the largest logit when the sample was last seen (by
            the highest rank); None if unknown.
        thumbnail: a PNG in base64, at most 64 pixels wide and high, or None.
        tokens: of a document, the number of rows (tokens) with a score when it was last seen; 65,535 means at least as many.
        negative_share: share of these with a negative score, in [0, 1], accurate to 0.005.
        lowest_tenth: a tenth of these have this score or a lower one, accurate to 4 %.

    The last three are None if each sample is one row.
    """

    id: Index
    mean_score: Number
    times_seen: float = Field(ge=0, lt=MAX_COUNT)
    label: Index | None = None
    predicted: Index | None = None
    thumbnail: str | None = None
    tokens: Count | None = None
    negative_share: float | None = Field(default=None, ge=0, le=1)
    lowest_tenth: float | None = Field(default=None, ge=-1, le=1)

    @field_validator("thumbnail")
    @classmethod
    def _is_a_picture(cls, value: str | None) -> str | None:
        if value is not None and not is_thumbnail(value):
            raise ValueError("expected a PNG of at most 64 x 64 pixels, in base64")
        return value


class SuspectsRecord(TimedRecord):
    """The most suspect samples at one point of the run.

    Attributes:
        step: index of the last training step before that point.
        epoch: the epoch in progress, or the one that has just ended.
        samples: number of samples that have been scored.
        suspects: the suspects, most suspect first.
        until_epoch: the epoch of the stop alert, if the scores after it do not count; None if all scores count.
    """

    kind: Literal["suspects"] = "suspects"
    step: int = Field(ge=-1, lt=MAX_COUNT)
    epoch: Count
    samples: Count
    suspects: tuple[Suspect, ...]
    until_epoch: Count | None = None

    COLUMNS: ClassVar = ("id", "mean_score", "times_seen", "label", "predicted")
    DOCUMENT_COLUMNS: ClassVar = ("tokens", "negative_share", "lowest_tenth")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the table's columns.

        `COLUMNS`; `DOCUMENT_COLUMNS` if any suspect is a document; "until_epoch" if only the scores up to an alert count.
        """
        has_documents = any(suspect.tokens is not None for suspect in self.suspects)
        documents = self.DOCUMENT_COLUMNS if has_documents else ()
        return (*self.COLUMNS, *documents, *(() if self.until_epoch is None else ("until_epoch",)))

    def rows(self) -> list[list[float | int | None]]:
        """The table of suspects, one row each with the values of `columns`; numbers of times seen as int if they are whole."""
        further = [name for name in self.columns[3:] if name != "until_epoch"]
        until = [] if self.until_epoch is None else [self.until_epoch]
        return [
            [
                s.id,
                s.mean_score,
                int(s.times_seen) if s.times_seen.is_integer() else s.times_seen,
                *(getattr(s, name) for name in further),
                *until,
            ]
            for s in self.suspects
        ]

    def csv(self) -> str:
        """The table as CSV with a header line; unknown values are empty."""
        lines = [",".join("" if value is None else str(value) for value in row) for row in self.rows()]
        return "\n".join([",".join(self.columns), *lines, ""])
