"""A local stand-in for a W&B server, which stores runs, their files and artifacts, and returns their history.

It speaks what wandb-core 0.31 asks for: GraphQL by the name of the operation, file_stream for the rows, and PUT for files.
It can fail, hang, and be stopped and started again at the same address.
"""

import json
import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote, unquote, urlsplit

import pytest
import wandb

from gwa_logging.records import EPOCH_KEYS, OPTIONAL_KEYS
from tests.json_over_http import read_body, send_json
from tests.trackers import INTERVAL_KEYS, OnWandb, Series, Tracker, TrackerContents

ENTITY, PROJECT = "entity", "project"

logger = logging.getLogger(__name__)


class StoredArtifact(NamedTuple):
    """One version of an artifact: the run that logged it, its name and type, and its files by path."""

    run: str
    name: str
    type: str
    files: dict[str, bytes]


class StoredRun:
    """One run on the server."""

    def __init__(self, name: str, project: str = PROJECT) -> None:
        self.name, self.project = name, project
        self.lines: dict[str, list[str]] = {}
        """The lines of each stream, such as wandb-history.jsonl."""
        self.config = "{}"
        self.alerts: list[str] = []
        self.files: dict[str, bytes] = {}
        """The uploaded files by path, such as the pictures in media/images."""
        self.is_finished = False

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
        owner = {"id": "p", "name": self.project, "entity": {"id": "e", "name": ENTITY}, "entityName": ENTITY}
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
        artifacts: the committed ones, in order.
        taking: whether it takes rows; otherwise it answers them with status 500, and wandb-core tries again.
        status: its answer to every request, if not 200.
        hanging: whether it answers nothing. It answers later what it was asked meanwhile.
        statuses: how often it gave which status.
        unknown: operations that it was asked for and does not know. It answers them with an error, and logs them.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[StoredArtifact] = []
        self.taking = True
        self.status = 200
        self.statuses: dict[int, int] = {}
        self.unknown: list[str] = []
        self._begun_artifacts: dict[str, StoredArtifact] = {}
        self._changed = Condition()
        self._may_answer = Event()
        self._may_answer.set()
        self._connections: set[socket.socket] = set()
        self._port = 0  # any free one
        self._listen()
        self._port = self._http.server_address[1]
        self.address = f"http://127.0.0.1:{self._port}"

    @property
    def hanging(self) -> bool:
        return not self._may_answer.is_set()

    @hanging.setter
    def hanging(self, value: bool) -> None:
        self._may_answer.clear() if value else self._may_answer.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.hanging = False
        self.stop()

    def start(self) -> None:
        """Starts to answer; after `stop`, at the same address."""
        if self._http is None:
            self._listen()
        Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Ends every connection and refuses new ones, as a machine without the server. Keeps what was stored."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait(self, until: Callable[[], bool], timeout: float = 60) -> bool:
        """Waits until a condition holds. Checks it after each write and each answer."""
        with self._changed:
            return self._changed.wait_for(until, timeout)

    def _listen(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def finish(self) -> None:
                server._connections.discard(self.connection)
                super().finish()

            def do_POST(self) -> None:
                body, path = read_body(self), urlsplit(self.path).path
                if not self._accepts():
                    return
                if path.startswith("/graphql"):
                    asked = json.loads(body)
                    self._answer(200, server._query(asked["query"], asked.get("variables") or {}))
                elif path.endswith("/file_stream"):
                    taken = server._stream(path.split("/")[-2], json.loads(body))
                    self._answer(200 if taken else 500, {"limits": {}})
                else:
                    self._answer(404, {})

            def do_PUT(self) -> None:
                body, path = read_body(self), urlsplit(self.path).path
                if self._accepts():
                    server._store(path, body)
                    self._answer(200, {})

            def do_GET(self) -> None:
                if self._accepts():
                    self._answer(200, {})

            def _accepts(self) -> bool:
                server._may_answer.wait()
                if server.status != 200:
                    self._answer(server.status, {"error": "out of order"})
                return server.status == 200

            def _answer(self, status: int, answer: dict[str, Any]) -> None:
                send_json(self, status, answer)
                with server._changed:
                    server.statuses[status] = server.statuses.get(status, 0) + 1
                    server._changed.notify_all()

            def log_message(self, *arguments: Any) -> None:
                """Logs nothing."""

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False  # `stop` ends the connections itself
            allow_reuse_address = True

            def handle_error(self, *arguments: Any) -> None:
                """Ignores clients that were killed."""

        self._http: ThreadingHTTPServer | None = Http(("127.0.0.1", self._port), Handler)

    def _stream(self, run: str, body: dict[str, Any]) -> bool:
        with self._changed:
            if not self.taking:
                return False
            for stream, part in body.get("files", {}).items():
                self.runs[run].write(stream, part["offset"], part["content"])
            self.runs[run].is_finished = bool(body.get("complete"))
            self._changed.notify_all()
        return True

    def _store(self, path: str, body: bytes) -> None:
        """Stores an uploaded file of a run (/storage/run/ID/PATH) or of an artifact (/storage/artifact/ID/PATH)."""
        _, _, kind, owner, file = (unquote(part) for part in path.split("/", 4))
        with self._changed:
            (self.runs if kind == "run" else self._begun_artifacts)[owner].files[file] = body
            self._changed.notify_all()

    def _upload_url(self, kind: str, owner: str, file: str) -> str:
        return f"{self.address}/storage/{kind}/{owner}/{quote(file, safe='')}"

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = str(found and found[1])
        with self._changed:
            data = self._about_run(operation, query, variables)
            if data is None:
                data = self._about_artifact(operation, variables)
            if data is not None:
                return {"data": data}
            self.unknown.append(operation)
        logger.warning("unknown GraphQL operation %s with %s: %s", operation, variables, query)
        return {"data": None, "errors": [{"message": f"unknown operation {operation}"}]}

    def _about_artifact(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        match operation:
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                asked = variables["input"]
                id = f"artifact-{len(self._begun_artifacts)}"
                self._begun_artifacts[id] = StoredArtifact(
                    asked["runName"], asked["artifactCollectionName"], asked["artifactTypeName"], {}
                )
                created = {"id": id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": created}}
            case "CreateArtifactManifest":
                id = variables["artifactID"]
                upload = {"uploadUrl": self._upload_url("artifact", id, variables["name"]), "uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": id, "file": upload}}}
            case "CreateArtifactFiles":
                files = []
                for file in variables["input"]["artifactFiles"]:
                    id, name = file["artifactID"], file["name"]
                    upload = {"uploadUrl": self._upload_url("artifact", id, name), "uploadHeaders": []}
                    files.append(
                        {"node": {"storagePath": name, "uploadMultipartUrls": None, "artifact": {"id": id}, **upload}}
                    )
                return {"createArtifactFiles": {"files": {"edges": files}}}
            case "CommitArtifact":
                self.artifacts.append(self._begun_artifacts[variables["artifactID"]])
                self._changed.notify_all()
                return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        return None

    def _about_run(self, operation: str, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        name = str(variables.get("name") or variables.get("run") or variables.get("runName") or "")
        in_project = variables.get("project") or PROJECT
        run = self.runs.get(name)
        if run and operation != "UpsertBucket" and "project" in variables and run.project != in_project:
            run = None
        bucket = run and run.bucket()
        project = {"id": "p", "name": in_project, "entityName": ENTITY, "readOnly": False}
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
                stored = self.runs.setdefault(name, StoredRun(name, in_project))
                stored.config = variables.get("config") or stored.config
                return {"upsertBucket": {"bucket": stored.bucket(), "inserted": run is None}}
            case "DeleteRun":
                self.runs = {id: stored for id, stored in self.runs.items() if f"id-{id}" != variables["id"]}
                return {"deleteRun": {"clientMutationId": None}}
            case "CreateRunFiles":
                urls = {file: self._upload_url("run", name, file) for file in variables["files"]}
                files = [{"name": file, "uploadUrl": url} for file, url in urls.items()]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
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
        if "project(" in query and name and "artifact" not in query.lower():
            return {"project": {**project, "internalId": "1", "run": bucket}}
        return None


class OnWandbServer(Tracker):
    """W&B online, with the stand-in for its server. Without one, all share a server from the first `set_up` until `stop`."""

    backend = "wandb"
    shared: ClassVar[WandbServer | None] = None

    def __init__(self, server: WandbServer | None = None) -> None:
        self._server = server

    @property
    def server(self) -> WandbServer:
        server = self._server or OnWandbServer.shared
        assert server is not None
        return server

    @classmethod
    def stop(cls) -> None:
        if OnWandbServer.shared is not None:
            OnWandbServer.shared.stop()
            OnWandbServer.shared = None

    def set_up(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        if self._server is None and OnWandbServer.shared is None:
            OnWandbServer.shared = WandbServer()
            OnWandbServer.shared.start()
        OnWandb().set_up(folder, patch)
        patch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # whole seconds; the default is 15
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        online = {
            "MODE": "online",
            "BASE_URL": self.server.address,
            "API_KEY": "0" * 40,
            "ENTITY": ENTITY,
            "PROJECT": PROJECT,
        }
        for key, value in {**online, "CACHE_DIR": str(folder), "DATA_DIR": str(folder)}.items():
            patch.setenv(f"WANDB_{key}", value)

    def start(self) -> wandb.Run:
        return wandb.init(reinit="create_new")

    def log(self, run: wandb.Run, value: float) -> None:
        run.log({"user/loss": value})

    def end(self, run: wandb.Run) -> None:
        run.finish()

    def ended(self, run: wandb.Run) -> bool:
        return self.server.runs[run.id].is_finished

    def read(self, run: wandb.Run) -> TrackerContents:
        return self.read_again(run.id)

    def read_again(self, run: str) -> TrackerContents:
        stored = self.server.runs[run.rpartition("/")[2]]

        def column(axis: str, key: str) -> Series:
            return [(row[axis], row[key]) for row in stored.history if axis in row and key in row]

        axes = {"gwa/step": INTERVAL_KEYS, "gwa/epoch": (*EPOCH_KEYS, *OPTIONAL_KEYS)}
        numbers = {key: column(axis, f"gwa/{key}") for axis, keys in axes.items() for key in keys}
        totals = [(step, sum(histogram["values"])) for step, histogram in column("gwa/step", "gwa/scores")]
        return TrackerContents(numbers, totals, stored.alerts, column("_step", "user/loss"))
