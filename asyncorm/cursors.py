"""`asyncorm.cursor()`: raw SQL under the same connection rules as the ORM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from django.db import InterfaceError

from . import bridge, sessions


class AsyncCursor:
    """A cursor whose statements are awaited: what `async with cursor()` gives.

    Each statement is an operation: inside `atomic()` or `connection()` it runs on that connection,
        otherwise on one of its own. Rows are in memory when `execute()` returns. Attributes such as
        `description`, `rowcount` and `statusmessage` are psycopg's.
    """

    def __init__(self, using: str | None) -> None:
        self._using = using
        self._cursor: Any = None

    def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._cursor is not None:
            self._cursor.close()
        self._cursor = sessions.require(self._using).wrapper.cursor()
        return getattr(self._cursor, method)(*args)

    async def execute(
        self, sql: Any, params: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> AsyncCursor:
        """Execute a statement; parameters as psycopg takes them (%s or %(name)s).

        Raises:
            django.db.Error: as Django's cursor does.
        """
        await bridge.run(self._run, "execute", (sql, params))
        return self

    async def executemany(self, sql: Any, param_list: Sequence[Any]) -> AsyncCursor:
        """Execute a statement once for each set of parameters, in one pipeline."""
        await bridge.run(self._run, "executemany", (sql, param_list))
        return self

    async def callproc(self, name: str, params: Sequence[Any] | None = None) -> Any:
        """Call a function of the database; fetch its result."""
        return await bridge.run(self._run, "callproc", (name, params))

    async def fetchone(self) -> tuple[Any, ...] | None:
        """The next row, None at the end."""
        return self._executed().fetchone()  # type: ignore[no-any-return]

    async def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        """The next `size` rows."""
        return self._executed().fetchmany(size)  # type: ignore[no-any-return]

    async def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that are left."""
        return self._executed().fetchall()  # type: ignore[no-any-return]

    async def __aiter__(self) -> AsyncIterator[tuple[Any, ...]]:
        for row in self._executed():
            yield row

    def _executed(self) -> Any:
        if self._cursor is None:
            raise InterfaceError("Nothing was executed on this cursor yet.")
        return self._cursor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._executed(), name)

    async def __aenter__(self) -> AsyncCursor:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cursor = None


def cursor(using: str | None = None) -> AsyncCursor:
    """Raw SQL: `async with asyncorm.cursor() as cur: await cur.execute(...)`.

    Args:
        using: a database alias; the default one by default.

    Raises (at the first statement):
        django.db.NotSupportedError: the alias has another engine.
    """
    return AsyncCursor(using)
