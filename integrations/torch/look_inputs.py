"""Chooses the inputs of a look from the training set, for `watch(look="auto")`.

At the first look 512 samples are read in the process itself, spread evenly over the data set, and made to batches as a
`DataLoader` does. The batches stay on the host, so all looks have the same inputs, even if the data set augments them at
random. Both the choice and these random numbers come from a constant seed, so the inputs are the same in each process
and after a resume. The caller restores the random numbers, see `look`.

Of a sample, the model gets: the sample itself if it is a tensor; of a dict, the entries that the model's `forward` accepts by
name, except labels, or if it accepts none, the only tensor that is no label; of a tuple or list, the first element, or as many
as `forward` requires.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler, default_collate

from gwa_logging.dataset import ID_COLUMN, WithIds, check_training_set, has_index, is_loader
from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.torch.find_head import inside_adapters

INPUTS = 512
"""Number of inputs, if the data set has as many samples."""

_BATCH = 64  # where the training's batch size is unknown
_SEED = 512
_NOT_INPUTS = {"label", "labels", "label_ids", "target", "targets", ID_COLUMN}
_REMEDY = "Pass look=<inputs as the model is called with them> instead of look='auto'"

Inputs = tuple[Any, ...] | dict[str, Any]
"""The positional or the keyword arguments of the model, with tensors on the host."""


class DatasetInputs:
    """Inputs that are chosen from a training set at the first look."""

    def __init__(self, find: Callable[[], Any]) -> None:
        """Reads nothing yet.

        Args:
            find: returns the data set, or its DataLoader. Called at the first look, since a trainer makes its loader late.
        """
        self._find: Callable[[], Any] | None = find
        self._chosen: _Chosen | None = None  # until the ids are known
        self._ids: npt.NDArray[np.int64] | None = None
        self._batches: list[Inputs] = []

    def __call__(self) -> Any:
        """Refuses: the inputs depend on the model. Here because a look is inputs or a function."""
        raise InvalidInputError("look='auto': call batches(model)")

    def batches(self, model: nn.Module) -> list[Inputs]:
        """The inputs for a model. Changes the seeds of Python's, NumPy's and PyTorch's random numbers at the first call.

        Raises:
            InvalidInputError: samples cannot be read, be made to a batch, or be passed to the model.
        """
        if not self._batches and self._find is not None:
            try:
                chosen = _choose(self._find())
                self._batches = _read(chosen, model)
            except Exception as error:
                raise InvalidInputError(
                    f"look='auto': no inputs could be made of the training set: {type(error).__name__}: {error}. {_REMEDY}"
                ) from error
            self._chosen, self._find = chosen, None  # which may keep a trainer alive
        return self._batches

    def ids(self, num_samples: int | None) -> npt.NDArray[np.int64] | None:
        """The sample ids of the inputs, int64 [inputs], in a ledger of this size; None if they are unknown.

        Call it after `batches`. Only the first call looks for them, and frees the data set.
        """
        if self._chosen is not None:
            chosen, self._chosen = self._chosen, None
            self._ids = None if num_samples is None else _ids_of(chosen.dataset, chosen.indices, num_samples)
        return self._ids

    def clear(self) -> None:
        """Frees the inputs, after the last look."""
        self._batches, self._find, self._chosen = [], None, None

    def rejection(self, error: Exception) -> InvalidInputError:
        """The error to raise if the model has raised one."""
        first = self._batches[0]
        what = ", ".join(map(repr, first)) if isinstance(first, dict) else f"{len(first)} positional argument(s)"
        return InvalidInputError(
            f"look='auto': the model was called with {what} from the training set and failed: {type(error).__name__}: {error}. "
            f"{_REMEDY}"
        )


def spread(size: int, wanted: int = INPUTS) -> list[int]:
    """Different indices from 0 to size - 1, in ascending order: a random one of each of `wanted` equal sections.

    They are random so that a data set whose classes alternate gives inputs of all classes.
    """
    wanted = min(wanted, size)
    edges = np.arange(wanted + 1) * size // wanted
    shares = np.random.RandomState(_SEED).random_sample(wanted)  # the same numbers in every version of NumPy
    indices: list[int] = (edges[:-1] + (shares * np.diff(edges)).astype(np.int64)).tolist()
    return indices


class _Chosen(NamedTuple):
    """Which samples are the inputs.

    Attributes:
        dataset: the data set, with its wrappers.
        indices: which of its samples.
        collate: makes a batch of samples.
        batch: the batch size.
    """

    dataset: Any
    indices: list[int]
    collate: Callable[[Any], Any]
    batch: int


def _choose(found: Any) -> _Chosen:
    """Chooses samples of a data set, or of the data set of a `DataLoader`."""
    check_training_set(found, None)
    if not is_loader(found):
        return _Chosen(found, spread(len(found)), default_collate, _BATCH)
    size = found.batch_size or getattr(found.batch_sampler, "batch_size", None) or _BATCH
    sampler = getattr(found.batch_sampler, "sampler", found.sampler)
    if not isinstance(sampler, SubsetRandomSampler):
        return _Chosen(found.dataset, spread(len(found.dataset)), found.collate_fn, size)
    places = sorted(int(index) for index in sampler.indices)  # the rest is held out
    return _Chosen(found.dataset, [places[index] for index in spread(len(places))], found.collate_fn, size)


def _ids_of(dataset: Any, indices: Sequence[int], num_samples: int) -> npt.NDArray[np.int64] | None:
    """The sample ids of the samples at some indices: those of `with_ids`, or else indices in a data set of this size.

    The data set may be a `Subset`, or a chain of these. None if no data set in the chain fits.
    """
    found, places = None, np.asarray(indices, np.int64)
    while True:
        if ID_COLUMN in (getattr(dataset, "column_names", None) or ()):
            return np.asarray(dataset.select(places)[ID_COLUMN], np.int64)
        if isinstance(dataset, WithIds):
            return places
        if found is None and len(dataset) == num_samples:
            found = places
        inner, inner_indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
        if inner_indices is None or not has_index(inner):
            return found
        dataset, places = inner, np.asarray(inner_indices, np.int64)[places]


def _read(chosen: _Chosen, model: nn.Module) -> list[Inputs]:
    is_wrapped = isinstance(chosen.dataset, WithIds) and chosen.collate is default_collate
    dataset = chosen.dataset.dataset if is_wrapped else chosen.dataset
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would also seed accelerators, which are not restored
    read_several = getattr(dataset, "__getitems__", None)
    batches = []
    for start in range(0, len(chosen.indices), chosen.batch):
        part = chosen.indices[start : start + chosen.batch]
        samples = read_several(part) if read_several is not None else [dataset[index] for index in part]
        batches.append(_on_host(_inputs_of(chosen.collate(samples), model)))
    return batches


def _inputs_of(batch: Any, model: nn.Module) -> Inputs:
    """The model's arguments in a batch.

    Raises:
        ValueError: it is unclear which part of the batch they are.
    """
    names, required = _parameters(model)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    if isinstance(batch, Mapping):
        possible = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        chosen = {key: value for key, value in possible.items() if not names or key in names}
        if chosen:
            return chosen
        tensors = [value for value in possible.values() if isinstance(value, Tensor)]
        if len(tensors) == 1 >= required:
            return (tensors[0],)
        raise ValueError(
            f"the samples have {', '.join(map(repr, batch))}, and forward of {type(model).__name__} accepts "
            f"{', '.join(map(repr, names))}"
        )
    if isinstance(batch, Tensor):
        return (batch,)
    if not isinstance(batch, list | tuple) or len(batch) < max(required, 1):
        found = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, list | tuple) else ''}"
        raise ValueError(
            f"expected batches that are a tensor, a dict, or a tuple of at least {max(required, 1)}, as forward of "
            f"{type(model).__name__} requires, found {found}"
        )
    return tuple(batch[: max(required, 1)])


def _parameters(model: nn.Module) -> tuple[list[str], int]:
    """The names that the model's `forward` accepts as keywords, and the number of positional arguments that it requires."""
    try:
        parameters = signature(inside_adapters(model).forward).parameters.values()
    except (TypeError, ValueError):  # a compiled function of C++ or of TorchScript
        return [], 0
    by_place = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in by_name]
    return names, sum(parameter.kind in by_place and parameter.default is parameter.empty for parameter in parameters)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_host(inner) for key, inner in value.items()}
    return type(value)(map(_on_host, value)) if type(value) in (list, tuple) else value
