"""Ray Train and Ray Tune: the journal in the storage of the run, and the state in Ray's checkpoints.

    from gwa_logging.integrations.ray import metrics, save_state, watch

    def train_loop_per_worker(config):
        model = ray.train.torch.prepare_model(Net())
        with watch(model) as monitor:  # resumes from the checkpoint that Ray restarts from
            for epoch in monitor.epochs(20):
                ...
                monitor.end_epoch()
                with TemporaryDirectory() as folder:
                    torch.save(model.state_dict(), Path(folder, "model.pt"))
                    save_state(monitor, folder)
                    ray.train.report(metrics(monitor), checkpoint=Checkpoint.from_directory(folder))

The callbacks for Lightning and Transformers need only `GWACallback(directory=storage_directory())`: the trainer's checkpoints
include their state.
"""

import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from gwa_logging._watch import watch as watch_model
from gwa_logging.errors import InvalidInputError, MissingDependencyError
from gwa_logging.monitor import Monitor
from gwa_logging.replay import tracked_runs
from gwa_logging.trainer_session import decode_arrays, encode_arrays

try:
    from pyarrow.fs import FileType, LocalFileSystem
    from ray import train
except ModuleNotFoundError as error:
    if error.name not in ("ray", "pyarrow"):
        raise
    raise MissingDependencyError(f"{error.name} (needed by Ray Train)", "ray") from error

logger = logging.getLogger("gwa_logging")

STATE_FILE = "gwa_logging.json"
"""Name of the file in a checkpoint that has the state of the monitor."""


def storage_directory() -> Path:
    """The folder `gwa_runs` in the storage of this run of Ray Train, or of this trial of Ray Tune: a value for `directory=`.

    Workers run in a temporary folder of their node, where a journal would be lost.

    Raises:
        InvalidInputError: the process is neither a worker of Ray Train nor a trial of Ray Tune, or the storage is an object
            store such as S3, to which a journal cannot be appended.
    """
    try:
        storage = _api().get_context().get_storage()
    except (RuntimeError, NotImplementedError) as error:  # the latter: a local run without workers
        raise InvalidInputError(
            f"directory: this process has no storage of Ray Train or Ray Tune ({error}). Call this inside the training "
            "function, or pass directory= with a folder that outlives the worker"
        ) from error
    if not isinstance(storage.storage_filesystem, LocalFileSystem):
        raise InvalidInputError(
            f"directory: the run's storage is {storage.storage_filesystem.type_name!r}, to which a journal cannot be appended. "
            "Pass directory= with a folder on a disk that all nodes share; directory='gwa_runs' keeps the journal in the "
            "temporary folder of the worker"
        )
    is_trial = getattr(storage, "trial_dir_name", None) is not None
    return Path(storage.trial_fs_path if is_trial else storage.experiment_fs_path) / "gwa_runs"


def watch(model: Any, **arguments: Any) -> Monitor:
    """Watches a model in the training function of Ray Train or Ray Tune. Every worker must call this.

    Journals and reports go to `storage_directory()` unless you set `directory=`. After a restart the monitor resumes from the
    checkpoint that Ray passes to the function, if `save_state` has added the state to it. The number of workers may differ.

    Args:
        model: as in `gwa_logging.watch`.
        arguments: as in `gwa_logging.watch`.

    Returns:
        The monitor. Close it at the end of the function, or use it as a context manager.

    Raises:
        InvalidInputError: an argument is wrong; there is no storage, see `storage_directory`; the state in the checkpoint is
            damaged or belongs to another head.
        GwaError: as in `gwa_logging.watch`.
    """
    if arguments.get("directory") is None:
        arguments["directory"] = storage_directory()
    state = _saved_state()
    monitor = watch_model(model, **arguments)
    if state is not None:
        try:
            monitor.load_state_dict(_for_processes(state, monitor._adapter.processes))
        except BaseException:
            monitor.close()
            raise
    else:
        _skip_what_trackers_have(monitor)
    return monitor


