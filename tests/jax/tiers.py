"""Products of parameters, of which a part that covers every claim stays in the fast tier: each case compiles programs."""

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(names: str, combinations: Iterable[tuple[Any, ...]], fast: Iterable[tuple[Any, ...]]) -> Any:
    """Parametrizes a test with combinations of values. Those that are not `fast` are slow.

    Args:
        names: as in `pytest.mark.parametrize`.
        combinations: the values for the names.
        fast: some of the combinations.
    """
    combinations, fast = list(combinations), list(fast)
    unknown = [each for each in fast if each not in combinations]
    assert not unknown, f"fast: {unknown} are not among the combinations"
    marks = [() if each in fast else pytest.mark.slow for each in combinations]
    return pytest.mark.parametrize(
        names, [pytest.param(*each, marks=mark) for each, mark in zip(combinations, marks, strict=True)]
    )
