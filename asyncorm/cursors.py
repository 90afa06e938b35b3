"""`asyncorm.cursor()`: raw SQL under the same connection rules as the ORM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from operator import length_hint
from typing import Any

from django.db import DEFAULT_DB_ALIAS, InterfaceError
from psycopg.abc import Query
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from . import _events, bridge, sessions
from ._cache.awaited import Crowd, place_of
from ._cache.execute import NotServed, direct, serves
from ._wire.cursors import Answer
from ._wire.lazy import DeferredConnection, Start
from ._wire.statement import Statement
from ._wire.texts import is_single
from .driver import Connection
from .pages import see
from .wrappers import Wrapper

TUPLES_OK = ExecStatus.TUPLES_OK


class _Raw:
    """SQL and parameters as a cursor takes them (a `Command`)."""

    def __init__(self, text: str, params: object, wrapper: Wrapper) -> None:
        self.text = text
        self.params = params
        self.wrapper = wrapper

    def bind(self, conn: Connection) -> Statement:
        if not serves(conn, self.wrapper):
            raise NotServed
        return conn.bound(self.text, self.params)

    def read(self, conn: Connection, result: PGresult) -> Answer:
        return conn.answer(result, conn.transformer)


def _told(text: str, params: Sequence[Any], wrapper: Wrapper) -> AbstractContextManager[Any]:
    """The statement for those who listen."""
    if not _events.statements:
        return nullcontext()
    return _events.statement(wrapper.alias, text, params, in_block=wrapper.in_atomic_block)


class AsyncCursor:
    """A cursor whose statements are awaited: what `async with cursor()` gives.

    Each statement is an operation: inside `atomic()` or `connection()` it runs on that connection,
        otherwise on one of its own. Rows are in memory when `execute()` returns. Attributes such as
        `description`, `rowcount` and `statusmessage` are psycopg's.
    """

    def __init__(self, using: str | None) -> None:
        self._using = using
        self._cursor: Any = None
        # What is left of a statement without a cursor, and how to make one for the rest.
        self._rows: Iterator[tuple[Any, ...]] | None = None
        self._make: Callable[[], Any] | None = None

    def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        self._close()
        self._cursor = sessions.require(self._using).wrapper.cursor()
        return getattr(self._cursor, method)(*args)

    def _execute(self, text: Any, params: Any) -> None:
        """Execute a statement, without a cursor if nobody would notice."""
        wrapper = sessions.require(self._using).wrapper
        conn = direct(wrapper) if type(text) is str and is_single(text) else None
        if conn is None or conn.row_factory is not tuple_row:
            self._run("execute", (text, params))
            return
        self._close()
        wrapper.validate_no_broken_transaction()
        with _told(text, params, wrapper), wrapper.wrap_database_errors:
            answer = conn.run(_events.followed(_Raw(text, params, wrapper)))
        self._keep(answer, wrapper, wrapper.session.pool.start, conn)

    async def _share(self, text: Any, params: Any) -> bool:
        """Have a statement travel with others while all connections are in use, if it may.

        As `_execute()` would, without an operation and a session that do nothing but wait.
        """
        if type(text) is not str:
            return False
        crowd = place_of(self._using or DEFAULT_DB_ALIAS)
        if not isinstance(crowd, Crowd) or crowd.wrapper.watched:
            return False
        wrapper, start = crowd.wrapper, crowd.pool.start
        if not crowd.takes(text) or start is None or start.row_factory is not tuple_row:
            return False
        bridge.check()
        self._close()
        try:
            with _told(text, params, wrapper), wrapper.wrap_database_errors:
                answer = await crowd.run(_events.followed(_Raw(text, params, wrapper)))
        except NotServed:
            return False
        self._keep(answer, wrapper, start)
        return True

    def _keep(
        self, answer: Answer, wrapper: Wrapper, start: Start, conn: Connection | None = None
    ) -> None:
        rows = iter(answer.rows) if answer.result.status == TUPLES_OK else None

        def make() -> Any:
            read = 0 if rows is None else answer.result.ntuples - length_hint(rows)
            return wrapper.make_cursor(
                start.cursor_on(conn or DeferredConnection(start)).show(answer, read)
            )

        self._rows, self._make = rows, make

    def _close(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._cursor = self._rows = self._make = None

    async def execute(
        self, sql: Query, params: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> AsyncCursor:
        """Execute a statement; parameters as psycopg takes them (%s or %(name)s).

        Raises:
            django.db.Error: as Django's cursor does.
        """
        if not await self._share(sql, params):
            await bridge.run(self._execute, sql, params)
        return self

    async def executemany(self, sql: Query, param_list: Sequence[Any]) -> AsyncCursor:
        """Execute a statement once for each set of parameters, in one pipeline."""
        await bridge.run(self._run, "executemany", (sql, param_list))
        return self

    async def callproc(self, name: str, params: Sequence[Any] | None = None) -> Any:
        """Call a function of the database; fetch its result."""
        return await bridge.run(self._run, "callproc", (name, params))

    async def fetchone(self) -> tuple[Any, ...] | None:
        """The next row, None at the end."""
        if self._rows is not None:
            return next(self._rows, None)
        return self._executed().fetchone()  # type: ignore[no-any-return]

    async def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        """The next `size` rows."""
        if self._rows is not None:
            return list(islice(self._rows, size))
        return self._executed().fetchmany(size)  # type: ignore[no-any-return]

    async def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that are left."""
        if self._rows is not None:
            return list(self._rows)
        return self._executed().fetchall()  # type: ignore[no-any-return]

    async def __aiter__(self) -> AsyncIterator[tuple[Any, ...]]:
        for row in self._executed() if self._rows is None else self._rows:
            yield row

    def _executed(self) -> Any:
        if self._make is not None:
            self._cursor = self._make()
            self._rows = self._make = None
        if self._cursor is None:
            raise InterfaceError(
                "Nothing was executed on this cursor yet." + see("querysets#raw-sql")
            )
        return self._cursor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._executed(), name)

    async def __aenter__(self) -> AsyncCursor:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._cursor = self._rows = self._make = None


def cursor(using: str | None = None) -> AsyncCursor:
    """Raw SQL: `async with asyncorm.cursor() as cur: await cur.execute(...)`.

    Args:
        using: a database alias; the default one by default.

    Raises (at the first statement):
        django.db.NotSupportedError: the alias has another engine.
    """
    return AsyncCursor(using)
