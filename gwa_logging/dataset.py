"""Adds the sample ids to a data set, for the per-sample ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

from gwa_logging.errors import InvalidInputError

ID_COLUMN = "sample_id"
"""Name of the ids in items that are dicts, and in a `datasets.Dataset`."""


def with_ids(dataset: Any) -> Any:
    """Wraps a data set so that each item includes its sample id: its index in this data set.

    >>> with_ids([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)

    A `DataLoader` over it yields `x, y, ids` instead of `x, y`, with any sampler, number of workers and batch size. Wrap
    before `Subset` or `random_split` to keep the ids of the whole data set; if you wrap after it, ids count within the subset.

    Args:
        dataset: an object with `__getitem__`, for indices from 0, and `__len__`. The id is appended to items that are tuples
            or lists and added to dicts as "sample_id"; any other item becomes a pair of the item and the id. A
            `datasets.Dataset` gets a column "sample_id", which `map`, `filter` and `shuffle` keep.

    Returns:
        A data set of the same length, with the attributes of the wrapped one. It can be pickled if the wrapped one can. A
        `datasets.Dataset` for one.

    Raises:
        InvalidInputError: the data set has no index, since it can only be iterated over, or it has ids already.
    """
    if any(
        base.__module__ == "datasets.arrow_dataset" and base.__name__ == "Dataset" for base in type(dataset).__mro__
    ):
        if ID_COLUMN in dataset.column_names:
            raise InvalidInputError(f"dataset: it has a column {ID_COLUMN!r} already; rename it, or use its ids")
        return dataset.add_column(ID_COLUMN, list(range(len(dataset))))
    streams = [base.__name__ for base in type(dataset).__mro__ if base.__name__.startswith("Iter")]
    if streams or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InvalidInputError(
            f"dataset: expected one with __getitem__ and __len__, found {type(dataset).__name__}"
            f"{', which is a stream' if streams else ''}; have the stream yield an id with each sample, such as its line "
            "number, and pass the ids to monitor.tag(ids)"
        )
    if isinstance(dataset, WithIds | Mapping):
        raise InvalidInputError(
            f"dataset: expected one with indices from 0 and without ids, found {type(dataset).__name__}"
        )
    return WithIds(dataset)


class WithIds:
    """The data set that `with_ids` returns.

    Attributes:
        dataset: the wrapped data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        position = self._position(index)
        return _with_id(self.dataset[position], position)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Returns several items at once. PyTorch's loaders call this instead of `__getitem__`."""
        positions = [self._position(index) for index in indices]
        get_items = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[position] for position in positions] if get_items is None else get_items(positions)
        return [_with_id(item, position) for item, position in zip(items, positions, strict=True)]

    def _position(self, index: Any) -> int:
        try:
            position = index.__index__()
        except AttributeError:
            raise InvalidInputError(f"index: expected a whole number, found {type(index).__name__}") from None
        size = len(self.dataset)
        if not -size <= position < size:
            raise IndexError(f"index {position} is out of range for {size} samples")
        return int(position % size)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or (
            name.startswith("__") and name.endswith("__")
        ):  # while unpickling, before `dataset` is set
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _with_id(item: Any, sample: int) -> Any:
    if isinstance(item, Mapping):
        return {**item, ID_COLUMN: sample}
    if isinstance(item, list):
        return [*item, sample]
    return (*item, sample) if isinstance(item, tuple) else (item, sample)
