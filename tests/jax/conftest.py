"""Fixtures of the JAX tests. Compiling takes most of their time, so it is kept short and its results are kept."""

import os
from collections.abc import Iterator
from pathlib import Path

# JAX finds compiled programs by their code, options and version, so the folder may be kept or removed at any time. All
# processes share it: the environment is for those that tests start.
_CACHE = {
    "jax_compilation_cache_dir": str(Path(__file__).parents[2] / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
os.environ |= {name.upper(): str(value) for name, value in _CACHE.items()}
os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported

import jax  # noqa: E402 - after the environment
import pytest  # noqa: E402

for name, value in _CACHE.items():
    jax.config.update(name, value)


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
