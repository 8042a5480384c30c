"""The quickstart notebook: its cells run in order and show what its text promises."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gwa_logging import EpochReport, Monitor

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def run(code: str, names: dict[str, Any]) -> Any:
    """Runs a cell. Returns the value of its last line, which a notebook shows."""
    tree = ast.parse(code)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(shown.value), "cell", "eval"), names) if shown else None


@pytest.mark.slow
@pytest.mark.report
@pytest.mark.usefixtures("one_thread")
def test_cells_show_the_report_the_run_and_the_suspects(capsys):
    names: dict[str, Any] = {}
    shown = [value for value in (run(code, names) for code in CODE) if value is not None]
    assert [type(value) for value in shown] == [EpochReport, Monitor]
    for value in shown:
        ElementTree.fromstring(value._repr_html_())
    monitor = names["monitor"]
    assert monitor.faults == {}
    assert {report.count + report.excluded for report in monitor.history} == {1797}
    assert monitor.history[-1].separation < monitor.history[monitor.alert.best_epoch].separation, "as its text says"
    printed = capsys.readouterr().out
    assert int(re.search(r"(\d+)% of the 100 most suspect samples have a wrong label", printed)[1]) > 90
    assert len({suspect.thumbnail for suspect in names["suspects"]}) > 90
    assert "Samples that are probably mislabelled" in (monitor.journal.parent / "report.html").read_text(
        encoding="utf-8"
    )


def test_notebook_is_stored_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert [cell for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
