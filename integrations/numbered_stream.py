"""NumberedStream: an IterableDataset whose items have their sample id."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from gwa_logging.dataset import add_id
from gwa_logging.dataset_streams import read_whole
from gwa_logging.faults import logger


class NumberedStream(IterableDataset[Any]):
    """What `with_ids` returns for an IterableDataset. The id of an item is its position in the stream.

    Of n workers, each reads the whole stream and yields every n-th item, so that each item is yielded once with the same id for
    any number of workers.

    Attributes:
        dataset: the wrapped data set.
    """

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        self._is_warned = False

    def __iter__(self) -> Iterator[Any]:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "gwa_logging: with_ids: the ids of a %s are positions in the stream of each process. If it yields another "
                "share in each of the %s processes, their ids are wrong: have it yield ids, and pass them to monitor.tag(ids)",
                *(type(self.dataset).__name__, os.environ["WORLD_SIZE"]),
            )
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position, item in enumerate(read_whole(self.dataset)):
            if position % step == first:
                yield add_id(item, position)

    def __len__(self) -> int:
        """The length of the stream.

        Raises:
            TypeError: it has none.
        """
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # A state of the wrapped stream does not include the position, so that stateful loaders read from the start instead.
        if name in ("dataset", "_is_warned", "state_dict", "load_state_dict") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
