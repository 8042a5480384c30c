"""The command line, `gwa-logging`: the commands `report`, `replay`, `heads`, `workspace`, `notify` and
`notify-test`."""

import argparse
import functools
import importlib
import inspect
import sys
import traceback
import types
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gwa_logging import __version__, registry
from gwa_logging.errors import GwaError, InvalidInputError
from gwa_logging.journal import FILE_NAME
from gwa_logging.redact import redact_urls
from gwa_logging.replay import NEW, Replayed, journals_of, replay, tracked_runs
from gwa_logging.report.page import REPORT_NAME, write_report

DEFAULT_DIRECTORY = Path("gwa_runs")
"""The default of `watch(directory=)`."""

_FACTORIES = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is printed to stderr as one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run_command(arguments) or 0
    except (GwaError, OSError) as error:
        _print_error(str(error))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gwa-logging", description="Works with runs that gwa_logging has recorded.")
    parser.add_argument("--version", action="version", version=f"gwa-logging {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_report(commands.add_parser("report", help="make an HTML page about a run"))
    _add_replay(commands.add_parser("replay", help="send a tracker the records of a run that it lacks"))
    _add_heads(commands.add_parser("heads", help="show which layer of a model is its classifier head, and why"))
    _add_workspace(commands.add_parser("workspace", help="save a W&B workspace or report with the panels for GWA"))
    _add_notify(commands.add_parser("notify", help="send the stop alert of a run's journal to a URL"))
    _add_notify_test(commands.add_parser("notify-test", help="send a test message to a URL of watch(notify=)"))
    return parser


# --- report -------------------------------------------------------------------------------------------------------------


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Writes {REPORT_NAME}, one page that works without a network, next to a run's journal and prints its path."
    )
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="the folder of a run; or a folder of runs, of which the most recently written one is taken "
        f"(default: {DEFAULT_DIRECTORY})",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.set_defaults(run_command=_report)


def _report(arguments: argparse.Namespace) -> None:
    """Writes the page. Only its path is printed to stdout."""
    page = write_report(_run_folder(arguments.directory))
    print(page)
    if arguments.open and not webbrowser.open(page.resolve().as_uri()):
        _print_error(f"found no browser; open {page} yourself")


def _run_folder(directory: Path) -> Path:
    """Returns the folder itself if it is a run's, otherwise the run in it whose journal was written to most recently."""
    if (directory / FILE_NAME).exists():
        return directory
    journals = sorted(directory.glob(f"*/{FILE_NAME}"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not journals:
        problem = f"contains no run: found no {FILE_NAME} in it or in its folders"
        raise InvalidInputError(
            f"{str(directory)!r} {problem if directory.is_dir() else 'is not a folder'}; pass the directory= of watch() "
            f"({DEFAULT_DIRECTORY} by default), or the folder of one run"
        )
    newest = journals[-1].parent.name
    print(f"newest of {len(journals)} runs: {newest}" if len(journals) > 1 else f"run: {newest}", file=sys.stderr)
    return journals[-1].parent


# --- replay -------------------------------------------------------------------------------------------------------------


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends the records of a run's journal that a tracker does not have. Running it again sends nothing. For a run that "
        "was killed and resumed, or for several runs, pass the folder that contains their folders."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the folder of a run, or a folder of runs")
    parser.add_argument("--backend", required=True, metavar="NAME", help="wandb, mlflow, tensorboard, trackio, ...")
    parser.add_argument(
        "--run",
        metavar="ID",
        help=f"the tracker's run (default: the run that was logged to); {NEW!r} starts a new one",
    )
    parser.set_defaults(run_command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    """Sends the missing records and prints a line for each journal of the run, or for each run in the folder."""
    folder, backend, run = arguments.directory, arguments.backend, arguments.run
    if backend != "local":  # refused below
        registry.find_backend(backend)  # reports an unknown name before any journal is read
    if not (folder / FILE_NAME).exists():
        return _replay_all(folder, backend, run)
    for journal in journals_of(folder):
        result = replay(journal, backend, run)
        run = run and result.run_ref.run  # the other heads are sent to the same new run
        print(_printable(f"{journal}: {_summary(result, backend)}"))
    return 0


def _replay_all(folder: Path, backend: str, run: str | None) -> int:
    """Sends the missing records of every run in a folder. A run that fails does not stop the others."""
    if backend == "local":
        raise InvalidInputError("--backend local: this is the journal itself; choose a tracker")
    folders = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))
    if not folders:
        _run_folder(folder)  # raises the error that explains why
    if run is not None:
        raise InvalidInputError(
            f"{str(folder)!r} is a folder of runs: with --run, name one of them: {', '.join(folders)}"
        )
    runs, others = tracked_runs(folder, backend)
    for reason in others.values():
        print(_printable(f"gwa-logging: skipped {reason}"), file=sys.stderr)
    if not runs:
        raise InvalidInputError(
            f"{str(folder)!r}: no journal in it was written for a run of {backend}; replay the folder of one run with "
            f"--run ID, or --run {NEW}"
        )
    exit_code = 0
    for tracked in runs:
        names = ", ".join(str(journal.parent.relative_to(folder)) for journal in tracked.journals)
        try:
            print(_printable(f"{names}: {_summary(replay(tracked.journals, backend), backend)}"))
        except (GwaError, OSError) as error:
            _print_error(f"{names}: {error}")
            exit_code = 2
    return exit_code


def _summary(result: Replayed, backend: str) -> str:
    parts = [f"sent {result.sent}", f"{result.had} were already there"]
    if result.repeated:
        parts.append(f"{result.repeated} were repeated after a resume")
    if result.skipped:
        parts.append(f"{result.skipped} lines of the journal skipped")
    return f"{', '.join(parts)}; {result.run_ref.url or result.run_ref.run or backend}"


# --- heads --------------------------------------------------------------------------------------------------------------


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists the layers of a model that could be its classifier head, which one is taken, and why."
    parser.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="where to find the model: package.module:name of a model, or of a function without arguments that returns one; "
        "for JAX a pair (model, example input) instead of the model",
    )
    parser.add_argument("--head", metavar="PATH", help="the dotted path of a layer, as in watch(head=)")
    parser.set_defaults(run_command=_heads)


