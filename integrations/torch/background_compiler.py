"""Compiles the terms of the score in another process, and keeps the libraries in a cache on disk.

The compiler runs once per machine for each head's sizes and dtypes. If several processes need the same library, one compiles
it and the others wait for the file. The key of a library contains everything that its machine code depends on, so
different machines can share a home directory.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch

from gwa_logging.integrations.torch import compile_worker, scores
from gwa_logging.integrations.torch.compile_worker import Signature

TIME_LIMIT = 300.0
"""Seconds until a compilation is given up. On one core it takes 10 to 20."""

_POLL = 0.1


class CompilationError(Exception):
    """The library cannot be made; the text is the reason."""


class Cancelled(Exception):  # noqa: N818 - not an error
    """The library is no longer needed."""


def library_for(signature: Signature, cancelled: Event, seconds: float = TIME_LIMIT) -> Path:
    """The file of a library, compiled if it does not exist yet. Blocks until it does.

    Args:
        signature: what it is compiled for.
        cancelled: once set, the compilation is stopped.
        seconds: time limit.

    Raises:
        CompilationError: the compiler is missing, has failed or took too long, or the cache cannot be used.
        Cancelled: `cancelled` was set.
    """
    end = time.monotonic() + seconds
    library = cache_directory() / f"{_key(signature)}.pt2"
    while not library.exists():
        with _locked(library.with_suffix(".lock")) as is_ours:
            if is_ours and not library.exists():
                _compile(signature, library, cancelled, end)
            elif not is_ours:
                _pause(cancelled, end)
    return library


def cache_directory() -> Path:
    """The folder of the libraries: `$XDG_CACHE_HOME/gwa_logging`, or `~/.cache/gwa_logging`. Creates it.

    Raises:
        CompilationError: other users may write to it, so what is in it must not be executed.
    """
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gwa_logging"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CompilationError(f"{directory} belongs to another user, or others may write to it; run chmod 700 on it")
    return directory


def _key(signature: Signature) -> str:
    """The name of a library: a hash of what its machine code depends on."""
    sources = [Path(str(module.__file__)).read_text() for module in (scores, compile_worker)]
    device = torch.device(signature.device)
    gpu = (
        (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)) if device.type == "cuda" else ()
    )
    versions = torch.__version__, torch.version.git_version, torch.version.cuda, platform.libc_ver(), sys.version
    machine = platform.machine(), _processor(), device.type, gpu
    text = json.dumps([signature._replace(device=""), sources, versions, machine])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _processor() -> str:
    """What instructions this machine has; its name if it does not show that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.node()
    found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join(found) or platform.node()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yields True if this process has the lock on a file, False if another process has."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # forked processes have copies of the file, so closing it would not do


def _compile(signature: Signature, library: Path, cancelled: Event, end: float) -> None:
    """Runs the worker, and moves its library to the cache. Only the process that has the lock may call this."""
    prefix = f"{library.stem}-"
    for left in library.parent.glob(f"{prefix}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=library.parent))
    try:
        made, log = folder / "terms.pt2", folder / "log"
        _run_worker(signature, made, log, cancelled, end)
        if not made.exists():
            raise CompilationError(_last_line(log))
        made.replace(library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_worker(signature: Signature, target: Path, log: Path, cancelled: Event, end: float) -> None:
    seconds = max(1.0, end - time.monotonic())
    arguments = json.dumps(signature), str(target), str(seconds)
    # -P: a file in the working directory cannot hide a module.
    command = [sys.executable, "-P", "-m", compile_worker.__spec__.name, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(target.parent / "inductor"),
        "TRITON_CACHE_DIR": str(target.parent / "triton"),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                _pause(cancelled, end)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _pause(cancelled: Event, end: float) -> None:
    if cancelled.wait(_POLL):
        raise Cancelled
    if time.monotonic() > end:
        raise CompilationError("the compilation took too long")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "the compiler's process ended without a message"
