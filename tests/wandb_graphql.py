"""A local stand-in for W&B's GraphQL API, as far as wandb-workspaces asks for it: projects, runs, and saving views."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self

from tests.json_over_http import read_body, send_json

ENTITY, PROJECT, RUN = "team", "digits", "run1"
USER = {
    "id": "u",
    "name": "user",
    "username": "user",
    "email": "user@localhost",
    "admin": False,
    "flags": "{}",
    "entity": ENTITY,
    "deletedAt": None,
    "apiKeys": None,
    "teams": {"edges": []},
}


class GraphQLServer:
    """The server, a context manager. It knows one project with one run.

    Attributes:
        address: for WANDB_BASE_URL.
        summary: the run's summary.
        views: what was saved: the variables of each mutation, with the parsed `spec`.
        status: the HTTP status of each answer, by operation; 200 if it is missing.
        errors: the GraphQL error of an answer, by operation.
        unknown: operations that it was asked for and does not know.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.views: list[dict[str, Any]] = []
        self.status: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        self.unknown: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = read_body(self)
                if not self.path.startswith("/graphql"):  # W&B's own statistics
                    return send_json(self, 404, {})
                asked = json.loads(body)
                found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                operation = found[1] if found else ""
                answer = {"data": server._query(operation, asked.get("variables") or {})}
                if operation in server.errors:
                    answer = {"data": None, "errors": [{"message": server.errors[operation], "path": [operation]}]}
                return send_json(self, server.status.get(operation, 200), answer)

            def do_HEAD(self) -> None:
                send_json(self, 200, {})

            def log_message(self, *arguments: Any) -> None:
                """Logs nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"__typename": "Project", "id": "p", "internalId": "1", "name": PROJECT, "entityName": ENTITY}
        project |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": USER, "readOnly": False}
        entity = variables.get("entity") or variables.get("entityName")
        name = variables.get("project") or variables.get("projectName") or variables.get("name")
        known = (entity, name) == (ENTITY, PROJECT)
        match operation:
            case "Viewer" | "GetViewer" | "GetDefaultEntity":
                return {"viewer": USER}
            case "GetProject":
                return {"project": project if known else None}
            case "GetProjects":
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                return {"models": {"pageInfo": page, "edges": [{"node": project}]}}
            case "Run":
                run = self._run() if known and variables.get("name") == RUN else None
                return {"project": {**project, "run": run}}
            case "ProjectInternalId":
                return {"project": {"id": "p", "internalId": "1"}}
            case "UpsertView2" | "upsertView":
                if operation not in self.status and operation not in self.errors:
                    self.views.append({**variables, "spec": json.loads(variables["spec"])})
                view = {key: variables.get(key) for key in ("name", "displayName", "description", "type", "spec")}
                view |= {"id": "Vmlldzox", "project": project, "updatedAt": "2026-01-01T00:00:00"}
                return {"upsertView": {"view": view, "inserted": True}}
        self.unknown.append(operation)
        return {}

    def _run(self) -> dict[str, Any]:
        return {
            "id": f"id-{RUN}",
            "name": RUN,
            "displayName": "a-run",
            "tags": [],
            "sweepName": None,
            "state": "finished",
            "group": None,
            "jobType": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "description": None,
            "notes": None,
            "historyLineCount": 1,
            "user": USER,
            "projectId": "1",
            "config": "{}",
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(self.summary),
        }
