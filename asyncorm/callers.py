"""Native code on a synchronous connection: that of who waits for it.

Synchronous code that waits for a coroutine (`async_to_sync()`, an asynchronous signal receiver, a
synchronous middleware around an asynchronous view) has a connection of its own. Where that has
something that the coroutine would miss elsewhere, it is lent to the coroutine (`lending()`): an
open transaction, execute wrappers, what statements have set in the server session. Django's own a*
methods go to the waiting thread then, as on the stock backend (swap.py); explicitly native code
uses the thread's connection from the loop. In a test's transaction (testcase.py) there is one
connection for everybody.

Each block that such code is in has a lock that works across threads. A statement holds it while it
runs, a block inside, be it native or a synchronous `transaction.atomic()` in a thread, for its
life, so that savepoints of tasks and of threads nest properly.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from time import monotonic, sleep
from typing import Any

import psycopg
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.db.transaction import TransactionManagementError
from greenlet import getcurrent
from psycopg import sql
from psycopg.pq import TransactionStatus

from . import between, bridge, driver, sessions
from ._sessions import callsite, scopes
from ._sessions.blocks import Block, Loan, PlainBlock
from ._sessions.session import Session
from ._sessions.thread_lock import ThreadLock
from ._wire.cancelling import pauses
from .bridge import Runner
from .wrappers import Wrapper

_ACTIVE = TransactionStatus.ACTIVE
STOP_TIMEOUT = 2.0  # seconds for the server to stop a statement whose loop is gone


class ThreadBlock(PlainBlock):
    """A thread's `transaction.atomic()`: native code that it calls by async_to_sync() belongs to
    it."""

    def __init__(self, session: SynchronousSession, parent: Block, origin: str) -> None:
        super().__init__(session, parent, origin)
        self.lock = ThreadLock(session)  # type: ignore[assignment]
        self.entered = 0  # by how many nested atomic()


# The blocks that synchronous code around this has entered, by alias.
_thread_blocks: ContextVar[dict[str, ThreadBlock]] = ContextVar(
    "asyncorm_thread_blocks",
    default={},  # noqa: B039
)


class SynchronousSession(Session):
    """A session on a synchronous wrapper, which tasks and threads share."""

    synchronous = True
    _loop: Any = None  # whose tasks may be in a block

    def __init__(self, wrapper: Wrapper, origin: str) -> None:
        self.alias = wrapper.alias
        self.wrapper = wrapper
        self.pinned = True
        self.keeper = None
        self.origin = origin
        self.holder = self.acting = self._held = None
        self.active = 0.0
        self._depth = 0
        self.cursors = None
        self.case_lock = ThreadLock(self)
        self._conn: Any = None
        self._native: Any = None
        wrapper.session = self
        sessions.sharing.add(self)
        # Not as what this thread installs: these may be called in any.
        list.extend(wrapper.execute_wrappers, sessions.everywhere)
        wrapper.inc_thread_sharing()
        self.bind()

    def __str__(self) -> str:
        return self.origin

    def bind(self) -> None:
        """Wait on the event loop, too, for what the wrapper's connection does."""
        conn = self.wrapper.connection
        if conn is self._conn:
            return
        self._unbind()
        self._conn = conn
        if conn is None:
            return
        self._lock, conn.lock = conn.lock, self
        handlers = conn.pgconn.notice_handler, conn.pgconn.notify_handler
        # The same server session once more, for its way of waiting.
        self._native = driver.Connection.over(conn.pgconn, {})
        conn.pgconn.notice_handler, conn.pgconn.notify_handler = handlers
        conn.wait = self._wait

    def _unbind(self) -> None:
        conn, self._conn = self._conn, None
        self._native = None  # contexts may keep us: the server's session is not ours to keep
        if conn is not None:
            conn.lock = self._lock
            del conn.wait

    def part(self) -> None:
        """Leave the connection to synchronous code alone.

        Tasks that go on cannot use it any more.
        """
        self.over = True
        self.wrapper.session = None
        sessions.sharing.discard(self)
        for everywhere in sessions.everywhere:
            with suppress(ValueError):
                self.wrapper.execute_wrappers.remove(everywhere)
        self.wrapper.dec_thread_sharing()
        self._unbind()

    def connect(self) -> None:
        """Have a connection, for native code."""

    def _wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        # psycopg's Connection.wait(), in native code as well as in synchronous code.
        if bridge.in_native_code():
            return self._native.wait(gen)
        return type(self._conn).wait(self._conn, gen, *args, **kwargs)

    def terminate(self) -> None:
        """Close the connection at once; the transaction is lost."""
        if not self.over and self._native is not None:
            self._native.terminate()

    async def interrupt(self) -> None:
        if self._native is not None:
            await self._native.interrupt()

    def stop_statement(self) -> None:
        """Cancel a native statement whose loop does not run, and close the connection."""
        if self._native is not None and self._native.waiting:
            until = monotonic() + STOP_TIMEOUT
            # Or the server would go on, and keep its locks. It ignores that if it has not read the
            # statement yet.
            for pause in pauses():
                with suppress(psycopg.Error):
                    self._conn.cancel_safe(timeout=STOP_TIMEOUT)
                left = until - monotonic()
                if self._native.wire.has_input or left <= 0:
                    break
                sleep(min(pause, left))
            self.terminate()

    @property
    def waits_for_server(self) -> bool:
        conn = self._conn
        return conn is not None and (
            self._native.waiting or conn.pgconn.transaction_status == _ACTIVE
        )

    @property
    def on_this_loop(self) -> bool:
        return True  # tasks of all loops share it

    @property
    def loop(self) -> Any:
        return self._loop

    def innermost(self) -> Block | None:
        if self.acting is not None and self.holder is getcurrent():
            return self.acting
        return self._scoped() or self.thread_block() or self.root

    def _scoped(self) -> Block | None:
        """The native block that the current task is in."""
        scope = scopes.find_scope(self.alias, detached=False)
        return scope.block if scope is not None and scope.session is self else None

    def thread_block(self) -> ThreadBlock | None:
        """The block that the synchronous code around the current task has entered."""
        block = _thread_blocks.get().get(self.alias)
        return block if block is not None and block.session is self and not block.ended else None

    def begun_by(self, origin: str) -> ThreadBlock:
        """The block of a thread that enters `transaction.atomic()`."""
        return ThreadBlock(self, self.root, origin)  # type: ignore[arg-type]

    def hook(self, callback: Callable[[], Any]) -> Callable[[], Any]:
        """Have what the callback returns awaited, also where synchronous code calls it.

        On a running loop as a task.
        """

        @functools.wraps(callback)
        def call() -> Any:
            result = callback()
            if not inspect.isawaitable(result):
                return None
            if bridge.in_native_code():
                bridge.await_(result)
            elif bridge.loop_runs():
                task = asyncio.ensure_future(result)
                _tasks.add(task)
                task.add_done_callback(_tasks.discard)
                return task
            else:
                async_to_sync(_wait_for)(result)
            return None

        return call

    def serves(self, runner: Runner | None) -> bool:
        return runner is not None or not bridge.loop_runs()  # also synchronous code, off the loop

    def abandon(self, name: str) -> None:
        """The cursor ends with the transaction."""

    def release(self) -> None:
        """The session ends with the synchronous code."""

    def _thread_lock(self) -> ThreadLock:
        block = self.thread_block()
        return self.case_lock if block is None else block.lock  # type: ignore[return-value]

    def __enter__(self) -> None:
        if bridge.in_native_code():
            super().__enter__()
        else:
            self._thread_lock().acquire_thread()

    def __exit__(self, *exc: Any) -> None:
        if bridge.in_native_code():
            super().__exit__(*exc)
        else:
            self.active = monotonic()
            self._thread_lock().release()

    def __del__(self) -> None:
        pass


