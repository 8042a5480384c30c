"""Checks within seconds that a tracker's server responds. The trackers' own clients retry for minutes."""

import ssl
from concurrent.futures import Future
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CONNECT_WITHIN = 3.0
"""Seconds for each connection (one for each address of the host), and for each response."""

RESPONSE_WITHIN = 8.0
"""Seconds in total, including a slow DNS look-up."""


def check_reachable(url: str, path: str = "/") -> None:
    """Sends an HTTP request, and accepts any response. Does nothing for other protocols and behind a proxy.

    Raises:
        OSError: no response within `RESPONSE_WITHIN` seconds.
        ValueError: the port of the address is not a number.
    """
    scheme, host, port = urlsplit(url).scheme, urlsplit(url).hostname, urlsplit(url).port
    if scheme not in ("http", "https") or not host:
        return
    if getproxies().keys() & {scheme, "all"} and not proxy_bypass(host):
        return
    response: Future[None] = Future()

    def send_request() -> None:
        try:
            _request(scheme, host, port, path)
            response.set_result(None)
        except HTTPException as error:
            response.set_exception(ConnectionError(repr(error)))
        except Exception as error:  # noqa: BLE001 - raised again below
            response.set_exception(error)

    Thread(target=send_request, name="gwa_logging reach", daemon=True).start()
    try:
        response.result(RESPONSE_WITHIN)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no response within {RESPONSE_WITHIN:g} s") from None


def _request(scheme: str, host: str, port: int | None, path: str) -> None:
    if scheme == "https":
        # The request contains no secret and the response is not used, so the certificate does not matter.
        connection: HTTPConnection = HTTPSConnection(
            host, port, timeout=CONNECT_WITHIN, context=ssl._create_unverified_context()
        )
    else:
        connection = HTTPConnection(host, port, timeout=CONNECT_WITHIN)
    try:
        connection.request("HEAD", path)
        connection.getresponse()
    finally:
        connection.close()