def save_state(monitor: Monitor, folder: str | PathLike[str]) -> None:
    """Adds the state of the monitor to a checkpoint, from which `watch` resumes. Waits for the device.

    Every worker must call this, because the state covers all of them. Rank 0 writes the file.

    Args:
        monitor: the monitor.
        folder: the folder that becomes the checkpoint of rank 0; other workers may pass any path.

    Raises:
        InvalidInputError: the folder does not exist.
    """
    state = monitor.state_dict()
    if not monitor._adapter.writes:
        return
    if not Path(folder).is_dir():
        raise InvalidInputError(f"folder={str(folder)!r}: not a folder; create it before you save the state in it")
    Path(folder, STATE_FILE).write_text(json.dumps(encode_arrays(state), allow_nan=False))


def metrics(monitor: Monitor) -> dict[str, float]:
    """The metrics of the last epoch for `ray.train.report`, by the keys that trackers show: `gwa/separation`, `gwa/stop`, ...

    `gwa/stop` is 1 while a stop alert stands, otherwise 0. Empty before the first epoch has ended.
    """
    if not monitor.history:
        return {}
    name = monitor._recording.name
    return {f"{name}/{key}": value for key, value in monitor.history[-1].metrics.items()}


def _api() -> Any:
    """The module with `get_context` and `get_checkpoint` for this process: `ray.train`, or `ray.tune` in a function of Tune."""
    try:
        train.get_context()
    except DeprecationWarning:  # what ray.train raises in a function of Tune
        from ray import tune

        return tune
    return train


def _saved_state() -> dict[str, Any] | None:
    """Reads the state from the checkpoint that Ray resumes from; None if there is none.

    Raises:
        InvalidInputError: the file is damaged.
    """
    try:
        checkpoint = _api().get_checkpoint()
    except RuntimeError:  # not in a worker: the user has passed a directory
        return None
    if checkpoint is None:
        return None
    file = f"{checkpoint.path}/{STATE_FILE}"
    if checkpoint.filesystem.get_file_info(file).type == FileType.NotFound:
        logger.warning(
            "gwa_logging: GWA starts again from zero: %s does not have the state, because save_state(monitor, folder) was "
            "not called before the checkpoint was reported",
            checkpoint.path,
        )
        return None
    with checkpoint.filesystem.open_input_stream(file) as stream:
        content = stream.read()
    try:
        state = decode_arrays(json.loads(content))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{file}: the state is damaged ({error}). Resume from an earlier checkpoint, or delete this file to start GWA "
            "from zero"
        ) from error
    return state if isinstance(state, dict) else {}  # load_state_dict explains what is wrong with it


def _skip_what_trackers_have(monitor: Monitor) -> None:
    """Sends a tracker nothing twice if an earlier attempt logged to the same run and died before its first checkpoint."""
    journal = monitor.journal
    if journal is None:
        return
    for recording in monitor._recordings():
        for delivery in recording.deliveries:
            runs, _ = tracked_runs(journal.parent.parent, delivery.backend.name)
            same = [each for each in runs if (each.run, each.name) == (delivery.backend.run_ref.run, recording.name)]
            if any(len(each.journals) > 1 for each in same):  # one of them is that of this attempt
                delivery.resume()


def _for_processes(state: dict[str, Any], processes: int) -> dict[str, Any]:
    """The state for a run with this number of processes: Ray may restart a run with fewer or more workers.

    A state holds sums over all processes, and rank 0 continues them, so it fits any number of processes.
    """
    saved = state.get("processes")
    if saved == processes or not isinstance(saved, int):
        return state
    logger.warning("gwa_logging: resuming with %d instead of %d workers", processes, saved)
    heads = state.get("heads")
    further = (
        {path: _for_processes(part, processes) for path, part in heads.items()} if isinstance(heads, Mapping) else heads
    )
    return {**state, "processes": processes, "heads": further}
