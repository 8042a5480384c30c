"""Trackers that die, hang, fail and recover while a real process trains: nothing is lost or duplicated."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import wandb

from gwa_logging.cli import main
from gwa_logging.journal import read_journal
from gwa_logging.replay import replay
from tests.trackers import (
    FOLDER,
    OnMlflow,
    OnMlflowServer,
    OnTensorBoard,
    OnTrackio,
    OnWandb,
    SQLiteStorage,
    Tracker,
    empty_database,
    numbers_in,
    point_mlflow_to,
    totals_in,
    trackio,
)
from tests.trainer import STEPS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


class Child:
    """A separate process that runs `tests.trainer`."""

    def __init__(self, folder: Path) -> None:
        # By default MLflow retries for four minutes, and waits two for a response. Users can change this as here.
        quick_to_give_up = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
        without_parents_core = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer"],
            env=without_parents_core | quick_to_give_up | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "trainer.log").open("wb"),
            text=True,
        )
        self.folder = folder

    def do(self, command: str, *arguments: Any) -> dict[str, Any]:
        """Runs a command in the process, and returns its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "error" not in answer or command == "start", answer
                return answer  # type: ignore[no-any-return]
        if command.endswith("_and_die"):
            assert self.process.wait(30) == -signal.SIGKILL
            return {}
        raise AssertionError((self.folder / "trainer.log").read_text()[-3000:])

    def end(self) -> str:
        """Ends the process, and returns its log."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0, (self.folder / "trainer.log").read_text()[-3000:]
        return (self.folder / "trainer.log").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def descendants(self, name: str) -> list[int]:
        """Returns the direct and indirect child processes with this name."""
        parents: dict[int, tuple[int, str]] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = status.read_text().partition(" ")
            except OSError:  # it has just ended
                continue
            command, _, rest = rest.rpartition(") ")
            parents[int(pid)] = int(rest.split()[1]), command.strip("(")
        found, grown = {self.process.pid}, True
        while grown:
            more = {pid for pid, (parent, _) in parents.items() if parent in found} - found
            found, grown = found | more, bool(more)
        return [pid for pid in found if name in parents.get(pid, (0, ""))[1]]


class Proxy:
    """A proxy between the trainer and a server, which forwards requests, delays them or refuses them.

    Attributes:
        mode: "pass", "fail" (status 500), or "slow" (5 s for each call).
    """

    def __init__(self, target: str) -> None:
        self.mode, self.released = "pass", Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.mode == "slow":
                    proxy.released.wait(5)
                status, kind, text = 500, "text/plain", b"out of order"
                if proxy.mode != "fail":
                    headers = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
                    request = Request(f"http://{target}{self.path}", body or None, headers, method=self.command)
                    try:
                        with urlopen(request, timeout=30) as reply:
                            status, kind, text = reply.status, reply.headers.get("Content-Type"), reply.read()
                    except HTTPError as error:
                        status, kind, text = error.code, error.headers.get("Content-Type"), error.read()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = answer  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                """Logs nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Outage:
    """A tracker, a trainer that logs to it, and the checks afterwards."""

    def __init__(self, tracker: Tracker, folder: Path, run: str | None) -> None:
        self.tracker, self.run = tracker, run
        self.child = Child(folder)
        started = self.child.do("start", str(folder), tracker.backend, run)
        assert "error" not in started, started
        self.journal = Path(started["journal"])

    def close(self) -> dict[str, Any]:
        """Closes the monitor. Checks that no training step was blocked, and that `close` returned in time."""
        closed = self.child.do("close")
        assert closed["took"] < 20  # 10 s and the delays of a busy machine
        waits = closed["waits"]  # of more than 100 steps, sorted; a busy machine may delay one
        assert waits[-2] < 0.5, waits[-5:]
        assert waits[len(waits) // 2] < 0.02, waits
        return closed

    def replayed(self) -> None:
        """Replays twice. Checks each time that the tracker has everything once."""
        for _ in range(2):
            run = replay(self.journal, self.tracker.backend, self.run).run_ref.run
            assert run is not None
            self.check(run)

    def check(self, run: str) -> None:
        records, _ = read_journal(self.journal)
        held = self.tracker.read_again(run)
        expected = {
            key: [(step, float(self.tracker.precision(value))) for step, value in values]
            for key, values in numbers_in(records).items()
        }
        assert {key: held.numbers.get(key) for key in expected} == expected
        assert held.totals == ([] if isinstance(self.tracker, OnMlflow) else totals_in(records))  # it has no histograms


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    wandb.teardown()
    OnMlflowServer.stop()


@pytest.fixture
def mlflow_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Outage, Proxy]]:
    """A trainer that logs through a proxy to a server."""
    tracker = OnMlflowServer()
    empty_database()
    tracker.set_up(Path(FOLDER.name), monkeypatch)
    server = OnMlflowServer.server
    assert server is not None
    proxy = Proxy(server.address)
    with monkeypatch.context() as through:
        point_mlflow_to(f"http://{proxy.address}", through)
        outage = Outage(tracker, tmp_path, tracker.start())
    yield outage, proxy
    outage.child.kill()
    proxy.stop()


