"""Adds the sample ids to a data set, for the per-sample ledger, and checks the data set that a look takes its inputs from."""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gwa_logging.dataset_streams import number_shards
from gwa_logging.errors import InvalidInputError

ID_COLUMN = "sample_id"
"""Name of the ids in items that are dicts, and in a `datasets.Dataset`."""

_WRAPPERS = 8  # data sets inside one another that are looked into


def with_ids(dataset: Any) -> Any:
    """Wraps a data set so that each item includes its sample id: its index in this data set.

    >>> with_ids([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)

    A `DataLoader` over it yields `x, y, ids` instead of `x, y`, with any sampler, number of workers and batch size. Wrap
    before `Subset` or `random_split` to keep the ids of the whole data set; if you wrap after it, ids count within the subset.

    Args:
        dataset: an object with `__getitem__`, for indices from 0, and `__len__`. The id is appended to items that are tuples
            or lists and added to dicts as "sample_id"; any other item becomes a pair of the item and the id. Or one of these:

            - A `datasets.Dataset` gets a column "sample_id", which `map`, `filter` and `shuffle` keep.
            - A `grain.MapDataset`: wrap before `shuffle`, `repeat` and `batch`.
            - An `IterableDataset` of PyTorch, which must yield the same samples in the same order each time: the id is the
              position in the stream. Each worker of a loader reads the whole stream and keeps its share, whether or not the
              stream splits itself, so wrap the part that is cheap to read and decode afterwards.
            - A `datasets.IterableDataset`, before `shuffle` and `split_dataset_by_node`: the id is the position in its shard
              times the number of shards, plus the number of the shard. So `num_samples` is the length of the longest shard
              times the number of shards.
            - A `streaming.StreamingDataset` of MosaicML, which is changed and returned: the id is its own index of the sample.

    Returns:
        A data set of the same length, with the attributes of the wrapped one. It can be pickled if the wrapped one can. For a
        data set of `datasets`, Grain or MosaicML, one of the same kind.

    Raises:
        InvalidInputError: the ids would not be right, or it has ids already. The message has the remedy.
    """
    if _is_a(dataset, "datasets.arrow_dataset", "Dataset"):
        if ID_COLUMN in dataset.column_names:
            raise InvalidInputError(f"dataset: it has a column {ID_COLUMN!r} already; rename it, or use its ids")
        return dataset.add_column(ID_COLUMN, list(range(len(dataset))))
    if _is_a(dataset, "datasets.iterable_dataset", "IterableDataset"):
        return number_shards(dataset, ID_COLUMN)
    if _is_a(dataset, "streaming.base.dataset", "StreamingDataset"):
        return _number_by_index(dataset)
    if _is_a(dataset, "grain", "MapDataset"):
        return dataset.map_with_index(AddIndex(len(dataset)))
    if _is_a(dataset, "torch.utils.data.dataset", "IterableDataset"):
        # by name, since the core imports no framework
        stream = importlib.import_module("gwa_logging.integrations.numbered_stream").NumberedStream
        if isinstance(dataset, stream):
            raise InvalidInputError("dataset: it has ids already, from with_ids")
        return stream(dataset)
    if not has_index(dataset):
        raise InvalidInputError(
            f"dataset: expected one with __getitem__ and __len__, found {type(dataset).__name__}"
            f"{', which is a stream' if _is_stream(dataset) else ''}; have the stream yield an id with each sample, such as "
            "its line number, and pass the ids to monitor.tag(ids)"
        )
    if isinstance(dataset, WithIds | Mapping):
        raise InvalidInputError(
            f"dataset: expected one with indices from 0 and without ids, found {type(dataset).__name__}"
        )
    return WithIds(dataset)


def _is_a(dataset: Any, module: str, name: str) -> bool:
    """Returns True if a base class has this name, and is defined in this module or in a part of it."""
    return any(
        base.__name__ == name and f"{base.__module__}.".startswith(f"{module}.") for base in type(dataset).__mro__
    )


