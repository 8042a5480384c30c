"""Sample ids for data sets that can only be iterated over, in the workers of a DataLoader too."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from gwa_logging.errors import InvalidInputError


def read_whole(stream: Iterable[Any]) -> Iterator[Any]:
    """Reads a stream as the main process would, also in a worker process, where a stream may yield only its share."""
    worker: Any = sys.modules.get("torch.utils.data._utils.worker")
    if worker is None:  # without PyTorch there are no such workers
        yield from stream
        return
    iterator = None
    while True:
        # Hidden only while the stream runs: the loader and other data sets in the same process need it.
        info, worker._worker_info = worker._worker_info, None
        try:
            iterator = iter(stream) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            worker._worker_info = info
        yield item


def number_shards(dataset: Any, column: str) -> Any:
    """Adds a column of sample ids to a `datasets.IterableDataset`, which keeps its shards.

    The workers of a loader read different shards, so an id that counts samples within a worker would not be unique. This one
    depends neither on the workers nor on the order of the shards.

    Args:
        dataset: the data set, before it is shuffled or split.
        column: name of the new column, int64: position in the shard * number of shards + number of the shard.

    Raises:
        InvalidInputError: it has the column, it is shuffled, or it is split over processes.
    """
    if dataset.column_names is not None and column in dataset.column_names:
        raise InvalidInputError(f"dataset: it has a column {column!r} already; rename it, or use its ids")
    if getattr(dataset, "_distributed", None) is not None:
        raise InvalidInputError(
            "dataset: it is split over processes, so the ids of two processes would be the same; call with_ids before "
            "split_dataset_by_node"
        )
    if _is_shuffled(dataset):
        raise InvalidInputError(
            "dataset: it is shuffled, so a sample would get another id in each epoch; call with_ids before shuffle"
        )
    import datasets

    features = dataset.features
    if features is not None:
        features = datasets.Features({**features, column: datasets.Value("int64")})
    count = dataset.num_shards
    arguments = {"dataset": dataset.with_format(None), "column": column, "count": count, "shards": list(range(count))}
    split = {} if dataset.split is None else {"split": dataset.split}
    numbered = datasets.IterableDataset.from_generator(_read_shards, features=features, gen_kwargs=arguments, **split)
    formatting = getattr(dataset, "_formatting", None)
    return numbered if formatting is None else numbered.with_format(formatting.format_type)


def _is_shuffled(dataset: Any) -> bool:
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        if "Shuffle" in type(part).__name__:
            return True
        part = getattr(part, "ex_iterable", None)
    return False


def _read_shards(dataset: Any, column: str, count: int, shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for position, row in enumerate(read_whole(dataset.shard(num_shards=count, index=shard))):
            yield {**row, column: position * count + shard}
