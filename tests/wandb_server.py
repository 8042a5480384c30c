"""A local stand-in for a W&B server, which can store a run, resume it and return its history.

It speaks what wandb-core 0.31 asks for: GraphQL by the name of the operation, and file_stream for the rows.
"""

import gzip
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from typing import Any, Self
from urllib.parse import urlsplit

ENTITY, PROJECT = "entity", "project"


class StoredRun:
    """One run on the server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, list[str]] = {}
        """The lines of each stream, such as wandb-history.jsonl."""
        self.config = "{}"
        self.alerts: list[str] = []

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> str:
        return (self.lines.get("wandb-summary.json") or ["{}"])[-1]

    def write(self, stream: str, offset: int, content: list[str]) -> None:
        """Writes lines at an offset, over existing ones."""
        lines = self.lines.setdefault(stream, [])
        if stream == "wandb-summary.json":
            lines[:] = content[-1:]
        else:
            lines[offset : offset + len(content)] = content

    def bucket(self) -> dict[str, Any]:
        """The run as GraphQL describes it."""
        history = self.history
        last = history[-1]["_step"] if history else -1
        tail = json.dumps([json.dumps(row) for row in history[-1:]])
        owner = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}, "entityName": ENTITY}
        return {
            "id": f"id-{self.name}",
            "internalId": f"id-{self.name}",
            "name": self.name,
            "displayName": self.name,
            "description": None,
            "notes": None,
            "group": None,
            "jobType": None,
            "commit": None,
            "state": "running",
            "tags": [],
            "sweepName": None,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "readOnly": False,
            "user": {"name": "user", "username": "user"},
            "project": owner,
            "projectId": "1",
            "config": self.config,
            "wandbConfig": '{"t": 1}',
            "historyLineCount": len(history),
            "historyTail": tail,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "summaryMetrics": self.summary,
            "systemMetrics": "{}",
            "historyKeys": {"lastStep": last, "keys": {}},
            "files": {"edges": []},
            "fileCount": 0,
        }

    def rows(self, first: int, end: int, keys: list[str] | None = None) -> list[dict[str, Any]]:
        """Rows of the steps from `first` to `end` (exclusive) that have all `keys`; with `keys`, only these columns."""
        found = [row for row in self.history if first <= row["_step"] < end]
        if not keys:
            return found
        return [{key: row[key] for key in keys} for row in found if all(key in row for key in keys)]


class WandbServer:
    """The server, a context manager.

    Attributes:
        address: for WANDB_BASE_URL.
        runs: by id.
        taking: whether it takes rows; otherwise it answers them with status 500, and wandb-core tries again.
        unknown: operations that it was asked for and does not know.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.taking = True
        self.unknown: list[str] = []
        self._changed = Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self._body()
                path = urlsplit(self.path).path
                if path.startswith("/graphql"):
                    asked = json.loads(body)
                    self._answer(200, {"data": server._query(asked["query"], asked.get("variables") or {})})
                elif path.endswith("/file_stream"):
                    taken = server._stream(path.split("/")[-2], json.loads(body))
                    self._answer(200 if taken else 500, {"limits": {}})
                else:
                    self._answer(404, {})

            def do_PUT(self) -> None:
                self._body()
                self._answer(200, {})

            def do_GET(self) -> None:
                self._answer(200, {})

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    body = b"".join(parts)
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _answer(self, status: int, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                """Logs nothing."""

        class Http(ThreadingHTTPServer):
            def handle_error(self, *arguments: Any) -> None:
                """Ignores clients that were killed."""

        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def wait(self, until: Callable[[], bool], timeout: float = 60) -> bool:
        """Waits until a condition holds. Checks it after each write."""
        with self._changed:
            return self._changed.wait_for(until, timeout)

    def _stream(self, run: str, body: dict[str, Any]) -> bool:
        with self._changed:
            if not self.taking:
                return False
            for stream, part in body.get("files", {}).items():
                self.runs[run].write(stream, part["offset"], part["content"])
            self._changed.notify_all()
        return True

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found and found[1]
        name = str(variables.get("name") or variables.get("run") or variables.get("runName") or "")
        run = self.runs.get(name)
        bucket = run and run.bucket()
        project = {"id": "p", "name": PROJECT, "entityName": ENTITY, "readOnly": False}
        match operation:
            case "Viewer" | "GetDefaultEntity":
                teams = {"edges": [{"node": {"id": "e", "name": ENTITY}}]}
                return {"viewer": {"id": "v", "entity": ENTITY, "username": "user", "flags": "{}", "teams": teams}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "ServerInfo" | "ProbeServerCapabilities":
                versions = {"max_cli_version": "9.9.9", "min_cli_version": "0.0.1"}
                return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": None}}
            case "RunResumeStatus":
                return {"model": {**project, "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}
            case "UpsertBucket":
                stored = self.runs.setdefault(name, StoredRun(name))
                stored.config = variables.get("config") or stored.config
                return {"upsertBucket": {"bucket": stored.bucket(), "inserted": run is None}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.address}/storage/{file}"} for file in variables["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
                with self._changed:
                    self.runs[str(variables["runName"])].alerts.append(variables["text"])
                    self._changed.notify_all()
                return {"notifyScriptableRunAlert": {"success": True}}
            case "RunParquetHistory":
                return {"project": {"run": {"parquetHistory": {"parquetUrls": []}}}}
            case "HistoryPage" | "RunFullHistory":
                rows = run.rows(variables.get("minStep") or 0, variables.get("maxStep") or 1 << 60) if run else []
                return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}
            case "SampledHistoryPage":
                spec = json.loads(variables["spec"])
                rows = run.rows(spec["minStep"], spec["maxStep"] + 1, spec["keys"]) if run else []
                return {"project": {"run": {"sampledHistory": [[*rows]]}}}
            case "MarkRunFilesUploaded":
                return {"markRunFilesUploaded": {"success": True}}
        if bucket and "project(" in query:
            return {"project": {**project, "internalId": "1", "run": bucket}}
        self.unknown.append(str(operation))
        return {}
