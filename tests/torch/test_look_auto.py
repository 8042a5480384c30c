"""look="auto": which inputs are chosen from the training set, that they stay the same, and that choosing leaves no trace."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import gwa_logging
from gwa_logging import InvalidInputError, Monitor, with_ids
from gwa_logging.integrations.torch.look_inputs import INPUTS, spread
from tests.torch.test_look import Keywords, Net, Tuples, data, randomness, train

SIZE = 1200
X, Y = data(4, SIZE)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    with ExitStack() as monitors:
        yield lambda *args, **options: monitors.enter_context(gwa_logging.watch(*args, directory=tmp_path, **options))


class Rows(Dataset):
    """The samples in a given form. Notes which ones are read."""

    def __init__(self, form: Callable[[Tensor, int], Any] = lambda x, y: (x, y), size: int = SIZE) -> None:
        self.form, self.size = form, size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.form(X[index], int(Y[index]))


# --- which samples ------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 10**12), wanted=st.integers(1, 600))
def test_one_index_is_chosen_from_each_of_equal_sections(size, wanted):
    state = randomness()
    indices = spread(size, wanted)
    wanted = min(wanted, size)
    assert all(k * size // wanted <= index < (k + 1) * size // wanted for k, index in enumerate(indices))
    assert len(set(indices)) == wanted
    assert spread(size, wanted) == indices
    assert randomness() == state


def test_classes_that_alternate_are_all_chosen():
    found = np.bincount(
        np.array(spread(51_200)) % 100, minlength=100
    )  # a fixed stride of 100 would give a single class
    assert (found > 0).sum() > 90


def test_a_small_data_set_is_chosen_as_a_whole_and_a_large_one_is_not_read_further(watch):
    assert spread(7) == list(range(7))
    rows = Rows()
    watch(Net(), look="auto", dataset=rows)
    assert rows.read == []
    model = Net()
    monitor = watch(model, look="auto", dataset=rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, monitor, optimizer)
    assert rows.read == spread(SIZE)
    assert len(rows.read) == INPUTS


def test_the_consensus_equals_that_of_a_look_at_these_inputs(watch):
    found = []
    chosen = list(X[spread(SIZE)].split(64))
    for look in ({"look": chosen}, {"look": "auto", "dataset": TensorDataset(X, Y)}):
        torch.manual_seed(0)
        model = Net()
        monitor = watch(model, **look)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        found.append([train(model, monitor, optimizer).consensus for _ in range(5)])
        assert monitor.faults == {}
    assert found[0] == found[1]
    assert found[0][1] is not None


# --- what of a sample is the input --------------------------------------------------------------------------------------


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor | None = None, labels: Any = None, **more: Any) -> Any:  # type: ignore[override]
        assert labels is None
        assert not more
        return SimpleNamespace(logits=super().forward(x if scale is None else x * scale))


class Anything(Net):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def as_dict(x: Tensor, y: int) -> Any:
    return {"x": x, "scale": torch.ones(1), "labels": y, "path": "a/b"}


def collate_x(samples: list[Any]) -> Any:
    """As the collators of transformers: a dict, and other names than those in the data set."""
    return {"x": torch.stack([sample[0] for sample in samples]), "labels": torch.tensor([s[1] for s in samples])}


FORMS: dict[str, tuple[type[nn.Module], Callable[[], Any], list[int], set[str]]] = {
    # model, data set, batch sizes, names of keywords
    "tensors": (Net, lambda: X, [64] * 8, set()),
    "arrays": (Net, lambda: X.numpy(), [64] * 8, set()),
    "a list of pairs": (Net, lambda: [*zip(X, Y.tolist(), strict=True)], [64] * 8, set()),
    "lists": (Net, lambda: Rows(lambda x, y: [x, y]), [64] * 8, set()),
    "pairs with ids": (Net, lambda: with_ids(Rows()), [64] * 8, set()),
    "tensors with ids": (Net, lambda: with_ids(Rows(lambda x, y: x)), [64] * 8, set()),
    "arguments that forward requires": (
        Tuples,
        lambda: Rows(lambda x, y: (x, torch.ones(1), y)),
        [64] * 8,
        set(),
    ),
    "arguments that forward requires, with ids": (
        Tuples,
        lambda: with_ids(Rows(lambda x, y: (x, torch.ones(1)))),
        [64] * 8,
        set(),
    ),
    "dicts": (Scaled, lambda: Rows(as_dict), [64] * 8, {"x", "scale"}),
    "dicts with another name": (
        Net,
        lambda: with_ids(Rows(lambda x, y: {"image": x, "path": "a", "label": y})),
        [64] * 8,
        set(),
    ),
    "dicts with ids": (Scaled, lambda: with_ids(Rows(as_dict)), [64] * 8, {"x", "scale"}),
    "pairs of a dict and a label": (
        Scaled,
        lambda: Rows(lambda x, y: ({"x": x}, y)),
        [64] * 8,
        {"x"},
    ),
    "dicts where forward takes any name": (
        Anything,
        lambda: Rows(lambda x, y: {"x": x, "label": y}),
        [64] * 8,
        {"x"},
    ),
    "a loader": (Net, lambda: DataLoader(Rows(), 100, shuffle=True), [100] * 5 + [12], set()),
    "a loader with its own collator": (
        Scaled,
        lambda: DataLoader(with_ids(Rows()), 256, collate_fn=collate_x, num_workers=2),
        [256] * 2,
        {"x"},
    ),
    "a loader with its own batch sampler": (
        Net,
        lambda: DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 128, drop_last=True)),
        [128] * 4,
        set(),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_model_gets_the_inputs_of_the_samples(form, watch):
    make, dataset, sizes, names = FORMS[form]
    model, calls = make(), []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training:
            calls.append((args, kwargs))

    model.register_forward_pre_hook(note, with_kwargs=True)
    state = randomness()
    monitor = watch(model, look="auto", dataset=dataset(), head="head")
    for _ in range(2):
        output = model(X[:24], torch.ones(1)) if make is Tuples else model(x=X[:24])
        output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        F.cross_entropy(output, Y[:24]).backward()
        report = monitor.end_epoch()
    assert monitor.faults == {}
    assert report.consensus is not None
    assert len(calls) == 2 * len(sizes)
    for epoch in (calls[: len(sizes)], calls[len(sizes) :]):
        inputs = [kwargs["x"] if names else args[0] for args, kwargs in epoch]
        assert [len(x) for x in inputs] == sizes
        assert torch.equal(torch.cat(inputs), X[spread(SIZE)])
        assert all(set(kwargs) == names for _, kwargs in epoch)
        assert all(len(args) == (0 if names else 2 if make is Tuples else 1) for args, _ in epoch)
    assert randomness()[1:] == state[1:]


def test_what_a_sampler_holds_out_is_not_chosen(watch):
    rows, model = Rows(), Net()
    kept = list(range(0, SIZE, 2))
    random.Random(0).shuffle(kept)
    monitor = watch(model, look="auto", dataset=DataLoader(rows, 50, sampler=SubsetRandomSampler(kept)))
    train(model, monitor, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(rows.read) == INPUTS
    assert set(rows.read) <= set(kept)


def test_data_sets_that_return_several_samples_at_once_are_asked_for_them(watch):
    asked = []

    class Several(Rows):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(indices)
            return [self[index] for index in indices]

    model = Net()
    monitor = watch(model, look="auto", dataset=Several())
    train(model, monitor, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [index for part in asked for index in part] == spread(SIZE)
    assert {len(part) for part in asked} == {64}


def test_a_data_set_of_hugging_face_gives_the_columns_that_forward_accepts(watch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X[:100].tolist(), "label": Y[:100].tolist(), "text": ["a"] * 100})
    model, seen = Net(), []
    model.register_forward_pre_hook(lambda m, a, k: None if m.training else seen.append(k["x"]), with_kwargs=True)
    monitor = watch(model, look="auto", dataset=with_ids(table.with_format("torch")), num_samples=100)
    monitor.tag(torch.arange(24))
    train(model, monitor, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    assert "look" not in monitor.faults
    assert torch.equal(torch.cat(seen), X[:100])


# --- the same inputs, and no trace --------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Changes each sample at random, by all three kinds of random numbers, each time it is read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return X[index] + torch.rand(()) + random.random() + float(np.random.rand()), int(Y[index])


def looked_at(directory: Path, seed: int, state: Any = None) -> tuple[list[Tensor], Any]:
    """What the model gets in two epochs, and a state of the monitor."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model, seen = Net(), []
    model.register_forward_pre_hook(lambda m, args: None if m.training else seen.append(args[0].clone()))
    with gwa_logging.watch(model, look="auto", dataset=Augmented(), directory=directory) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            train(model, monitor, optimizer)
        assert monitor.faults == {}
        return seen, monitor.state_dict()


