"""A W&B workspace and a W&B report with the panels for this library's metrics, through wandb-workspaces.

A project's workspace shows no histograms, and sorts the panels by name. The saved workspace shows the picture of the scores
first, then the metrics that the stop rule follows, and the diagnostics in a closed section.
"""

import re
from typing import Any

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from gwa_logging.errors import BackendError, InvalidInputError, MissingDependencyError
from gwa_logging.integrations._reachable import check_reachable
from gwa_logging.records import EPOCH_KEYS, QUANTILE_KEYS, STEP_KEYS
from gwa_logging.redact import has_secret
from gwa_logging.settings import NAME_LENGTH, NAME_PATTERN

try:
    import wandb
except ModuleNotFoundError as error:
    if error.name != "wandb":
        raise
    raise MissingDependencyError("wandb", "workspace") from error

TITLES = {
    "separation": "Separation (the stop rule follows it)",
    "gwa": "GWA, as published",
    "stable": "GWA, stable form",
    "negative_fraction": "Share of negative scores",
    "stop": "Stop alert (1 while it stands)",
}
"""Metric keys of the first section, and the titles of their plots."""

SUMMARY = {
    "best_epoch": "Best epoch",
    "best_value": "Value at the best epoch",
    "stop_epoch": "Epoch of the stop alert",
}
"""Keys of the run's summary that are not metrics, and the titles of their panels."""

_PART = r"[^/\\#?%:\s]{1,128}"  # of a path of W&B
_LONGEST_TITLE = 128
_LONGEST_REASON = 300  # characters of a server's response in an error


def save_workspace(project: str, name: str = "gwa") -> str:
    """Saves a new workspace with the panels for all runs of a project. Existing workspaces stay as they are.

    Args:
        project: "entity/project".
        name: the prefix of the metric keys, as in `watch(name=)`; for a further head, its own prefix, "gwa/path".

    Returns:
        The address of the workspace.

    Raises:
        InvalidInputError: an argument is malformed.
        BackendError: the key, the network or the project is missing, or W&B refuses.
    """
    entity, project = _split(project)
    _check_name(name)
    _connect(entity, project)
    label = _label(name)
    sections = [
        ws.Section(
            name=label,
            panels=[*_main_panels(name), *_summary_panels(name)],
            is_open=True,
            pinned=True,
            layout_settings=ws.SectionLayoutSettings(columns=3, rows=3),
        ),
        ws.Section(
            name=f"{label}: suspects",
            panels=[_suspects_panel(name)],
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=1, rows=1),
        ),
        ws.Section(name=f"{label}: diagnostics", panels=_diagnostic_panels(name), is_open=False),
    ]
    workspace = ws.Workspace(entity=entity, project=project, name=label, sections=sections)
    return _saved(workspace, f"the workspace in {entity}/{project}")


def save_report(project: str, run: str, name: str = "gwa") -> str:
    """Saves a new W&B report of one run: what its summary says, the panels, the suspects and the diagnostics.

    Args:
        project: "entity/project".
        run: the run's id, or its path "entity/project/id".
        name: as for `save_workspace`.

    Returns:
        The address of the report.

    Raises:
        InvalidInputError: an argument is malformed, or the run has no metric with this prefix.
        BackendError: the key, the network, the project or the run is missing, or W&B refuses.
    """
    entity, project = _split(project)
    _check_name(name)
    run_id = run.removeprefix(f"{entity}/{project}/")
    if not re.fullmatch(_PART, run_id):
        raise InvalidInputError(f"--report {run!r}: expected a run's id, or {entity}/{project}/ID")
    api = _connect(entity, project)
    try:
        found = api.run(f"{entity}/{project}/{run_id}")
        title, summary = found.name or run_id, dict(found.summary)
    except Exception as error:  # noqa: BLE001 - whatever wandb raises
        raise _refusal(f"--report: cannot read the run {run_id!r} of {entity}/{project}", error) from None
    if not any(key.startswith(f"{name}/") for key in summary):
        raise InvalidInputError(
            f"--report: the run {run_id!r} has no metric named {name}/...; pass the name= of watch() as --name"
        )

    def grid(panels: list[Any], columns: int = 3) -> Any:
        only_this_run = wr.Runset(entity=entity, project=project, filters=[expr.Metric("ID") == run_id])
        return wr.PanelGrid(runsets=[only_this_run], panels=_in_grid(panels, columns))

    blocks = [
        wr.MarkdownBlock(_summary_text(name, summary)),
        grid([*_main_panels(name), *_summary_panels(name)]),
    ]
    if f"{name}/suspects" in summary:
        blocks += [wr.H2("Suspects"), grid([_suspects_panel(name)], columns=1)]
    blocks += [wr.H2("Diagnostics"), grid(_diagnostic_panels(name))]
    title = f"{_label(name)} of {title}"[:_LONGEST_TITLE]
    report = wr.Report(entity=entity, project=project, title=title, blocks=blocks)
    return _saved(report, f"the report of {entity}/{project}/{run_id}")