@pytest.mark.parametrize("mode", ["fail", "slow"])
def test_a_server_that_fails_or_is_slow_has_everything_after_it_recovers(mlflow_outage, mode: str) -> None:
    outage, proxy = mlflow_outage
    outage.child.do("epoch")
    proxy.mode = mode
    for _ in range(2):
        outage.child.do("epoch")
    if mode == "fail":  # until MLflow has given up once; with a slow server it may not
        deadline = time.monotonic() + 30
        while not outage.child.do("steps", 1)["faults"].get("backend mlflow"):
            assert time.monotonic() < deadline
    proxy.mode = "pass"
    proxy.released.set()
    outage.child.do("epoch")
    assert outage.child.do("flush", 60)["done"]
    outage.close()
    outage.child.end()
    outage.check(outage.run)


def test_a_server_that_stays_slow_does_not_delay_close_and_receives_the_rest_by_replay(mlflow_outage) -> None:
    outage, proxy = mlflow_outage
    outage.child.do("epoch")
    proxy.mode = "slow"
    outage.child.do("epoch")
    outage.close()
    log = outage.child.end()
    assert re.search(r"\d+ records are left. To send what it lacks: gwa-logging replay \S+ --backend mlflow", log)
    outage.replayed()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_killed_or_stopped_has_everything_after_it_is_back(mlflow_outage, way) -> None:
    outage, _ = mlflow_outage
    server = OnMlflowServer.server
    assert server is not None
    outage.child.do("epoch")
    server.signal(way)
    for _ in range(2):
        outage.child.do("epoch")
    if way == signal.SIGKILL:
        server.stop()
        server.start()
    else:
        server.signal(signal.SIGCONT)
    outage.child.do("epoch")
    assert outage.child.do("flush", 60)["done"]
    outage.close()
    outage.child.end()
    outage.check(outage.run)


def test_a_server_that_does_not_come_back_receives_the_rest_by_replay(mlflow_outage) -> None:
    outage, _ = mlflow_outage
    server = OnMlflowServer.server
    assert server is not None
    outage.child.do("epoch")
    server.signal(signal.SIGKILL)
    outage.child.do("epoch")
    closed = outage.close()
    assert closed["faults"]["backend mlflow"] >= 1
    outage.child.end()
    server.stop()
    server.start()
    outage.replayed()


@pytest.mark.parametrize("stopped", [False, True], ids=["dead", "stopped"])
def test_a_server_that_does_not_respond_at_the_start_is_an_error_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    tracker = OnMlflowServer()
    tracker.set_up(Path(FOLDER.name), monkeypatch)
    server = OnMlflowServer.server
    assert server is not None
    if stopped:
        server.signal(signal.SIGSTOP)
    else:
        point_mlflow_to("http://127.0.0.1:9", monkeypatch)
    child = Child(tmp_path)
    begin = time.monotonic()
    answer = child.do("start", str(tmp_path), "mlflow", None)
    took = time.monotonic() - begin
    server.signal(signal.SIGCONT)
    child.kill()
    assert re.search("BackendError.*nothing answers at", answer["error"])
    assert took < 60  # including the imports of the process; MLflow itself would retry for four minutes


ANY = {"MLflow server": OnMlflowServer, "W&B": OnWandb, "TensorBoard": OnTensorBoard}


