"""Draws a picture in a thread, for a tracker whose writes make the training thread wait."""

from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Thread
from typing import NamedTuple

from PIL import Image


class Drawing(NamedTuple):
    """A picture in a temporary file, which whoever takes it has to delete.

    Attributes:
        step: the training step up to which it shows the run.
        path: of the PNG file.
    """

    step: int
    path: Path


class DrawingThread:
    """Draws one picture at a time. A picture takes 10 to 20 ms to draw and to encode; no method but `wait` blocks."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._outcome: Drawing | Exception | None = None

    @property
    def is_free(self) -> bool:
        """Returns True if no picture is being drawn and none is waiting for `take`."""
        return self._thread is None

    def start(self, step: int, draw: Callable[[], Image.Image]) -> None:
        """Starts to draw. To be called only if `is_free`."""
        self._thread = Thread(target=self._draw, args=(step, draw), name="gwa_logging picture", daemon=True)
        self._thread.start()

    def take(self) -> Drawing | None:
        """Returns the picture, once, or None if none is finished.

        Raises:
            Exception: what drawing or storing it has raised.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def wait(self, seconds: float) -> None:
        """Waits until the picture that is being drawn is finished."""
        if self._thread:
            self._thread.join(seconds)

    def _draw(self, step: int, draw: Callable[[], Image.Image]) -> None:
        try:
            image = draw()
            with NamedTemporaryFile(prefix="gwa_logging-", suffix=".png", delete=False) as file:
                image.save(file, "png")
            self._outcome = Drawing(step, Path(file.name))
        except Exception as error:  # noqa: BLE001 - raised by `take`
            self._outcome = error
