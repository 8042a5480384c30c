"""Takes pictures of the first screen of each dashboard, after one run that logs to all of them.

python examples/screenshots.py docs/images

Needs the extras mlflow, tensorboard, trackio and report, the package websockets, and Chromium. A screen is 1400 x 900
pixels, as a browser shows it without a click: MLflow and the report in light and dark, TensorBoard, Trackio's metrics and
its media. Also saves the newest picture of the scores, as all trackers get it.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from websockets.sync.client import connect

WIDTH, HEIGHT = 1400, 900
PALETTE = {"colors": 256, "method": Image.Quantize.MAXCOVERAGE}
"""Makes the files a quarter as large. Pillow's default method loses colours of few pixels, such as those of lines."""

START = 180.0
"""Seconds in which a server must answer and a page must have loaded, on a busy machine."""

HIDE_TOOLBARS = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar{display:none!important}</style>')"
"""Hides plotly's toolbars: a browser shows them only while the mouse is over a plot, one without a window shows them always."""

SETTLE = 3.0
"""Seconds for the animations of a page that has loaded."""


class Screen(NamedTuple):
    """A page to take a picture of.

    Attributes:
        name: of the picture.
        url: of the page.
        loaded: a JavaScript expression that is true once the page shows what it should.
        storage: entries of the page's local storage, such as a choice of theme.
        dark: True for a browser that prefers dark pages.
    """

    name: str
    url: str
    loaded: str
    storage: tuple[tuple[str, str], ...] = ()
    dark: bool = False


def train(folder: Path) -> Path:
    """Trains with all trackers and writes the report. Returns the run's folder."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **settings(folder)}
    example = Path(__file__).with_name("pytorch_digits.py").resolve()
    options = ("--backend", "mlflow,tensorboard,trackio", "--epochs", "40", "--noise", "0.3")
    subprocess.run([sys.executable, example, *options], cwd=folder, env=environment, check=True)
    (run,) = (path for path in (folder / "gwa_runs").iterdir() if path.is_dir())
    subprocess.run([sys.executable, "-m", "gwa_logging.cli", "report", run], cwd=folder, env=environment, check=True)
    return run


def settings(folder: Path) -> dict[str, str]:
    """Environment variables for the trackers: local data, and no requests to anywhere else."""
    return {
        "TRACKIO_DIR": f"{folder}/trackio",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serve(folder: Path, port: int, *command: str) -> Iterator[str]:
    """Runs a server on loopback, and waits until it answers. Yields its address."""
    environment = os.environ | settings(folder) | {"GRADIO_SERVER_PORT": str(port)}
    with (folder / "servers.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(lambda: read(f"http://127.0.0.1:{port}/") is not None, command[0])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def read(url: str, method: str = "GET") -> bytes | None:
    """Returns what is at an address, or None if nothing answers."""
    with suppress(OSError):
        return bytes(urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10).read())
    return None


def wait_for(is_done: Any, what: str, seconds: float = START) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not ready after {seconds:.0f} s")
        time.sleep(0.2)


class Browser:
    """Chromium without a window, driven by its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        profile = folder / "chromium"
        options = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking "
            f"--remote-debugging-port=0 --user-data-dir={profile} --window-size={WIDTH},{HEIGHT}"
        )
        with (folder / "chromium.log").open("ab") as log:
            self._process = subprocess.Popen(["chromium", *options.split(), "about:blank"], stdout=log, stderr=log)
        port = profile / "DevToolsActivePort"
        wait_for(lambda: port.is_file() and port.read_text().count("\n"), "chromium")
        self._address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"

    def picture(self, screen: Screen) -> Image.Image:
        """Opens a page and returns a picture of the first screen, once it has loaded."""
        (page,) = [page for page in json.loads(read(f"{self._address}/json") or b"[]") if page["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None) as channel:
            number = 0

            def do(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                channel.send(json.dumps({"id": number, "method": method, "params": parameters}))
                while (answer := json.loads(channel.recv(timeout=START))).get("id") != number:
                    pass  # an event
                return dict(answer["result"])

            do("Page.enable")
            do("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if screen.dark else "light"}
            do("Emulation.setEmulatedMedia", features=[scheme])
            stores = "".join(f"localStorage.setItem({json.dumps(k)},{json.dumps(v)});" for k, v in screen.storage)
            script = do("Page.addScriptToEvaluateOnNewDocument", source=f"try{{{stores}}}catch{{}}")
            do("Page.navigate", url="about:blank")
            do("Page.navigate", url=screen.url)
            loaded = f"Boolean(document.body && ({screen.loaded}))"
            wait_for(lambda: do("Runtime.evaluate", expression=loaded)["result"].get("value"), screen.name)
            do("Runtime.evaluate", expression=HIDE_TOOLBARS)
            time.sleep(SETTLE)
            png = do("Page.captureScreenshot", format="png")["data"]
            do("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
        return Image.open(BytesIO(base64.b64decode(png))).convert("RGB")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def screens(folder: Path, run: Path, open_server: Any) -> Iterator[Screen]:
    """Starts each dashboard and yields its screens."""
    from mlflow import MlflowClient  # here, because it is not needed to train

    report = (run / "report.html").as_uri()
    plots = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 1"
    yield Screen("report", report, plots)
    yield Screen("report-dark", report, plots, dark=True)

    port = free_port()
    address = open_server(
        serve(folder, port, "tensorboard.main", "--logdir", f"{folder}/gwa_runs", "--port", str(port))
    )
    yield Screen("tensorboard", address, "document.querySelectorAll('card-view').length > 3")

    port = free_port()
    address = open_server(serve(folder, port, "trackio.cli", "show", "--project", "gwa"))
    yield Screen("trackio", f"{address}/?project=gwa", "document.querySelectorAll('canvas, svg.marks').length > 2")
    yield Screen(
        "trackio-media", f"{address}/media?project=gwa", "document.querySelectorAll('img[src*=file]').length > 0"
    )

    port = free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    address = open_server(serve(folder, port, "mlflow", "server", "--backend-store-uri", store, "--port", str(port)))
    client = MlflowClient(store)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    page = f"{address}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}/model-metrics"
    tiles = "document.querySelectorAll('.js-plotly-plot').length > 2 && document.querySelectorAll('img').length > 0"
    for name, dark in (("light", False), ("dark", True)):
        chosen = (("_mlflow_dark_mode_toggle_enabled", str(dark).lower()),)
        yield Screen(f"mlflow-metrics-{name}", page, tiles, chosen, dark)


def main() -> None:
    images = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, ExitStack() as servers:
        folder = Path(temporary)
        run = train(folder)
        browser = Browser(folder)
        servers.callback(browser.close)
        for screen in screens(folder, run, servers.enter_context):
            path = images / f"{screen.name}.png"
            browser.picture(screen).quantize(**PALETTE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KB")
        newest = next(folder.glob("mlruns/*/*/artifacts/gwa/scores.png"))
        shutil.copy(newest, images / "picture.png")


if __name__ == "__main__":
    main()
