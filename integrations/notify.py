"""Notifications about the stop alert, through Apprise: Slack, Discord, Teams, mail, ntfy and about 175 other services.

Each URL is a backend: it has its own thread, retries, and a position in the journal. So a service that is down neither
blocks training nor the other services, and receives the alert once it is back. The URLs contain credentials; only their
schemes appear in errors, faults and the journal, and Apprise's own log messages are masked.
"""

import logging
import re
from collections.abc import Sequence
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import apprise
from apprise.attachment.memory import AttachMemory
from apprise.manager_plugins import NotificationManager

from gwa_logging.errors import BackendError, InvalidInputError, MissingDependencyError
from gwa_logging.integrations._tracker import Tracker
from gwa_logging.journal import JournalReader
from gwa_logging.records import AlertWithdrawal, EpochReport, IntervalRecord, RunRecord, StopAlert
from gwa_logging.redact import MASK, redact_urls

try:
    from PIL import Image

    from gwa_logging.integrations.heatmap_picture import PictureSeries
except ModuleNotFoundError as error:
    if error.name != "PIL":
        raise
    raise MissingDependencyError("pillow", "notify") from error

DOCUMENTATION = "https://github.com/caronc/apprise/wiki"

_SHORTEST_SECRET = 4  # characters; masking shorter parts of a URL would make messages unreadable


class Notifier(Tracker):
    """Sends the stop alert, and its withdrawal, to one service.

    Attributes:
        masked: the URL without its credentials: the scheme only.
    """

    is_notifier = True

    def __init__(self, url: str, folder: Path | None = None) -> None:
        """Checks the URL; sends nothing.

        Args:
            url: an Apprise URL, such as "slack://..." or "mailto://...".
            folder: the run's folder, which the message names.

        Raises:
            InvalidInputError: the scheme is unknown, or a part of the URL is missing. The message does not contain the URL.
        """
        super().__init__()
        self.masked, self.name = masked(url), f"notify {scheme_of(url)}"
        self._url, self._folder = url, folder
        self._run: RunRecord | None = None
        self._service = _open_service(url)
        self._pictures = PictureSeries()
        self._tried: StopAlert | None = None

    def on_run(self, run: RunRecord) -> None:
        self._run = run

    def on_interval(self, interval: IntervalRecord) -> None:
        self._pictures.add(interval)

    def on_epoch(self, report: EpochReport) -> None:
        self._pictures.add_epoch(report)

    def on_alert(self, alert: StopAlert) -> None:
        """Sends the alert with the picture of the scores.

        Some services accept the text and refuse the picture, and Apprise reports both as one failure. So the attempts
        after the first are without the picture: no text is sent more than twice because of a picture, and a picture that
        cannot be drawn does not hold the alert back.
        """
        is_first_attempt, self._tried = self._tried != alert, alert
        if is_first_attempt:
            self._pictures.add_alert(alert)
        picture = self._draw() if is_first_attempt else None
        self.send(StopAlert.TITLE, self._with_run(alert.text), apprise.NotifyType.WARNING, picture)

    def on_withdrawal(self, withdrawal: AlertWithdrawal) -> None:
        text = f"{withdrawal.message} Training can continue."
        self.send(AlertWithdrawal.TITLE, self._with_run(text), apprise.NotifyType.INFO)

    def send(self, title: str, text: str, kind: apprise.NotifyType, picture: bytes | None = None) -> None:
        """Sends a message, and waits until the service has accepted it.

        Raises:
            BackendError: the service refused it, or could not be reached.
        """
        attachment = picture and AttachMemory(content=picture, name="scores.png", mimetype="image/png")
        result = self._service.notify(
            body=text, title=title, notify_type=kind, body_format=apprise.NotifyFormat.TEXT, attach=attachment or None
        )
        if not result:
            reason = mask("; ".join(entry.message for entry in result.logs()), self._url) or "no reason was given"
            raise BackendError(f"{self.masked} did not accept the message: {reason}")

    def _draw(self) -> bytes | None:
        """Draws the scores so far, as a PNG; None if there are none."""
        if not self._pictures.has_columns:
            return None
        file = BytesIO()
        self._pictures.draw().save(file, format="PNG")
        return file.getvalue()

    def _with_run(self, text: str) -> str:
        """Adds the name, head and place of the run, so that readers with several runs know which one is meant."""
        lines = [f"Run: {self._folder.name}" if self._folder else "Run"]
        if self._run:
            lines[0] += f" ({self._run.name}), {self._run.head}"
            lines += [ref.url for ref in self._run.places.values() if ref.url]
        if self._folder:
            lines.append(f"Journal and report: {self._folder}")
        return "\n".join([text, "", *lines])


