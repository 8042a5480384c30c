"""Whether a tracker's server answers, found out within seconds: the trackers' own clients try for minutes."""

import ssl
from concurrent.futures import Future
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CALL_WITHIN = 3.0
"""Seconds for connecting, for each address of a host, and for each answer."""

ANSWER_WITHIN = 8.0
"""Seconds altogether, also where looking up the host's name takes long."""


def check_reachable(url: str, path: str = "/") -> None:
    """Asks an HTTP server for anything, and takes any answer. Does nothing for other addresses, or behind a proxy, where
    there is no telling.

    Raises:
        OSError: no answer within `ANSWER_WITHIN` seconds.
        ValueError: the address has a port that is none.
    """
    scheme, host, port = urlsplit(url).scheme, urlsplit(url).hostname, urlsplit(url).port
    if scheme not in ("http", "https") or not host:
        return
    if getproxies().keys() & {scheme, "all"} and not proxy_bypass(host):
        return
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            _ask(scheme, host, port, path)
            answer.set_result(None)
        except HTTPException as error:
            answer.set_exception(ConnectionError(repr(error)))
        except Exception as error:  # noqa: BLE001 - raised again below
            answer.set_exception(error)

    Thread(target=ask, name="gwa_logging reach", daemon=True).start()
    try:
        answer.result(ANSWER_WITHIN)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {ANSWER_WITHIN:g} s") from None


def _ask(scheme: str, host: str, port: int | None, path: str) -> None:
    if scheme == "https":
        # Nothing secret is sent and nothing is believed, so whoever answers may have any certificate.
        line: HTTPConnection = HTTPSConnection(
            host, port, timeout=CALL_WITHIN, context=ssl._create_unverified_context()
        )
    else:
        line = HTTPConnection(host, port, timeout=CALL_WITHIN)
    try:
        line.request("HEAD", path)
        line.getresponse()
    finally:
        line.close()
