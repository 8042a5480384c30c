"""The named errors. Every one says what was found and what to do about it.

All of them are raised while starting up or from a call that the user made; a fault in the middle of training is
counted by `gwa_logging.faults.Faults` instead and never raised.
"""

from collections.abc import Iterable

from gwa_logging.redact import redact_urls


class GwaError(Exception):
    """Base of every error that gwa_logging raises on purpose. Messages never show credentials."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact_urls(str(message)))


class InvalidInputError(GwaError, ValueError):
    """An argument has a wrong value, shape or dtype; the message names the argument and the remedy."""


class HeadNotFoundError(GwaError):
    """The classifier head was not found, or several modules could be it.

    Attributes:
        candidates: one line per module that could be a head: dotted path and shape.
    """

    def __init__(self, found: str, candidates: Iterable[str] = ()) -> None:
        self.candidates = tuple(candidates)
        listing = "".join(f"\n  {line}" for line in self.candidates)
        super().__init__(
            f"{found}\nCandidates:{listing}\nName it: watch(model, head='dotted.path')." if listing else found
        )


class NoObservationsError(GwaError):
    """An epoch was ended, but no training step has passed the probe."""


class MissingDependencyError(GwaError, ImportError):
    """A third-party package was asked for and is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'gwa-logging[{extra}]'")


class BackendError(GwaError):
    """A tracking backend cannot be used. Raised into the user's code while starting up only."""
