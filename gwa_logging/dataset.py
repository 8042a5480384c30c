"""A data set whose items say which sample they are: for the per-sample ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

from gwa_logging.errors import InvalidInputError


def with_ids(dataset: Any) -> "WithIds":
    """Wraps a data set so that each item comes with its sample id, its index in this data set.

    >>> with_ids([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)

    A `DataLoader` over it then gives `x, y, ids` in place of `x, y`, whatever its sampler, workers and batches. Wrap before
    `Subset` or `random_split` to keep the ids of the whole data set; wrapped after, ids count within the subset.

    Args:
        dataset: what has `__getitem__` and `__len__`, by index from 0. Items that are tuples or lists gain the id at the end,
            dicts gain "sample_id"; any other item becomes a pair of it and the id.

    Returns:
        A data set of the same length, with the other attributes of the wrapped one; it can be pickled if that one can.

    Raises:
        InvalidInputError: the data set is iterable only, so that its samples have no index.
    """
    streams = [base.__name__ for base in type(dataset).__mro__ if base.__name__.startswith("Iter")]
    if streams or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InvalidInputError(
            f"dataset: expected one with __getitem__ and __len__, found {type(dataset).__name__}"
            f"{', which is a stream' if streams else ''}; let the stream yield an id of its own with each sample, such as the "
            "line of its file, and give that to monitor.tag(ids)"
        )
    if isinstance(dataset, WithIds | Mapping):
        raise InvalidInputError(
            f"dataset: expected one by index from 0 and without ids, found {type(dataset).__name__}"
        )
    return WithIds(dataset)


class WithIds:
    """What `with_ids` returns.

    Attributes:
        dataset: the wrapped one.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        position = self._position(index)
        return _with_id(self.dataset[position], position)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Several items at once, as PyTorch's loaders ask for them where the wrapped data set can do so."""
        positions = [self._position(index) for index in indices]
        ask = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[position] for position in positions] if ask is None else ask(positions)
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
        if name == "dataset" or (name.startswith("__") and name.endswith("__")):  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _with_id(item: Any, sample: int) -> Any:
    if isinstance(item, Mapping):
        return {**item, "sample_id": sample}
    if isinstance(item, list):
        return [*item, sample]
    return (*item, sample) if isinstance(item, tuple) else (item, sample)