def _heads(arguments: argparse.Namespace) -> int:
    """Prints the head finder's table. The exit code is 2 if the model has no head."""
    with _working_directory_on_path():
        found = _load(arguments.model)
        model, *inputs = found if type(found) is tuple else (found,)
        table = registry.find_adapter(model).describe(model, arguments.head, inputs)
    print(table)
    return 2 if table.splitlines()[-1].startswith("no head:") else 0


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _load(where: str) -> Any:
    """Returns the object at `package.module:name`, or its result if it is a function or a class.

    Raises:
        InvalidInputError: the object does not exist, its module cannot be imported, or the function needs arguments or fails.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise InvalidInputError(f"{where!r}: expected package.module:name, such as my_project.models:make_model")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"{where!r}: {error}") from error
    except Exception as error:  # the user's module may raise anything
        raise InvalidInputError(f"{where!r}: importing {module} raised {_located(error)}") from error
    return _call(found, where, name) if isinstance(found, _FACTORIES) else found


def _call(factory: Any, where: str, name: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except ValueError:  # some functions written in C have no signature
        pass
    except TypeError as error:
        raise InvalidInputError(
            f"{where!r}: {name}{inspect.signature(factory)} cannot be called without arguments ({error}); name a function "
            "without required arguments that returns the model"
        ) from error
    try:
        return factory()
    except Exception as error:  # the user's function may raise anything
        raise InvalidInputError(f"{where!r}: {name}() raised {_located(error)}") from error


def _located(error: Exception) -> str:
    """Describes an error together with the line of the user's module that it came from."""
    files = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    importers = (__file__, importlib.__file__)
    own = [(name, line) for name, line in files if name not in importers and not name.startswith("<frozen importlib")]
    where = " ({}, line {})".format(*own[0]) if own else ""  # a SyntaxError has none and names its line itself
    return f"{type(error).__name__}: {error}{where}"


# --- workspace ----------------------------------------------------------------------------------------------------------


def _add_workspace(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Saves a new workspace in a W&B project, with the picture of the scores and the metrics to look at first, and "
        "prints its address. With --report, saves a W&B report of one run instead."
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the two parts after https://wandb.ai/")
    parser.add_argument("--report", metavar="RUN", help="the id of a run in the project")
    parser.add_argument("--name", default="gwa", help="prefix of the metrics, as in watch(name=) (default: gwa)")
    parser.set_defaults(run_command=_workspace)


def _workspace(arguments: argparse.Namespace) -> None:
    """Saves a workspace or a report. Only its address is printed to stdout."""
    workspace = registry.import_integration(
        "gwa_logging.integrations.wandb_workspace", third_party="wandb_workspaces", extra="workspace"
    )
    if arguments.report is None:
        print(workspace.save_workspace(arguments.project, arguments.name))
    else:
        print(workspace.save_report(arguments.project, arguments.report, arguments.name))


# --- notify, notify-test ------------------------------------------------------------------------------------------------


def _add_notify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends the stop alert of a run's journal to each URL, for instance because a service was down until the run ended. "
        "An alert that a better epoch has withdrawn is not sent."
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="the folder of a run; or a folder of runs, of which the most recently written one is taken",
    )
    _add_urls(parser)
    parser.set_defaults(run_command=_notify)


def _notify(arguments: argparse.Namespace) -> int:
    """Prints a line for each URL. The exit code is 2 if one of the services did not accept the message."""
    notify = registry.notify_module()
    folder = _run_folder(arguments.directory)
    exit_code = 0
    for notifier in notify.open_notifiers(arguments.urls, folder):
        try:
            is_sent = notify.send_standing_alert(notifier, folder / FILE_NAME)
            print(f"{notifier.masked}: {'accepted' if is_sent else 'nothing sent, because no stop alert stands'}")
        except GwaError as error:
            _print_error(str(error))
            exit_code = 2
    return exit_code


def _add_notify_test(parser: argparse.ArgumentParser) -> None:
    parser.description = "Sends a test message with a picture to each URL, as watch(notify=) sends the stop alert."
    _add_urls(parser)
    parser.set_defaults(run_command=_notify_test)


def _add_urls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="+", metavar="URL", help="an Apprise URL, such as slack://... or mailto://...")


def _notify_test(arguments: argparse.Namespace) -> int:
    """Prints a line for each URL. The exit code is 2 if one of the services did not accept the message."""
    exit_code = 0
    notify = registry.notify_module()
    for notifier in notify.open_notifiers(arguments.urls):
        try:
            notify.send_test(notifier)
            print(f"{notifier.masked}: accepted")
        except GwaError as error:
            _print_error(str(error))
            exit_code = 2
    return exit_code


# --- messages -----------------------------------------------------------------------------------------------------------


def _print_error(text: str) -> None:
    """Prints an error as one line, without credentials."""
    print("gwa-logging:", _printable(" ".join(redact_urls(text).splitlines())), file=sys.stderr)


def _printable(text: str) -> str:
    """Replaces control characters, which a journal from elsewhere may contain, so that the text cannot affect a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    raise SystemExit(main())
