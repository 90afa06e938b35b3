"""The connections of a pool: asynchronous ones, each with a synchronous-looking twin."""

from __future__ import annotations

from collections.abc import Awaitable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from django.db import connections
from psycopg import AsyncConnection
from psycopg.abc import PQGen

from .._wire.locks import OwnLock
from ..driver import Connection
from ..roles import Role
from ..wire import Wire

if TYPE_CHECKING:
    from .pool import ConnectionPool


T = TypeVar("T")

# Of the arguments that Django makes for connect(), those about the cursors of synchronous code.
OF_CURSORS = ("row_factory", "cursor_factory", "context", "prepare_threshold")


# What is made in a context, for who has to close it if it is not made completely.
MADE: ContextVar[list[PooledConnection] | None] = ContextVar("asyncorm_made", default=None)


async def _made(connecting: Awaitable[T]) -> T:
    """What connect() gives.

    An error has none of psycopg's frames, which have the attempt, and the error: the server would
    keep a place for it until the garbage collector comes.
    """
    try:
        return await connecting
    except psycopg.errors._NO_TRACEBACK as exc:
        raise exc.with_traceback(None)  # noqa: B904


class PooledConnection(AsyncConnection[Any]):
    """A connection of the pool with the synchronous-looking `twin` over it.

    `connect()` takes the arguments that Django makes for `psycopg.connect()`; those about Python
    state go to the twin.

    Attributes:
        home: the pool that it belongs to, until that retires it.
        began: the server's role when it was made.
        wrote_in_vain: a write was refused on it, perhaps since the role has changed.
    """

    twin: Connection
    wire: Wire
    home: ConnectionPool | None = None
    began: Role
    wrote_in_vain = False
    options: dict[str, Any]

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> PooledConnection:
        options = {name: kwargs.pop(name) for name in OF_CURSORS if name in kwargs}
        kwargs["autocommit"] = True
        conn = await _made(super().connect(conninfo, prepare_threshold=None, **kwargs))
        conn.options = options
        conn.wire = Wire(conn.pgconn, lambda: conn._pool is None)
        conn.began = Role.of(conn.pgconn)
        conn.renew()
        if (made := MADE.get()) is not None:
            made.append(conn)
        return conn

    @classmethod
    async def unpooled(cls, **kwargs: Any) -> Connection:
        """A connection for whoever asks: the twin of a new one."""
        twin = (await cls.connect(**kwargs)).twin
        twin.wire = Wire(twin.pgconn)  # it may be dropped unclosed, and must not stay a loop's
        twin.lock = OwnLock()
        # Nobody else gets it: what is left in its server session does not matter.
        twin.cursor_factory = kwargs.get("cursor_factory") or psycopg.Cursor
        return twin

    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """psycopg's, as the twin waits: for the pool's own statements (check, rollback, reset)."""
        return await self.twin.drive(gen)

    async def close(self) -> None:
        """As psycopg's."""
        self._closed = True
        self.wire.finish()

    def renew(self) -> None:
        """Forget the Python state of the session: for a session that was reset on the server."""
        self.twin = Connection.over(self.pgconn, self.options, self.wire)
        self.twin.pooled = self

    def alive(self) -> bool:
        """Whether it may be used and the server has kept it open, as far as one can see here."""
        return self.home is not None and self.wire.is_open()


async def connect_beside(alias: str) -> AsyncConnection[Any]:
    """A connection beside the pool of an alias, psycopg's own."""
    params = connections.create_connection(alias).get_connection_params()
    for name in OF_CURSORS:
        params.pop(name, None)
    return await _made(AsyncConnection.connect(**{**params, "autocommit": True}))
