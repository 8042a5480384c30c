"""The command line of the study; the package's docstring describes it."""

import argparse
from pathlib import Path

from benchmarks.study.archive import add
from benchmarks.study.page import write_page
from benchmarks.study.schedule import train_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train the cells that have no file yet; resumable")
    command.add_argument(
        "--data", type=Path, required=True, help="folder with fashion_mnist.npz, cifar10n.npz, clinc150.json"
    )
    command.add_argument("--runs", type=Path, default=Path("study_runs"), help="folder of the runs' files")
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--minutes", type=float, default=1e6, help="start no further run after this time")
    command.add_argument("--only", default="", help="only runs whose names contain this")
    command.set_defaults(call=lambda a: train_all(a.data, a.runs, a.workers, a.minutes, a.only))
    command = commands.add_parser("add", help="add the finished runs to the archive")
    command.add_argument("--runs", type=Path, default=Path("study_runs"))
    command.set_defaults(call=lambda a: print(f"{add(a.runs)} runs added"))
    command = commands.add_parser("page", help="write docs/study.md from the archive")
    command.set_defaults(call=lambda _: print(write_page()))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
