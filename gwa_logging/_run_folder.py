"""The folder of one run: created with the journal, and removed again if the run recorded nothing."""

import os
from contextlib import suppress
from pathlib import Path

from gwa_logging.errors import BackendError


class RunFolder:
    """Remembers which folders did not exist before the run, so that only these are removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new = [folder for folder in (path, *path.parents) if not folder.exists()]

    def check_writable(self) -> None:
        """Fails before any tracker starts a run. Creates nothing.

        Raises:
            BackendError: the folder cannot be created.
        """
        above = next(folder for folder in self.path.parents if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise BackendError(f"directory={str(self.path.parent)!r}: {above} is not a folder that can be written")

    def remove(self, journal: Path) -> None:
        """Removes a journal, and the new folders as far as nothing else is in them. Never raises."""
        with suppress(OSError):
            journal.unlink(missing_ok=True)
            for folder in self._new:  # the innermost first
                folder.rmdir()
