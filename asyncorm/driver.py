"""A synchronous-looking psycopg connection whose waits are awaited: the seam to psycopg.

psycopg builds its synchronous and its asynchronous connection on the same generators; only
`Connection.wait()` blocks. `Connection` here overrides that one method.
"""

from __future__ import annotations

from asyncio import CancelledError, get_running_loop
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from time import monotonic
from typing import Any, TypeVar

import anyio
import psycopg
from greenlet import getcurrent
from psycopg import generators, pq, sql
from psycopg._preparing import Prepare
from psycopg.adapt import Transformer

from . import _events
from ._wire.adapting import Adapters, text_transformer_of
from ._wire.cancelling import CANCEL_TIMEOUT, CancellableConnection, finish
from ._wire.cursors import Answer, in_turn, native_cursor
from ._wire.locks import NO_LOCK
from ._wire.noticing import NoticingConnection
from ._wire.settings import REMEMBERED, reported
from ._wire.statement import STALE, Command, Statement, Unanswered, checked, sent
from .bridge import Runner, deliver
from .pages import see
from .session_state import leaves_state as leaves_state  # others look for it here
from .turns import BUSY as _BUSY
from .turns import turn
from .wire import CLOSED, Wire

T = TypeVar("T")
Steps = Generator[int, int, Any]  # what `wait()` runs

SLICE = 100  # rows loaded, or made into objects, before other tasks may have a turn

_OK = pq.ConnStatus.OK
_IDLE = pq.TransactionStatus.IDLE
_TUPLES_OK = pq.ExecStatus.TUPLES_OK
_COMMAND_OK = pq.ExecStatus.COMMAND_OK
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_SHOULD = Prepare.SHOULD
_PIPELINE_OFF = pq.PipelineStatus.OFF
_SEEN = len(REMEMBERED)
_NOT_MADE: Any = (None, (None,), None)


