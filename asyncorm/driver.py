"""A synchronous-looking psycopg connection whose waits are awaited: the seam to psycopg and
psycopg_pool.

psycopg builds its synchronous and its asynchronous connection on the same generators; only
`Connection.wait()` blocks. `Connection` here overrides that one method. `ConnectionPool` is
psycopg_pool's, plus what it does not offer: a checkout and a return that need no task switch, the
reason of a failed connection told to those who wait, an immediate close.

What psycopg and psycopg_pool do not document of what is used here is in internals.py, with the
reasons.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import traceback
from asyncio import CancelledError, get_running_loop
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import anyio
import psycopg
from greenlet import getcurrent
from psycopg import AsyncConnection, generators, pq, sql, waiting
from psycopg._preparing import Prepare
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.types import TypesRegistry
from psycopg.types.string import TextLoader
from psycopg_pool.pool_async import AddConnection, ReturnConnection

from . import _events, patches
from .bridge import Runner, deliver
from .growth import GrowingPool
from .roles import ASK, STANDBY_WANTED, Role, contradicts
from .session_state import leaves_state
from .turns import BUSY as _BUSY
from .turns import turn
from .upkeep import Cancelled
from .wire import CLOSED, Wire, close_generator

T = TypeVar("T")

logger = logging.getLogger("psycopg.pool")

# Seconds for the server to answer a cancel request, or to end a COMMIT, once the task is cancelled.
CANCEL_TIMEOUT = 5.0
_ELSEWHERE = 10.0  # seconds for which standbys are refused where a primary was and is looked for
SLICE = 100  # rows loaded, or made into objects, before other tasks may have a turn

# Who has put a method of his own in its place is to see each statement.
_EXECUTE: Any = psycopg.Cursor.execute
if getattr(getattr(_EXECUTE, "__code__", None), "co_filename", None) != psycopg.cursor.__file__:
    _EXECUTE = object()  # it was there before us

_OK = pq.ConnStatus.OK
_IDLE = pq.TransactionStatus.IDLE
_ACTIVE = pq.TransactionStatus.ACTIVE
_UNKNOWN = pq.TransactionStatus.UNKNOWN
_TUPLES_OK = pq.ExecStatus.TUPLES_OK
_COMMAND_OK = pq.ExecStatus.COMMAND_OK
_EMPTY_QUERY = pq.ExecStatus.EMPTY_QUERY
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_SHOULD = Prepare.SHOULD
# A prepared statement cannot be executed any more: "cached plan must not change result type" and
# "prepared statement does not exist".
STALE = (b"0A000", b"26000")
_TIMESTAMPTZ = 1184
_AS_TEXT = 2**32 - 1  # stands for no type of the server's
_COPY_IN, _COPY_OUT = pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT


ENDED = (
    "This cursor or connection belongs to an operation that has ended and given its server "
    "connection back."
)


class _NoLock:
    def __str__(self) -> str:  # among the holders of a pool's connections
        return "nobody, on its way to the next"

    def __enter__(self) -> None:
        raise psycopg.InterfaceError(ENDED)

    def queue_for(self, text: str) -> None:
        raise psycopg.InterfaceError(ENDED)

    def settle(self) -> None:
        raise psycopg.InterfaceError(ENDED)

    def __exit__(self, *exc: object) -> None: ...


NO_LOCK = _NoLock()


class Unanswered(psycopg.OperationalError):
    """The connection was lost after a statement outside a transaction had been sent, and before it
    was answered: whether the server has executed it is not known.

    Attributes:
        text: the statement.
    """

    def __init__(self, message: str = "", text: str = "") -> None:
        super().__init__(message)
        self.text = text

    @classmethod
    def of(cls, exc: BaseException, text: str) -> Unanswered:
        """What to raise for an error of a connection that is lost."""
        lost = "The connection was lost before the server had answered this statement."
        unanswered = cls(f"{lost} {exc}", text)
        unanswered.__cause__ = exc
        return unanswered


class OwnLock:
    """The lock of a connection that no session holds: one statement at a time."""

    def __init__(self) -> None:
        self._holder: Any = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._holder is not None and self._holder is not getcurrent():
            raise psycopg.InterfaceError("Two tasks used one connection at the same time.")
        self._holder = getcurrent()
        self._depth += 1

    def queue_for(self, text: str) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None


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
        self._pgconn = _Nowhere(answer.encoding)
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

    def copy(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        self._watch(text_of(statement))
        return super().copy(statement, *args, **kwargs)  # type: ignore[misc]

    def stream(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        self._watch(text_of(query))
        with self._conn.lock:  # or psycopg may see that others' statements are in a pipeline now
            self._conn.streamed = True
            yield from super().stream(query, *args, **kwargs)  # type: ignore[misc]

    def _watch(self: Any, text: str) -> None:
        """What follows needs the connection to itself."""
        conn = self._conn
        if conn.unsettled:
            conn.settle()
        self._pgconn = conn.pgconn
        if leaves_state(text):
            conn.touched = True


class InTurn:
    """A server-side cursor's part that waits for its turn before psycopg looks for pipelines."""

    __slots__ = ()

    def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._conn.lock:
            return super().execute(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _in_turn(cls: Any) -> Any:
    return type(cls.__name__, (InTurn, cls), {"__slots__": (), "__module__": cls.__module__})


def text_of(query: Any) -> str:
    if isinstance(query, str):
        return query
    return query.decode("utf-8", "replace") if isinstance(query, bytes) else str(query.as_string())


class _Executing:
    """A cursor's statement on the connection of others (a `Command`)."""

    def __init__(self, cursor: Any, query: Any, params: Any, text: str) -> None:
        self.cursor = cursor
        self.query = query
        self.params = params
        self.text = text

    def bind(self, conn: Connection) -> Statement:
        cursor = self.cursor
        adapters = cursor._adapters if _has_own(cursor._adapters) else conn.adapters
        self.transformer = Transformer(_Context(adapters, conn))
        cursor._query = query = cursor._query_cls(self.transformer)  # for the query log, too
        query.convert(self.query, self.params)
        return _sent(query, self.text)

    def read(self, conn: Connection, result: Any) -> Answer:
        return conn.answer(result, self.transformer)


def _has_own(adapters: Any) -> bool:
    """Whether something was registered in an adapters map since it was copied from another."""
    return bool(
        any(adapters._own_loaders)
        or any(adapters._own_dumpers_by_oid)
        or any(adapters._own_dumpers.values())
        or adapters.types._own_state
    )


class Answer:
    """The result of a statement with its rows loaded: nothing is left to be read from a connection.

    For a cursor it is the `Transformer` of that result.
    """

    def __init__(self, result: Any, rows: list[tuple[Any, ...]], encoding: str) -> None:
        self.result = result
        self.rows = rows
        self.encoding = encoding

    def set_pgresult(self, result: Any, **kwargs: Any) -> None:
        """It has it already."""

    def load_row(self, row: int, make_row: Any) -> Any:
        """As psycopg's."""
        return make_row(self.rows[row]) if row < len(self.rows) else None

    def load_rows(self, row0: int, row1: int, make_row: Any) -> list[Any]:
        """As psycopg's."""
        rows = self.rows[row0:row1]
        return rows if make_row is tuple else list(map(make_row, rows))


class _Nowhere:
    """What a cursor has in place of a libpq connection, while it has none or needs none."""

    status = pq.ConnStatus.BAD  # for its repr()

    def __init__(self, encoding: str = "utf-8") -> None:
        self._encoding = encoding


@functools.cache
def _native_cursor(cls: Any) -> Any:
    return type(cls.__name__, (_Cursor, cls), {"__slots__": (), "__module__": cls.__module__})


class Command(Protocol):
    """A statement that is not bound yet: for whichever connection will run it."""

    @property
    def text(self) -> str:
        """The SQL, with or without its values."""

    def bind(self, conn: Connection) -> Statement:
        """The statement with its values, as it has to be for a connection's settings now."""

    def read(self, conn: Connection, result: Any) -> Any:
        """What is wanted of its result, which the connection has just given.

        Nobody has used the connection since, and nothing is read from it later.
        """


class Statement:
    """One SQL statement with its parameters as they go over the wire: needs no cursor.

    `Connection.run()` sends it and returns its result: it is a `Command` that is bound. The parts
    of that are separate, for several in one pipeline (pipelines.py): `send()` or `send_prepare()`
    and `send_prepared()`, then `checked()`.

    Attributes:
        query: the SQL in the connection's encoding, with $1, $2, ... for the parameters.
        params: their values in PostgreSQL's form, None for NULL.
        types: their types' oids; 0 leaves it to the server. With `query` they tell one prepared
            statement from another.
        formats: text or binary, for each; None when all are text.
        result_format: in which the values of the result shall come.
        text: the query as text.
        leaves_state: whether it changes the server session (`leaves_state()`).
        prepare: False to leave it unprepared, however often it comes.
    """

    __slots__ = (
        "formats", "leaves_state", "params", "prepare", "query", "result_format", "text", "types",
    )  # fmt: skip

    def __init__(
        self,
        query: bytes,
        params: Sequence[Any] | None = None,
        types: tuple[int, ...] = (),
        formats: Sequence[int] | None = None,
        result_format: int = pq.Format.TEXT,
        leaves_state: bool = False,
        text: str | None = None,
    ) -> None:
        self.query = query
        self.text = query.decode() if text is None else text
        self.params = params
        self.types = types
        self.formats = formats
        self.result_format = result_format
        self.leaves_state = leaves_state
        self.prepare: bool | None = None

    def bind(self, conn: Connection) -> Statement:
        """It is bound."""
        return self

    def read(self, conn: Connection, result: Any) -> Any:
        """The result as it is."""
        return result

    def send(self, pgconn: Any) -> None:
        """Have libpq send it, unprepared."""
        pgconn.send_query_params(
            self.query, self.params, self.types, self.formats, self.result_format
        )

    def send_prepare(self, pgconn: Any, name: bytes) -> None:
        """Have libpq send the order to prepare it under a name."""
        pgconn.send_prepare(name, self.query, self.types)

    def send_prepared(self, pgconn: Any, name: bytes) -> None:
        """Have libpq send the order to execute it, prepared before."""
        pgconn.send_query_prepared(name, self.params, self.formats, self.result_format)


def _sent(query: Any, text: str) -> Statement:
    """The statement that a psycopg query object stands for once it has its parameters."""
    statement = Statement(query.query, text=text)
    if query.types:
        statement.params, statement.types = query.params, query.types
        statement.formats = query.formats
    else:  # none, or bound on the client: the text has their values
        statement.prepare = False
    return statement


class Reading:
    """A bound statement of whose result something is wanted (a `Command`).

    Args:
        load: called with the result and the connection.
    """

    def __init__(self, statement: Statement, load: Callable[[Any, Connection], Any]) -> None:
        self.statement = statement
        self.text = statement.text
        self.load = load

    def bind(self, conn: Connection) -> Statement:
        """It is bound."""
        return self.statement

    def read(self, conn: Connection, result: Any) -> Any:
        """What `load` makes of the result."""
        return self.load(result, conn)


def checked(results: Sequence[Any], encoding: str) -> Any:
    """The result of a statement.

    Raises:
        psycopg.Error: what a cursor would raise.
    """
    for result in results:
        if (status := result.status) in (_TUPLES_OK, _COMMAND_OK, _EMPTY_QUERY):
            continue
        if status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding=encoding)
        if status == pq.ExecStatus.PIPELINE_ABORTED:
            raise psycopg.errors.PipelineAborted("pipeline aborted")
        raise psycopg.ProgrammingError(
            f"A statement without a cursor gave {pq.ExecStatus(status).name}."
        )
    if not results:
        raise psycopg.InternalError("The server gave no result.")
    return results[0]


