"""The progress bar of `Monitor.epochs`, if tqdm is installed: it is an optional dependency.

There is one bar on the screen, below all messages: a message of this library replaces the bar, and the next epoch draws it
again.
"""

import logging
import os
import warnings
from typing import Any, Self

from gwa_logging.records import EpochReport

logger = logging.getLogger("gwa_logging")

_open_bars: "set[EpochBar]" = set()


class EpochBar:
    """Counts epochs and shows the last report's GWA and separation."""

    def __init__(self, total: int, done: int) -> None:
        self._bar: Any = None
        self._process = os.getpid()
        try:
            with warnings.catch_warnings():
                # In a notebook without ipywidgets, tqdm asks for them; the bar is a line of text there.
                warnings.filterwarnings("ignore", message="IProgress not found")
                from tqdm.auto import tqdm
        except ModuleNotFoundError:
            return
        self._bar = tqdm(total=total, initial=done, unit="epoch", desc="GWA")

    def advance(self, report: EpochReport) -> None:
        """Counts one epoch."""
        if self._bar is not None:
            self._bar.set_postfix(gwa=f"{report.gwa:.3g}", separation=f"{report.separation:.3g}", refresh=False)
            self._bar.update()

    def clear(self) -> None:
        """Removes the bar from the screen until the next epoch."""
        if (
            self._bar is not None and os.getpid() == self._process
        ):  # tqdm's lock may be held forever in a forked process
            self._bar.clear()

    def __enter__(self) -> Self:
        _open_bars.add(self)
        logger.addFilter(_clear_before)
        return self

    def __exit__(self, *error: object) -> None:
        _open_bars.discard(self)
        if not _open_bars:
            logger.removeFilter(_clear_before)
        if self._bar is not None:
            self._bar.close()


def clear_bars() -> None:
    """Makes room for a message on the screen."""
    for bar in tuple(_open_bars):
        bar.clear()


def _clear_before(record: logging.LogRecord) -> bool:
    """Makes room for a logged message. A filter of the logger, because that is called before the message is written."""
    if record.levelno >= logging.INFO:
        clear_bars()
    return True
