"""Draws a picture for a run of W&B in a thread, for backends whose writes the training thread waits for."""

from collections.abc import Callable
from threading import Lock, Thread
from typing import Any

DRAWN_WITHIN = 5.0
"""Seconds that closing waits for a picture in the making."""


class PictureThread:
    """Draws one picture at a time.

    Drawing and encoding take about 20 ms, and logging the result takes less than one. So this draws in a thread, and the
    backend logs the picture together with a later record.

    Attributes:
        lock: hold it while changing what is drawn.
    """

    def __init__(self, draw: Callable[[], dict[str, Any]]) -> None:
        """Takes a function that draws: it returns the values to log, does not raise, and takes `lock` itself."""
        self.lock = Lock()
        self._draw = draw
        self._thread: Thread | None = None
        self._drawn: dict[str, Any] = {}

    def start(self) -> None:
        """Starts to draw, unless a picture is in the making or has not been taken yet."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="gwa_logging picture", daemon=True)
            self._thread.start()

    def take(self, *, wait: bool = False) -> dict[str, Any]:
        """Returns the values of the finished picture, once; empty if there is none.

        Args:
            wait: waits for a picture in the making, for `DRAWN_WITHIN` seconds at most.
        """
        if self._thread is None:
            return {}
        self._thread.join(DRAWN_WITHIN if wait else 0.0)
        if self._thread.is_alive():
            return {}
        self._thread = None
        drawn, self._drawn = self._drawn, {}
        return drawn

    def _run(self) -> None:
        self._drawn = self._draw()
