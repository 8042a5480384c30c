"""The pages of docs/: links have a target, code runs, and quoted messages and figures are the real ones."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import gwa_logging
from tests.pages import DOCS, MODEL, ROOT, assert_two_epochs, in_trainer, links, python_blocks, run, run_together

PAGES = sorted(DOCS.glob("*.md"))
TRAINERS = python_blocks(DOCS / "trainers.md")
PRESUMED = {
    "notifications.md": f"import os\nos.environ['ALERT_URL'] = 'json://127.0.0.1:9/hook'\n{MODEL}",
    "stopping.md": MODEL,
}
"""Code that the blocks of a page presume."""

TESTED_ELSEWHERE = {"backends.md", "trainers.md", "language-models.md", "ray.md"}
"""Pages whose code is run by test_backends.py, below block by block, by trainers/test_trl.py and by trainers/test_ray.py."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, and the names that the API page documents."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", prose, flags=re.MULTILINE))


@pytest.mark.parametrize(("page", "target"), [(page.name, target) for page in PAGES for target in links(page)])
def test_every_link_and_picture_of_the_docs_has_a_target(page, target):
    path, _, anchor = target.partition("#")
    found = DOCS / (path or page)
    assert found.is_file()
    assert not anchor or anchor in anchors(found)


def program(page: str) -> str:
    return "\n".join([PRESUMED.get(page, ""), *python_blocks(DOCS / page)])


def in_trainer_as_documented(trainer: str) -> str:
    (code,) = [code for code in TRAINERS if f"integrations.{trainer} import" in code]
    return in_trainer(trainer, code)


PROGRAMS = {p.name: program(p.name) for p in PAGES if python_blocks(p) and p.name not in TESTED_ELSEWHERE}


@pytest.fixture
def _settings_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles faster
    # devices.md runs in a world of one process, as torchrun sets it up; port 0 means any free port.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("framework", ["PyTorch", "JAX"])
@pytest.mark.usefixtures("_settings_of_a_process")
def test_the_code_of_all_pages_on_a_framework_runs_in_one_process(framework, tmp_path):
    chosen = {page: code for page, code in PROGRAMS.items() if ("import jax" in code) == (framework == "JAX")}
    assert f"quickstart-{framework.lower()}.md" in chosen
    run_together(chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS)
@pytest.mark.usefixtures("_settings_of_a_process")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    run(PROGRAMS[page], tmp_path)


def test_the_code_for_transformers_and_accelerate_runs(tmp_path):
    """test_readme.py runs the lines for Lightning, and trainers/test_keras.py trains with Keras."""
    trainers = ("transformers", "accelerate")
    run_together({trainer: in_trainer_as_documented(trainer) for trainer in trainers}, tmp_path)
    for trainer in trainers:
        assert_two_epochs(tmp_path / trainer)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lightning", "transformers", "keras", "accelerate", "ignite", "fastai"])
def test_the_code_for_each_trainer_runs_in_its_own_process(trainer, tmp_path):
    """examples/ultralytics_digits.py has the lines for Ultralytics."""
    if importlib.util.find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed")
    run(in_trainer_as_documented(trainer), tmp_path)
    assert_two_epochs(tmp_path)


def test_the_page_on_trainers_has_one_block_per_trainer():
    assert len(TRAINERS) == 7


def literals() -> list[str]:
    """Every string literal in the library, with … for what is filled in."""
    found = []
    for folder in ("gwa_logging", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value.replace("%s", "…"))
    return found


LITERALS = literals()
QUOTED = re.findall(r"^\*\*`([^`]+)`\*\*", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)


def test_the_page_on_troubleshooting_quotes_messages():
    headings = re.findall(r"^\*\*.*`.*\*\*", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(QUOTED) == len(headings) > 10


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_in_troubleshooting_is_one_that_the_code_gives(message):
    pieces = [piece.strip() for piece in message.split("…") if piece.strip(" .:")]
    assert any(all(piece in text for piece in pieces) for text in LITERALS)


def test_the_figures_about_the_stop_alert_are_those_of_the_study():
    _, evidence = (DOCS / "stopping.md").read_text().split("## The evidence")
    quoted, measured = (set(re.findall(r"\d+\.\d+", text)) for text in (evidence, (DOCS / "study.md").read_text()))
    assert quoted
    assert quoted <= measured


def test_the_api_page_has_every_public_name():
    documented = set(re.findall(r"^::: gwa_logging\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    assert documented == set(gwa_logging.__all__)


def test_the_site_shows_every_page():
    listed = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed | {"performance.md"} == {page.name for page in PAGES} | {"performance.md"}