def test_random_augmentation_gives_the_same_inputs_in_every_epoch_and_after_a_resume(tmp_path):
    first, state = looked_at(tmp_path, 1)
    resumed, _ = looked_at(tmp_path, 2, state)
    assert len(first) == len(resumed) == 2
    assert all(torch.equal(first[0], other) for other in (first[1], *resumed))
    assert not torch.equal(first[0], X[:40])


def trained(dataset: Any, directory: Path) -> tuple[list[Any], list[Tensor]]:
    random.seed(0)
    np.random.seed(0)
    model = Net(noise=True)
    torch.manual_seed(7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    look = None if dataset is None else "auto"
    states = []
    with gwa_logging.watch(model, look=look, dataset=dataset, directory=directory) as monitor:
        for _ in range(3):
            train(model, monitor, optimizer)
            states.append([randomness(), [module.training for module in model.modules()]])
        assert monitor.faults == {}
    return states, [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize(
    "dataset", [Augmented(), DataLoader(Augmented(), 10, shuffle=True)], ids=["data set", "loader"]
)
def test_training_is_bit_identical_with_and_without_it(dataset, tmp_path):
    alone, found = trained(None, tmp_path / "a"), trained(dataset, tmp_path / "b")
    assert alone[0] == found[0]
    assert all(map(torch.equal, alone[1], found[1]))


def test_the_inputs_are_freed_when_the_monitor_is_closed(watch):
    model = Net()
    monitor = watch(model, look="auto", dataset=TensorDataset(X, Y))
    train(model, monitor, torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = monitor._recording.adapter._look._from_dataset
    assert len(inputs._batches) == 8
    monitor.close()
    assert inputs._batches == []


# --- wrong arguments ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([])

    def __len__(self) -> int:
        return 3


class WithoutLength(Rows):
    def __len__(self) -> int:
        raise NotImplementedError("no idea")


EXPECTED = (
    "dataset: expected the training set, with __len__ and with __getitem__ for indices from 0, or its DataLoader, found"
)
WRONG = {
    "no data set": ({"look": "auto"}, "look='auto': the inputs are chosen from the training set; add dataset=<"),
    "another text": ({"look": "Auto", "dataset": X}, "or 'auto'; found str"),
    "a data set alone": ({"dataset": X}, "dataset: only look='auto' reads it; add look='auto', or leave it out"),
    "a data set and inputs": ({"look": X, "dataset": X}, "dataset: only look='auto' reads it"),
    "a stream": ({"look": "auto", "dataset": Stream()}, f"{EXPECTED} Stream. From a stream, collect"),
    "a loader of a stream": ({"look": "auto", "dataset": DataLoader(Stream())}, f"{EXPECTED} Stream"),
    "a generator": ({"look": "auto", "dataset": (x for x in X)}, f"{EXPECTED} generator"),
    "a dict": ({"look": "auto", "dataset": {"train": X}}, f"{EXPECTED} dict"),
    "a name": ({"look": "auto", "dataset": "cifar10"}, f"{EXPECTED} str"),
    "a number": ({"look": "auto", "dataset": 3}, f"{EXPECTED} int"),
    "an empty one": ({"look": "auto", "dataset": []}, "dataset: this list is empty"),
    "one without a length": (
        {"look": "auto", "dataset": WithoutLength()},
        "the length of this WithoutLength cannot be read: NotImplementedError: no idea",
    ),
    "a loader without batches": (
        {"look": "auto", "dataset": DataLoader(Rows(), batch_size=None)},
        "dataset: this DataLoader does not make batches",
    ),
    "another number of samples": (
        {"look": "auto", "dataset": Rows(), "num_samples": 7},
        "dataset: it has 1200 samples, and num_samples=7: pass the training set that the ledger is about",
    ),
    "another number of labels": ({"look": "auto", "dataset": Rows(), "labels": [0, 1]}, "num_samples=2"),
    "windows": (
        {"look": "auto", "dataset": X, "samples_per_epoch": 9},
        "look: the model can only be evaluated between",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    arguments, message = WRONG[case]
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        gwa_logging.watch(Net(), **arguments)
    assert not Path("gwa_runs").exists()


def test_the_ledger_may_be_that_of_the_data_set_that_this_is_a_subset_of(watch):
    whole = with_ids(Rows())
    assert watch(Net(), look="auto", dataset=Subset(whole, range(9)), num_samples=SIZE).faults == {}
    assert watch(Net(), look="auto", dataset=DataLoader(Subset(whole, range(9))), num_samples=SIZE).faults == {}
    assert watch(Net(), look="auto", dataset=Subset(whole, range(9)), num_samples=9).faults == {}
    with pytest.raises(InvalidInputError, match="dataset: it has 9 samples, and num_samples=8"):
        watch(Net(), look="auto", dataset=Subset(whole, range(9)), num_samples=8)


# --- a guess that fails -------------------------------------------------------------------------------------------------


def broken(x: Tensor, y: int) -> Any:
    raise OSError("the disk is gone")


NONE = "look='auto': no inputs could be made of the training set: "
FAULTS: dict[str, tuple[type[nn.Module], Any, str]] = {
    "reading fails": (Net, Rows(broken), f"{NONE}OSError: the disk is gone. Pass look=<inputs"),
    "lengths differ": (Net, Rows(lambda x, y: (x[: y + 1], y)), f"{NONE}RuntimeError: "),
    "unknown names": (
        Keywords,
        Rows(lambda x, y: {"image": x, "label": y}),
        f"{NONE}ValueError: the samples have 'image', 'label', and forward of Keywords accepts 'pixels', 'scale'. Pass look=",
    ),
    "several possible inputs": (
        Net,
        Rows(lambda x, y: {"image": x, "mask": x, "label": y}),
        f"{NONE}ValueError: the samples have 'image', 'mask', 'label', and forward of Net accepts 'x'. Pass look=",
    ),
    "only labels": (Scaled, Rows(lambda x, y: {"labels": y}), f"{NONE}ValueError: the samples have 'labels'"),
    "too few elements": (
        Tuples,
        Rows(lambda x, y: (x,)),
        f"{NONE}ValueError: expected batches that are a tensor, a dict, or a tuple of at least 2, as forward of Tuples "
        "requires, found list of 1",
    ),
    "an id is no argument": (Tuples, with_ids(Rows(lambda x, y: (x,))), "requires, found list of 1"),
    "objects": (Net, Rows(lambda x, y: object()), f"{NONE}TypeError: default_collate"),
    "text": (
        Net,
        Rows(lambda x, y: ("text", y)),
        "called with 1 positional argument(s) from the training set and failed: Type",
    ),
    "the model rejects them": (
        Net,
        Rows(lambda x, y: (x[:5], y)),
        "look='auto': the model was called with 1 positional argument(s) from the training set and failed: RuntimeError: mat1",
    ),
    "a keyword is missing": (
        Keywords,
        Rows(lambda x, y: {"pixels": x}),
        "look='auto': the model was called with 'pixels' from the training set and failed: TypeError",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_guess_that_fails_is_counted_names_the_remedy_and_leaves_no_trace(case, watch, caplog):
    make, dataset, message = FAULTS[case]
    model = make()
    monitor = watch(model, look="auto", dataset=dataset, head="head")
    for _ in range(3):
        extra = {Keywords: {"pixels": X[:9], "scale": torch.ones(1)}, Tuples: {"x": X[:9], "scale": torch.ones(1)}}
        output = model(**extra.get(make, {"x": X[:9]}))
        output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        F.cross_entropy(output, Y[:9]).backward()
        state, modes = randomness(), [module.training for module in model.modules()]
        assert monitor.end_epoch().consensus is None
        assert randomness() == state
        assert [module.training for module in model.modules()] == modes
    assert monitor.faults == {"look": 3}
    assert message in caplog.text
    assert "Pass look=<inputs as the model is called with them> instead of look='auto'" in caplog.text
    assert caplog.text.count("gwa_logging: look: ") == 1
