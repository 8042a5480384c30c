"""The examples in the docstrings of the core print what they state."""

import doctest
import importlib
from pathlib import Path

import pytest

import gwa_logging

FOLDER = Path(gwa_logging.__file__).parent
MODULES = sorted(
    ".".join(("gwa_logging", *path.relative_to(FOLDER).with_suffix("").parts))
    for path in FOLDER.rglob("*.py")
    if "integrations" not in path.parts and ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert "gwa_logging.alignment" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_state(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
