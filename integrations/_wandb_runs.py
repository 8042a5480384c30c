"""Starts, resumes and checks runs of W&B."""

import shutil
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any

import wandb

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import logger
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.integrations._tracker import invalid_run
from gwa_logging.integrations._wandb_contents import project_of
from gwa_logging.redact import redact_urls

PROJECT = "gwa"
"""Of the runs that this library starts, unless WANDB_PROJECT is set."""


def check_server() -> None:
    """Checks that the server responds; W&B itself would retry for 90 seconds.

    Raises:
        BackendError: the server does not respond.
    """
    settings = wandb.setup().settings
    has_proxy = settings.http_proxy or settings.https_proxy or settings.x_proxies
    if settings.mode not in ("online", "run", "shared") or has_proxy:
        return
    try:
        check_reachable(settings.base_url)
    except (OSError, ValueError) as error:
        raise BackendError(
            f"backend='wandb': nothing answers at {settings.base_url} ({error}). Check the network and WANDB_BASE_URL; or set "
            "WANDB_MODE=offline to keep the run on disk; or use backend='local' and replay the journal later"
        ) from error


def new_run_options(directory: Path) -> dict[str, Any]:
    """The project and the name of a run that this library starts, unless the user has set them for W&B."""
    settings = wandb.setup().settings
    options = {"project": settings.project or PROJECT, "name": settings.run_name or directory.name}
    return {key: value for key, value in options.items() if value}


def parse_path(run: str) -> dict[str, Any]:
    """Splits a run id or path into the arguments `id`, `project` and `entity` of `wandb.init`, as far as it has them."""
    parts = run.strip("/").split("/")
    if len(parts) > 3 or not all(parts):
        raise InvalidInputError(f"run={run!r}: expected a run id, or [entity/]project/id")
    return dict(zip(("id", "project", "entity"), reversed(parts), strict=False))


def resume(wanted: str) -> wandb.Run:
    """Resumes a run.

    If neither `wanted` nor WANDB_PROJECT names its project, looks in the project of the runs that this library starts, then
    in W&B's default project. Offline, the run's folder names the project.

    Raises:
        LookupError: offline, and there is no folder of this run.
        Exception: whatever wandb raises if the server does not have the run.
    """
    options, settings = parse_path(wanted), wandb.setup().settings
    project: str | None = None
    if settings._offline:
        folders = _offline_folders(options["id"])
        if not folders:  # W&B would accept any id
            raise LookupError(f"run={wanted!r} is not in {settings.wandb_dir}")
        _wait_for_free_folder_name(folders[-1].name.removesuffix(f"-{options['id']}"))
        project = project_of(folders[-1])
    elif not settings.project and "project" not in options and _is_in_project(options["id"]):
        project = PROJECT
    return wandb.init(reinit="create_new", resume="must", **({"project": project} if project else {}) | options)


def discard_run(run: wandb.Run) -> None:
    """Finishes a run and deletes it, from the server and from disk. If the server refuses, only logs it: the run is empty."""
    path, folder, is_offline = run.path, Path(run.settings.sync_dir), run.offline or run.disabled
    run.finish()
    try:
        if not is_offline:
            wandb.Api().run(path).delete()
    except Exception as error:  # noqa: BLE001 - whatever wandb raises
        logger.info("gwa_logging: backend wandb: the empty run %s remains (%s)", path, redact_urls(repr(error)))
        return
    shutil.rmtree(folder, ignore_errors=True)  # otherwise `wandb sync` would upload it


def _is_in_project(run_id: str) -> bool:
    """Returns True if W&B has this run in `PROJECT`. Asks, because after a failed `init` W&B takes the id to be in use."""
    try:
        wandb.Api().run(f"{PROJECT}/{run_id}")
    except Exception as error:  # noqa: BLE001 - wandb raises different ones; `init` reports what prevents it from resuming
        logger.info(
            "gwa_logging: backend wandb: no run %s in project %s (%s)", run_id, PROJECT, redact_urls(repr(error))
        )
        return False
    return True


def _offline_folders(run_id: str) -> list[Path]:
    """The folders of an offline run, the latest one last."""
    return sorted(Path(wandb.setup().settings.wandb_dir).glob(f"offline-run-*-{run_id}"))


def _wait_for_free_folder_name(last: str) -> None:
    """Waits until W&B gives an offline run another folder than its last one, whose name without the id is `last`.

    W&B names the folder by the current second, and would overwrite the files of a run that was started in the same second.
    """
    while datetime.now().astimezone().strftime("%S") == last[-2:]:
        sleep(0.02)


def check_run(run: object) -> wandb.Run:
    if not isinstance(run, wandb.Run):
        raise invalid_run(run, "a wandb.Run, as wandb.init() returns it (Lightning: logger.experiment)")
    if is_finished(run):
        raise InvalidInputError(f"run={run.id!r}: this run is finished; pass an unfinished one, or none")
    return run


def is_finished(run: wandb.Run) -> bool:
    """Returns True if the run is finished. Does not ask W&B: most calls on a finished run block for 30 seconds."""
    return bool(getattr(run, "_is_finished", False))  # there is no public name for it
