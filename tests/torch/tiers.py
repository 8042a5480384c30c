"""Full products of parameters, of which a part that covers every claim stays in the fast tier."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def tiered(
    names: str, *columns: Iterable[Any], odd: bool = False, fast: Callable[..., bool] = lambda *combination: False
) -> pytest.MarkDecorator:
    """Parametrizes a test with all combinations of values; combinations that are compiled are slow, except for half of them.

    Compiling is what takes time, so all others are fast. The half is that whose positions have an even sum. With three or more
    columns every pair of values from different columns occurs in it.

    Args:
        names: as in `pytest.mark.parametrize`.
        columns: the values for each name. A combination is compiled if "compiled" is one of its values.
        odd: takes the other half.
        fast: returns True for further combinations that stay in the fast tier.
    """
    parameters = []
    for combination in product(*(enumerate(column) for column in columns)):
        values = [value for _, value in combination]
        is_fast = "compiled" not in values or sum(position for position, _ in combination) % 2 == odd or fast(*values)
        parameters.append(pytest.param(*values, marks=() if is_fast else pytest.mark.slow))
    return pytest.mark.parametrize(names, parameters)