@pytest.mark.parametrize("name", ANY)
def test_after_the_trainer_is_killed_a_replay_sends_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = ANY[name]()
    tracker.set_up(Path(FOLDER.name) if name == "MLflow server" else tmp_path, monkeypatch)
    outage = Outage(tracker, tmp_path, None)
    outage.child.do("epoch")
    outage.child.do("steps", STEPS // 2)
    outage.child.kill()
    with outage.journal.open("ab") as file:
        file.write(b'{"kind":"interval","step":99')  # as if it had died while writing
    outage.replayed()


@pytest.fixture
def trackio_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    tracker = OnTrackio()
    tracker.set_up(tmp_path, monkeypatch)
    outage = Outage(tracker, tmp_path, None)
    yield outage
    outage.child.kill()


def test_after_a_kill_a_replay_sends_the_rest_to_a_run_that_trackio_has_stored(trackio_outage: Outage) -> None:
    run = next(r for r in read_journal(trackio_outage.journal)[0] if r.kind == "run").places["trackio"].run
    deadline = time.monotonic() + 30
    while not is_stored(run):
        trackio_outage.child.do("steps", 1)
        assert time.monotonic() < deadline
    trackio_outage.child.do("epoch")
    trackio_outage.child.kill()
    trackio_outage.replayed()


def test_after_a_kill_before_trackio_has_stored_the_run_the_error_explains_how_to_replay(
    trackio_outage: Outage, capsys
) -> None:
    assert trackio_outage.child.do("step_and_die") == {}
    records, _ = read_journal(trackio_outage.journal)
    assert totals_in(records)
    (place,) = (record.places["trackio"] for record in records if record.kind == "run")
    assert not is_stored(place.run)
    command = ["replay", str(trackio_outage.journal.parent), "--backend", "trackio"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert re.search("killed within half a second.*--run new", said)
    assert main([*command, "--run", "new"]) == 0
    trackio_outage.run = re.search(r"gwa/\S+$", capsys.readouterr().out.strip())[0]
    trackio_outage.check(trackio_outage.run)
    trackio_outage.replayed()


def is_stored(run: str) -> bool:
    project, _, name = run.partition("/")
    is_there = SQLiteStorage.get_project_db_path(project).exists()  # Trackio raises for an unknown project
    return is_there and name in [other.name for other in trackio.Api().runs(project)]


def test_after_wandb_core_dies_training_ends_and_a_replay_sends_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = OnWandb()
    tracker.set_up(tmp_path, monkeypatch)
    outage = Outage(tracker, tmp_path, None)
    outage.child.do("epoch")
    (core,) = outage.child.descendants("wandb-core")
    os.kill(core, signal.SIGKILL)
    for _ in range(2):
        outage.child.do("epoch")
    closed = outage.close()
    assert closed["faults"]["backend wandb"] >= 1
    outage.child.kill()
    outage.replayed()


def test_a_hanging_wandb_core_does_not_block_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = OnWandb()
    tracker.set_up(tmp_path, monkeypatch)
    outage = Outage(tracker, tmp_path, None)
    outage.child.do("epoch")
    (core,) = outage.child.descendants("wandb-core")
    os.kill(core, signal.SIGSTOP)
    for _ in range(5):  # enough to fill the socket
        outage.child.do("epoch")
    outage.close()
    outage.child.kill()
    os.kill(core, signal.SIGKILL)
    outage.replayed()


class Quota:
    """A quota: the trainer's files cannot grow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, child: Child) -> None:
        child.do("limit_files", 100)

    def free(self, child: Child) -> None:
        child.do("limit_files", None)

    def remove(self) -> None:
        """Does nothing."""


class SmallDisk:
    """A file system of one megabyte, which another file fills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self.folder)]
        mounted = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if mounted is None or mounted.returncode:
            pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip() if mounted else 'there is no mount'}")

    def fill(self, child: Child) -> None:
        with suppress(OSError), (self.folder / "something else").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    def free(self, child: Child) -> None:
        (self.folder / "something else").unlink()

    def remove(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture(params=[Quota, SmallDisk])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Quota | SmallDisk]:
    disk = request.param(tmp_path)
    yield disk
    disk.remove()


@pytest.fixture
def on_disk(disk: Quota | SmallDisk, tmp_path: Path) -> Iterator[tuple[Child, Path]]:
    """A trainer, and its journal on a disk that is full after the first epoch."""
    child = Child(tmp_path)
    journal = Path(child.do("start", str(disk.folder), "local", None)["journal"])
    assert journal.is_relative_to(disk.folder)
    child.do("epoch")
    disk.fill(child)
    faults = child.do("epoch")["faults"]
    assert faults["journal"] > STEPS / 2  # a few lines may have fitted into the last block
    assert "records lost" not in faults
    yield child, journal
    child.kill()


def test_a_journal_on_a_full_disk_is_complete_once_there_is_space(disk, on_disk, tmp_path: Path) -> None:
    child, journal = on_disk
    disk.free(child)
    child.do("epoch")
    assert "records lost" not in child.do("close")["faults"]
    child.end()
    records, skipped = read_journal(journal)
    assert [r.step for r in records if r.kind == "interval"] == list(range(3 * STEPS))
    assert [r.epoch for r in records if r.kind == "epoch"] == [0, 1, 2]
    assert skipped == 0  # the line that was torn when the disk became full was completed
    done = replay(journal, "tensorboard", str(tmp_path / "runs"))
    assert done.sent == 3 * STEPS + 3


def test_if_a_disk_stays_full_training_continues_and_the_lost_records_are_counted(disk, on_disk) -> None:
    child, journal = on_disk
    child.do("epoch")
    closed = child.do("close")
    assert closed["took"] < 20
    records, _ = read_journal(journal)
    kept = [record for record in records if record.kind in ("interval", "epoch")]
    assert STEPS + 1 <= len(kept) < 1.5 * STEPS
    assert [r.step for r in kept if r.kind == "interval"][:STEPS] == list(range(STEPS))
    everything = 3 * (STEPS + 1) + 1  # and the close record
    assert closed["faults"]["records lost"] == everything - len(kept)
    assert "records lost" in child.end()