_tasks: set[Any] = set()


async def _wait_for(awaitable: Any) -> None:
    await awaitable


def are_sharing(wrapper: Wrapper) -> bool:
    """Whether native code may be using a synchronous wrapper's connection, too."""
    return isinstance(getattr(wrapper, "session", None), SynchronousSession)


def enter_thread(wrapper: Wrapper) -> None:
    """Synchronous code is about to enter a `transaction.atomic()` on a connection that it shares
    with native code."""
    session: SynchronousSession = wrapper.session
    session.case_lock.acquire_thread()
    block = session.thread_block()
    if block is None:
        block = session.begun_by(callsite.caller())
        _thread_blocks.set({**_thread_blocks.get(), session.alias: block})
    block.entered += 1


def note_savepoints(wrapper: Wrapper) -> None:
    """Note what a callback registered in the thread's block depends on (`on_commit`)."""
    block = wrapper.session.thread_block()
    if block is not None:
        block.sids = frozenset(wrapper.savepoint_ids)


def block_of_thread(alias: str) -> Block | None:
    """The `transaction.atomic()` of synchronous code around the current task, on a connection that
    both use."""
    block = _thread_blocks.get().get(alias)
    return block if block is not None and not block.ended else None


def leave_thread(wrapper: Wrapper) -> None:
    """It was left, or could not be entered."""
    session: SynchronousSession = wrapper.session
    block = session.thread_block()
    if block is not None:
        note_savepoints(wrapper)
        block.entered -= 1
        block.ended = not block.entered
        session.case_lock.release()


