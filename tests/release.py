"""Builds the wheel and the sdist, installs them with each extra into a fresh environment, and runs a small training in it.

    python -m tests.release [EXTRAS ...]

Not part of the tests, because each environment installs its framework again, which takes minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.pages import AFTER, BEFORE, MODEL, ROOT, python_blocks
from tests.trackers import Server

CORE = """
import importlib.util
import numpy as np
import gwa_logging
for absent in ("torch", "jax", "wandb", "mlflow", "plotly"):
    assert importlib.util.find_spec(absent) is None, absent
scores = gwa_logging.alignment_scores(np.ones((4, 3)), np.arange(20.0).reshape(4, 5), np.eye(3, 5))
assert scores.shape == (4,)
try:
    gwa_logging.watch(object())
except gwa_logging.InvalidInputError as error:
    assert "torch.nn.Module" in str(error)
"""

TORCH = (
    MODEL
    + """
import gwa_logging
with gwa_logging.watch(model, backend="BACKEND") as monitor:
    for epoch in monitor.epochs(3):
        for batch in loader:
            loss_of(model(batch["x"]), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
assert [report.count for report in monitor.history] == [40] * 3
assert monitor.faults == {}, monitor.faults
"""
)

JAX = """
import jax, jax.numpy as jnp
from flax import linen
import gwa_logging
model = linen.Dense(4)
x, y = jnp.arange(80.0).reshape(10, 8) / 80, jnp.arange(10) % 4
params = model.init(jax.random.key(0), x)
def loss(params):
    return -jnp.take_along_axis(jax.nn.log_softmax(model.apply(params, x)), y[:, None], 1).mean()
with gwa_logging.watch(model) as monitor:
    (value, scores), grads = jax.jit(monitor.value_and_grad(loss))(params)
    monitor.update(scores)
    assert monitor.end_epoch().count == 10
assert monitor.faults == {}, monitor.faults
"""

REPORT = """
import subprocess, sys
from pathlib import Path
subprocess.run([str(Path(sys.executable).parent / "gwa-logging"), "report", "gwa_runs"], check=True)
(page,) = Path("gwa_runs").rglob("report.html")
assert "plotly" in page.read_text().lower()
"""

SKINNY = """
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
try:
    gwa_logging.watch(model, backend="mlflow")
except gwa_logging.BackendError as error:
    assert str(error).startswith("pip install mlflow, or name a server"), error
else:
    raise AssertionError("mlflow-skinny has opened a database")
"""

NOTIFY = """
import http.server, subprocess, sys, threading
from pathlib import Path
received = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
program = str(Path(sys.executable).parent / "gwa-logging")
subprocess.run([program, "notify-test", f"json://127.0.0.1:{server.server_port}/"], check=True)
assert b"image/png" in received[0]
"""

WORKSPACE = (
    (ROOT / "tests" / "wandb_graphql.py").read_text()
    + """
import os, subprocess, sys
from pathlib import Path
program = str(Path(sys.executable).parent / "gwa-logging")
with GraphQLServer() as server:
    environment = {**os.environ, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40}
    subprocess.run([program, "workspace", f"{ENTITY}/{PROJECT}"], env=environment, check=True)
    server.summary = {"gwa/best_epoch": 1}
    subprocess.run([program, "workspace", f"{ENTITY}/{PROJECT}", "--report", RUN], env=environment, check=True)
    assert len(server.views) == 2, server.unknown
"""
)

CLEANLAB = """
import cleanlab
from gwa_logging.exports import register_cleanlab_issue
register_cleanlab_issue()
lab = cleanlab.Datalab({"label": [0, 1, 0, 1]}, label_name="label", verbosity=0)
lab.find_issues(issue_types={"gwa": {"label_quality": [0.6, 0.25, 1.0, 0.55]}})
assert lab.get_issues("gwa")["is_gwa_issue"].tolist() == [False, True, False, False]
"""

TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
TRAINERS = {
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite,tensorboard",
    "keras": "keras,jax,tensorboard",
}


def trainer(name: str) -> str:
    """The lines of docs/trainers.md for a trainer, with the code that they presume."""
    (code,) = [
        code
        for code in python_blocks(ROOT / "docs" / "trainers.md")
        if f"gwa_logging.integrations.{name} import" in code
    ]
    return BEFORE[name] + code.replace("=20", "=2") + AFTER.get(name, "")


RUNS = {
    "": CORE,
    "torch": TORCH.replace("BACKEND", "local"),
    "jax": JAX,
    "torch,report": TORCH.replace("BACKEND", "local") + REPORT,
    **{f"torch,{name}": TORCH.replace("BACKEND", name) for name in TRACKERS},
    "torch,mlflow-skinny": TORCH.replace("BACKEND", "mlflow") + SKINNY,
    "notify": NOTIFY,
    "workspace": WORKSPACE,
    "cleanlab": CLEANLAB,
    "trl": trainer("transformers") + "import trl\n",
    "ray": python_blocks(ROOT / "docs" / "ray.md")[0],
    **{extras: trainer(name) for name, extras in TRAINERS.items()},
}


def build(folder: Path) -> list[Path]:
    """Builds the wheel and the sdist and returns their paths."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.iterdir())


def try_run(package: Path, extras: str, folder: Path, server: Server) -> str | None:
    """Installs a package and runs a training that needs its extras, without access to this checkout.

    Returns:
        The errors, or None.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    wanted = f"{package}[{extras}]" if extras else str(package)
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wanted]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    environment["MLFLOW_TRACKING_URI"] = f"http://{server.address}"
    for command in (pip, [python, "-I", "-c", RUNS[extras]]):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "extras", nargs="*", metavar="EXTRAS", help=f"any of {', '.join(map(repr, RUNS))}; all by default"
    )
    failures = 0
    with tempfile.TemporaryDirectory() as directory:
        packages, server = build(Path(directory) / "dist"), Server(Path(directory))
        server.start()
        for extras in parser.parse_args().extras or RUNS:
            for package in packages if extras in ("", "torch") else packages[:1]:
                folder = Path(directory) / "environment"
                folder.mkdir()
                failed = try_run(package, extras, folder, server)
                failures += failed is not None
                print(f"{package.name}[{extras}]: {failed or 'passed'}", flush=True)
                shutil.rmtree(folder)
        server.stop()
    sys.exit(failures)


if __name__ == "__main__":
    main()
