"""A `Session`: a Django wrapper for native code with, while needed, a connection from the pool."""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop, Task, get_running_loop, sleep
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, cast
from weakref import WeakSet

import psycopg
from django.db import NotSupportedError
from django.db.transaction import TransactionManagementError
from greenlet import getcurrent
from psycopg.pq import TransactionStatus

from .. import _events, bridge, limits, pools
from .._wire.lazy import DeferredConnection
from .._wire.locks import NO_LOCK
from .._wire.texts import asks_for_drawn, asks_who_serves, draws, is_read
from ..bridge import Runner
from ..driver import Connection
from ..generators import Place
from ..multiplexing import Queue
from ..pages import see
from .blocks import Block, Loan
from .callsite import caller
from .crowding import is_crowded, queue_of, travels
from .engines import pool_of
from .leaving import later, run_in
from .lock import StatementLock

_IDLE = TransactionStatus.IDLE
_MANY_CURSORS = 64  # of one operation, before those that are closed are forgotten

UNKNOWN: Any = object()


class Session(StatementLock):
    """A Django wrapper for native code and, from its first statement on, a connection.

    Attributes:
        pool: that of the alias.
        source: where connections come from: the pool, or a limit on it.
        pipelining: it is for statements of several operations, sent together.
        keeper, origin: the task that pinned the session (not kept alive), and where.
        left: the stream or `connection()` that pinned it was dropped.
        own: Django's own wrapper of the task that uses the session, None if there is none.
        opened: other cursors; open ones keep the connection while the operation awaits something.
        fate: what the open transaction settles by, if it does (fate.py).
        drew: what may have drawn from a sequence has gone with others' statements of a batch.
    """

    drew = False
    fate: Any = None
    pipelining = False
    settling = False
    left = False

    synchronous = False  # on a synchronous wrapper, shared with threads (callers.py)
    over = False  # the test case that it belonged to has ended (testcase.py)

    def __init__(self, alias: str, pool: pools.Pool, source: limits.Source) -> None:
        self.alias = alias
        self.pool = pool
        self.source = source
        self.wrapper: Any = pool.take_wrapper()
        self.wrapper.session = self
        self.root: Block | None = None
        self.pinned = False
        self.keeper: weakref.ref[Task[Any]] | None = None
        self.places: tuple[Place, ...] = ()
        self.origin = ""
        self.cursors: WeakSet[Any] | None = None
        self.opened: list[weakref.ref[Any]] = []
        self.django_wrapper: Any = UNKNOWN
        self.holder: Any = None
        self.acting: Block | None = None
        self.active = 0.0
        self.taken: Connection | None = None  # checked out, and not yet the wrapper's
        self._depth = 0
        self._held: Block | None = None

    @property
    def on_this_loop(self) -> bool:
        """Whether its connection is one of the running loop."""
        return self.pool.loop is get_running_loop()

    @property
    def loop(self) -> AbstractEventLoop:
        """The loop that its connection belongs to."""
        return self.pool.loop

    @property
    def is_lost(self) -> bool:
        """Whether its loop, and its connection with it, is closed."""
        return self.pool.loop.is_closed()

    @property
    def task(self) -> Task[Any] | None:
        """The task that keeps the connection beyond an operation, if any."""
        if self.root is not None:
            return None if (scope := self.root.scope) is None else scope.task
        return None if self.keeper is None else self.keeper()

    @property
    def closing(self) -> bool:
        """Whether what keeps the connection was left, and gives it back in a moment."""
        root = self.root
        return self.left or (
            root is not None and ((scope := root.scope) is None or scope.left != ())
        )

    def await_closing(self, runner: Runner) -> None:
        """Wait until a block of a generator that was left is rolled back."""
        if self.root is not None and self.closing:
            bridge.wait_for(runner, self.root.until_over())

    def dropped(self, place: Place) -> None:
        """Nobody can continue the stream or `connection()` any more (generators.Entry)."""
        self.left = True

    def __str__(self) -> str:
        if self.root is not None:
            return str(self.root)
        if self.pinned:
            return f"a stream or connection() that began at {self.origin}"
        return "an operation"

    # The connection

    def attach(self) -> Connection:
        """Check a connection out of the pool; DatabaseWrapper.connect() calls this."""
        self._entitled(getcurrent())
        if not self.pool.current:  # settings changed in the middle of the operation
            self._follow()
        self.drop_taken()
        # No call between its leaving the pool and its being noted: an error would lose it.
        self.taken = conn = None if self.source.batching else self.source.take()
        if conn is None:
            self.taken = conn = self._lazy() or self._checkout()
        conn.lock = self
        if _events.checkouts and not conn.deferred:
            _events.checked_out(self.alias, conn, self)
        return conn

    def attach_free(self) -> bool:
        """Have a connection that is free, if there is one that Django has configured. Listeners are
        not told: the session does not say yet what for."""
        self.taken = conn = self.source.take()
        if conn is None or not conn.configured:
            self.taken = None
            if conn is not None:
                self.source.checkin(conn)
            return False
        conn.lock = self
        self.wrapper._thread_ident = get_ident()  # the loop may run in another thread by now
        self.use(conn)
        return True

    def use(self, conn: Connection) -> None:
        """Have the wrapper use a connection that was taken, and that Django has configured."""
        wrapper = self.wrapper
        wrapper.connection = conn
        conn._pool = wrapper.native_pool
        wrapper.autocommit = wrapper.health_check_done = True
        wrapper.closed_in_transaction = wrapper.errors_occurred = False
        wrapper.close_at = None
        self.taken = None

    def _follow(self) -> None:
        self.pool = pool_of(self.alias, type(self.wrapper))
        self.source = limits.source(self.pool)

    @property
    def _shares(self) -> bool:
        """Whether single statements of the operation are to travel with others'."""
        if self.kept or self.pipelining or self.settling or self.acting is not None:
            return False
        return is_crowded(self.source)

    def _lazy(self) -> DeferredConnection | None:
        """What serves an operation of single statements while every connection is in use."""
        return self.pool.defer() if self._shares else None

    def shared(self, text: str) -> Queue | None:
        """Where a statement waits for others' connection.

        None: the operation has a connection, or gets one.
        """
        if (
            self.wrapper.connection is not None
            or not self._shares
            or not self.pool.current
            or self.pool.start is None
            or not self._joins(text)
        ):
            return None
        self._entitled(getcurrent())
        return queue_of(self.source, self.pool, Session)

    def _joins(self, text: str) -> bool:
        """Whether a statement travels; not what the operation's next may rely on."""
        joins = travels(self.source, text) and not draws(text)
        if not self.source.batching:
            return joins and not asks_who_serves(text)
        if self.drew and asks_for_drawn(text):
            raise NotSupportedError(
                "currval() and lastval() would give the number of another operation of batch(), "
                "whose INSERT was sent behind this one's. Use INSERT ... RETURNING."
                + see("parallelism#batch-several-operations-in-one-round-trip")
            )
        self.drew = self.drew or (joins and not is_read(text))
        return joins

    def _checkout(self) -> Connection:
        if self.source.batching and (conn := self.source.take()) is not None:
            return conn
        if not self.pipelining and (queue := self.source.queue) is not None:
            queue.seal()
            if queue.starting and (runner := bridge.current()) is not None:
                bridge.wait_for(runner, sleep(0))  # they came first
        since = monotonic()
        try:
            conn = self.source.get(self.wrapper)
        except pools.Retired:  # settings changed meanwhile
            self._follow()
            return self._checkout()
        if not self.pipelining:  # or the statements' own tasks have waited, and say so
            _events.waited(self.alias, "for a connection", since)
        return conn

    def queue_for(self, text: str) -> Queue | None:
        """Where a statement waits that needs no connection of its own; None if it runs now."""
        if self.root is not None:
            block = self.innermost()
            if block is None or self.holder is getcurrent():
                return None
            queue = block.queue_for(text)
            if queue is None and self.fate is not None and self.fate.wants(text):
                return self.fate  # type: ignore[no-any-return]
            return queue
        conn = self.wrapper.connection if self.wrapper is not None else None
        if conn is None or not conn.deferred:
            return None
        if not self._joins(text):
            return None
        self._entitled(getcurrent())
        return queue_of(self.source, self.pool, Session)

    def materialize(self) -> Connection:
        """In place of a lazy connection, one of the operation's own."""
        lazy = self.wrapper.connection
        self.wrapper.connection = None
        self.settling = True
        try:
            self.wrapper.ensure_connection()
        except BaseException:
            self.wrapper.connection = lazy
            raise
        finally:
            self.settling = False
        return cast(Connection, self.wrapper.connection)

    def detach(self) -> None:
        """Give the connection back."""
        conn = self.wrapper.connection
        if conn is not None:
            self.put(conn)  # if that fails, the end of the operation tries again
            if self.taken is conn:
                self.taken = None
            self.wrapper.connection = None
        self.drop_taken()

    def give_up_lost(self) -> bool:
        """Give back a connection that was lost with a statement outside transactions, to have
        another; False if somebody would miss what it had."""
        if self.is_needed:
            return False
        conn = self.wrapper.connection
        if conn is not None and not conn.deferred:
            if not conn.closed:
                return False
            self.detach()
        return True

    @property
    def is_needed(self) -> bool:
        """Whether the next statement may need this very session."""
        conn = self.wrapper.connection
        return self.kept or (conn is not None and not conn.deferred and self._has_state(conn))

    def drop_taken(self) -> None:
        """Close and give back a connection that was checked out in vain."""
        conn = self.taken
        if conn is not None:
            conn.terminate()
            self.put(conn)
            self.taken = None

    def put(self, conn: Connection) -> None:
        """Return `conn` to the pool in the state it came in, or closed."""
        conn.lock = NO_LOCK
        conn._pool = None
        if conn.deferred:
            return
        if not conn._autocommit:
            if conn.pgconn.transaction_status != _IDLE:
                # Somebody turned autocommit off and left: what was not committed is rolled back.
                conn.terminate()
            conn._autocommit = True
        if _events.checkouts:
            _events.checked_in(conn)
        self.source.checkin(conn)

    def terminate(self) -> None:
        """Close the connection at once, whatever runs on it; the pool replaces it."""
        if self.wrapper is not None and self.wrapper.connection is not None:
            self.wrapper.connection.terminate()

    async def interrupt(self) -> None:
        """Cancel what runs on the connection; close it if it stays in doubt."""
        if self.wrapper.connection is not None:
            await self.wrapper.connection.interrupt()

    @property
    def waits_for_server(self) -> bool:
        """Whether a statement is on its way."""
        conn = self.wrapper.connection if self.wrapper is not None else None
        return conn is not None and conn.waiting

    @property
    def exclusive(self) -> bool:
        """Whether no other task's statements run on its connection, at least for now."""
        if self.root is None and not self.pipelining:
            return True
        return getattr(self.holder, "exclusive", False)

    @property
    def kept(self) -> bool:
        """Whether something other than an operation keeps the connection."""
        return self.root is not None or self.pinned or self.streaming

    def transaction_ended(self) -> None:
        """Its server-side cursors are gone, and do not keep the connection."""
        for cursor in self.cursors or ():
            cursor.transaction_ended()

    def suspend(self) -> Callable[[BaseException | None], None] | None:
        """The operation awaits something else (bridge.Resource): hold nothing meanwhile.

        Except what it has left in the server session, or an open cursor: then the connection stays,
        and what is awaited has it, as it would have a synchronous operation's.
        """
        conn = self.wrapper.connection
        if conn is None or self.holder is not None or self.root is not None:
            return None
        if not self._has_state(conn):
            if not self.kept:
                self.detach()
            return None
        self.root = loan = Loan(self, caller())
        loan.enter()
        return loan.take_back

    def _has_state(self, conn: Connection) -> bool:
        """Whether the operation's next statement may need this very connection."""
        if not conn._autocommit:
            return True
        if self.source.keeps_state:
            return False
        return conn.session_dirty or any(
            (cursor := ref()) is not None and not cursor.closed for ref in self.opened
        )

    def note(self, cursor: psycopg.Cursor[Any]) -> None:
        """Remember a cursor that is being opened."""
        if len(self.opened) >= _MANY_CURSORS:
            self.opened = [
                ref for ref in self.opened if (other := ref()) is not None and not other.closed
            ]
        self.opened.append(weakref.ref(cursor))

    def release(self) -> None:
        """The operation has ended (bridge.Resource)."""
        if not self.kept:
            self.close()

    def close(self) -> None:
        """Give back the connection and the wrapper."""
        wrapper = self.wrapper
        if wrapper is None:
            return
        self.detach()
        self.wrapper = None
        wrapper.session = None
        wrapper.forget()
        if not self.pool.outdated and self.holder is None:  # or a statement is still to fail
            self.pool.give_wrapper(wrapper)

    def serves(self, runner: Runner | None) -> bool:
        """Whether `runner` uses the session, rather than a finaliser that happens to run in it."""
        if runner is None:
            return False
        held = runner.resources
        if runner.session_override is self or held.get(self.alias) is self or self.key in held:
            return True
        try:
            return self.innermost() is not None
        except TransactionManagementError:  # it outlived the block
            return False

    def hook(self, callback: Callable[[], Any]) -> Callable[[], Any]:
        """What to keep for an on_commit() callback, which Django calls."""
        return callback

    def abandon(self, name: str) -> None:
        """A server-side cursor was dropped outside native code: close it later."""
        if self.pinned:  # its task may have a statement under way
            self.abandoned = (*self.abandoned, name)
        elif self.root is None:
            later(self, self._abandoned(name))

    async def _abandoned(self, name: str) -> None:
        def close() -> None:
            conn = self.wrapper.connection if self.wrapper is not None else None
            if conn is not None and self.root is None and not conn.closed:
                conn.close_cursor(name)

        try:
            await run_in(self, close)
        except Exception:
            self.terminate()
        self.release()

    def __del__(self) -> None:
        # Nobody left the block or the stream that kept it: the connection is in doubt.
        wrapper = getattr(self, "wrapper", None)
        if wrapper is not None and wrapper.connection is not None:
            conn, wrapper.connection = wrapper.connection, None
            conn.lock = NO_LOCK
            conn._pool = None
            if not conn.deferred and not self.pool.loop.is_closed():
                self.pool.loop.call_soon_threadsafe(self._drop, self.source, conn)

    @staticmethod
    def _drop(source: limits.Source, conn: Connection) -> None:
        conn.terminate()
        source.checkin(conn)
