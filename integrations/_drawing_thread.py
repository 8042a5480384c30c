"""Draws a picture in a thread, for a tracker whose writes make the training thread wait."""

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")

LAST_PICTURE = 5.0
"""Seconds that closing waits for a picture in the making."""


class DrawingThread(Generic[T]):
    """Draws one picture at a time. A picture takes 10 to 20 ms to draw and to encode; no method but `wait` blocks."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._outcome: T | Exception | None = None

    @property
    def is_free(self) -> bool:
        """Returns True if no picture is being drawn and none is waiting for `take`."""
        return self._thread is None

    def start(self, draw: Callable[[], T]) -> None:
        """Starts to draw. To be called only if `is_free`."""
        self._thread = Thread(target=self._draw, args=(draw,), name="gwa_logging picture", daemon=True)
        self._thread.start()

    def take(self) -> T | None:
        """Returns what was drawn, once, or None if nothing is finished.

        Raises:
            Exception: what drawing has raised.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def wait(self, seconds: float = LAST_PICTURE) -> None:
        """Waits until the picture that is being drawn is finished."""
        if self._thread:
            self._thread.join(seconds)

    def _draw(self, draw: Callable[[], T]) -> None:
        try:
            self._outcome = draw()
        except Exception as error:  # noqa: BLE001 - raised by `take`
            self._outcome = error