class _Types(TypesRegistry):
    """A registry of types that counts its changes."""

    version = 0

    def add(self, info: Any) -> None:
        super().add(info)
        self.version += 1


class _Adapters(AdaptersMap):
    """An adapters map that counts its changes, for who keeps a Transformer."""

    version = 0

    def __init__(self, template: AdaptersMap) -> None:
        super().__init__(template)
        self.types: _Types = _Types(template.types)

    def register_dumper(self, *args: Any, **kwargs: Any) -> None:
        super().register_dumper(*args, **kwargs)
        self.version += 1

    def register_loader(self, *args: Any, **kwargs: Any) -> None:
        super().register_loader(*args, **kwargs)
        self.version += 1


class _TimesAsText(Transformer):  # type: ignore[misc, valid-type]
    """A Transformer that leaves the timestamps of a row as the server wrote them.

    Only where one is a column of its own: what has timestamps in it (arrays, ranges, composites)
    has them loaded by the loader that the connection has for them.
    """

    def set_pgresult(self, result: Any, **kwargs: Any) -> None:
        super().set_pgresult(result, set_loaders=False)
        if result is not None:
            oids = [result.ftype(i) for i in range(result.nfields)]
            self.set_loader_types(
                [_AS_TEXT if oid == _TIMESTAMPTZ else oid for oid in oids], pq.Format.TEXT
            )


