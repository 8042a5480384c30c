"""Fixtures of the JAX tests. Compiling takes most of their time, so it is kept short."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def fully_optimised() -> None:
    """For tests about compiled code: XLA optimises as it does in production."""


@pytest.fixture(autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA skips most optimisations, unless the test asks for `fully_optimised`."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", "fully_optimised" not in request.fixturenames)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
