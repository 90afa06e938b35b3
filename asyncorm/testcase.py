"""Native code inside a test's transaction: it runs on the test's own server session.

Django's TestCase, and with it pytest-django's `db`, opens a transaction on a synchronous connection
and rolls it back at the end. While that transaction is open, native code uses the same connection
instead of a pool's, whichever loop or thread it runs in: what either side writes the other sees,
and all of it is rolled back. Statements of concurrent tasks take turns then, as in any transaction
block; tests that need real parallelism use TransactionTestCase, or `transaction=True`.

One lock guards the connection across threads. A statement holds it while it runs; an outermost
block, be it native or a synchronous `transaction.atomic()` in a thread, holds it for its life, so
that savepoints of tasks and of threads nest properly.

`transactions.enter()` calls `begin()` when Django marks a transaction as a test case's
(`Atomic._from_testcase`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any

import anyio
import psycopg
from asgiref.sync import async_to_sync
from django.db import InterfaceError, connections
from django.db.transaction import TransactionManagementError
from greenlet import getcurrent
from psycopg.pq import TransactionStatus

from . import bridge, conf, driver, sessions
from .bridge import Runner
from .sessions import Block, PlainBlock, Session

_ACTIVE = TransactionStatus.ACTIVE
_CANCEL_TIMEOUT = 2.0


class _Lock:
    """The lock of the case's transaction, shared by tasks and threads, first come first served.

    Tasks use it as any block's lock (`acquire_nowait()`, `acquire()`, `release()`, `value`) and
    wait without blocking their loop. A thread may take it again while it holds it.
    """

    def __init__(self, session: TestSession) -> None:
        self._session = session
        self._mutex = threading.Lock()
        self._holder: int | None = None  # the thread that took it, for itself or for a task
        self._depth = 0  # how often a thread took it for itself
        self._lent = 0  # to synchronous code, while the holder's loop is not running
        self._waiting: deque[tuple[Callable[[], None], int, int]] = deque()

    def _take(self, wake: Callable[[], None] | None, depth: int) -> bool:
        thread = threading.get_ident()
        with self._mutex:
            if self._holder is None:
                self._holder, self._depth = thread, depth
                return True
            if depth and self._depth and self._holder == thread:
                self._depth += 1
                return True
            if depth and self._holder == thread:
                if self._session.root is None:  # the loop is not running: between two tests
                    self._session.stop_statement()
                    self._lent += 1
                    return True
                raise InterfaceError(
                    "Synchronous code used the test's connection on the event loop's thread "
                    "while a native statement or block has it."
                )
            if wake is not None:
                self._waiting.append((wake, thread, depth))
            return False

    def _give_up(self, wake: Callable[[], None]) -> None:
        with self._mutex:
            for entry in self._waiting:
                if entry[0] is wake:
                    self._waiting.remove(entry)
                    return
        self.release()  # it was handed over meanwhile

    @property
    def value(self) -> int:
        """1 when it is free, as a semaphore's."""
        return int(self._holder is None)

    def acquire_nowait(self) -> None:
        """Take it for a task, if it is free."""
        if not self._take(None, 0):
            raise anyio.WouldBlock

    async def acquire(self) -> None:
        """Take it for a task, in turn."""
        loop = asyncio.get_running_loop()
        turn = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(turn.set)

        if not self._take(wake, 0):
            try:
                await turn.wait()
            except BaseException:
                self._give_up(wake)
                raise

    def acquire_thread(self) -> None:
        """Take it for synchronous code of this thread, in turn."""
        turn = threading.Event()
        wake = turn.set
        if self._take(wake, 1):
            return
        timeout = conf.get("LOCK_TIMEOUT")
        while not turn.wait(timeout):
            session = self._session
            if monotonic() - session.active >= timeout and not session.waits_for_server:
                self._give_up(wake)
                raise TransactionManagementError(
                    f"A thread waited {timeout:g} s for the test's connection: a native block has "
                    "it and does nothing. Probably that block waits for this thread."
                )

    def release(self) -> None:
        """Give it back, to the one who has waited longest."""
        with self._mutex:
            if self._lent and self._holder == threading.get_ident() and self._session.root is None:
                self._lent -= 1
                return
            if self._depth > 1:
                self._depth -= 1
                return
            while self._waiting:
                wake, self._holder, self._depth = self._waiting.popleft()
                try:
                    wake()
                    return
                except RuntimeError:  # its loop is closed
                    continue
            self._holder, self._depth = None, 0


