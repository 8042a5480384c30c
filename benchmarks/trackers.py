"""Local trackers for the benchmarks. Each is set up in this process by environment variables, as users do it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

EXPERIMENT = "gwa"


class Tracker(NamedTuple):
    """A tracker that stores in a local folder.

    Attributes:
        backend: its name for `watch(backend=)`.
        set_up: points it to a folder.
    """

    backend: str
    set_up: Callable[[Path], None]


class MlflowServer:
    """`mlflow server` on loopback, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "server-artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | quiet, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.signal(15)
                raise RuntimeError((folder / "server.log").read_text())

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
            return False

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


servers: list[MlflowServer] = []
"""The servers that `MLFLOW_SERVER` has started in this process."""


def stop_servers(number: int = 15) -> None:
    """Sends a signal to all servers of this process."""
    for server in servers:
        server.signal(number)


def start_wandb_run(folder: Path) -> Any:
    """An offline run, started as a user starts one; it is not the active run."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb.init(mode="offline", dir=folder, settings=settings, reinit="create_new")


def _set_up_mlflow(folder: Path, uri: str) -> None:
    from mlflow import MlflowClient

    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": EXPERIMENT}
    artifacts = (folder / "artifacts").as_uri() if uri.startswith("sqlite") else None
    MlflowClient(uri).create_experiment(EXPERIMENT, artifact_location=artifacts)


def _set_up_mlflow_sqlite(folder: Path) -> None:
    _set_up_mlflow(folder, f"sqlite:///{folder / 'mlflow.db'}")


def _set_up_mlflow_server(folder: Path) -> None:
    servers.append(MlflowServer(folder))
    _set_up_mlflow(folder, servers[-1].address)


def _set_up_wandb(folder: Path) -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def _set_up_trackio(folder: Path) -> None:
    os.environ |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}  # read when Trackio is imported


MLFLOW_SQLITE = Tracker("mlflow", _set_up_mlflow_sqlite)
MLFLOW_SERVER = Tracker("mlflow", _set_up_mlflow_server)
WANDB = Tracker("wandb", _set_up_wandb)
TENSORBOARD = Tracker("tensorboard", lambda folder: None)
TRACKIO = Tracker("trackio", _set_up_trackio)
