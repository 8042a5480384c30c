"""The arguments of `watch` and of the stop rule: frozen, and validated once with error messages of this library.

Every message has the form `field=value: expected ...`; an unknown argument is answered with the nearest name.
"""

import operator
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gwa_logging.dataset import check_training_set
from gwa_logging.errors import InvalidInputError
from gwa_logging.redact import MASK
from gwa_logging.sample_ids import sample_ids

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""What `watch(name=)` accepts, with `NAME_LENGTH` characters at most. It becomes the name of folders."""

NAME_LENGTH = 64

_LONGEST_VALUE = 80  # characters of a wrong value in a message


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> str:
    """The message for a name that is none of the choices. Case does not matter for the nearest one.

    >>> unknown_name("backend", "WanDB", ["local", "wandb"])
    "unknown backend 'WanDB'; did you mean 'wandb'? Choose from 'local', 'wandb'"
    """
    by_lower_case = {choice.lower(): choice for choice in choices}
    nearest = [by_lower_case[match] for match in get_close_matches(name.lower(), by_lower_case, n=1)]
    suggestion = f"did you mean {nearest[0]!r}? Choose" if nearest else "choose"
    return f"unknown {kind} {name!r}; {suggestion} from {', '.join(map(repr, by_lower_case.values()))}"


def _integer(value: object) -> int:
    """Accepts Python's and NumPy's integers. Text, floats and booleans are mistakes, so they are not converted."""
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]  # raises TypeError for everything else


def _number(value: object) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError
    return float(value)


def _path(value: object) -> Path:
    return Path(os.fspath(value))  # type: ignore[call-overload]  # raises TypeError for everything else


def _kept(value: object) -> object:
    if not isinstance(value, bool | str) or value not in (False, True, "averaged"):
        raise TypeError
    return value


def _checked(convert: Callable[[Any], Any]) -> BeforeValidator:
    """Validates with a function that raises TypeError, which pydantic would let through."""

    def validate(value: Any) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError):
            raise AssertionError from None  # `_explain` states what the field expects

    return BeforeValidator(validate)


Integer = Annotated[int, _checked(_integer)]
Number = Annotated[float, _checked(_number), Field(allow_inf_nan=False)]


class Settings(BaseModel):
    """A frozen model that raises InvalidInputError instead of pydantic's errors.

    The description of a field is what its message says after "expected".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidInputError(_explain(type(self), error)) from None


_DEFAULTS_OF_STATISTIC: dict[str, dict[str, float]] = {
    "consensus": {"warmup": 2, "drop": 0},
    "agreement": {"warmup": 2},  # the first value needs two epochs, each compared with the one before
}
"""The defaults of `EarlyStop` that depend on the statistic."""


