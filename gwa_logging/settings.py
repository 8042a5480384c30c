"""Settings, validated once at the door: frozen, and a typo is an error that names the nearest field."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gwa_logging.errors import InvalidInputError

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""What `watch(name=)` takes, with `NAME_LENGTH` characters at most. It becomes the name of folders."""

NAME_LENGTH = 64


class Settings(BaseModel):
    """A frozen model whose validation errors are one InvalidInputError that people can act on."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidInputError(_explain(type(self), error)) from None


class EarlyStop(Settings):
    """When to say that training should stop.

    Attributes:
        statistic: what is watched: "separation" (of the scores into two groups: the one that proved best, see
            `docs/study.md`), "stable" (mean / (excess kurtosis + 3)), "gwa" (as published) or "mean".
        regime: "scratch" looks for the maximum; "finetune" for the maximum after the first minimum.
        warmup: epochs that are not looked at: a share (below 1) of the epochs planned by `Monitor.epochs`, or a
            number of epochs. A share of an unknown plan counts as one epoch. On small data sets that are learnt by heart
            within a few epochs, a number such as 2 is better.
        patience: epochs in a row that are clearly below the best until the alert; at least 1.
        drop: how far below the best is clearly below, as a share of it, in [0, 1). With 0 every epoch without a new best
            costs patience.
        min_delta: by how many of its standard errors a value must exceed the best to be a new best; at least 0.
        action: "alert" tells; "stop" also ends `Monitor.epochs`.
    """

    statistic: Literal["separation", "stable", "gwa", "mean"] = "separation"
    regime: Literal["scratch", "finetune"] = "scratch"
    warmup: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    patience: int = Field(default=5, ge=1)
    drop: float = Field(default=0.05, ge=0, lt=1)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    action: Literal["alert", "stop"] = "alert"


class WatchSettings(Settings):
    """The keyword arguments of `gwa_logging.watch`, which describes them."""

    backend: Any = "local"
    run: Any = None
    head: Any = None
    early_stop: EarlyStop | None = Field(default_factory=EarlyStop)
    on_alert: Callable[..., Any] | None = None
    log_every_n_steps: int = Field(default=50, ge=1)
    samples_per_epoch: int | None = Field(default=None, ge=1)
    num_samples: int | None = Field(default=None, ge=1, lt=2**31)
    labels: Any = None
    directory: Path = Path("gwa_runs")
    name: str = Field(default="gwa", pattern=NAME_PATTERN, max_length=NAME_LENGTH)

    @field_validator("backend")
    @classmethod
    def _backends(cls, value: Any) -> tuple[Any, ...]:
        backends = tuple(value) if isinstance(value, list | tuple) else (value,)
        for backend in backends:
            if not isinstance(backend, str) and not (hasattr(backend, "write") and hasattr(backend, "close")):
                raise ValueError(
                    "expected a name such as 'wandb' or 'mlflow', a list of them, or an object with write(record) "
                    "and close()"
                )
        if not backends:
            raise ValueError("expected at least one backend; 'local' keeps only the journal and the report")
        return backends

    @model_validator(mode="before")
    @classmethod
    def _labels(cls, values: dict[str, Any]) -> dict[str, Any]:
        given, size = values.get("labels"), values.get("num_samples")
        if given is None:
            return values
        try:
            labels = np.asarray(given)
        except Exception as error:  # a tensor on another device, a ragged list
            raise ValueError(f"labels: expected an array on the host, or a list ({error})") from error
        if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
            found = f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"labels: expected class indices, int [num_samples], found {found}")
        if size not in (None, labels.size):
            raise ValueError(f"labels: expected num_samples={size} of them, found {labels.size}")
        return {**values, "labels": labels, "num_samples": labels.size}

    @model_validator(mode="after")
    def _runs(self) -> Self:
        if isinstance(self.run, dict):
            strangers = [name for name in self.run if name not in self.backend]
            if strangers:
                raise ValueError(f"run={{{strangers[0]!r}: ...}}: it is not among the backends")
        elif self.run is not None and len(self.backend) > 1:
            raise ValueError("run=: with several backends, say which one it belongs to: run={'mlflow': run}")
        return self

    @property
    def heads(self) -> tuple[Any, ...]:
        """The heads that are wanted, at least one; None stands for the one to be found."""
        heads = tuple(self.head) if isinstance(self.head, list | tuple) else (self.head,)
        if not heads:
            raise InvalidInputError("head=[]: expected at least one head, or None to find it")
        if len(heads) > 1 and not all(isinstance(backend, str) for backend in self.backend):
            raise InvalidInputError(
                "head: with several heads, backends must be given by name, since each head opens its own"
            )
        return heads

    def for_head(self, head: Any) -> "WatchSettings":
        """The settings for the one that the alert follows."""
        return self.model_copy(update={"head": head})

    def for_other_head(self, head: Any, runs: dict[str, Any]) -> "WatchSettings":
        """The settings for one of the others, which share the runs and the epochs of the first."""
        alone = {"early_stop": None, "on_alert": None, "samples_per_epoch": None}
        return self.model_copy(update={"head": head, "run": runs, **alone})

    def run_of(self, backend: Any) -> Any:
        """The user's run for one of the backends; None if none is given."""
        return self.run.get(backend) if isinstance(self.run, dict) else self.run

    def plain(self) -> dict[str, Any]:
        """What of the settings can be written down: for the journal."""
        return {
            "backend": [b if isinstance(b, str) else type(b).__name__ for b in self.backend],
            "early_stop": self.early_stop.model_dump() if self.early_stop else None,
            "log_every_n_steps": self.log_every_n_steps,
            "samples_per_epoch": self.samples_per_epoch,
            "num_samples": self.num_samples,
        }


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(field, model.model_fields, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(model.model_fields)}"
            lines.append(f"unknown argument {field!r}: {remedy}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f"{field}={problem['input']!r}: " if field else ""
            lines.append(f"{found}{message[:1].lower()}{message[1:]}")
    return "; ".join(lines)
