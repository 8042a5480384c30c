"""EpochBackup: the state of a TrainerSession in a file, for trainers whose own checkpoints have no place for it."""

import json
import os
from pathlib import Path
from typing import Any

from gwa_logging.faults import logger


class EpochBackup:
    """A file with the state at the end of the last epoch, and beside it one of the epoch before.

    A trainer that is killed between this file and its own checkpoint resumes from either of the two epochs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Writes nothing yet, and creates no folder."""
        self.path = Path(path)
        self._earlier = self.path.with_suffix(".before")

    def save(self, epochs: int, state: dict[str, Any]) -> None:
        """Writes the state after a number of epochs.

        Raises:
            OSError: the file cannot be written. The earlier ones remain.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(json.dumps({"epochs": epochs, "state": state}))
        if self.path.exists() and self._epochs(self.path) != epochs:
            self.path.replace(self._earlier)
        unfinished.replace(self.path)

    def load(self, epochs: int) -> dict[str, Any] | None:
        """Returns the state after a number of epochs; None, with a warning, if there is none."""
        for path in (self.path, self._earlier):
            if self._epochs(path) == epochs:
                state: dict[str, Any] = json.loads(path.read_text())["state"]
                return state
        logger.warning(
            "gwa_logging: GWA starts again from zero: %s does not have the state at the end of epoch %d",
            *(self.path, epochs - 1),
        )
        return None

    def remove(self) -> None:
        """Deletes the files: the training is complete."""
        self.path.unlink(missing_ok=True)
        self._earlier.unlink(missing_ok=True)

    @staticmethod
    def _epochs(path: Path) -> int | None:
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError):  # it does not exist, or a machine crashed while it was written
            return None
        return saved.get("epochs") if isinstance(saved, dict) else None
