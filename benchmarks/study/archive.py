"""The series of all runs, in one file of the repository, so that the page can be rewritten without training.

Raw signals, 2 MB a run, are not kept: `train` makes them again.
"""

import io
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.study.grid import grid
from benchmarks.study.series import Series, reduced

ARCHIVE = Path(__file__).with_name("series.tar.xz")


def load(archive: Path = ARCHIVE) -> dict[str, Series]:
    """The series of the archive by the names of the runs."""
    series = {}
    if archive.exists():
        with tarfile.open(archive) as file:
            for member in file:
                content = file.extractfile(member)
                assert content is not None
                with np.load(io.BytesIO(content.read())) as arrays:
                    series[member.name.removesuffix(".npz")] = dict(arrays)
    return series


def add(runs: Path, archive: Path = ARCHIVE) -> int:
    """Reduces the finished runs in a folder and adds them to the archive. Returns the number of new runs."""
    series = load(archive)
    new = {run.name: run for run in grid() if run.name not in series and (runs / f"{run.name}.npz").exists()}
    for name, run in new.items():
        with np.load(runs / f"{name}.npz") as raw:
            series[name] = reduced(run, dict(raw))
    unfinished = archive.with_suffix(".part")
    with tarfile.open(unfinished, "w:xz", preset=9) as file:
        for name in sorted(series):
            buffer = io.BytesIO()
            np.savez(buffer, **series[name])
            entry = tarfile.TarInfo(f"{name}.npz")
            entry.size = buffer.tell()
            file.addfile(entry, io.BytesIO(buffer.getvalue()))
    unfinished.replace(archive)
    return len(new)
