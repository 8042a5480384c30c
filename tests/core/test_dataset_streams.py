"""with_ids for streams: each sample comes once, with the same id in every epoch and for any number of workers."""

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gwa_logging import InvalidInputError, with_ids

SIZE = 11


class Stream(IterableDataset):
    """Squares, the same in every worker."""

    name = "squares"

    def __iter__(self):
        return ((i**2, i % 2) for i in range(SIZE))


class SplitStream(Stream):
    """Squares, split over the workers, as PyTorch's documentation recommends."""

    def __iter__(self):
        for index, item in enumerate(super().__iter__()):
            worker = get_worker_info()  # again for each item
            if worker is None or index % worker.num_workers == worker.id:
                yield item

    def __len__(self) -> int:
        return SIZE


class Chained(IterableDataset):
    """What users put around a stream with ids: it runs in the same worker, and knows which one that is."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self):
        for x, y, sample in self.inner:
            worker = get_worker_info()
            yield x, y, sample, -1 if worker is None else worker.id


@pytest.mark.parametrize(
    "workers", [0, *(pytest.param(count, marks=pytest.mark.slow if count != 2 else ()) for count in (1, 2, 3))]
)
@pytest.mark.parametrize("kind", [Stream, SplitStream])
def test_each_item_comes_once_with_its_position_for_any_number_of_workers(kind, workers):
    batches = list(DataLoader(Chained(with_ids(kind())), batch_size=4, num_workers=workers))
    x, y, ids, worker = (torch.cat(column) for column in zip(*batches, strict=True))
    assert sorted(ids.tolist()) == list(range(SIZE))
    assert torch.equal(x, ids**2)
    assert torch.equal(y, ids % 2)
    assert torch.equal(worker, ids % workers if workers else torch.full((SIZE,), -1))


@pytest.mark.slow
def test_spawned_and_persistent_workers_yield_the_same_ids_in_each_epoch():
    loader = DataLoader(
        with_ids(SplitStream()),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    epochs = [[tuple(map(int, item)) for item in loader] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert sorted(item[2] for item in epochs[0]) == list(range(SIZE))


def test_length_and_attributes_are_those_of_the_stream_except_its_state():
    stream = Stream()
    stream.state_dict = dict
    assert with_ids(stream).name == "squares"
    assert not hasattr(with_ids(stream), "state_dict")
    assert len(with_ids(SplitStream())) == SIZE
    with pytest.raises(TypeError):
        len(with_ids(stream))
    with pytest.raises(InvalidInputError, match="it has ids already"):
        with_ids(with_ids(stream))


def test_several_processes_are_warned_about_once(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stream = with_ids(Stream())
    assert list(stream) == list(stream)
    (record,) = caplog.records
    assert "positions in the stream of each process" in record.getMessage()


# --- datasets ---------------------------------------------------------------------------------------------------------


def read(lengths: list[int], shards: list[int]):
    for shard in shards:
        for position in range(lengths[shard]):
            yield {"x": 100 * shard + position}


def stream_of_shards(lengths: tuple[int, ...]) -> Any:
    datasets = pytest.importorskip("datasets")
    arguments = {"lengths": lengths, "shards": list(range(len(lengths)))}
    return datasets.IterableDataset.from_generator(read, gen_kwargs=arguments)


def pairs(rows: Any) -> set[tuple[int, int]]:
    found = [(int(row["x"]), int(row["sample_id"])) for row in rows]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Too many dataloader workers")
def test_the_ids_of_a_datasets_stream_depend_neither_on_workers_nor_on_later_shuffling():
    lengths = (3, 5, 1, 4)
    stream = with_ids(stream_of_shards(lengths))
    expected = {(100 * s + p, p * 4 + s) for s, length in enumerate(lengths) for p in range(length)}
    assert pairs(stream) == expected
    assert stream.num_shards == 4
    later = stream.shuffle(seed=0, buffer_size=5).map(lambda row: {"y": row["x"] + 1})
    for workers, epoch in itertools.product((0, 2, 6), (0, 1)):
        later.set_epoch(epoch)
        assert pairs(DataLoader(later, batch_size=None, num_workers=workers)) == expected
    from datasets.distributed import split_dataset_by_node

    shares = [pairs(split_dataset_by_node(stream, rank, 2)) for rank in (0, 1)]
    assert shares[0] | shares[1] == expected
    assert not shares[0] & shares[1]


@pytest.mark.slow
def test_a_stream_made_of_a_table_keeps_its_columns_and_its_format():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": list(range(10))})
    stream = with_ids(table.to_iterable_dataset(num_shards=3).with_format("torch"))
    assert stream.column_names == ["x", "sample_id"]
    assert stream.features["sample_id"].dtype == "int64"
    rows = list(stream)
    assert isinstance(rows[0]["sample_id"], torch.Tensor)
    assert len({int(row["sample_id"]) for row in rows}) == 10
    with pytest.raises(InvalidInputError, match="it has a column 'sample_id' already"):
        with_ids(stream)


@pytest.mark.slow
def test_a_datasets_stream_that_is_shuffled_or_split_is_refused():
    from datasets.distributed import split_dataset_by_node

    stream = stream_of_shards((2, 2))
    with pytest.raises(InvalidInputError, match="call with_ids before shuffle"):
        with_ids(stream.shuffle(seed=0).map(dict))
    with pytest.raises(InvalidInputError, match="call with_ids before split_dataset_by_node"):
        with_ids(split_dataset_by_node(stream, 0, 2))


# --- Grain ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grain_keeps_the_ids_through_shuffling_repeating_and_batching():
    grain = pytest.importorskip("grain")
    source = [{"x": np.float32(index**2)} for index in range(SIZE)]
    pipeline = with_ids(grain.MapDataset.source(source)).shuffle(seed=1).repeat(2).batch(4)
    x = np.concatenate([batch["x"] for batch in pipeline.to_iter_dataset()])
    ids = np.concatenate([batch["sample_id"] for batch in pipeline.to_iter_dataset()])
    assert x.tolist() == (ids**2).tolist()
    assert sorted(ids.tolist()) == sorted([*range(SIZE)] * 2)
    assert with_ids(grain.MapDataset.source(source).repeat(2))[SIZE + 3]["sample_id"] == SIZE + 3
    wrapped = grain.MapDataset.source(with_ids(source))
    assert [wrapped[index]["sample_id"] for index in range(SIZE)] == list(range(SIZE))


@pytest.mark.slow
def test_a_grain_iterator_is_refused_with_a_remedy():
    grain = pytest.importorskip("grain")
    with pytest.raises(InvalidInputError, match="which is a stream; have the stream yield an id"):
        with_ids(grain.MapDataset.source([1, 2]).to_iter_dataset())


# --- MosaicML ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_streaming_data_set_yields_its_own_index(workers, tmp_path):
    from tests.trainers.torchvision_operators import define_operators

    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed")
    define_operators()
    import streaming

    with streaming.MDSWriter(out=str(tmp_path), columns={"x": "int"}, size_limit=200) as writer:
        for index in range(20):
            writer.write({"x": 100 + index})

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index)["x"], 0

    dataset = with_ids(Decoded(local=str(tmp_path), shuffle=True, batch_size=4))
    for _ in range(2):
        batches = list(streaming.StreamingDataLoader(dataset, batch_size=4, num_workers=workers))
        x, _, ids = (torch.cat(column) for column in zip(*batches, strict=True))
        assert torch.equal(x, ids + 100)
        assert sorted(ids.tolist()) == list(range(20))
    with pytest.raises(InvalidInputError, match="it has ids already"):
        with_ids(dataset)
