"""Several processes of JAX: the key-value store that `jax.distributed` keeps for them."""

from collections import Counter
from importlib import import_module
from time import monotonic
from typing import Any, NamedTuple

import jax


class ClientBoard(NamedTuple):
    """The store of jax.distributed. See `gwa_logging.ranks.Board`."""

    client: Any

    def watches(self, name: str) -> int:
        """Counts the calls of watch() under this name."""
        _watches[name] += 1
        return _watches[name]

    def post(self, key: str) -> None:
        """Stores the key for this process."""
        self.client.key_value_set(f"{key}/{jax.process_index()}", "watches")

    def absent(self, key: str, within: float) -> list[int]:
        """The processes that have not stored the key in time."""
        deadline = monotonic() + within
        return [number for number in range(jax.process_count()) if not self._has(f"{key}/{number}", deadline)]

    def _has(self, key: str, deadline: float) -> bool:
        try:
            self.client.blocking_key_value_get(key, max(1, round(1000 * (deadline - monotonic()))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        return True

    def settle(self, key: str, value: str) -> str:
        """Stores a value, unless a process has done so before."""
        try:
            self.client.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        return str(self.client.blocking_key_value_get(key, 1000))


_watches: Counter[str] = Counter()


def board() -> ClientBoard | None:
    """The board of jax.distributed; None if there is no other process, or this version of JAX keeps it elsewhere."""
    if jax.process_count() == 1:
        return None
    try:
        client = import_module("jax._src.distributed").global_state.client  # it has no public name
    except (ImportError, AttributeError):  # without it a process that never watches is waited for, as by any collective
        return None
    return None if client is None else ClientBoard(client)
