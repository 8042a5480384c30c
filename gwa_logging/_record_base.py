"""The base classes of all records, and the numbers in them."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo

from gwa_logging.histogram import MAX_COUNT

_LARGEST = 1e30
"""Larger numbers in a journal are rejected: no statistic of scores comes near this."""


def _number(value: object, info: ValidationInfo) -> object:
    if value is None:
        return math.nan
    if info.mode == "json" and isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise ValueError(f"expected a number within +-{_LARGEST:g}")
    return value


Number = Annotated[
    float,
    BeforeValidator(_number),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
"""A float that may be undefined: null in JSON, NaN in Python."""
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
"""A number or an index of steps, epochs or samples."""

Index = Annotated[int, Field(gt=-MAX_COUNT, lt=MAX_COUNT)]
"""A sample id or a class index; negative ones mark what is to be ignored."""


class Record(BaseModel):
    """Base class of everything in the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TimedRecord(Record):
    """A record with the time at which it was written to the journal: seconds since 1970 (UTC), or 0 if it was not yet."""

    time: float = Field(default=0.0, ge=0, lt=1e11)
