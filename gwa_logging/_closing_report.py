"""Writes the reports of runs that are being closed, in a thread, so that closing waits for them only until a deadline.

A report is optional: without plotly, one line says how to make it; a report that fails is a fault.
"""

from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from gwa_logging._announce import announce
from gwa_logging.errors import MissingDependencyError
from gwa_logging.faults import Faults
from gwa_logging.report.page import REPORT_NAME, write_report


class ClosingReport:
    """The report of one run. The largest journals (20,000 intervals) take 2 s and 130 MB.

    Attributes:
        done: set once the report is written, or cannot be.
    """

    def __init__(self, folder: Path, faults: Faults) -> None:
        """Writes nothing yet.

        Args:
            folder: the run's folder, which contains the journal.
            faults: records a failure.
        """
        self.done = Event()
        self._folder, self._faults = folder, faults
        self._line: str | None = None

    def write(self) -> None:
        """Writes the report. Never raises."""
        try:
            self._line = f"report: {write_report(self._folder)}"
        except MissingDependencyError as error:
            self._line = f"no {REPORT_NAME}: {error}, then gwa-logging report {self._folder}"
        except Exception as error:  # noqa: BLE001 - closing must continue
            self._faults.record("report", f"{type(error).__name__}: {error}")
        finally:
            self.done.set()

    def end(self, deadline: float) -> None:
        """Waits until the report is written, or until `deadline` on the monotonic clock, and shows the user where it is."""
        if not self.done.wait(max(0.0, deadline - monotonic())):
            self._faults.record("report", f"not written in time; to write it: gwa-logging report {self._folder}")
        elif self._line is not None:
            announce(self._line)


def write_in_thread(reports: Sequence[ClosingReport]) -> None:
    """Writes the reports one after the other in a thread; without one if the interpreter no longer starts threads."""
    if not reports:
        return
    try:
        Thread(target=_write_all, args=(reports,), name="gwa_logging report", daemon=True).start()
    except RuntimeError:  # the interpreter is shutting down
        _write_all(reports)


def _write_all(reports: Sequence[ClosingReport]) -> None:
    for report in reports:
        report.write()
