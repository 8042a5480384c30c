"""What the stand-ins for W&B's servers share: reading a request's body and answering it in JSON."""

import gzip
import json
from http.server import BaseHTTPRequestHandler
from typing import Any


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    """Returns the whole body, uncompressed."""
    if request.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(request.rfile.readline(), 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        body = b"".join(parts)
    else:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
    return gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body


def send_json(request: BaseHTTPRequestHandler, status: int, answer: dict[str, Any]) -> None:
    """Answers a request. HEAD gets only the headers."""
    body = json.dumps(answer).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