def _text_transformer(conn: Connection) -> Any:
    adapters = AdaptersMap(conn.adapters)
    adapters.register_loader(_AS_TEXT, TextLoader)
    return _TimesAsText(_Context(adapters, conn))


class _Context:
    """What a Transformer is made from."""

    def __init__(self, adapters: AdaptersMap, connection: Any) -> None:
        self.adapters = adapters
        self.connection = connection


# What the server tells of a session when it changes: the settings that change what statements mean,
# and who executes them (SET ROLE is seen in is_superuser only, search_path from PostgreSQL 18 on).
_REPORTED = (
    b"TimeZone", b"DateStyle", b"IntervalStyle", b"client_encoding", b"standard_conforming_strings",
    b"search_path", b"session_authorization", b"is_superuser", b"default_transaction_read_only",
    b"application_name",
)  # fmt: skip


def reported(pgconn: Any) -> tuple[bytes | None, ...]:
    """What the server has told of a session so far, of what changes the meaning of statements."""
    return tuple(map(pgconn.parameter_status, _REPORTED))


# What psycopg keeps of a session.
_kept = operator.attrgetter(
    "row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max",
    "_isolation_level", "_read_only", "_deferrable", "_pipeline", "_adapters", "_adapters.version",
    "_adapters.types.version",
)  # fmt: skip


