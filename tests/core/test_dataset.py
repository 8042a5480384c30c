"""with_ids: each item has its sample id, also in PyTorch's loaders, subsets and samplers."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from gwa_logging import InvalidInputError, with_ids


class Squares:
    """A data set that does not use PyTorch, with items of a given form."""

    classes = ("even", "odd")

    def __init__(self, form=lambda x, y: (x, y)) -> None:
        self.form = form

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index):
        return self.form(np.float32(index**2), index % 2)


class Batched(Squares):
    """A data set that returns several items at once to PyTorch's loaders."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def as_dict(x, y):
    return {"image": x, "label": y}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (lambda x, y: (x, y), (9.0, 1, 3)),
        (lambda x, y: [x, y], [9.0, 1, 3]),
        (as_dict, {"image": 9.0, "label": 1, "sample_id": 3}),
        (lambda x, y: x, (9.0, 3)),
    ],
)
def test_an_item_of_any_form_gets_its_id(form, expected):
    assert with_ids(Squares(form))[3] == expected
    assert with_ids(Squares(form))[-8] == expected
    assert with_ids(Squares(form))[np.int64(3)] == expected


@pytest.mark.parametrize("kind", [Squares, Batched])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_loader_yields_the_ids_of_the_samples_in_the_batch(kind, workers):
    loader = DataLoader(with_ids(kind(as_dict)), batch_size=4, shuffle=True, num_workers=workers)
    batches = list(loader)
    for batch in batches:
        assert torch.equal(batch["image"], batch["sample_id"].float() ** 2)
    assert sorted(torch.cat([batch["sample_id"] for batch in batches]).tolist()) == list(range(11))


def test_a_subset_keeps_the_ids_and_ids_of_a_wrapped_subset_count_within_it():
    whole = TensorDataset(torch.arange(11.0))
    chosen = [7, 2, 5]
    assert [item[-1] for item in Subset(with_ids(whole), chosen)] == chosen
    inner = with_ids(Subset(whole, chosen))
    assert [inner[i][-1] for i in range(3)] == [0, 1, 2]
    assert [float(inner[i][0]) for i in range(3)] == chosen
    assert [tuple(map(float, item)) for item in inner.__getitems__([1, 0])] == [(2, 1), (7, 0)]


def test_each_rank_gets_the_ids_of_its_share_and_the_last_share_is_padded_with_the_first_samples():
    dataset = with_ids(Squares())
    shares = [
        torch.cat(
            [ids for _, _, ids in DataLoader(dataset, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))]
        )
        for rank in (0, 1)
    ]
    assert shares[0].tolist() == [0, 2, 4, 6, 8, 10]
    assert shares[1].tolist() == [1, 3, 5, 7, 9, 0]


def test_length_and_attributes_are_those_of_the_wrapped_data_set_also_after_pickling():
    for dataset in (with_ids(Squares(as_dict)), pickle.loads(pickle.dumps(with_ids(Squares(as_dict))))):
        assert len(dataset) == 11
        assert dataset.classes == ("even", "odd")
        assert dataset[2]["sample_id"] == 2
    with pytest.raises(AttributeError, match="targets"):
        _ = dataset.targets


class IterStream:
    """A base class of another library's streams."""


class Stream(IterStream):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "found Stream, which is a stream; have the stream yield an id"),
        ((i for i in range(3)), "expected one with __getitem__ and __len__, found generator"),
        (7, "found int"),
        ({"a": 1}, "with indices from 0 and without ids, found dict"),
        (with_ids(Squares()), "without ids, found WithIds"),
    ],
)
def test_data_sets_without_an_index_are_refused_with_a_remedy(dataset, message):
    with pytest.raises(InvalidInputError, match=message):
        with_ids(dataset)


@pytest.mark.parametrize(("index", "error"), [(11, IndexError), (-12, IndexError), ("a", InvalidInputError)])
def test_an_invalid_index_is_refused(index, error):
    with pytest.raises(error, match="index"):
        with_ids(Squares())[index]
