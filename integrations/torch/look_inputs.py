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
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler, default_collate

from gwa_logging.dataset import ID_COLUMN, WithIds, check_training_set, is_loader
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
                self._batches = _read(self._find(), model)
                self._find = None  # which may keep a trainer alive
            except Exception as error:
                raise InvalidInputError(
                    f"look='auto': no inputs could be made of the training set: {type(error).__name__}: {error}. {_REMEDY}"
                ) from error
        return self._batches

    def clear(self) -> None:
        """Frees the inputs, after the last look."""
        self._batches, self._find = [], None

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


def _read(found: Any, model: nn.Module) -> list[Inputs]:
    check_training_set(found, None)
    dataset, collate, size, places = found, default_collate, _BATCH, None
    if is_loader(found):
        dataset, collate = found.dataset, found.collate_fn
        size = found.batch_size or getattr(found.batch_sampler, "batch_size", None) or _BATCH
        sampler = getattr(found.batch_sampler, "sampler", found.sampler)
        if isinstance(sampler, SubsetRandomSampler):  # the rest is held out
            places = sorted(int(index) for index in sampler.indices)
    elif isinstance(found, WithIds):
        dataset = found.dataset
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would also seed accelerators, which are not restored
    read_several = getattr(dataset, "__getitems__", None)
    indices, batches = spread(len(dataset) if places is None else len(places)), []
    indices = indices if places is None else [places[index] for index in indices]
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        samples = read_several(part) if read_several is not None else [dataset[index] for index in part]
        batches.append(_on_host(_inputs_of(collate(samples), model)))
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