def open_notifiers(urls: Sequence[str], folder: Path | None = None) -> list[Notifier]:
    """Checks the URLs and returns a notifier for each; sends nothing.

    Raises:
        InvalidInputError: a URL is wrong.
    """
    return [Notifier(url, folder) for url in urls]


def send_test(notifier: Notifier) -> None:
    """Sends a test message with a small picture.

    Raises:
        BackendError: the service did not accept it.
    """
    file = BytesIO()
    Image.new("RGB", (64, 48), "steelblue").save(file, format="PNG")
    text = "A test of watch(notify=...). A stop alert looks like this, with a picture of the scores."
    notifier.send("GWA: test", text, apprise.NotifyType.INFO, file.getvalue())


def send_standing_alert(notifier: Notifier, journal: Path) -> bool:
    """Sends the stop alert that stands at the end of a journal, whether or not the service has received it before.

    Returns:
        False if no alert stands: none fired, or the last one was withdrawn. Then nothing is sent.

    Raises:
        InvalidInputError: the journal is of another version.
        BackendError: the service did not accept the message, neither with the picture nor without it.
    """
    standing: StopAlert | None = None
    for record in JournalReader(journal):
        if isinstance(record, StopAlert):
            standing = record
        elif isinstance(record, AlertWithdrawal):
            standing = None
        else:
            notifier.write(record)
    if standing is None:
        return False
    try:
        notifier.write(standing)
    except Exception:  # noqa: BLE001 - the picture is refused or cannot be drawn; the second attempt is without it
        notifier.write(standing)
    return True


def scheme_of(url: str) -> str:
    """Returns the part of a URL that names the service, or "" if there is none."""
    scheme, separator, _ = url.strip().partition("://")
    return scheme.lower() if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,30}", scheme) else ""


def masked(url: str) -> str:
    """Masks everything in a URL except its scheme: of many services the path or the host is the secret.

    >>> masked("slack://TokenA/TokenB/TokenC")
    'slack://***'
    """
    return f"{scheme_of(url)}://{MASK}"


def mask(text: str, url: str) -> str:
    """Masks every part of a URL that occurs in a text, whole or alone, encoded or decoded."""
    rest = url.strip().partition("://")[2]
    parts = {part for piece in (rest, unquote(rest)) for part in (piece, *re.split(r"[/?&=:@#,]", piece))}
    for part in sorted(parts, key=len, reverse=True):
        if len(part) >= _SHORTEST_SECRET:
            text = text.replace(part, MASK)
    return redact_urls(text)


class _MaskUrls(logging.Filter):
    """Masks this library's URLs in the messages of a logger. Apprise logs whole addresses at the level DEBUG."""

    def __init__(self) -> None:
        super().__init__()
        self._urls: tuple[str, ...] = ()  # replaced, never changed: other threads may log meanwhile

    def add(self, url: str) -> None:
        self._urls = tuple({*self._urls, url})

    def filter(self, record: logging.LogRecord) -> bool:
        before = after = record.getMessage()
        for url in self._urls:
            after = mask(after, url)
        if after != before:
            record.msg, record.args = after, None
        return True


_mask_urls = _MaskUrls()
logging.getLogger("apprise").addFilter(_mask_urls)


def _open_service(url: str) -> apprise.Apprise:
    schemes = _schemes()
    scheme = scheme_of(url)
    if not scheme:
        raise InvalidInputError(f"notify: expected a URL of Apprise, such as 'slack://...'; see {DOCUMENTATION}")
    if scheme not in schemes and scheme not in ("http", "https"):  # web addresses of some services are accepted
        nearest = get_close_matches(scheme, schemes, n=1)
        suggestion = f"; did you mean '{nearest[0]}://'" if nearest else "."
        raise InvalidInputError(f"notify: unknown service '{scheme}://'{suggestion}; see {DOCUMENTATION}")
    _mask_urls.add(url)
    service = apprise.Apprise()
    if not service.add(url):
        raise InvalidInputError(
            f"notify: Apprise cannot read the URL {masked(url)}: a token, host or other part of it is missing or invalid; "
            f"see {DOCUMENTATION}"
        )
    return service


def _schemes() -> list[str]:
    return [str(scheme) for scheme in NotificationManager().schemas()]
