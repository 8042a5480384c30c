"""The run that a state belongs to: its folder and its trackers' runs, so that a restarted process continues them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gwa_logging.protocols import Backend
from gwa_logging.redact import MASK
from gwa_logging.state_values import Flag

_RUN_IDS = {
    "mlflow": r"[\w-]{1,256}",
    "wandb": r"(?:[^/\\#?%:]{1,128}/){0,2}[^/\\#?%:]{1,128}",  # [entity/]project/id
    "trackio": r"[^/\\]{1,256}/.{1,256}",  # project/run
}


def is_allowed(backend: str, run: str, name: str, folders: Iterable[Path]) -> bool:
    """Returns True if a journal or a checkpoint may name this run of a tracker: they may come from others.

    Args:
        backend: the tracker.
        run: the run, as text for `watch(run=)`.
        name: prefix of the metric keys.
        folders: TensorBoard's log directory must be in one of them.
    """
    if backend == "tensorboard":
        where = f"{run}/{name}"
        return "\0" not in where and "://" not in where and any(_is_inside(Path(where), folder) for folder in folders)
    is_shaped = re.fullmatch(_RUN_IDS.get(backend, ".{1,4096}"), run) is not None
    return is_shaped and run.isprintable() and not {"", ".", ".."} & set(run.split("/"))


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


class SavedTracker(BaseModel):
    """A tracker's run.

    Attributes:
        run: the run, as text for `watch(run=)`; None if it is in the run's folder (TensorBoard).
        owned: True if this library started it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    run: Annotated[str, Field(max_length=4096)] | None
    owned: Flag


def _check_folder(name: str) -> str:
    if not re.fullmatch(r"[^/\\\x00]{1,255}", name) or name in (".", ".."):
        raise ValueError(f"expected the name of a run's folder, found {name[:80]!r}")
    return name


class SavedRun(BaseModel):
    """The run of one head.

    Attributes:
        folder: name of the run's folder in `watch(directory=)`.
        trackers: the trackers' runs, by the name of the backend. Those that cannot be opened again are left out.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    folder: Annotated[str, AfterValidator(_check_folder)]
    trackers: dict[str, SavedTracker]

    @classmethod
    def of(cls, folder: str, backends: Mapping[str, Backend]) -> Self:
        """The run in a folder, and those of its trackers, which `watch(backend=)` named so."""
        trackers: dict[str, SavedTracker] = {}
        for name, backend in backends.items():
            run = None if backend.is_in_folder else backend.run_ref.run
            if backend.is_in_folder or (run is not None and MASK not in run):
                trackers[name] = SavedTracker(run=run, owned=backend.owns_run)
        return cls(folder=folder, trackers=trackers)
