"""The progress bar of `Monitor.epochs`, if tqdm is installed: it is an optional dependency."""

from typing import Any, Self

from gwa_logging.records import EpochReport


class EpochBar:
    """Counts epochs and shows the last report's GWA and separation."""

    def __init__(self, total: int, done: int) -> None:
        self._bar: Any = None
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError:
            return
        self._bar = tqdm(total=total, initial=done, unit="epoch", desc="GWA")

    def advance(self, report: EpochReport) -> None:
        """Counts one epoch."""
        if self._bar is not None:
            self._bar.set_postfix(gwa=f"{report.gwa:.3g}", separation=f"{report.separation:.3g}", refresh=False)
            self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