class Connection(NoticingConnection, CancellableConnection):
    """What Django sees as its psycopg connection, over the libpq connection of a pooled one.

    It owns all Python state (autocommit, isolation level, adapters, prepared statements, notice
    handlers).

    Attributes:
        lock: taken by psycopg around each statement; the session that holds the connection sets it.
        alone: the statement that runs, or the last one, is no part of a transaction, and was sent.
        deferred: it is a `DeferredConnection` and has no server connection yet.
        wire: waits for the socket.
        served_by: the server process that ran the last statement of a deferred one.
        streamed: a cursor's `stream()` has asked libpq for single rows.
        lender: the session of `connection()`, while `batch()` has its connection.
        has_pipelines: libpq has pipeline mode (from 14 on).
    """

    alone = False
    deferred = False
    streamed = False
    has_pipelines = psycopg.capabilities.has_pipeline()
    served_by = 0
    lender: Any = None
    lock: Any

    def __init__(self, pgconn: Any, row_factory: Any = psycopg.rows.tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self.lock = NO_LOCK
        self.held = set()
        self.wire = Wire(pgconn)
        self.pooled = None
        self._pool = None  # also tells psycopg not to warn about a connection it did not see closed
        self._made: dict[Any, tuple[Any, Any, Any]] = {}

    @classmethod
    def over(cls, pgconn: Any, options: dict[str, Any], wire: Wire | None = None) -> Connection:
        """A connection over `pgconn`; options as `psycopg.Connection.connect()` takes them."""
        conn = cls(pgconn)
        if wire is not None:
            conn.wire = wire
        conn._autocommit = True
        conn.row_factory = options.get("row_factory") or conn.row_factory
        conn.cursor_factory = native_cursor(options.get("cursor_factory") or psycopg.Cursor)
        context = options.get("context")
        conn._adapters = Adapters(psycopg.adapters if context is None else context.adapters)
        conn.prepare_threshold = options.get("prepare_threshold", 5)
        return conn

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's."""
        cursor: Any = super().cursor(*args, **kwargs)
        if args or kwargs.get("name"):
            cursor.__class__ = in_turn(type(cursor))  # type: ignore[arg-type]
        return cursor

    def _check_intrans_gen(self, attribute: str) -> Any:
        # psycopg says "can't change 'autocommit' now" of a lost connection, too.
        if self.pgconn.status != _OK:
            raise psycopg.OperationalError(CLOSED)
        yield from super()._check_intrans_gen(attribute)

    def set_autocommit(self, value: bool) -> None:
        """psycopg's; at once where it would send nothing, as twice for each block."""
        with self.lock:
            if self.pgconn.transaction_status == _IDLE and not self._pipeline:
                self._autocommit = bool(value)
            else:
                super().set_autocommit(value)

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run one of psycopg's generators: where it would block, other tasks run."""
        runner = getcurrent()
        if type(runner) is not Runner:
            gen.close()
            raise psycopg.InterfaceError(
                "A native connection was used outside native code: use 'await "
                "asyncorm.native(function)(...)'." + see("debugging#it-raises")
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

    @property
    def begins(self) -> bool:
        """Whether BEGIN is due and may go with the statement that it is for: in one sync segment,
        of which nothing is executed behind what fails."""
        pgconn = self.pgconn
        return (
            not self._autocommit
            and pgconn.transaction_status == _IDLE
            and pgconn.pipeline_status == _PIPELINE_OFF
            and self.has_pipelines
        )

    def send_begin(self) -> None:
        """Have libpq keep BEGIN for the next sync segment, in pipeline mode."""
        command = self._get_tx_start_command()
        with _events.command(self, command.decode()):
            self.pgconn.send_query_params(command, None)

    def whole_results(self) -> Steps:
        """A generator for `wait()`: libpq would give single rows to the first statement of a
        pipeline, too, if nothing else came between."""
        if self.streamed:
            self.streamed = False
            self.pgconn.send_query(b"")
            yield from generators.execute(self.pgconn)

    @property
    def transformer(self) -> Any:
        """psycopg's dumpers and loaders as the connection's adapters are now."""
        return self.per_settings(Transformer)

    @property
    def text_transformer(self) -> Any:
        """The same, but a timestamptz stays as the server wrote it."""
        return self.per_settings(text_transformer_of)

    def per_settings(self, make: Callable[[Connection], T]) -> T:
        """What `make` gives for the adapters and the session's settings of times and texts as they
        are now: dumpers and loaders remember them."""
        version: Any = self._adapters.version  # type: ignore[union-attr]
        told = self.told
        last, made_for, made = self._made.get(make, _NOT_MADE)
        if told is None or last is not told or made_for[0] != version:
            seen = map(self.pgconn.parameter_status, REMEMBERED) if told is None else told[:_SEEN]
            current = (version, *seen)
            if made_for != current:
                made = make(self)
            elif told is None:
                return made  # type: ignore[no-any-return]
            self._made[make] = told, current, made
        return made  # type: ignore[no-any-return]

    def bound(self, text: str, params: Any) -> Statement:
        """The statement that a cursor of the connection would send for SQL and parameters."""
        query = self.cursor_factory._query_cls(self.transformer)
        query.convert(text, params)
        return sent(query, text)

    def load(self, result: Any, transformer: Any, **known: Any) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of a result that was just given, some at a time.

        Other tasks have a turn now and then. Loaded as they are asked for if nobody but the
        operation can change the session meanwhile, otherwise at once.

        Args:
            known: what the transformer need not ask the result for.
        """
        if (count := result.ntuples) <= SLICE:
            transformer.set_pgresult(result, **known)
            rows = transformer.load_rows(0, count, tuple)
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
        return Answer(result, [*chain.from_iterable(parts)], transformer.encoding)

    def give_turn(self) -> bool:
        """Let other tasks run if this one has kept them waiting; whether they did.

        A cancellation may arrive then: not in a shield, and not outside native code.
        """
        if monotonic() - self.wire.yielded < _BUSY:
            return False
        runner = getcurrent()
        if type(runner) is not Runner or runner.shield_depth:
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

    def close_cursor(self, name: str) -> None:
        """Close a server-side cursor.

        Raises:
            psycopg.Error: what a cursor would raise.
        """
        command = sql.SQL("CLOSE {}").format(sql.Identifier(name))
        with self.lock:
            self.wait(self._exec_command(command.as_bytes(self)))
        self.held.discard(name)

    def run(self, command: Command) -> Any:
        """Execute a command and return what it wants of its result.

        As `Cursor.execute()`: in the transaction that is open, prepared on the server from its
        `prepare_threshold`th time on, together with those of other operations where that is due.

        Raises:
            psycopg.Error: what a cursor would raise.
        """
        if (queue := self.lock.queue_for(command.text)) is not None:
            value = queue.run(command)
            self.served_by = queue.served_by
            self.wire.yielded = monotonic()
            return value
        if self.deferred:
            self.materialize()  # type: ignore[attr-defined]
        try:
            with self.lock:
                return command.read(self, self.wait(self._run(command.bind(self))))
        except psycopg.errors._NO_TRACEBACK as exc:
            raise self.lost(exc, command.text).with_traceback(None)  # noqa: B904

    async def awaited(self, command: Command, last: bool = False) -> Any:
        """As `run()`, for a coroutine that has the connection to itself.

        If it is cancelled, the statement is stopped, or the connection closed.

        Args:
            last: the caller takes `told` away before anything more is read from it.
        """
        try:
            result = await self.drive(self._run(command.bind(self)))
            if last:
                self.told = reported(self.pgconn)
            return command.read(self, result)
        except psycopg.errors._NO_TRACEBACK as exc:
            raise self.lost(exc, command.text).with_traceback(None)  # noqa: B904

    async def drive(self, gen: Any) -> Any:
        """Run one of psycopg's generators from a coroutine; cancelled, its statement is stopped."""
        try:
            state = self.wire.begin(gen)
        except StopIteration as stop:
            return stop.value
        try:
            return await self.wire.drive(gen, state)
        except CancelledError:
            await self.give_up(gen)
            raise

    def lost(self, exc: BaseException, text: str) -> BaseException:
        """What to raise for an exception: `Unanswered` if that is what it means."""
        exc = self.told_why(exc)
        if (
            self.alone
            and self.configured  # else it was Django's, to set the session up
            and isinstance(exc, psycopg.OperationalError)
            and self.pgconn.status != _OK
        ):
            return Unanswered.of(exc, text, self.wire.opened)
        return exc

    def told_why(self, exc: BaseException) -> BaseException:
        """An error, which says so if the server stopped because the pool is closed."""
        home = self.pooled.home if self.pooled is not None else None
        if home is None or not home.closed or not isinstance(exc, psycopg.errors.QueryCanceled):
            return exc
        return psycopg.errors.QueryCanceled(f"The native pool was closed: {exc}")

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
        pgconn = self.pgconn
        begins = False
        if not self._autocommit and pgconn.transaction_status == _IDLE:
            begins = self.begins
            yield from self.whole_results() if begins else self.started()
        if statement.traces:
            self.note(statement.traces)
        book: Any = self._prepared
        prepare, name = book.get(statement, statement.prepare)
        self.alone = alone = not begins and pgconn.transaction_status == _IDLE
        if begins:
            try:
                self._send_segment(statement, name, prepare == _SHOULD)
            except Exception:  # what libpq refuses: it has more than 65,535 parameters, say
                yield from self.segment_results()
                raise
            return prepare, name, False, None, True
        if not name:
            statement.send(pgconn)
        else:
            if prepare == _SHOULD:
                statement.send_prepare(pgconn, name)
                checked((yield from generators.execute(pgconn)), self.info.encoding)
            statement.send_prepared(pgconn, name)
        return prepare, name, alone, book.maybe_add_to_cache(statement, prepare, name), False

    def _send_segment(self, statement: Statement, name: bytes, to_prepare: bool) -> None:
        """Have libpq send BEGIN and the statement in one sync segment."""
        pgconn = self.pgconn
        pgconn.enter_pipeline_mode()
        self.segment = True
        try:
            self.send_begin()
            if to_prepare:
                statement.send_prepare(pgconn, name)
            if name:
                statement.send_prepared(pgconn, name)
            else:
                statement.send(pgconn)
        finally:
            pgconn.pipeline_sync()

    def _received(
        self, statement: Statement, prepare: Any, name: bytes, alone: bool, key: Any, begins: bool
    ) -> Any:
        pgconn = self.pgconn
        book: Any = self._prepared
        if begins:
            *before, results = yield from self.segment_results()
            for command in before:  # BEGIN; the order to prepare
                self.checked(command)
            key = book.maybe_add_to_cache(statement, prepare, name)
        else:
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
                raise self.given_up(gen)
            raise psycopg.errors._WaitTimeout("wait timeout expired")
        except CancelledError as exc:
            if not runner.shield_depth:
                await self.give_up(gen)
                raise
            # A COMMIT or the like: let it end, then deliver the cancellation (bridge.deliver).
            runner.cancelled = exc
            task = get_running_loop().create_task(self.wire.drive(gen, self.wire.state))
            if not await finish(task, CANCEL_TIMEOUT):
                raise self.given_up(gen) from exc
            return task.result()

    def forget(self, statement: Statement, name: bytes) -> None:
        """A table was altered, or a pooler changed the session: prepare it anew next time."""
        book: Any = self._prepared
        if book._names.pop(book.key(statement), None) is not None:
            book._to_flush.append(name)