class Connection(psycopg.Connection[Any]):
    """What Django sees as its psycopg connection, over the libpq connection of a pooled one.

    It owns all Python state (autocommit, isolation level, adapters, prepared statements, notice
    handlers).

    Attributes:
        lock: taken by psycopg around each statement; the session that holds the connection sets it.
        configured: whether Django has set time zone, role and so on.
        pooled: the pool's connection underneath, None when there is none.
        alone: the statement that runs, or the last one, is no part of a transaction, and was sent.
        unsettled: it is a `LazyConnection` and has no server connection yet.
        wire: waits for the socket.
        served_by: the server process that ran the last statement of an unsettled one.
        streamed: a cursor's `stream()` has asked libpq for single rows.
    """

    alone = False
    unsettled = False
    streamed = False
    served_by = 0
    lock: Any
    configured: bool
    pooled: PooledConnection | None
    wire: Any

    def __init__(self, pgconn: Any, row_factory: Any = psycopg.rows.tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self.lock = NO_LOCK
        self.configured = False
        self.wire = Wire(pgconn)
        self._touched = False
        self._start: tuple[Any, ...] | None = None
        self.pooled = None
        self._pool = None  # also tells psycopg not to warn about a connection it did not see closed
        self._made: dict[Any, tuple[Any, Any]] = {}

    @classmethod
    def over(cls, pgconn: Any, options: dict[str, Any], wire: Wire | None = None) -> Connection:
        """A connection over `pgconn`; options as `psycopg.Connection.connect()` takes them."""
        conn = cls(pgconn)
        if wire is not None:
            conn.wire = wire
        conn._autocommit = True
        if row_factory := options.get("row_factory"):
            conn.row_factory = row_factory
        conn.cursor_factory = _native_cursor(options.get("cursor_factory") or psycopg.Cursor)
        context = options.get("context")
        conn._adapters = _Adapters(psycopg.adapters if context is None else context.adapters)
        conn.prepare_threshold = options.get("prepare_threshold", 5)
        return conn

    def begin(self) -> None:
        """Take the session as it is now for that of a new connection: Django has configured it."""
        self.configured = True
        self._touched = False
        self._start = self._settings()

    def _settings(self) -> tuple[Any, ...]:
        """What is set in the session, of what can be seen without asking the server."""
        handlers = (*self._notice_handlers, *self._notify_handlers)
        standby = self.pgconn.parameter_status(b"in_hot_standby")
        return (*reported(self.pgconn), standby, *_kept(self), handlers)

    @property
    def touched(self) -> bool:
        """Whether something is left in the session that nobody else may see: by a statement, as far
        as its text tells or the server told, or in psycopg's connection."""
        if self._touched or self._start is None or self.pgconn.status != _OK:
            return self._touched
        return self._settings() != self._start

    @touched.setter
    def touched(self, value: bool) -> None:
        self._touched = value

    @property
    def is_set(self) -> bool:
        """Whether a statement may have set something in the session, as far as its text tells."""
        return self._touched

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's."""
        cursor: Any = super().cursor(*args, **kwargs)
        if args or kwargs.get("name"):
            cursor.__class__ = _in_turn(type(cursor))  # type: ignore[arg-type]
        return cursor

    def _check_intrans_gen(self, attribute: str) -> Any:
        # psycopg says "can't change 'autocommit' now" of a lost connection, too.
        if self.pgconn.status != _OK:
            raise psycopg.OperationalError(CLOSED)
        yield from super()._check_intrans_gen(attribute)

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run one of psycopg's generators: where it would block, other tasks run."""
        runner = getcurrent()
        if type(runner) is not Runner:
            gen.close()
            raise psycopg.InterfaceError(
                "A native connection was used outside native code: use 'await "
                "asyncorm.native(function)(...)'."
            )
        if runner.cancelled is not None:
            deliver(runner)
        try:
            state = self.wire.begin(gen)
        except StopIteration as stop:
            if not self.pgconn.pipeline_status:  # else psycopg's Pipeline is being entered
                self.give_turn()
            return stop.value
        return runner.parent.switch(self._wait(runner, gen, state, timeout))  # type: ignore[union-attr]

    def whole_results(self) -> Steps:
        """A generator for `wait()`: libpq would give single rows to the first statement of a
        pipeline, too, if nothing else came between."""
        if self.streamed:
            self.streamed = False
            self.pgconn.send_query(b"")
            yield from generators.execute(self.pgconn)

    def _try_cancel(self, *, timeout: float = CANCEL_TIMEOUT) -> None:
        # For a stream() that is left before its end: psycopg's would block the loop, and might hit
        # the next statement.
        runner = getcurrent()
        if type(runner) is Runner:
            runner.parent.switch(self.interrupt())  # type: ignore[union-attr]
        else:
            self.terminate()

    @property
    def transformer(self) -> Any:
        """psycopg's dumpers and loaders as the connection's adapters are now."""
        return self.per_settings(Transformer)

    @property
    def text_transformer(self) -> Any:
        """The same, but a timestamptz stays as the server wrote it."""
        return self.per_settings(_text_transformer)

    def per_settings(self, make: Callable[[Connection], T]) -> T:
        """What `make` gives for the adapters and the session's settings of times and texts as they
        are now: dumpers and loaders remember them."""
        status = self.pgconn.parameter_status
        adapters: Any = self._adapters
        current = (
            adapters.version, status(b"TimeZone"), status(b"DateStyle"),
            status(b"IntervalStyle"), status(b"client_encoding"),
        )  # fmt: skip
        made_for, made = self._made.get(make, (None, None))
        if made_for != current:
            made = make(self)
            self._made[make] = current, made
        return cast(T, made)

    def bound(self, text: str, params: Any) -> Statement:
        """The statement that a cursor of the connection would send for SQL and parameters."""
        query = self.cursor_factory._query_cls(self.transformer)
        query.convert(text, params)
        return _sent(query, text)

    def load(self, result: Any, transformer: Any) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of a result that was just given, some at a time.

        Other tasks have a turn now and then. Loaded as they are asked for if nobody but the
        operation can change the session meanwhile, otherwise at once.
        """
        if result.ntuples <= SLICE:
            transformer.set_pgresult(result)
            rows = transformer.load_rows(0, result.ntuples, tuple)
            transformer.set_pgresult(None)  # an idle connection keeps no rows
            return iter((rows,))
        parts = self._load(result, transformer)
        return parts if getattr(self.lock, "exclusive", False) else iter(list(parts))

    def _load(self, result: Any, transformer: Any) -> Iterator[list[tuple[Any, ...]]]:
        size = result.ntuples
        for start in range(0, size or 1, SLICE):
            transformer.set_pgresult(result)  # the operation may have used it meanwhile
            part = transformer.load_rows(start, min(start + SLICE, size), tuple)
            transformer.set_pgresult(None)  # an idle connection keeps no rows
            yield part
            if size > SLICE:
                self.give_turn()

    def answer(self, result: Any, transformer: Any) -> Answer:
        """A result with all that is to be read of it."""
        parts = self._load(result, transformer) if result.status == _TUPLES_OK else ()
        rows = list(chain.from_iterable(parts))
        return Answer(result, rows, transformer.encoding)

    def give_turn(self) -> bool:
        """Let other tasks run if this one has kept them waiting; whether they did.

        A cancellation may arrive then: not in a shield, and not outside native code.
        """
        if monotonic() - self.wire.yielded < _BUSY:
            return False
        runner = getcurrent()
        if type(runner) is not Runner or runner.shields:
            return False
        runner.parent.switch(turn())  # type: ignore[union-attr]
        self.wire.yielded = monotonic()
        return True

    def fetch(self, name: str, count: int) -> Any:
        """The result of fetching so many rows from a server-side cursor.

        Raises:
            psycopg.Error: what its `fetchmany()` would raise.
        """
        command = sql.SQL("FETCH FORWARD {} FROM {}").format(count, sql.Identifier(name))
        with self.lock:
            return self.wait(self._exec_command(command.as_bytes(self)))

    def run(self, command: Command) -> Any:
        """Execute a command and return what it wants of its result.

        As `Cursor.execute()`: in the transaction that is open, prepared on the server from its
        `prepare_threshold`th time on, together with those of other operations where that is due.

        Raises:
            psycopg.Error: what a cursor would raise.
        """
        queue = self.lock.queue_for(command.text)
        if queue is not None:
            value = queue.run(command)
            self.served_by = queue.served_by
            self.wire.yielded = monotonic()
            return value
        if self.unsettled:
            self.settle()  # type: ignore[attr-defined]
        try:
            with self.lock:
                result = self.wait(self._run(command.bind(self)))
                return command.read(self, result)
        except psycopg.errors._NO_TRACEBACK as exc:
            raise self.lost(exc, command.text).with_traceback(None)  # noqa: B904

    def lost(self, exc: BaseException, text: str) -> BaseException:
        """What to raise for an exception: `Unanswered` if that is what it means."""
        if (
            self.alone
            and self.configured  # else it was Django's, to set the session up
            and isinstance(exc, psycopg.OperationalError)
            and self.pgconn.status != _OK
        ):
            return Unanswered.of(exc, text)
        return exc

    @contextmanager
    def sending(self, text: str) -> Iterator[None]:
        """Have what psycopg itself does with a statement inside raise `Unanswered`, too."""
        self.alone = self._autocommit and self.pgconn.transaction_status == _IDLE
        try:
            yield
        except psycopg.OperationalError as exc:
            if (lost := self.lost(exc, text)) is exc:
                raise
            raise lost from exc

    def start(self, statement: Statement) -> Callable[[], Any]:
        """Send a statement; what is returned waits for its result, as `run()`.

        The caller holds `lock`, and asks for the result before anything else. If it cannot, it has
        `interrupt()` awaited.
        """
        sent = self.wait(self._sent(statement))
        return lambda: self.wait(self._received(statement, *sent))

    def _sent(self, statement: Statement) -> Any:
        begun = yield from self._begun(statement)
        yield from generators.send(self.pgconn)
        return begun

    def _run(self, statement: Statement) -> Any:
        begun = yield from self._begun(statement)
        return (yield from self._received(statement, *begun))

    def _begun(self, statement: Statement) -> Any:
        self.alone = False  # or it would be that of the last one if this is not sent
        yield from self._start_query()
        if statement.leaves_state:
            self.touched = True
        pgconn = self.pgconn
        book: Any = self._prepared
        prepare, name = book.get(statement, statement.prepare)
        self.alone = alone = pgconn.transaction_status == _IDLE
        if not name:
            statement.send(pgconn)
        else:
            if prepare == _SHOULD:
                statement.send_prepare(pgconn, name)
                checked((yield from generators.execute(pgconn)), self.info.encoding)
            statement.send_prepared(pgconn, name)
        return prepare, name, alone, book.maybe_add_to_cache(statement, prepare, name)

    def _received(
        self, statement: Statement, prepare: Any, name: bytes, alone: bool, key: Any
    ) -> Any:
        pgconn = self.pgconn
        book: Any = self._prepared
        results = yield from generators.execute(pgconn)
        if key is not None:
            book.validate(key, prepare, name, results)
        elif name and results and results[-1].error_field(_SQLSTATE) in STALE:
            self.forget(statement, name)
            if alone:
                statement.send(pgconn)
                results = yield from generators.execute(pgconn)
        result = self.checked(results)
        if book._to_flush:
            yield from book.maintain_gen(self)
        return result

    def checked(self, results: Sequence[Any]) -> Any:
        """`checked()` for results of this connection."""
        result = results[0] if len(results) == 1 else None
        if result is None or (result.status != _TUPLES_OK and result.status != _COMMAND_OK):
            result = checked(results, self.info.encoding)
        return result

    async def _wait(self, runner: Runner, gen: Any, state: int, timeout: float | None) -> Any:
        cleaning = runner.cleaning_until is not None
        if cleaning:
            timeout = max(0.0, runner.cleaning_until - monotonic())  # type: ignore[operator]
        try:
            if timeout is None:
                return await self.wire.drive(gen, state)
            with anyio.move_on_after(timeout):
                return await self.wire.drive(gen, state)
            if cleaning:
                raise self._given_up(gen)
            raise psycopg.errors._WaitTimeout("wait timeout expired")
        except CancelledError as exc:
            if not runner.shields:
                await self.give_up(gen)
                raise
            # A COMMIT or the like: let it end, then deliver the cancellation (bridge.deliver).
            runner.cancelled = exc
            task = get_running_loop().create_task(self.wire.drive(gen, self.wire.state))
            if not await finish(task, CANCEL_TIMEOUT):
                raise self._given_up(gen) from exc
            return task.result()
        except GeneratorExit:  # who waited is closed, and nobody else knows what was under way
            close_generator(gen)
            self.terminate()
            raise

    def _hangs(self) -> None:
        """The server does not answer: whoever gets another old connection would find that, too."""
        if self.pooled is not None and self.pooled.home is not None:
            self.pooled.home.retire_all()

    def _given_up(self, gen: Any) -> psycopg.OperationalError:
        close_generator(gen)
        self._hangs()
        self.terminate()
        return psycopg.OperationalError(
            f"The task was cancelled and the server did not answer within {CANCEL_TIMEOUT:g} s; "
            "the connection is closed. If this was a COMMIT, the transaction may or may not have "
            "been committed."
        )

    async def _complete(self, gen: Any) -> Any:
        try:
            state = self.wire.begin(gen)
        except StopIteration as stop:
            return stop.value
        return await self.wire.drive(gen, state)

    async def give_up(self, gen: Any) -> None:
        close_generator(gen)
        await self.interrupt()

    async def interrupt(self) -> None:
        """Cancel the statement on the server; close the connection if it stays in doubt."""
        if self.pgconn.status == pq.ConnStatus.OK:
            pipeline = self.pgconn.pipeline_status
            if not pipeline and self.pgconn.transaction_status != _ACTIVE:
                return
            stop = self.cancel_running() if pipeline else self._cancel_and_drain()
            task = get_running_loop().create_task(stop)
            answered = await finish(task, CANCEL_TIMEOUT)
            if not answered or task.cancelled() or task.exception():
                self._hangs()
            elif not pipeline:
                return
        self.terminate()

    async def _cancel_and_drain(self) -> None:
        await self.cancel_running()
        await self._drain()
        await self.absorb_cancel()

    async def absorb_cancel(self) -> None:
        # The request may have reached the server after the statement had ended: give it something
        # harmless to hit.
        self.pgconn.send_query(b"SELECT 1")
        await self._drain()

    async def stop_others(self, turn: Callable[[], Awaitable[Any]]) -> None:
        """Cancel the statement that another task waits for, then wait for `turn()`: for the
        connection to be the caller's."""
        stopped = self.wire.waiting
        if stopped:
            await self.cancel_running()
        await turn()
        if stopped:
            await self.absorb_cancel()

    async def _drain(self) -> None:
        results = await self._complete(generators.execute(self.pgconn))
        if results and results[-1].status == _COPY_IN:
            self.pgconn.put_copy_end(b"cancelled")
            await self._complete(generators.execute(self.pgconn))
        elif results and results[-1].status == _COPY_OUT:
            with suppress(psycopg.Error):  # the answer to the cancel request
                left: Any = memoryview(b"")
                while isinstance(left, memoryview):
                    left = await self._complete(generators.copy_from(self.pgconn))
        if self.pgconn.transaction_status in (_ACTIVE, _UNKNOWN):
            raise psycopg.OperationalError("The connection is still busy.")

    def terminate(self) -> None:
        """Close the socket at once; a task waiting for it gets OperationalError."""
        self.wire.finish()

    def close(self) -> None:
        """As psycopg's."""
        self._closed = True
        self.terminate()

    def forget(self, statement: Statement, name: bytes) -> None:
        """A table was altered, or a pooler changed the session: prepare it anew next time."""
        book: Any = self._prepared
        if book._names.pop(book.key(statement), None) is not None:
            book._to_flush.append(name)

    async def cancel_running(self) -> None:
        """Have the server stop the statement that runs."""
        if psycopg.capabilities.has_cancel_safe():
            await waiting.wait_conn_async(self._cancel_gen(), 0.1)
        else:
            await asyncio.to_thread(self.cancel)


Steps = Generator[int, int, Any]  # what `wait()` runs


def copy_in(cursor: Any, statement: str, data: Iterable[bytes]) -> Steps:
    """A generator for `wait()`: run COPY ... FROM STDIN, send the data, return the row count.

    Pieces of more than some 100 KB slow libpq down.
    """
    pgconn = cursor.connection.pgconn
    yield from cursor._start_copy_gen(statement)
    for piece in data:
        yield from generators.copy_to(pgconn, piece)
    result = yield from generators.copy_end(pgconn, None)
    return result.command_tuples


def copy_out(cursor: Any, statement: str) -> Steps:
    """A generator for `wait()`: begin a COPY ... TO STDOUT."""
    yield from cursor._start_copy_gen(statement)


def copy_read(cursor: Any, size: int) -> Steps:
    """A generator for `wait()`: return at least `size` bytes, and the row count at the end."""
    data = bytearray()
    while len(data) < size:
        row = yield from generators.copy_from(cursor.connection.pgconn)
        if not isinstance(row, memoryview):
            return data, row.command_tuples
        data += row
    return data, None


_exec_command: Any = psycopg.Connection._exec_command


def _telling(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
    """`_exec_command()`, with listeners told of the commands of sessions."""
    with told(self, text_of(command)):
        return (yield from _exec_command(self, command, *args, **kwargs))


@contextmanager
def told(conn: Connection, text: str) -> Iterator[None]:
    """Tell listeners of a command that is executed inside for a session."""
    session = conn.lock
    command = None
    if _events.commands and hasattr(session, "alias"):
        pid = 0 if conn.closed else conn.pgconn.backend_pid
        command = _events.Command(session.alias, text, pid, session.root is not None)
    try:
        yield
    finally:
        if command is not None:
            command.end()


def _arrange() -> None:
    if _events.commands:
        patches.replace(
            psycopg.Connection, "_exec_command", _telling, "somebody listens to commands"
        )
    elif patches.replaced_by_us(psycopg.Connection, "_exec_command"):
        patches.undo(psycopg.Connection, "_exec_command")


_events.changed.append(_arrange)


class Start(NamedTuple):
    """What the connections of a pool have when they are new: of no connection in particular.

    Attributes:
        pgconn: for cursors without a connection.
    """

    adapters: AdaptersMap
    row_factory: Any
    cursor_factory: Any
    server_version: int
    pgconn: Any = _Nowhere()

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


class LazyConnection(Connection):
    """Stands for a connection of the pool until one is needed.

    Single statements go to a queue and travel with those of other operations (see multiplexing.py).
    Whatever else is asked of it waits for a connection, and from then on this object is a second
    face of that one: they share all their attributes. Until then it has none of any connection.
    """

    unsettled = True
    configured = True
    touched = False
    closed = False
    _autocommit = True
    _closed = False
    _beginning: Start

    def __init__(self, start: Start) -> None:
        self.__dict__.update(_beginning=start, lock=NO_LOCK, _pool=None, wire=_NoWire())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.settle()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_LAZY:
            self.settle()
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at 0x{id(self):x}>"

    def __del__(self, *args: Any) -> None:
        """There is nothing to close."""

    def settle(self) -> None:
        """Wait for a connection and be it."""
        conn = self.lock.settle()
        object.__setattr__(self, "__dict__", conn.__dict__)
        object.__setattr__(self, "__class__", Connection)

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """As Connection.wait(), on a connection of its own."""
        self.settle()
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
            self.settle()
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


_OF_LAZY = ("lock", "_pool", "served_by")


async def finish(task: asyncio.Task[Any], timeout: float) -> bool:
    """Wait for `task` whatever cancellations arrive (anyio's come again and again)."""
    deadline = monotonic() + timeout
    with anyio.CancelScope(shield=True):
        while not task.done():
            left = deadline - monotonic()
            if left <= 0:
                task.cancel()
                with suppress(CancelledError):
                    await asyncio.wait((task,))
                return False
            with suppress(CancelledError):
                await asyncio.wait((task,), timeout=left)
    return True


# Of the arguments that Django makes for connect(), those about the cursors of synchronous code.
OF_CURSORS = ("row_factory", "cursor_factory", "context", "prepare_threshold")


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
        conn = await super().connect(conninfo, prepare_threshold=None, **kwargs)
        conn.options = options
        conn.wire = Wire(conn.pgconn, lambda: conn._pool is None)
        conn.began = Role.of(conn.pgconn)
        conn.renew()
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

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """psycopg's, as the twin waits: for the pool's own statements (check, rollback, reset)."""
        try:
            return await self.wire.drive(gen, self.wire.begin(gen))
        except StopIteration as stop:
            return stop.value
        except CancelledError:
            await self.twin.give_up(gen)
            raise

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


class ConnectionPool(GrowingPool[PooledConnection]):
    """psycopg_pool's pool, with a checkout that costs no task switch when a connection is free.

    Attributes:
        live: every open connection, in the pool or not.
        connect_error: why the last attempt to connect failed; None after one that worked.
        target: the role that servers have to have (`target_session_attrs`), None if it is not said.
    """

    def __init__(self, target: str | None = None, **kwargs: Any) -> None:
        self.live: set[PooledConnection] = set()
        self.connect_error: BaseException | None = None
        self.target = target
        self._had_primary = False
        self._primary_until = 0.0
        super().__init__("", connection_class=PooledConnection, open=False, **kwargs)

    async def _connect(self, timeout: float | None = None) -> PooledConnection:
        self.live = {conn for conn in self.live if not conn.closed}
        try:
            conn = await super()._connect(timeout)
            self._look_at_role(conn)
        except CancelledError as exc:
            traceback.clear_frames(exc.__traceback__)  # closes the half-open connection now
            raise Cancelled from None
        except Exception as exc:
            self.connect_error = exc
            if not self.live and not self.passes(exc):
                await self._fail_waiting(exc)
            raise
        self.connect_error = None
        conn.home = self
        self.live.add(conn)
        return conn

    def _look_at_role(self, conn: PooledConnection) -> None:
        if not conn.began.in_recovery:
            self._had_primary = True
        elif monotonic() < self._primary_until:
            conn.twin.terminate()
            raise psycopg.OperationalError("A write was refused, and the server is in hot standby")

    async def _fail_waiting(self, exc: BaseException) -> None:
        # Tell those who wait what the server said, at once rather than after the pool's timeout.
        while self._waiting:
            error = psycopg.OperationalError(str(exc))
            error.__cause__ = exc
            await self._waiting.popleft().fail(error)

    def fill(self, min_size: int) -> None:
        """Have at least `min_size` connections (`resize()` would go beyond max_size)."""
        self._min_size = min_size
        for _ in range(self._nconns, min_size):
            self._nconns += 1
            self.run_task(AddConnection(self))

    def discard(self, conn: PooledConnection) -> None:
        """Close a connection that nobody has."""
        self.live.discard(conn)
        conn.twin.terminate()

    def take(self) -> PooledConnection | None:
        """A free connection, the one used last, or None: then `await getconn()`."""
        if self._check or self._closed:
            return None
        pool = self._pool
        while pool:
            conn = pool[-1]
            if conn.alive():
                if len(pool) <= self._nconns_min:
                    self._nconns_min = len(pool) - 1
                self._stats[self._REQUESTS_NUM] += 1
                conn._pool = self
                pool.pop()  # no call after it: an error (of recursion) would lose the connection
                return conn
            self._return(conn, from_getconn=True)
            pool.pop()
        return None

    def _return(self, conn: PooledConnection, from_getconn: bool) -> None:
        """Have the pool's workers take a connection back; an error means that they will not."""
        self._loop.call_soon(self.run_task, ReturnConnection(self, conn, from_getconn))

    def give(self, conn: PooledConnection) -> None:
        """Take back a connection from `take()` or `getconn()`."""
        if self._closed:
            conn._pool = None
            conn.twin.terminate()
        elif not self.is_clean(conn):
            if conn.pgconn.transaction_status == _ACTIVE:
                conn.twin.terminate()
            self._return(conn, from_getconn=False)
        else:
            if not self._hand_over(conn):
                self._pool.append(conn)
            conn._pool = None

    def is_clean(self, conn: Any) -> bool:
        """Whether a connection can be used again as it is."""
        return (
            not self._reset
            and not self._closed
            and conn.pgconn.transaction_status == _IDLE
            and conn._expire_at > monotonic()
            and conn._created_at > self._drained_at
        )

    def _hand_over(self, conn: PooledConnection) -> bool:
        """Give a connection to the one who has waited longest, without a turn of the loop."""
        while self._waiting:
            handing = self._waiting[0].set(conn)
            try:
                handing.send(None)
            except StopIteration as done:
                self._waiting.popleft()
                if done.value:
                    return True
            else:  # its lock is taken just now: leave it to the pool's workers
                handing.close()
                self.run_task(ReturnConnection(self, conn, from_getconn=False))
                return True
        return False

    async def reset(self, conn: PooledConnection) -> None:
        """Undo on the server what was left in the session, then take the connection back."""
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT):
                await conn.execute("DISCARD ALL")
                changed = contradicts(Role.of(conn.pgconn), conn.began, self.target)
                if conn.wrote_in_vain and not changed:
                    conn.wrote_in_vain = False
                    changed = await (await conn.execute(ASK)).fetchone() == (True,)
            conn.renew()
            if changed:
                self.role_changed(conn)
        except Exception:
            conn.twin.terminate()
        self.give(conn)

    # The server's role

    def refused_write(self, conn: PooledConnection, ask: Callable[[], bool] | None) -> bool:
        """A write was refused on a connection; whether the reason is that its server's role has
        changed. The next one then gets another connection.

        Args:
            ask: asks the server whether it is read-only; None if it cannot be asked now.
        """
        now, began = Role.of(conn.pgconn), conn.began
        if self.target in STANDBY_WANTED or (began.in_recovery and not self._had_primary):
            return False
        changed = now.in_recovery or (contradicts(now, began, None) and not conn.twin.is_set)
        if not changed and (now.in_recovery is None or now.read_only is not began.read_only):
            if ask is None:
                conn.wrote_in_vain = conn.twin.touched = True
            else:
                changed = ask()
        if changed:
            self.role_changed(conn)
        return bool(changed)

    def role_changed(self, conn: PooledConnection) -> None:
        """The server of a connection is not the one that is wanted: neither are those before."""
        if self._had_primary and self.target is None:
            # A proxy may need a moment to see that, too.
            self._primary_until = monotonic() + _ELSEWHERE
        if conn.home is not None:
            self.retire_all()

    def retire_all(self) -> None:
        """Use none of the connections any more, those in use when they are given back."""
        self._drained_at = monotonic()
        for conn in self.live:
            conn.home = None
        while self._pool:
            self._nconns -= 1
            self.discard(self._pool.pop())
        self._nconns_min = 0
        self.fill(self._min_size)

    async def shut(self, timeout: float = 5.0) -> None:
        """Close everything, connections in use too, even if the pool's tasks are cancelled."""
        workers = [*self._workers]
        with suppress(CancelledError, Exception):
            await self.close(timeout)
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.gather(*workers, return_exceptions=True)
        # The server would go on with what runs: it notices a closed connection at the end only.
        busy = [conn for conn in self.live if conn.pgconn.transaction_status == _ACTIVE]
        if busy:
            with suppress(CancelledError, Exception):
                await asyncio.gather(*(conn.cancel_safe(timeout=1.0) for conn in busy))
        self.terminate()

    def terminate(self) -> None:
        """Close every connection at once, without a loop."""
        self._closed = True
        self.dismiss()
        for conn in self.live:
            conn._pool = None
            conn._closed = True
            conn.twin.terminate()
        self.live.clear()

    @property
    def waiting(self) -> int:
        """How many tasks wait for a connection."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """How many connections nobody has."""
        return len(self._pool)

    @property
    def opened(self) -> int:
        """How many connections there are, those that are being opened included."""
        return int(self._nconns)
