"""The types of the values in a monitor's state, which checkpoints may have turned into arrays or text."""

import operator
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gwa_logging.settings import shortened


def whole(value: Any) -> int:
    """An integer of Python or NumPy, or an array with one element: some checkpoints convert numbers to arrays."""
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"expected an integer, found {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected an integer, found {shortened(value)}") from None


def real(value: Any) -> float:
    """A number, or the text that a checkpoint has for one that is not finite."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, bool | np.bool_ | str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"expected a number, found {shortened(value)}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number, found {shortened(value)}") from None


def _flag(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.dtype(bool):
        return bool(value)
    raise ValueError(f"expected True or False, found {shortened(value)}")


def _array(value: Any, kinds: str) -> npt.NDArray[Any]:
    """A one-dimensional array of finite numbers of the given kinds, from an array of any framework on any device."""
    try:
        on_host = value.detach().cpu() if hasattr(value, "detach") and hasattr(value, "cpu") else value
        array = np.asarray(on_host)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not an array
        raise ValueError(f"expected an array of numbers ({error})") from None
    if array.ndim != 1 or (array.dtype.kind not in kinds and array.size):
        raise ValueError(f"expected a one-dimensional array of numbers, found {array.dtype} of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers, found {int((~np.isfinite(array)).sum())} that are not")
    return array


LARGEST = 2**53
"""Float64, in which processes exchange counts, holds every integer up to this one."""

Count = Annotated[int, BeforeValidator(whole), Field(ge=0, le=LARGEST)]
Positive = Annotated[int, BeforeValidator(whole), Field(ge=1, le=LARGEST)]
EpochOrNone = Annotated[int, BeforeValidator(whole), Field(ge=-1, le=LARGEST)]
Real = Annotated[float, BeforeValidator(real)]
Finite = Annotated[float, BeforeValidator(real), Field(allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Floats = Annotated[Any, BeforeValidator(lambda value: _array(value, "f").astype(np.float32))]
FloatsOrNone = Annotated[
    Any, BeforeValidator(lambda value: None if value is None else _array(value, "f").astype(np.float32))
]
Integers = Annotated[
    Any, BeforeValidator(lambda value: None if value is None else _array(value, "iuf").astype(np.int32))
]

EXPECTED = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a dictionary",
    "model_type": "a dictionary",
    "enum": "one of {expected}",
}
"""What a field should be, by pydantic's type of the error."""


class StatePart(BaseModel):
    """Base class of the parts of a state. Nothing is converted silently."""

    model_config = ConfigDict(strict=True, extra="forbid")