# --- panels -------------------------------------------------------------------------------------------------------------


def _label(name: str) -> str:
    return "GWA" if name == "gwa" else f"GWA {name}"


def _main_panels(name: str) -> list[Any]:
    return [
        wr.MediaBrowser(title="Scores over time", media_keys=[f"{name}/picture"]),
        *(_line(name, key, title) for key, title in TITLES.items()),
    ]


def _summary_panels(name: str) -> list[Any]:
    return [wr.ScalarChart(title=title, metric=wr.SummaryMetric(f"{name}/{key}")) for key, title in SUMMARY.items()]


def _suspects_panel(name: str) -> Any:
    return wr.WeavePanelSummaryTable(table_name=f"{name}/suspects")


def _diagnostic_panels(name: str) -> list[Any]:
    quantiles = wr.LinePlot(
        title="Quantiles of the scores", x=f"{name}/step", y=[f"{name}/{key}" for key in QUANTILE_KEYS]
    )
    keys = [key for key in (*EPOCH_KEYS, *STEP_KEYS) if key not in TITLES]
    return [quantiles, *(_line(name, key, key) for key in keys)]


def _line(name: str, key: str, title: str) -> Any:
    axis = "epoch" if key in EPOCH_KEYS else "step"
    outliers = True if key == "gwa" else None  # near its pole, GWA is so large that nothing else would be visible
    return wr.LinePlot(title=title, x=f"{name}/{axis}", y=[f"{name}/{key}"], ignore_outliers=outliers)


def _in_grid(panels: list[Any], columns: int) -> list[Any]:
    """Places panels of a report side by side: its grid is 24 units wide, and does not flow."""
    width, height = 24 // columns, 8
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        panel.layout = wr.Layout(x=column * width, y=row * height, w=width, h=height)
    return panels


def _summary_text(name: str, summary: dict[str, Any]) -> str:
    """States in one sentence each what the run's summary contains."""
    lines = []
    if (best := summary.get(f"{name}/best_epoch")) is not None:
        value = summary.get(f"{name}/best_value")
        lines.append(
            f"Best epoch: **{best}**" + (f", with the value {value:.4g}." if isinstance(value, float) else ".")
        )
    if stops := summary.get(f"{name}/stop_epochs"):
        state = "It stands" if summary.get(f"{name}/stop") else "A better epoch has withdrawn it"
        lines.append(f"Stop alert after epoch {', '.join(map(str, stops))}. {state}.")
    else:
        lines.append("No stop alert so far.")
    return "\n\n".join([*lines, "Epochs count from 0."])


# --- W&B ----------------------------------------------------------------------------------------------------------------


def _split(project: str) -> tuple[str, str]:
    if not re.fullmatch(f"{_PART}/{_PART}", project):
        raise InvalidInputError(
            f"{project!r}: expected ENTITY/PROJECT, such as my-team/my-project: the two parts after https://wandb.ai/"
        )
    entity, _, project = project.partition("/")
    return entity, project


def _check_name(name: str) -> None:
    prefix, slash, path = name.partition("/")
    fits = re.fullmatch(NAME_PATTERN, prefix) and len(prefix) <= NAME_LENGTH
    if not fits or (slash and not re.fullmatch(r"[\w.-]{1,1000}", path)):
        raise InvalidInputError(f"--name {name!r}: expected the name= of watch(), such as 'gwa'")


def _connect(entity: str, project: str) -> wandb.Api:
    """Checks the network, the key and the project, in this order, so that each error names its reason."""
    address = wandb.setup().settings.base_url
    try:
        check_reachable(address)
    except (OSError, ValueError) as error:
        raise BackendError(
            f"workspace: nothing answers at {address} ({error}). Check the network and WANDB_BASE_URL"
        ) from error
    try:
        api = wandb.Api()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - in a terminal W&B asks for a key, until Ctrl-C
        raise _refusal(
            f"workspace: {address} has not accepted an API key. Run `wandb login` or set WANDB_API_KEY", error
        ) from None
    try:
        found = api.project(project, entity).id
    except Exception as error:  # noqa: BLE001 - whatever wandb raises
        raise _refusal(f"workspace: cannot find the project {entity}/{project}", error, _NO_PROJECT) from None
    if not found:
        raise BackendError(f"workspace: cannot find the project {entity}/{project}. {_NO_PROJECT}")
    return api


_NO_PROJECT = "Check the entity and the project, and that your key may read it; the first run creates a project"


def _saved(view: Any, what: str) -> str:
    try:
        return str(view.save().url)
    except Exception as error:  # noqa: BLE001 - whatever wandb-workspaces, wandb or the network raise
        raise _refusal(f"W&B did not save {what}", error) from (None if has_secret(error) else error)


def _refusal(problem: str, error: BaseException, remedy: str = "") -> BackendError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}..."
    return BackendError(f"{problem} ({reason.rstrip('.')})" + (f". {remedy}" if remedy else ""))