class _CaseBlock(PlainBlock):
    """A block that synchronous code entered, whose rollback flag is also that of synchronous code.

    It is the test case's transaction, or, as a child of that, a thread's `transaction.atomic()`:
    native code that the thread calls by async_to_sync() belongs to it.
    """

    def __init__(self, session: TestSession, parent: Block | None, origin: str) -> None:
        super().__init__(session, parent, origin)
        self.entered = 0  # by how many nested atomic() of a thread
        if parent is None:
            self.lock = session.case_lock  # type: ignore[assignment]

    @property
    def of_test_case(self) -> bool:  # type: ignore[override]
        return self.parent is None


# The blocks that synchronous code around this has entered, by alias.
_thread_blocks: ContextVar[dict[str, _CaseBlock]] = ContextVar("asyncorm_thread_blocks", default={})  # noqa: B039


class TestSession(Session):
    """The session of a test case: Django's own wrapper, shared by all tasks and threads."""

    def __init__(self, alias: str, wrapper: Any) -> None:
        self.alias = alias
        self.wrapper = wrapper
        self.pinned = True
        self.keeper = None
        self.origin = "the test case"
        self.holder = self.acting = self._held = None
        self.active = 0.0
        self._depth = 0
        self.case_lock = _Lock(self)
        self._base: Block | None = None
        self._loop: Any = None
        self._conn = conn = wrapper.connection
        self._lock, conn.lock = conn.lock, self
        handlers = conn.pgconn.notice_handler, conn.pgconn.notify_handler
        # The same server session once more, for its way of waiting.
        self._native = driver.Connection.over(conn.pgconn, {})
        conn.pgconn.notice_handler, conn.pgconn.notify_handler = handlers
        conn.wait = self._wait
        wrapper.session = self
        wrapper.execute_wrappers.extend(sessions.everywhere)
        wrapper.inc_thread_sharing()

    def end(self) -> None:
        """Give the connection back to synchronous code alone.

        Tasks that the test left running cannot use it any more, nor get into the next test.
        """
        self.stop_statement()
        self.over = True
        block = self._base
        while block is not None:
            block.ended = True
            inner, block.inner = block.inner, None
            if inner is not None:
                block.lock.release()
            block = inner
        # Django pops the last of these: what is left open goes with the outermost, which is left.
        del self.wrapper.atomic_blocks[1:]
        self.wrapper.savepoint_ids.clear()
        self.wrapper.session = None
        for everywhere in sessions.everywhere:
            self.wrapper.execute_wrappers.remove(everywhere)
        self.wrapper.dec_thread_sharing()
        self._conn.lock = self._lock
        del self._conn.wait

    def _wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        # psycopg's Connection.wait(), in native code as well as in synchronous code.
        if bridge.in_native_code():
            return self._native.wait(gen)
        return type(self._conn).wait(self._conn, gen, *args, **kwargs)

    def terminate(self) -> None:
        """Close the connection at once; the transaction is lost, as at the test's end."""
        if not self.over:
            self._native.terminate()

    async def interrupt(self) -> None:
        await self._native.interrupt()

    def stop_statement(self) -> None:
        """Cancel a native statement whose loop does not run, and close the connection."""
        if self._native.waiting:
            with suppress(psycopg.Error):  # or the server would go on, and keep its locks
                self._conn.cancel_safe(timeout=_CANCEL_TIMEOUT)
            self.terminate()

    @property
    def waits_for_server(self) -> bool:
        return self._native.waiting or self._conn.pgconn.transaction_status == _ACTIVE

    @property
    def on_this_loop(self) -> bool:
        return True  # tasks of all loops share it

    @property
    def loop(self) -> Any:
        return self._loop

    @property
    def is_lost(self) -> bool:
        return self.over

    @property
    def root(self) -> Block | None:  # type: ignore[override]
        """The test case's transaction, as the block that operations outside any other are in."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        if self._base is None or self._loop is not loop:
            self._base = _CaseBlock(self, None, self.origin)
            self._loop = loop
        return self._base

    def innermost(self) -> Block | None:
        if self.acting is not None and self.holder is getcurrent():
            return self.acting
        scope = sessions.find_scope(self.alias, detached=False)
        if scope is not None and scope.session is self:
            return scope.block
        block = _thread_blocks.get().get(self.alias)
        return block if block is not None and not block.ended else self.root

    def hook(self, callback: Callable[[], Any]) -> Callable[[], Any]:
        """captureOnCommitCallbacks() calls it in a synchronous way: have what it returns awaited.

        On a running loop as a task.
        """

        @functools.wraps(callback)
        def call() -> Any:
            result = callback()
            if not inspect.isawaitable(result):
                return None
            if bridge.in_native_code():
                bridge.await_(result)
            elif self.root is not None:
                task = asyncio.ensure_future(result)
                _tasks.add(task)
                task.add_done_callback(_tasks.discard)
                return task
            else:
                async_to_sync(_wait_for)(result)
            return None

        return call

    def serves(self, runner: Runner | None) -> bool:
        return runner is not None or self.root is None  # also synchronous code, off the loop

    def abandon(self, name: str) -> None:
        """The cursor ends with the test's transaction."""

    def release(self) -> None:
        """The session ends with the test case."""

    def __enter__(self) -> None:
        if bridge.in_native_code():
            super().__enter__()
        else:
            self.case_lock.acquire_thread()

    def __exit__(self, *exc: Any) -> None:
        if bridge.in_native_code():
            super().__exit__(*exc)
        else:
            self.active = monotonic()
            self.case_lock.release()

    def __del__(self) -> None:
        pass


