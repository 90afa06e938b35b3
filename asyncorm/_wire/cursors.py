"""Cursors that notice session state, and whose statements may travel with others'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer
from psycopg.pq.abc import PGresult

from .. import _events, written
from .adapting import AdaptersContext, has_own
from .statement import Statement, sent, text_of
from .texts import is_single, traces

if TYPE_CHECKING:
    from ..driver import Connection


# Who has put a method of his own in its place is to see each statement.
_EXECUTE: Any = psycopg.Cursor.execute
if getattr(getattr(_EXECUTE, "__code__", None), "co_filename", None) != psycopg.cursor.__file__:
    _EXECUTE = object()  # it was there before us


class _Cursor:
    """A cursor class's part that notices session state, and whose statements may travel with those
    of other operations (mixed into Django's).
    """

    __slots__ = ()

    def execute(self: Any, query: Any, params: Any = None, **options: Any) -> Any:
        text = text_of(query)
        conn = self._conn
        theirs = getattr(super().execute, "__func__", None) is not _EXECUTE  # type: ignore[misc]
        queue = None if options or theirs else conn.lock.queue_for(text)
        if queue is None and not (options or theirs) and conn.begins and is_single(text):
            queue = conn  # which sends BEGIN with it
        if queue is None:
            self._watch(text)
            with self._conn.sending(text):
                return super().execute(query, params, **options)  # type: ignore[misc]
        if self.closed:
            raise psycopg.InterfaceError("the cursor is closed")
        self._reset()
        answer = queue.run(_events.followed(_Executing(self, query, params, text)))
        conn.served_by = queue.served_by
        conn.wire.yielded = monotonic()
        return self.show(answer)

    def show(self: Any, answer: Answer, read: int = 0) -> Any:
        """Have executed the statement of an answer, and read so many rows of it."""
        self._tx = answer
        self._pgconn = Nowhere(answer.encoding)
        self._set_results([answer.result])
        self._pos = read
        return self

    def fetchmany(self: Any, size: int = 0) -> Any:
        """As psycopg's; Django reads large results so, in small parts."""
        self._conn.give_turn()
        return super().fetchmany(size)  # type: ignore[misc]

    def executemany(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        self._watch(text := text_of(query))
        if self._conn.streamed:
            with self._conn.lock:
                self._conn.wait(self._conn.whole_results())
        with self._conn.sending(text):
            return super().executemany(query, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def copy(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._alone(statement), super().copy(statement, *args, **kwargs) as copy:  # type: ignore[misc]
            yield copy

    def stream(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        # The lock, or psycopg may see that others' statements are in a pipeline now.
        with self._alone(query), self._conn.lock:
            self._conn.streamed = True
            yield from super().stream(query, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _alone(self: Any, query: Any) -> Iterator[None]:
        """No event tells of what is executed inside."""
        self._watch(text := text_of(query))
        try:
            yield
        finally:
            if written.listeners and (alias := getattr(self._conn.lock, "alias", None)) is not None:
                written.tell(alias, text)

    def _start_query(self: Any, query: Any = None) -> Any:
        self._conn.watched = True
        yield from super()._start_query(query)  # type: ignore[misc]

    def _watch(self: Any, text: str) -> None:
        """What follows needs the connection to itself."""
        conn = self._conn
        if conn.deferred:
            conn.materialize()
        self._pgconn = conn.pgconn
        if left := traces(text):
            conn.note(left)


@functools.cache
def native_cursor(cls: type) -> Any:
    """The class, with what native code needs."""
    return type(cls.__name__, (_Cursor, cls), {"__slots__": (), "__module__": cls.__module__})


class InTurn:
    """A server-side cursor's part that waits for its turn before psycopg looks for pipelines, and
    that notices session state."""

    __slots__ = ()

    def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        declaring = getattr(self._conn, "declaring", None)
        if declaring is not None:  # None on a synchronous caller's connection
            declaring(self.name, self.withhold, traces(text_of(query)))
        with self._conn.lock:
            return super().execute(query, *args, **kwargs)  # type: ignore[misc]

    def close(self: Any) -> None:
        super().close()  # type: ignore[misc]
        if (held := getattr(self._conn, "held", None)) is not None:
            held.discard(self.name)

    def _start_query(self: Any, query: Any = None) -> Any:
        self._conn.watched = True
        yield from super()._start_query(query)  # type: ignore[misc]


@functools.cache
def in_turn(cls: type) -> Any:
    """The class of a server-side cursor, to take turns."""
    return type(cls.__name__, (InTurn, cls), {"__slots__": (), "__module__": cls.__module__})


class _Executing:
    """A cursor's statement on the connection of others (a `Command`)."""

    def __init__(self, cursor: Any, query: Any, params: object, text: str) -> None:
        self.cursor = cursor
        self.query = query
        self.params = params
        self.text = text

    def bind(self, conn: Connection) -> Statement:
        cursor = self.cursor
        adapters = cursor._adapters if has_own(cursor._adapters) else conn.adapters
        self.transformer = Transformer(AdaptersContext(adapters, conn))
        cursor._query = query = cursor._query_cls(self.transformer)  # for the query log, too
        query.convert(self.query, self.params)
        return sent(query, self.text)

    def read(self, conn: Connection, result: PGresult) -> Answer:
        return conn.answer(result, self.transformer)


class Answer:
    """The result of a statement with its rows loaded: nothing is left to be read from a connection.

    For a cursor it is the `Transformer` of that result.
    """

    def __init__(self, result: Any, rows: list[tuple[Any, ...]], encoding: str) -> None:
        self.result = result
        self.rows = rows
        self.encoding = encoding

    def set_pgresult(self, result: PGresult, **kwargs: Any) -> None:
        """It has it already."""

    def load_row(self, row: int, make_row: Callable[..., Any]) -> Any:
        """As psycopg's."""
        return make_row(self.rows[row]) if row < len(self.rows) else None

    def load_rows(self, row0: int, row1: int, make_row: Callable[..., Any]) -> list[Any]:
        """As psycopg's."""
        rows = self.rows[row0:row1]
        return rows if make_row is tuple else list(map(make_row, rows))


class Nowhere:
    """What a cursor has in place of a libpq connection, while it has none or needs none."""

    status = pq.ConnStatus.BAD  # for its repr()

    def __init__(self, encoding: str = "utf-8") -> None:
        self._encoding = encoding
