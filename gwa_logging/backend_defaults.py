"""Turns an object with `write` and `close` into a backend, with the defaults of the other members."""

from gwa_logging.protocols import Backend, BackendWriter
from gwa_logging.records import AnyRecord


class _WithDefaults(Backend):
    """A backend made of an object that has `write`, `close`, and any of the optional members."""

    def __init__(self, writer: BackendWriter) -> None:
        self._writer = writer
        self.name = type(writer).__name__
        own = (
            "name",
            "run",
            "run_ref",
            "threaded",
            "is_notifier",
            "owns_run",
            "is_in_folder",
            "records_per_call",
            "write_many",
            "contents",
            "discard",
            "move_to",
            "refusal",
        )
        for member in own:
            if hasattr(writer, member):
                setattr(self, member, getattr(writer, member))

    def __eq__(self, other: object) -> bool:
        return self._writer is (other._writer if isinstance(other, _WithDefaults) else other)

    def __hash__(self) -> int:
        return id(self._writer)

    def write(self, record: AnyRecord) -> None:
        self._writer.write(record)

    def close(self) -> None:
        self._writer.close()


def with_defaults(writer: BackendWriter) -> Backend:
    """Adds the defaults of `Backend` to an object that has `write` and `close`. Equal to that object, and hashable."""
    return writer if isinstance(writer, Backend) else _WithDefaults(writer)