class EarlyStop(Settings):
    """When to alert that training should stop.

    Attributes:
        statistic: what to watch: "separation" (how well the scores fall into two groups; needs neither ids nor a look, see
            `docs/study.md`), "stable" (mean / (excess kurtosis + 3)), "gwa" (as published), "mean", "consensus" (separation
            plus how well the checkpoint agrees with the model's early predictions: needs a look, has other defaults, warmup=2
            and drop=0, and fires once the separation alone would fire too), or "agreement" (separation plus the share of
            samples whose scores keep their sign, mean of two epochs: needs sample ids, and skips two epochs: warmup=2).
        regime: "scratch" looks for the maximum; "finetune" for the maximum after the first minimum.
        warmup: epochs to skip at the start: below 1 a share of the epochs planned by `Monitor.epochs` or `Monitor.plan`, else
            a number of epochs. A share of an unknown plan counts as one epoch. Small data sets are memorised within a few
            epochs; there a number such as 2 works better.
        patience: how many consecutive epochs must be clearly below the best before the alert; at least 1.
        drop: how far below the best is clearly below, as a share of the best, in [0, 1). With 0 every epoch without a new
            best counts.
        min_delta: by how many of its standard errors a value must exceed the best to be a new best; at least 0.
        action: "alert" notifies you; "stop" also ends `Monitor.epochs`.
    """

    statistic: Literal["separation", "stable", "gwa", "mean", "consensus", "agreement"] = Field(
        default="separation", description="'separation', 'stable', 'gwa', 'mean', 'consensus' or 'agreement'"
    )
    regime: Literal["scratch", "finetune"] = Field(default="scratch", description="'scratch' or 'finetune'")
    warmup: Number = Field(
        default=0.1, ge=0, description="a number of at least 0: a share below 1, or a number of epochs"
    )
    patience: Integer = Field(default=5, ge=1, description="an integer of at least 1")
    drop: Number = Field(default=0.05, ge=0, lt=1, description="a number in [0, 1)")
    min_delta: Number = Field(default=0.0, ge=0, description="a number of at least 0")
    action: Literal["alert", "stop"] = Field(default="alert", description="'alert' or 'stop'")

    @model_validator(mode="before")
    @classmethod
    def _set_defaults_of_statistic(cls, values: dict[str, Any]) -> dict[str, Any]:
        statistic = values.get("statistic")
        own = _DEFAULTS_OF_STATISTIC.get(statistic, {}) if isinstance(statistic, str) else {}
        return {**own, **values}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Only what differs from the defaults, so that the signature of `watch` shows `EarlyStop()`."""
        fields = type(self).model_fields
        return [(name, value) for name, value in super().__repr_args__() if name and value != fields[name].default]


DEFAULT_EARLY_STOP = EarlyStop()
"""The stop rule of `watch` unless the user passes one. A language model then gets no alert, see `for_language_model`."""


EARLY_STOP_WITH_LOOK = EarlyStop(statistic="consensus")
"""The stop rule of `watch(look=)` unless the user passes one."""


class WatchSettings(Settings):
    """The keyword arguments of `gwa_logging.watch`, which documents them."""

    backend: Any = Field(default="local", validate_default=True)
    run: Any = None
    head: Any = None
    early_stop: EarlyStop | None = Field(default=DEFAULT_EARLY_STOP, description="an EarlyStop(...) or None")
    on_alert: Callable[..., Any] | None = Field(default=None, description="a function of the StopAlert, or None")
    log_every_n_steps: Integer = Field(default=50, ge=1, description="an integer of at least 1")
    samples_per_epoch: Integer | None = Field(default=None, ge=1, description="an integer of at least 1, or None")
    labels: Any = None
    num_samples: Integer | None = Field(
        default=None, ge=1, lt=2**31, validate_default=True, description="an integer from 1 to 2**31 - 1, or None"
    )
    unit: Literal["sample", "position"] | None = Field(default=None, description="'sample', 'position' or None")
    look: Any = Field(default=None, repr=False)
    look_ids: Any = Field(default=None, repr=False)
    dataset: Any = Field(default=None, repr=False)
    keep_best: Annotated[bool | Literal["averaged"], _checked(_kept)] = Field(
        default=False, description="False, True or 'averaged'"
    )
    notify: Any = Field(default=(), repr=False, validate_default=True)
    directory: Annotated[Path, _checked(_path)] = Field(default=Path("gwa_runs"), description="a path")
    name: str = Field(
        default="gwa",
        pattern=NAME_PATTERN,
        max_length=NAME_LENGTH,
        description=f"1 to {NAME_LENGTH} letters, digits, '_', '.' or '-', the first a letter, a digit or '_'",
    )

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, value: Any) -> tuple[Any, ...]:
        backends = tuple(value) if isinstance(value, list | tuple) else (value,)
        for backend in backends:
            if not isinstance(backend, str) and not (hasattr(backend, "write") and hasattr(backend, "close")):
                raise ValueError(
                    "expected a name such as 'wandb' or 'mlflow', a list of them, or an object with write(record) "
                    "and close()"
                )
        if not backends:
            raise ValueError("expected at least one backend; 'local' writes only the journal and the report")
        return backends

    @field_validator("notify")
    @classmethod
    def _check_notify(cls, value: Any) -> tuple[str, ...]:
        urls = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
            raise ValueError("expected a URL of Apprise, such as 'slack://...', a list of URLs, or None")
        return tuple(urls)

    @field_validator("look")
    @classmethod
    def _check_look(cls, value: Any, info: ValidationInfo) -> Any:
        batches = value if isinstance(value, list) else [value]
        are_batches = [isinstance(batch, tuple | Mapping) or getattr(batch, "shape", ()) != () for batch in batches]
        is_auto = isinstance(value, str) and value == "auto"
        if not (value is None or is_auto or callable(value) or (batches and all(are_batches))):
            raise ValueError(
                f"expected inputs as the model is called with them (a tensor, a tuple of positional arguments, or a dict of "
                f"keyword arguments), a list of such batches, a function that returns one of these, or 'auto'; found "
                f"{type(value).__name__}. From a DataLoader, collect batches in a list first"
            )
        if value is not None and info.data.get("samples_per_epoch") is not None:
            raise ValueError(
                "the model can only be evaluated between two steps, and samples_per_epoch closes an epoch inside one; call "
                "end_epoch() in your loop instead"
            )
        return value

    @field_validator("look_ids")
    @classmethod
    def _check_look_ids(cls, value: Any, info: ValidationInfo) -> npt.NDArray[np.int64] | None:
        if value is None or "look" not in info.data or "num_samples" not in info.data:
            return None
        if info.data["look"] is None or isinstance(info.data["look"], str):
            raise ValueError("they are the sample ids of the inputs in look=; pass those, or leave this out")
        if info.data["num_samples"] is None:
            raise ValueError(
                "add num_samples=<size of the training set>, so that training's predictions are kept by id"
            )
        return sample_ids(value, None, info.data["num_samples"])

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and "look" in info.data:
            if not isinstance(info.data["look"], str):
                raise ValueError("only look='auto' reads it; add look='auto', or leave it out")
            check_training_set(value, info.data.get("num_samples"))
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: Any) -> npt.NDArray[np.integer[Any]] | None:
        if value is None:
            return None
        try:
            labels = np.asarray(value)
        except Exception as error:  # a tensor on another device, a ragged list
            raise ValueError(f"expected an array on the host, or a list ({error})") from error
        if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
            found = f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"expected class indices, int [num_samples], found {found}")
        return labels

    @field_validator("early_stop", mode="before")
    @classmethod
    def _check_early_stop(cls, value: Any) -> Any:
        if not isinstance(value, EarlyStop | None):  # pydantic would convert a dict
            raise AssertionError
        return value

    @field_validator("num_samples", mode="before")
    @classmethod
    def _count_labels(cls, value: Any, info: ValidationInfo) -> Any:
        labels = info.data.get("labels")
        return len(labels) if value is None and labels is not None else value

    @field_validator("num_samples")
    @classmethod
    def _check_num_samples(cls, value: int | None, info: ValidationInfo) -> int | None:
        labels = info.data.get("labels")
        if labels is not None and value != len(labels):
            raise ValueError(f"there are {len(labels)} labels; leave num_samples out, or give all labels")
        return value

    @model_validator(mode="before")
    @classmethod
    def _watch_the_look(cls, values: dict[str, Any]) -> dict[str, Any]:
        is_default = values.get("early_stop", DEFAULT_EARLY_STOP) is DEFAULT_EARLY_STOP
        return (
            {**values, "early_stop": EARLY_STOP_WITH_LOOK} if is_default and values.get("look") is not None else values
        )

    @model_validator(mode="after")
    def _check_ids_of_rule(self) -> Self:
        if self.early_stop is not None and self.early_stop.statistic == "agreement" and self.num_samples is None:
            raise ValueError(
                "early_stop=EarlyStop(statistic='agreement'): it compares each sample's scores with its earlier ones, and "
                "there are no sample ids; add num_samples=<size of the training set>, and pass the ids: tag(ids) or, in JAX, "
                "update(scores, ids)"
            )
        return self

    @model_validator(mode="after")
    def _check_run(self) -> Self:
        if isinstance(self.run, dict):
            for backend in self.run:
                if backend not in self.backend:
                    raise ValueError(f"run={{{backend!r}: ...}}: it is not among the backends")
        elif self.run is not None and len(self.backend) > 1:
            raise ValueError("run: with several backends, name the one it belongs to: run={'mlflow': run}")
        return self

    @property
    def heads(self) -> tuple[Any, ...]:
        """The heads to watch, at least one; None stands for the one that is to be found."""
        heads = tuple(self.head) if isinstance(self.head, list | tuple) else (self.head,)
        if not heads:
            raise InvalidInputError("head=[]: expected at least one head, or None to find it")
        if len(heads) > 1 and not all(isinstance(backend, str) for backend in self.backend):
            raise InvalidInputError(
                "head: with several heads, give the backends by name, because each head opens its own"
            )
        return heads

    def for_language_model(self) -> "WatchSettings":
        """The settings for a language model: without a stop alert, unless the user has passed a rule.

        The rule was validated on classifiers. In a study of language models it stayed silent where it should not have.
        """
        is_default = self.early_stop is DEFAULT_EARLY_STOP or self.early_stop is EARLY_STOP_WITH_LOOK
        return self.model_copy(update={"early_stop": None}) if is_default else self

    def for_head(self, head: Any) -> "WatchSettings":
        """The settings for the head that the alert follows."""
        return self.model_copy(update={"head": head})

    def for_other_head(self, head: Any, runs: dict[str, Any]) -> "WatchSettings":
        """The settings for a further head, which shares the runs and the epochs of the first."""
        alone: dict[str, Any] = {"early_stop": None, "on_alert": None, "notify": (), "samples_per_epoch": None}
        alone |= {"look": None, "look_ids": None, "dataset": None, "keep_best": False}
        return self.model_copy(update={"head": head, "run": runs, **alone})

    def run_of(self, backend: Any) -> Any:
        """The user's run for one of the backends; None if none is given."""
        return self.run.get(backend) if isinstance(self.run, dict) else self.run

    def to_dict(self) -> dict[str, Any]:
        """The settings that the journal records."""
        return {
            "backend": [b if isinstance(b, str) else type(b).__name__ for b in self.backend],
            "early_stop": self.early_stop.model_dump() if self.early_stop else None,
            "notify": [f"{url.partition('://')[0]}://{MASK}" for url in self.notify],
            "log_every_n_steps": self.log_every_n_steps,
            "samples_per_epoch": self.samples_per_epoch,
            "num_samples": self.num_samples,
            "unit": self.unit,
            "look": self.look is not None,
            "keep_best": self.keep_best,
        }


def shortened(value: object) -> str:
    """A value in a message: at most 80 characters of its repr."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the message matters, not the value
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _found(field: object, value: object) -> str:
    """The start of a message. Data may be long, and `notify` contains secrets: their values are left out."""
    if field in ("labels", "notify", "look", "look_ids", "dataset"):
        return f"{field}: "
    return f"{field}={shortened(value)}: " if field else ""


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """This library's message for each field that pydantic refuses; nothing of pydantic's wording is in it."""
    messages: dict[object, str] = {}
    for problem in error.errors(include_url=False):
        field = problem["loc"][0] if problem["loc"] else ""
        found = _found(field, problem["input"])
        reason = problem.get("ctx", {}).get("error")
        if problem["type"] == "extra_forbidden":
            message = unknown_name("argument", str(field), model.model_fields)
        elif problem["type"] == "value_error":
            message = f"{found}{reason}"
        else:
            message = f"{found}expected {model.model_fields[str(field)].description}"
        messages.setdefault(field, message)  # of a union, every member reports its own problem
    return "; ".join(messages.values())
