"""Removes secrets from text before it is shown, logged or stored.

Tracking URIs carry credentials in many forms: `http://user:password@host`, `postgresql://user:pass/word@host/db`,
`https://host?token=...`, a presigned `X-Amz-Signature=...`. Errors of trackers quote them. Where a text is ambiguous,
too much is masked rather than too little.
"""

import re
from urllib.parse import unquote

MASK = "***"

# A URL ends at white space or where the next one begins. The length of the scheme is bounded to keep matching linear.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30})://(?P<rest>\S*?)(?=[A-Za-z][A-Za-z0-9+.-]{0,30}://|\s|\Z)")
_HOST = re.compile(r"(\[[^\]@]*\]|[^@:]*)(:\d*)?")
_PARAMETER = re.compile(r"(?P<start>[?&;#])(?P<name>[^=&;?#\s]{1,100})=[^&\s]*")
_SECRET_PARAMETER = re.compile(
    r"key|sig|pw|pass|pwd|auth|code|.*(token|secret|passw|api[_-]?key|access[_-]?key|credential|signature|authorization).*",
    re.IGNORECASE | re.DOTALL,
)
_ASSIGNMENT = re.compile(
    r"(?P<start>\b(?:[A-Za-z]{1,30}[_-]){0,5}(?:password|passwd|pwd|secret|api_?key|(?:access|auth)_token|(?-i:TOKEN))"
    r"['\"]?\s?[=:]\s?)(?P<value>'[^']*'|\"[^\"]*\"|[^\s&,;)\]}'\"]+)",
    re.IGNORECASE,
)


def redact_urls(text: str) -> str:
    """Replaces the credentials in a text by `***`.

    Args:
        text: anything; most often the address of a server, or an error message that quotes one.

    Returns:
        The text with the user information of URLs, query parameters with secret names (`token`, `api_key`, `sig`, ...) and
        the values of assignments such as `password=...` masked; unchanged if there are none.

    >>> redact_urls("http://me:p@ss@host:5000/#/runs/1 and sqlite:///mlflow.db")
    'http://***@host:5000/#/runs/1 and sqlite:///mlflow.db'
    >>> redact_urls("https://host/path?run=7&token=abc")
    'https://host/path?run=7&token=***'
    """
    if "://" in text:
        text = _URL.sub(_without_user, text)
    if "=" in text or ":" in text:
        text = _PARAMETER.sub(_without_value, text)
        text = _ASSIGNMENT.sub(rf"\g<start>{MASK}", text)
    return text


def has_secret(error: BaseException) -> bool:
    """Returns True if a traceback of this error, or of one that led to it, would show a secret."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if redact_urls(text := str(link)) != text:
            return True
        link = link.__cause__ or link.__context__
    return False


def _without_user(url: re.Match[str]) -> str:
    """A URL without its user and password. Passwords may hold `/`, `?` and `#`: database drivers take them unquoted."""
    rest = url["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_web = url["scheme"].lower() in ("http", "https")
    is_host = _HOST.fullmatch(authority) and (is_web or ":" not in authority)
    if "@" in rest and not is_host:
        rest = MASK + rest[rest.rindex("@") :]
    return f"{url['scheme']}://{rest}"


def _without_value(parameter: re.Match[str]) -> str:
    if _SECRET_PARAMETER.fullmatch(unquote(parameter["name"])):
        return f"{parameter['start']}{parameter['name']}={MASK}"
    return parameter[0]