# Lending


class LentSession(SynchronousSession):
    """The connection of synchronous code that waits for a coroutine, lent to that."""

    def __init__(self, wrapper: Wrapper) -> None:
        super().__init__(wrapper, "")
        self.root = self._loan = loan = Loan(self, callsite.caller())
        loan.lock = self.case_lock  # type: ignore[assignment]
        self.origin = str(loan)
        self._dropped: list[str] = []
        loan.enter()

    @property
    def is_lost(self) -> bool:
        return False

    def __enter__(self) -> None:
        if bridge.in_native_code():
            self._loop = asyncio.get_running_loop()
        super().__enter__()

    def _scoped(self) -> Block | None:
        block = super()._scoped()
        return None if block is self.root else block  # a thread's block may be inside

    def connect(self) -> None:
        """Have a connection, for native code: the waiting thread makes it."""
        bridge.wait_for(bridge.running(), sync_to_async(self._connect)())

    def _connect(self) -> None:
        with scopes.unscoped():
            self.wrapper.ensure_connection()

    def abandon(self, name: str) -> None:
        """The cursor is closed when the loan ends."""
        self._dropped.append(name)

    def end(self) -> None:
        """The coroutine has ended; statements and blocks that it left running are waited for.

        Raises:
            TransactionManagementError: such a block does not end; the connection is closed.
        """
        try:
            self.case_lock.acquire_thread()
        except TransactionManagementError:
            self._loan.force_end()
            raise
        finally:
            self._loan.end()
            self.part()
            self.case_lock.release()
        conn = self.wrapper.connection
        for name in self._dropped if conn is not None else ():
            with suppress(psycopg.Error), conn.cursor() as cursor:
                # One that is gone with its savepoint would fail the caller's transaction.
                cursor.execute("SELECT 1 FROM pg_cursors WHERE name = %s", [name])
                if cursor.rowcount:
                    cursor.execute(sql.SQL("CLOSE {}").format(sql.Identifier(name)))


@contextmanager
def lending() -> Iterator[None]:
    """Synchronous code waits for a coroutine inside: what that would miss is lent to it."""
    if bridge.loop_runs():  # asgiref refuses to wait
        between.refuse_gevent()
        yield
        return
    with ExitStack() as stack:
        if wrappers := list(_lenders()):
            # Whatever scopes the coroutine leaves behind, asgiref brings them back to this thread.
            stack.enter_context(scopes.unscoped(scopes.outer()))
        for wrapper in wrappers:
            stack.callback(LentSession(wrapper).end)
        stack.enter_context(between.exchanging())
        yield


def _lenders() -> Iterator[Any]:
    """Wrappers of this thread that have something, and are not lent already."""
    local = connections._connections.local  # type: ignore[attr-defined]
    for alias in connections.settings:
        wrapper: Any = getattr(local, alias, None)
        if (
            getattr(wrapper, "native_class", None) is not None
            and wrapper.session is None
            and wrapper.has_state
        ):
            yield wrapper
