"""The errors of this library. Each message states what was found and what to do about it.

They are raised during start-up, or from a call that the user made. Errors inside a training step are never raised:
`gwa_logging.faults.Faults` counts them.
"""

from collections.abc import Iterable

from gwa_logging.redact import redact_urls


class GwaError(Exception):
    """Base class of all errors of this library. Credentials in the message are masked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact_urls(str(message)))


class InvalidInputError(GwaError, ValueError):
    """An argument has a wrong value, shape or dtype. The message names the argument and what is expected."""


class HeadNotFoundError(GwaError):
    """The classifier head was not found, or several modules could be the head.

    Attributes:
        candidates: one line per module that could be the head, with its dotted path and shape.
    """

    def __init__(self, found: str, candidates: Iterable[str] = ()) -> None:
        self.candidates = tuple(candidates)
        listing = "".join(f"\n  {line}" for line in self.candidates)
        super().__init__(
            f"{found}\nCandidates:{listing}\nName it: watch(model, head='dotted.path')." if listing else found
        )


class NoObservationsError(GwaError):
    """An epoch was ended, but the probe at the head has seen no training step."""


class MissingDependencyError(GwaError, ImportError):
    """A third-party package is needed and not installed. The message has the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'gwa-logging[{extra}]'")


class BackendError(GwaError):
    """A backend cannot be used. Raised only during start-up: a tracker that fails later never interrupts training."""