def _is_stream(dataset: Any) -> bool:
    return any(base.__name__.startswith("Iter") for base in type(dataset).__mro__)


def has_index(dataset: Any) -> bool:
    """Returns True if samples can be read by their index and counted. False for a stream, even if it has such methods."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not _is_stream(dataset)


def is_loader(dataset: Any) -> bool:
    """Returns True for a `DataLoader` of PyTorch, also one of Accelerate, which has its class only as `__class__`."""
    return any(
        base.__module__ == "torch.utils.data.dataloader" and base.__name__ == "DataLoader"
        for base in dataset.__class__.__mro__
    )


def check_training_set(dataset: Any, num_samples: int | None) -> None:
    """Checks that a look can take its inputs from a data set, or from the data set of a DataLoader.

    Args:
        dataset: the data set or the loader.
        num_samples: the size of the ledger, None without one. It must be the length of the data set, or of the one that this
            is a subset of.

    Raises:
        ValueError: it cannot. The message does not name the argument.
    """
    loader = dataset if is_loader(dataset) else None
    if loader is not None:
        if loader.batch_size is None and loader.batch_sampler is None:
            raise ValueError(
                "this DataLoader does not make batches, so its samples are unknown; pass look=<inputs> instead"
            )
        dataset = loader.dataset
    kind = type(dataset).__name__
    if isinstance(dataset, str | bytes | Mapping) or not has_index(dataset):
        raise ValueError(
            f"expected the training set, with __len__ and with __getitem__ for indices from 0, or its DataLoader, found {kind}"
            ". From a stream, collect a few hundred inputs and pass look=<inputs> instead"
        )
    try:
        sizes = [len(dataset)]
    except Exception as error:  # user code, such as a sampler or a length that is not implemented
        raise ValueError(f"the length of this {kind} cannot be read: {type(error).__name__}: {error}") from error
    if not sizes[0]:
        raise ValueError(f"this {kind} is empty")
    while num_samples not in (None, *sizes) and len(sizes) < _WRAPPERS and has_index(getattr(dataset, "dataset", None)):
        dataset = dataset.dataset
        sizes.append(len(dataset))
    if num_samples not in (None, *sizes):
        raise ValueError(
            f"it has {sizes[0]} samples, and num_samples={num_samples}: pass the training set that the ledger is about"
        )


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
        return add_id(self.dataset[position], position)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Returns several items at once. PyTorch's loaders call this instead of `__getitem__`."""
        positions = [self._position(index) for index in indices]
        get_items = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[position] for position in positions] if get_items is None else get_items(positions)
        return [add_id(item, position) for item, position in zip(items, positions, strict=True)]

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


class AddIndex:
    """Adds to an item its id, which is its index modulo the size of the data set. Can be pickled, for worker processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, index: int, item: Any) -> Any:
        return add_id(item, int(index) % self.size)


def _number_by_index(dataset: Any) -> Any:
    """Makes the iteration over a StreamingDataset add its own sample index to each item.

    The object remains the same: MosaicML's loader recognises the class, and the data set is registered in shared memory.
    """
    if "__getitem__" in vars(dataset):
        raise InvalidInputError("dataset: it has ids already, from with_ids")
    dataset.__getitem__ = partial(_get_numbered, dataset)  # its __iter__ calls this
    return dataset


def _get_numbered(dataset: Any, index: Any) -> Any:
    return add_id(type(dataset).__getitem__(dataset, index), int(index))


def add_id(item: Any, sample: int) -> Any:
    """Returns the item with its id: appended to a tuple or list, as "sample_id" in a dict, else as a pair."""
    if isinstance(item, Mapping):
        return {**item, ID_COLUMN: sample}
    if isinstance(item, list):
        return [*item, sample]
    return (*item, sample) if isinstance(item, tuple) else (item, sample)
