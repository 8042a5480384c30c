"""The command line: `gwa-logging report`, `gwa-logging replay`, `gwa-logging heads`."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from gwa_logging import __version__, registry
from gwa_logging.errors import GwaError, InvalidInputError
from gwa_logging.journal import FILE_NAME
from gwa_logging.redact import redact_urls
from gwa_logging.replay import NEW, Replayed, journals_of, replay, tracked_runs
from gwa_logging.report.page import REPORT_NAME, write_report


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is told on stderr in one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run_command(arguments) or 0
    except (GwaError, OSError) as error:
        _print_error(str(error))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gwa-logging", description="Looks at runs that gwa_logging has watched.")
    parser.add_argument("--version", action="version", version=f"gwa-logging {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="make an HTML page of a run",
        description=f"Writes {REPORT_NAME}, one page that works without a network, next to a run's journal.",
    )
    report.add_argument(
        "directory", type=Path, metavar="DIR", help="a run's folder; or a folder of runs, for the run written to last"
    )
    report.set_defaults(run_command=_report)
    replay = commands.add_parser(
        "replay",
        help="send to a tracker what it has missed of a run",
        description="Sends the records of a run's journal that a tracker does not have. A second time sends nothing. For a run "
        "that was killed and resumed, or for several runs, give the folder that holds their folders.",
    )
    replay.add_argument("directory", type=Path, metavar="DIR", help="a run's folder, or a folder of runs")
    replay.add_argument("--backend", required=True, metavar="NAME", help="wandb, mlflow, tensorboard, trackio, ...")
    replay.add_argument(
        "--run", metavar="ID", help=f"the tracker's run; without it the one that was logged to; {NEW!r} starts one"
    )
    replay.set_defaults(run_command=_replay)
    heads = commands.add_parser(
        "heads",
        help="show which layer of a model is taken for its classifier head, and why",
        description="Shows what could be the classifier head of a model, which layer is taken, and why.",
    )
    heads.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="where the model is: package.module:name of a model, or of a function that makes one; in JAX, of both the model "
        "and an example input: (model, input)",
    )
    heads.add_argument("--head", metavar="PATH", help="as head= of watch(): the dotted path of a layer")
    heads.set_defaults(run_command=_heads)
    return parser


def _report(arguments: argparse.Namespace) -> None:
    """Writes the page and prints its path, and nothing else, on stdout."""
    print(write_report(_run_folder(arguments.directory)))


def _replay(arguments: argparse.Namespace) -> int:
    """Sends what is missing, and says for each journal of the run, or for each run of the folder, what it did."""
    folder, backend, run = arguments.directory, arguments.backend, arguments.run
    if not (folder / FILE_NAME).exists():
        return _replay_all(folder, backend, run)
    for journal in journals_of(folder):
        done = replay(journal, backend, run)
        run = run and done.run_ref.run  # a new one is for the other heads too
        print(_printable(f"{journal}: {_told(done, backend)}"))
    return 0


def _replay_all(folder: Path, backend: str, run: str | None) -> int:
    """Sends what is missing of every run in a folder; one that fails does not stop the others."""
    folders = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))
    if not folders:
        _run_folder(folder)  # says what is wrong
    if run is not None:
        raise InvalidInputError(
            f"{str(folder)!r} is a folder of runs: with --run, name one of them: {', '.join(folders)}"
        )
    runs, others = tracked_runs(folder, backend)
    for reason in others.values():
        print(_printable(f"gwa-logging: skipped {reason}"), file=sys.stderr)
    if not runs:
        raise InvalidInputError(
            f"{str(folder)!r}: no journal in it was written for a run of {backend}; replay one run's folder with --run ID, or "
            f"--run {NEW}"
        )
    failed = 0
    for tracked in runs:
        names = ", ".join(str(journal.parent.relative_to(folder)) for journal in tracked.journals)
        try:
            print(_printable(f"{names}: {_told(replay(tracked.journals, backend), backend)}"))
        except (GwaError, OSError) as error:
            _print_error(f"{names}: {error}")
            failed = 2
    return failed


def _told(done: Replayed, backend: str) -> str:
    skipped = f", {done.skipped} lines of the journal skipped" if done.skipped else ""
    repeated = f", {done.repeated} were repeated after a resume" if done.repeated else ""
    return (
        f"sent {done.sent}, {done.had} were there{repeated}{skipped}; {done.run_ref.url or done.run_ref.run or backend}"
    )


def _heads(arguments: argparse.Namespace) -> None:
    """Prints the head finder's view of a model."""
    found = _load(arguments.model)
    model, *inputs = found if type(found) is tuple else (found,)
    print(registry.find_adapter(model).describe(model, arguments.head, inputs))


def _load(where: str) -> Any:
    """The model at `package.module:name`, made if there is a function of that name; the working directory counts."""
    module, _, name = where.partition(":")
    if not module or not name:
        raise InvalidInputError(f"{where!r}: expected package.module:name, such as my_project.models:make_model")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"{where!r}: {error}") from error
    finally:
        sys.path.pop(0)
    is_maker = isinstance(found, type) or type(found).__name__ in ("function", "builtin_function_or_method", "partial")
    return found() if is_maker else found


def _print_error(text: str) -> None:
    """Prints an error as one line, without credentials."""
    print("gwa-logging:", _printable(" ".join(redact_urls(text).splitlines())), file=sys.stderr)


def _printable(text: str) -> str:
    """One line that changes nothing in a terminal: control characters of a foreign journal are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _run_folder(directory: Path) -> Path:
    """The folder itself if it is a run's, otherwise the run in it whose journal was written to last."""
    if (directory / FILE_NAME).exists():
        return directory
    journals = sorted(directory.glob(f"*/{FILE_NAME}"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not journals:
        missing = "holds no run" if directory.is_dir() else "is not a folder"
        raise InvalidInputError(
            f"{str(directory)!r} {missing}: there is no {FILE_NAME} in it or in its folders; give the directory= of "
            "watch(), by default gwa_runs, or the folder of one run"
        )
    newest = journals[-1].parent
    print(f"newest of {len(journals)} runs: {newest.name}" if journals[1:] else f"run: {newest.name}", file=sys.stderr)
    return newest


if __name__ == "__main__":
    raise SystemExit(main())