_tasks: set[Any] = set()


async def _wait_for(awaitable: Any) -> None:
    await awaitable


def begin(alias: str) -> None:
    """A test case's transaction was entered: native code runs in the outermost one from now on."""
    wrapper = connections[alias]
    if (
        alias not in sessions.test_sessions
        and sessions.native_class(alias) is not None
        and isinstance(wrapper.connection, psycopg.Connection)
    ):
        sessions.test_sessions[alias] = TestSession(alias, wrapper)


def end(alias: str) -> None:
    """The outermost transaction of the test case was left."""
    session = sessions.test_sessions.pop(alias, None)
    if session is not None:
        session.end()


def enter_thread(alias: str) -> None:
    """Synchronous code is about to enter a `transaction.atomic()` inside a test's transaction."""
    session = sessions.test_sessions.get(alias)
    if session is None or connections[alias] is not session.wrapper:
        return
    session.case_lock.acquire_thread()
    blocks = _thread_blocks.get()
    if alias not in blocks or blocks[alias].ended:
        block = _CaseBlock(session, _CaseBlock(session, None, session.origin), sessions.caller())
        blocks = {**blocks, alias: block}
        _thread_blocks.set(blocks)
    blocks[alias].entered += 1


def leave_thread(alias: str) -> None:
    """It was left, or could not be entered."""
    session = sessions.test_sessions.get(alias)
    block = _thread_blocks.get().get(alias)
    if session is None or block is None or connections[alias] is not session.wrapper:
        return
    block.entered -= 1
    block.ended = not block.entered
    session.case_lock.release()
