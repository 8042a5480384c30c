"""Local trackers for the benchmarks. Each is set up in this process by environment variables, as users do it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

EXPERIMENT = "gwa"

START_WITHIN = 180.0
"""Seconds in which an MLflow server must answer; a quiet machine needs about five."""


class Tracker(NamedTuple):
    """A tracker that stores in a local folder.

    Attributes:
        backend: its name for `watch(backend=)`.
        set_up: points it to a folder.
    """

    backend: str
    set_up: Callable[[Path], None]


class MlflowServer:
    """`mlflow server` on loopback with its data in a folder. Can be stopped and started again on the same data and port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        host, port = self.address.split(":")
        quiet = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port, "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "server-artifacts")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | quiet
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_WITHIN
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "server.log").read_text())

    def _is_healthy(self) -> bool:
        assert self._process is not None
        try:
            with urllib.request.urlopen(f"http://{self.address}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
            return False

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of the server."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Ends the server; does nothing if it does not run."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(60)
            self._process = None


servers: list[MlflowServer] = []
"""The servers that `MLFLOW_SERVER` has started in this process."""


def signal_servers(number: int) -> None:
    """Sends a signal to all servers of this process."""
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
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
    server = MlflowServer(folder)
    servers.append(server)
    server.start()
    _set_up_mlflow(folder, f"http://{server.address}")


def _set_up_wandb(folder: Path) -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def _set_up_trackio(folder: Path) -> None:
    os.environ |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}  # read when Trackio is imported


MLFLOW_SQLITE = Tracker("mlflow", _set_up_mlflow_sqlite)
MLFLOW_SERVER = Tracker("mlflow", _set_up_mlflow_server)
WANDB = Tracker("wandb", _set_up_wandb)
TENSORBOARD = Tracker("tensorboard", lambda folder: None)
TRACKIO = Tracker("trackio", _set_up_trackio)
