"""Masks credentials in text before it is displayed, logged or stored.

Tracking URIs carry credentials in many forms: `http://user:password@host`, `postgresql://user:pass/word@host/db`,
`https://host?token=...`, a presigned `X-Amz-Signature=...`. Error messages of trackers quote them. Where a text is
ambiguous, these functions mask too much rather than too little.
"""

import re
from urllib.parse import unquote

MASK = "***"

# A URL ends at white space or where the next one begins. The bounded length of the scheme keeps the matching time linear.
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
    """Replaces the credentials in a text with `***`.

    Args:
        text: any text; usually the address of a server, or an error message that contains one.

    Returns:
        The text, in which these are masked: the user information of URLs, query parameters with secret names (`token`,
        `api_key`, `sig`, ...) and the values of assignments such as `password=...`.

    >>> redact_urls("http://me:p@ss@host:5000/#/runs/1 and sqlite:///mlflow.db")
    'http://***@host:5000/#/runs/1 and sqlite:///mlflow.db'
    >>> redact_urls("https://host/path?run=7&token=abc")
    'https://host/path?run=7&token=***'
    """
    if "://" in text:
        text = _URL.sub(_mask_user, text)
    if "=" in text or ":" in text:
        text = _PARAMETER.sub(_mask_value, text)
        text = _ASSIGNMENT.sub(rf"\g<start>{MASK}", text)
    return text


def has_secret(error: BaseException) -> bool:
    """Returns True if the message of this error, or of an error that caused it, contains a credential."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if redact_urls(text := str(link)) != text:
            return True
        link = link.__cause__ or link.__context__
    return False


def _mask_user(url: re.Match[str]) -> str:
    """Masks user and password in a URL. Passwords may contain `/`, `?` and `#`: database drivers accept them unquoted."""
    rest = url["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_web = url["scheme"].lower() in ("http", "https")
    is_host = _HOST.fullmatch(authority) and (is_web or ":" not in authority)
    if "@" in rest and not is_host:
        rest = MASK + rest[rest.rindex("@") :]
    return f"{url['scheme']}://{rest}"


def _mask_value(parameter: re.Match[str]) -> str:
    """Masks the value of a query parameter if its name is that of a secret."""
    if _SECRET_PARAMETER.fullmatch(unquote(parameter["name"])):
        return f"{parameter['start']}{parameter['name']}={MASK}"
    return parameter[0]
