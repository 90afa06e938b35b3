"""What stands for a connection of a crowded pool until one is needed."""

from __future__ import annotations

from collections.abc import Generator
from time import monotonic
from typing import Any, NamedTuple

from psycopg.adapt import AdaptersMap

from ..driver import Connection
from .cursors import Nowhere
from .locks import NO_LOCK


class Start(NamedTuple):
    """What the connections of a pool have when they are new: of no connection in particular.

    Attributes:
        pgconn: for cursors without a connection.
    """

    adapters: AdaptersMap
    row_factory: Any
    cursor_factory: Any
    server_version: int
    pgconn: Any = Nowhere()

    @classmethod
    def of(cls, conn: Connection) -> Start:
        """That of a connection which is new."""
        adapters = AdaptersMap(conn.adapters)  # connection_created may have added some
        return cls(adapters, conn.row_factory, conn.cursor_factory, conn.info.server_version)

    def cursor_on(self, conn: Connection) -> Any:
        """A cursor of a connection that nothing is asked for it."""
        cursor = self.cursor_factory(self)
        cursor._conn = conn
        return cursor

    @property
    def has_known_cursors(self) -> bool:
        """Whether its cursors are made without asking a connection for more than is here."""
        return all(
            cls.__module__.partition(".")[0] in ("asyncorm", "django", "psycopg", "typing")
            for cls in self.cursor_factory.__mro__[:-1]
        )


class _NoWire:
    """What a connection has in place of its wire while there is none."""

    waiting = False

    def __init__(self) -> None:
        self.yielded = monotonic()


_OF_LAZY = ("lock", "_pool", "served_by")


class DeferredConnection(Connection):
    """Stands for a connection of the pool until one is needed.

    Single statements go to a queue and travel with those of other operations (see multiplexing.py).
    Whatever else is asked of it waits for a connection, and from then on this object is a second
    face of that one: they share all their attributes. Until then it has none of any connection.
    """

    deferred = True
    configured = True
    session_dirty = False
    closed = False
    _autocommit = True
    _closed = False
    _beginning: Start

    def __init__(self, start: Start) -> None:
        self.__dict__.update(_beginning=start, lock=NO_LOCK, _pool=None, wire=_NoWire())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.materialize()
        return getattr(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _OF_LAZY:
            self.materialize()
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at 0x{id(self):x}>"

    def __del__(self, *args: Any) -> None:
        """There is nothing to close."""

    def materialize(self) -> None:
        """Wait for a connection and be it."""
        conn = self.lock.materialize()
        object.__setattr__(self, "__dict__", conn.__dict__)
        object.__setattr__(self, "__class__", Connection)

    def wait(
        self, gen: Generator[Any, Any, Any], interval: float = 0.1, timeout: float | None = None
    ) -> Any:
        """As Connection.wait(), on a connection of its own."""
        self.materialize()
        return self.wait(gen, interval, timeout)

    @property
    def row_factory(self) -> Any:  # type: ignore[override]
        """That of the pool's connections."""
        return self._beginning.row_factory

    @property
    def cursor_factory(self) -> Any:  # type: ignore[override]
        """That of the pool's connections."""
        return self._beginning.cursor_factory

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's; one that is not as usual needs a session."""
        if args or kwargs or not self._beginning.has_known_cursors:
            self.materialize()
            return self.cursor(*args, **kwargs)
        return self._beginning.cursor_on(self)

    def terminate(self) -> None:
        """There is nothing to close."""

    def close(self) -> None:
        """There is nothing to close."""

    def cancel(self) -> None:
        """There is nothing to cancel."""

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """There is nothing to cancel."""
